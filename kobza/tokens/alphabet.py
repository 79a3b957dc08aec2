"""Generation in one alphabet: which tokens may come next so that the text holds only allowed characters, each of them whole.

`parse` turns "Cyrillic", "uk" or "[abc]" into a set of characters. `Alphabet` answers, for the bytes of a character still
unfinished at the end of a row (mostly none) and the tokens still to come, which ids keep the text inside the set: those whose
bytes, after the unfinished ones, spell allowed characters and then at most the beginning of one that the tokens left can
finish. An answer depends on these two alone, so it is computed once and kept: a step costs one masked_fill. Every tokenizer
goes the same way, by `Tokenizer.pieces`; kobza.generate's `forbid` applies the answer and knows no text.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

import numpy as np
import regex
import torch
from torch import Tensor

from kobza.config import SampleConfig, nearest, require
from kobza.generate import Processor, forbid
from kobza.tokenizer import Tokenizer
from kobza.tokens.scripts import SCRIPTS

LATIN = "abcdefghijklmnopqrstuvwxyz"
LANGUAGES = {  # the letters of a language, lower case; the capitals are added
    "be": "абвгдеёжзійклмнопрстуўфхцчшыьэюяʼ",
    "bg": "абвгдежзийклмнопрстуфхцчшщъьюя",
    "cs": LATIN + "áčďéěíňóřšťúůýž",
    "de": LATIN + "äöüßẞ",
    "el": "αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊϋΐΰ",
    "en": LATIN,
    "es": LATIN + "áéíñóúü",
    "fr": LATIN + "àâæçéèêëîïôœùûüÿ",
    "it": LATIN + "àèéìíîòóùú",
    "pl": LATIN + "ąćęłńóśźż",
    "pt": LATIN + "áâãàçéêíóôõúü",
    "ru": "абвгдеёжзийклмнопрстуфхцчшщъыьэюя",
    "sr": "абвгдђежзијклљмнњопрстћуфхцчџш",
    "uk": "абвгґдеєжзиіїйклмнопрстуфхцчшщьюяʼ",
}
# always allowed: space, line end, tab, the rest of ASCII but its letters, and punctuation of no script in particular (« – …);
# its wide forms ( 「 ， ) only beside a script that is written with them
SHARED = r"[\ \n\t]|[\x21-\x7e--[A-Za-z]]|[\p{scx=Common}&&\p{P}--[\u2E80-\uFFFF]]"
WIDE = r"\u3000|[\p{scx=Common}&&\p{P}&&[\u3000-\uFFFF]]"
WIDE_SCRIPTS = {"Bopomofo", "Hangul", "Han", "Hiragana", "Katakana", "Yi"}
WORD = regex.compile(r"""\s*(?:"(?P<a>[^"]+)"|'(?P<b>[^']+)'|\[(?P<c>[^\]]+)\]|(?P<name>[^,"'\[\]]+))\s*(?:,|$)""")
NEVER = 99  # steps that finish a character which no token finishes


# ---- what is allowed -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def shared() -> frozenset[str]:
    """The characters that are always allowed."""
    return frozenset(regex.findall(SHARED, _all_characters(), flags=regex.V1))


def parse(spec: str) -> frozenset[str]:
    """The characters that --alphabet asks for: scripts by name, languages by code, and characters themselves in brackets or
    quotes, joined by commas: 'Cyrillic', 'uk,en', 'Greek,[+∞]'."""
    letters, patterns, at = set(), [], 0
    require(bool(spec.strip()), "--alphabet is empty; name a script (Cyrillic), a language (uk) or characters ([abc])")
    while at < len(spec):
        word = WORD.match(spec, at)
        require(word is not None, f"--alphabet {spec!r} is not a list: {spec[at:]!r}; write as in: Cyrillic,en,[№€]")
        at = word.end()
        name = (word["name"] or "").strip()
        if word["name"] is None:
            letters.update(word["a"] or word["b"] or word["c"])
        elif name in LANGUAGES:
            capitals = (letter.upper() for letter in LANGUAGES[name])
            letters.update(LANGUAGES[name], (c for c in capitals if len(c) == 1))  # not the SS of ß
        else:
            script = find_script(name)
            patterns += [rf"\p{{scx={script}}}"] + [WIDE] * (script in WIDE_SCRIPTS)
    if patterns:
        letters.update(regex.findall("|".join(patterns), _all_characters(), flags=regex.V1))
    return frozenset(letters)


def find_script(name: str) -> str:
    """A script's name as Unicode writes it: find_script("old italic") -> "Old_Italic"."""
    known = {script.lower(): script for script in SCRIPTS}
    plain = name.lower().replace(" ", "_")
    hint = nearest(name.capitalize(), SCRIPTS) if len(name) > 3 else ""
    hint = hint if hint.startswith("; did") else f"; languages: {', '.join(LANGUAGES)}; scripts: Cyrillic, Latin, ..."
    require(plain in known, f"--alphabet: no script or language {name!r}{hint}; characters stand in brackets: [{name}]")
    return known[plain]


@lru_cache(maxsize=1)
def _all_characters() -> str:
    return "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))  # all but surrogates


# ---- which tokens keep a text within it ----------------------------------------------------------------------------


def cut(piece: bytes) -> tuple[bytes, str | None, bytes]:
    """A token's bytes -> what ends a character begun before, whole characters (None: not UTF-8), what begins one.

    cut("її".encode()[1:3]) -> (b"\\x97", "", b"\\xd1")
    """
    n_head = next((i for i, byte in enumerate(piece) if byte & 0xC0 != 0x80), len(piece))
    head, rest = piece[:n_head], piece[n_head:]
    n_tail = unfinished(rest)
    try:
        return head, rest[: len(rest) - n_tail].decode("utf-8"), rest[len(rest) - n_tail :]
    except UnicodeDecodeError:
        return head, None, b""


def unfinished(text: bytes) -> int:
    """How many bytes at the end are the beginning of a character: unfinished(b"a\\xd1") -> 1, unfinished(b"a") -> 0."""
    for n in (1, 2, 3):
        if n <= len(text) and text[-n] & 0xC0 != 0x80:
            lead = text[-n]
            return n if n < 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0) else 0
    return 0


class Alphabet:
    """The tokens of one tokenizer that may stand in a text of the allowed characters.

    A token is cut once into head, whole characters and tail; arrays over the vocabulary then answer any state.
    """

    def __init__(self, spec: str, tokenizer: Tokenizer):
        asked = parse(spec)
        characters = asked | shared()
        self.pieces, self.ends = tokenizer.pieces, list(tokenizer.ends)
        self.whole = {character.encode("utf-8") for character in characters}
        self.beginnings = {one[:n] for one in self.whole for n in range(1, len(one))}
        heads: dict[bytes, int] = {b"": 0}  # each distinct head and tail -> its number
        tails: dict[bytes, int] = {b"": 0}
        V = len(self.pieces)
        self.head, self.tail = np.zeros(V, np.int64), np.zeros(V, np.int64)
        self.good = np.zeros(V, bool)  # nothing but what is allowed, and beginnings of it
        self.bare = np.zeros(V, bool)  # a head and no more
        asks = np.zeros(V, bool)  # of it something asked for
        begun = {character.encode("utf-8")[:n] for character in asked for n in (1, 2, 3)}
        for i, piece in enumerate(self.pieces):
            head, text, tail = cut(piece)
            fits = text is not None and characters.issuperset(text) and (not tail or tail in self.beginnings)
            self.good[i] = bool(piece) and fits
            asks[i] = fits and (not asked.isdisjoint(text or "") or tail in begun)
            self.bare[i] = bool(head) and not text and not tail
            self.head[i], self.tail[i] = heads.setdefault(head, len(heads)), tails.setdefault(tail, len(tails))
        self.heads, self.tails = list(heads), list(tails)
        self.steps = self._steps_to_finish()
        self.tail_steps = np.array([self.steps.get(tail, NEVER) for tail in self.tails])[self.tail]  # (V,)
        self.most = 1 + max(n for n in self.steps.values() if n < NEVER)  # more tokens left than this change nothing
        self._masks: dict[tuple[bytes, int], Tensor] = {}
        some = self._allowed(b"", 1).any() and (self._allowed(b"", NEVER) & asks).any()
        require(
            bool(some),
            f"--alphabet {spec}: none of the {V:,} tokens is written in it; take one that the model's text was written in",
        )

    def _steps_to_finish(self) -> dict[bytes, int]:
        """Unfinished bytes -> the fewest tokens after which no character is unfinished; {b"": 0, b"\\xd1": 1, ...}."""
        leads_to: dict[bytes, set[bytes]] = defaultdict(set)  # head -> the tails of good tokens that begin with it
        for h, t in {(int(h), int(t)) for h, t in zip(self.head[self.good], self.tail[self.good], strict=True)}:
            leads_to[self.heads[h]].add(self.tails[t])
        bare = {self.heads[h] for h in set(self.head[self.bare].tolist())}
        after: dict[bytes, set[bytes]] = {}  # state -> the states one token later
        found = [tail for tail in leads_to[b""] if tail]
        for state in found:  # grows as it is read
            if state in after:
                continue
            after[state] = set()
            for head in self.heads[1:]:
                if state + head in self.whole:
                    after[state] |= leads_to[head]
                elif head in bare and state + head in self.beginnings:
                    after[state].add(state + head)
            found += after[state]
        steps = {state: NEVER for state in after} | {b"": 0}
        for _ in range(8):  # a character has four bytes; a longer detour finishes none sooner
            steps |= {state: min([NEVER, *(1 + steps[s] for s in nexts)]) for state, nexts in after.items() if state}
        return steps

    def _allowed(self, state: bytes, left: int) -> np.ndarray:
        """(V,) bool: the tokens that may follow `state` as one of `left` tokens to come."""
        in_time = self.good & (self.tail_steps < left)
        if not state:
            return in_time & (self.head == 0)
        ends = np.array([state + head in self.whole for head in self.heads])
        goes_on = np.array([self.steps.get(state + head, NEVER) < left for head in self.heads])
        ends[0] = goes_on[0] = False
        return (ends[self.head] & in_time) | ((goes_on & ~ends)[self.head] & self.bare)

    def forbidden(self, state: bytes, left: int, device: torch.device) -> Tensor:
        """(V,) bool on the device: the tokens that may not follow `state`. A text ends only where no character is open."""
        key = (state, min(left, self.most))
        if key not in self._masks:
            allowed = self._allowed(*key)
            allowed[self.ends] = not state
            self._masks[key] = torch.from_numpy(~allowed).to(device)
        return self._masks[key]

    def open_bytes(self, ids: list[int]) -> bytes:
        """The bytes of a character still unfinished after the ids: each holds at least one of at most three."""
        text = b"".join(self.pieces[i] for i in ids[-3:])
        return text[len(text) - unfinished(text) :]


@lru_cache(maxsize=1)
def alphabet_of(spec: str, tokenizer: Tokenizer) -> Alphabet:
    """The Alphabet, kept from one answer of a chat to the next."""
    return Alphabet(spec, tokenizer)


def restrict(config: SampleConfig, tokenizer: Tokenizer, n_prompt: int, device: torch.device) -> list[Processor]:
    """The processors that config.alphabet asks for: none, or one for rows whose prompts have n_prompt tokens."""
    if not config.alphabet:
        return []
    alphabet = alphabet_of(config.alphabet, tokenizer)

    def of_row(row: list[int]) -> Tensor:
        new = row[n_prompt:]
        return alphabet.forbidden(alphabet.open_bytes(new), config.tokens - len(new), device)

    return [forbid(of_row)]

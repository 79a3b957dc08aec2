"""Does the pre-tokenizer that a GGUF file names cut text where the folder's tokenizer.json cuts it?

A byte-level BPE merges inside pieces only. The file has a name for its regexes, tokenizer.json the regexes: both are put to a few
texts. Other pieces are no proof: a vocabulary trained on single digits has no merge that would join them, however they are cut.
The first text that becomes other tokens is the counter-example. Names and forms that are not known here are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import regex

from kobza.doctor.files.gguf_header import GgufSubject, f2
from kobza.doctor.finding import Check, Finding, Skip
from kobza.formats.splits import GPT2, WHOLE
from kobza.formats.splits import SPLITS as PRE
from kobza.tokenizer import byte_of_symbol

TEXTS = (
    "In 1234567 of 2024",
    "It's DON'T we'LL",
    "a  b\n\n  c\r\nd",
    "foo_bar(x)==y1;",
    "HTTPServer v2.10",
    "x\t\ty",
    "Привіт, світе! М'яч №5",
    "日本語テスト123 café",
    "...!!! ---\n",
    "x² + ½ = Ⅷ",
    "уся ніч\n\nдень 1234567",
)
LONGEST = 2000  # characters of a regex; released ones have some 300
SECONDS = 0.5


def pieces(text: str, steps: tuple[str, ...]) -> list[str]:
    """The text cut by each regex in turn: its matches and what is between them. Skip where a regex does not come to an end."""
    found = [text]
    for step in steps:
        try:
            pattern, cut = regex.compile(step), []
            for piece in found:
                at = 0
                for match in pattern.finditer(piece, timeout=SECONDS):
                    cut += [piece[at : match.start()], match[0]]
                    at = match.end()
                cut.append(piece[at:])
        except (regex.error, TimeoutError, MemoryError, RecursionError, OverflowError) as error:
            raise Skip(f"tokenizer.json: a regex of its pre_tokenizer cannot be followed: {error}") from None
        found = [piece for piece in cut if piece]
    return found


def steps_of(part: Any) -> tuple[str, ...]:
    """The regexes of a pre_tokenizer of tokenizer.json; Skip for a form that is none."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "Sequence" and isinstance(part.get("pretokenizers"), list) and len(part["pretokenizers"]) < 20:
        if any(isinstance(step, dict) and step.get("type") == "Sequence" for step in part["pretokenizers"]):
            raise Skip("tokenizer.json: sequences in its pre_tokenizer's sequence are not followed here")
        return tuple(one for step in part["pretokenizers"] for one in steps_of(step))
    if kind == "ByteLevel":
        return (GPT2,) if part.get("use_regex", True) is True else ()
    if kind == "Digits":
        return (r"\p{N}",) if part.get("individual_digits") is True else (r"\p{N}+",)
    pattern = part.get("pattern") if kind == "Split" else None
    given = pattern.get("Regex") if isinstance(pattern, dict) else None
    plain = kind == "Split" and part.get("invert", False) is False and part.get("behavior") == "Isolated"
    if plain and isinstance(given, str) and len(given) <= LONGEST:
        return (given,)
    raise Skip(f"tokenizer.json: a pre_tokenizer of the form {kind} is not followed here")


class Speller:
    """The tokens of pieces by the merges of a file, as a byte-level BPE makes them."""

    def __init__(self, merges: list[str], known: set[str] | None) -> None:
        """known: the whole vocabulary, if a piece that is a token is taken without merging (ignore_merges, as Llama 3 has it)."""
        self.ranks = {tuple(merge.split(" ", 1)): rank for rank, merge in enumerate(merges)}
        self.known = known or set()
        self.symbols = {byte: symbol for symbol, byte in byte_of_symbol().items()}

    def tokens(self, text: str, steps: tuple[str, ...]) -> list[str]:
        """The tokens of a text that is cut by these regexes."""
        return [token for piece in pieces(text, steps) for token in self.merged(piece)]

    def merged(self, piece: str) -> list[str]:
        word = [self.symbols[byte] for byte in piece.encode()]
        if "".join(word) in self.known:
            return ["".join(word)]
        while pairs := [pair for pair in zip(word, word[1:], strict=False) if pair in self.ranks]:
            best, out = min(pairs, key=self.ranks.__getitem__), []
            for symbol in word:
                if out and not isinstance(out[-1], tuple) and (out[-1], symbol) == best:
                    out[-1] = (out[-1], symbol)  # joined in this round: it takes no third
                else:
                    out.append(symbol)
            word = ["".join(part) for part in out]
        return word


def same_pieces(s: GgufSubject) -> Iterator[Finding]:
    """By the named pre-tokenizer a text becomes the tokens that it becomes by the folder's."""
    name, merges = s.get("pre"), s.get("merges")
    if s.get("model") != "gpt2" or name not in PRE or not merges:
        raise Skip(f"the regexes of pre-tokenizer {name!r} are not known here, or the file has no merges")
    theirs = steps_of(s.tokenizer.get("pre_tokenizer"))
    speller = Speller(merges, set(s.tokens) if name in WHOLE else None)
    for text in TEXTS:
        wanted, got = speller.tokens(text, theirs), speller.tokens(text, PRE[name])
        if wanted != got:
            proof = f"{text!r} becomes {wanted} by tokenizer.json and {got} by {name}"
            fits = [n for n, steps in PRE.items() if all(pieces(t, theirs) == pieces(t, steps) for t in TEXTS)]
            fix = (
                f"set tokenizer.ggml.pre to {fits[0]}"
                if fits
                else "convert again with a converter that knows this tokenizer"
            )
            why = "text becomes other ids than in training, mostly numbers and contractions: worse answers, no error"
            at = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), 0)
            yield f2("pre", str(wanted[at : at + 4]), f"{got[at : at + 4]} ({name})", why, fix, proof)
            return


PRE_CHECKS = (Check("F2", "the named pre-tokenizer makes the folder's tokens", same_pieces),)

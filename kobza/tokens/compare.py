"""One text under several tokenizers, side by side.

`Split` is a text cut by one tokenizer: ids, where each token begins and ends in bytes, and counts. Tokens are shown by what a
reader takes for characters: one that lies in several tokens (a Cyrillic letter in bytes, an emoji with joiners) is shown whole
in each of them with its share, "ї:1/2" and "ї:2/2"; U+FFFD is never shown. `rows` lays several splits side by side, cut where
all of them are.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property, reduce
from typing import Any

import numpy as np

from kobza.tokenizer import Tokenizer
from kobza.tokens.scripts import clusters, piece_script

VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
ESCAPED_MARKS = "\u200b\u200c\u200d\u2060\ufe0e\ufe0f\ufeff"  # invisible when they stand alone


class Split:
    """A text cut by a tokenizer.

    ids (n,), start and end (n,): the bytes of each token in `raw`, which is the text as the tokens spell it; `lossless` where
    that is the text itself. border (m + 1,): the bytes at which a reader's characters begin, and the end.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, text: str):
        self.name, self.tokenizer = name, tokenizer
        ids = np.asarray(tokenizer.encode(text))
        pieces = [tokenizer.pieces[i] for i in ids]
        if pieces:
            pieces[0] = pieces[0].removeprefix(tokenizer.prefix)  # of its own accord, not the text's
        self.ids, self.pieces = ids, pieces
        self.end = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        self.start = self.end - [len(piece) for piece in pieces]
        self.raw = b"".join(pieces)
        self.lossless = self.raw == text.encode("utf-8", errors="replace")
        spelled = self.raw.decode("utf-8", errors="replace") if not self.lossless else text
        self.characters = clusters(spelled)
        sizes = [len(character.encode("utf-8", errors="replace")) for character in self.characters]
        self.border = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    @cached_property
    def first(self) -> np.ndarray:
        """(m,) the token in which each character begins."""
        return np.searchsorted(self.end, self.border[:-1], side="right")

    @cached_property
    def last(self) -> np.ndarray:
        """(m,) the token in which each character ends."""
        return np.searchsorted(self.end, self.border[1:] - 1, side="right")

    @property
    def n_split(self) -> int:
        """Characters that lie in several tokens."""
        return int((self.first != self.last).sum())

    @cached_property
    def scripts(self) -> Counter[str]:
        """How many tokens are of each script (kobza.tokens.scripts.piece_script), the commonest first."""
        kinds, counts = np.unique(self.ids, return_counts=True)
        found: Counter[str] = Counter()
        for i, n in zip(kinds, counts, strict=True):
            found[piece_script(self.tokenizer.pieces[i])] += int(n)
        return Counter(dict(found.most_common()))

    def parts(self, token: int) -> list[tuple[str, int, int]]:
        """What a token holds, character by character: (character, its part, of how many tokens)."""
        if self.start[token] == self.end[token]:
            return []  # SentencePiece's space before a text
        begin = int(np.searchsorted(self.border, self.start[token], side="right")) - 1
        stop = int(np.searchsorted(self.border, self.end[token], side="left"))
        return [
            (self.characters[c], token - int(self.first[c]) + 1, int(self.last[c] - self.first[c]) + 1)
            for c in range(begin, stop)
        ]

    def show(self, token: int) -> str:
        """A token for a person: show(0) -> "Реве␣", or "ї:1/2" where it holds the first of a letter's two parts, "a+ї:1/2"
        where a whole one stands before it."""
        segments, whole = [], ""
        for character, part, of in self.parts(token):
            if of == 1:
                whole += visible(character)
                continue
            segments += [whole] * bool(whole) + [f"{visible(character)}:{part}/{of}"]
            whole = ""
        return "+".join(segments + [whole] * bool(whole)) or "(nothing)"

    def show_span(self, span: range) -> str:
        """Neighbouring tokens for a person; a further part of the same character is its share alone: "ї:1/2  2/2"."""
        shown, before = [], None
        for k in span:
            parts = self.parts(k)
            alone = len(parts) == 1 and parts[0][2] > 1
            shown.append(f"{parts[0][1]}/{parts[0][2]}" if alone and parts[0][1] > 1 and before else self.show(k))
            before = (
                bool(parts) and parts[-1][2] > parts[-1][1]
            )  # the next token goes on with this one's last character
        return "  ".join(shown)

    def totals(self) -> dict[str, Any]:
        """The counts over the whole text, for a table or JSON."""
        n = max(1, len(self.ids))
        return {
            "name": self.name,
            "vocab_size": self.tokenizer.vocab_size,
            "tokens": len(self.ids),
            "kinds": len(np.unique(self.ids)),
            "bytes_per_token": len(self.raw) / n,
            "characters_per_token": len(self.characters) / n,
            "split_characters": self.n_split,
            "lossless": self.lossless,
            "scripts": dict(self.scripts),
        }

    def token(self, k: int) -> dict[str, Any]:
        """One token, for JSON: its id, bytes, script, and the characters it holds with their shares."""
        parts = [{"character": c, "part": part, "of": of} for c, part, of in self.parts(k)]
        whole = all(part["of"] == 1 for part in parts)
        text = "".join(part["character"] for part in parts) if whole else None
        script = piece_script(self.pieces[k])
        return {
            "id": int(self.ids[k]),
            "text": text,
            "bytes": self.pieces[k].hex(),
            "script": script,
            "characters": parts,
        }


def rows(splits: list[Split], most: int) -> list[tuple[str, list[range]]]:
    """The first rows of a side-by-side table: a stretch of the text, and which tokens of each split spell it. A row ends where a
    token of every split ends, and a character. All splits must be lossless."""
    ends = [split.end for split in splits]
    cuts = reduce(np.intersect1d, [*ends, splits[0].border])[:most]
    table, before = [], [0] * len(splits)
    start = 0
    for cut in cuts[cuts > 0]:
        after = [int(np.searchsorted(end, cut, side="right")) for end in ends]
        stretch = splits[0].raw[start:cut].decode("utf-8")
        table.append((stretch, [range(a, b) for a, b in zip(before, after, strict=True)]))
        before, start = after, int(cut)
    return table


def visible(character: str) -> str:
    """A character that can be seen on paper: visible(" ") -> "␣", visible("\\x07") -> "\\\\x07"."""
    if character in VISIBLE:
        return VISIBLE[character]
    if character == "\r\n":
        return "␍↵"
    alone = character in ESCAPED_MARKS or not any(c.isprintable() for c in character)
    return repr(character)[1:-1] if alone else character

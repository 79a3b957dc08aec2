"""Ids -> text as it can be shown: whole characters, and nothing that may yet turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from kobza.tokenizer import StreamDecoder, Tokenizer


class StopFinder:
    """Text piece by piece, held back while it may be the beginning of a stop string, and cut where one stands.

    Of several stop strings the one that is whole first cuts, of those whole at the same character the longest: so the cut does
    not depend on how the text came in pieces. StopFinder(["abc", "b"]) cuts "abc" before the "b".
    """

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.found = [s for s in stops if s], "", False

    def feed(self, piece: str) -> str:
        """The text that can be shown now."""
        self.held += piece
        places = [(i + len(stop), i) for stop in self.stops if (i := self.held.find(stop)) >= 0]
        if places:
            self.found, shown = True, self.held[: min(places)[1]]
            self.held = ""
            return shown
        keep = max((n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown


class TextStream:
    """Ids one by one -> the text that can be shown; `found` once a stop string stands, which ends the text before it.

    What feed and flush return is, joined, decode(ids) cut at the first stop string. `continues`: the ids go on from a text, so
    that a space which a tokenizer puts before every text is theirs.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), continues: bool = True):
        self._decoder, self._finder = StreamDecoder(tokenizer, continues), StopFinder(stops)

    @property
    def found(self) -> bool:
        """Whether a stop string stands; nothing is shown after it."""
        return self._finder.found

    def feed(self, i: int) -> str:
        """The text that token i lets be shown; may be empty."""
        return "" if self.found else self._finder.feed(self._decoder.feed(i))

    def flush(self) -> str:
        """What was held back, when no token follows."""
        if self.found:
            return ""
        shown = self._finder.feed(self._decoder.flush())
        if not self.found:
            shown, self._finder.held = shown + self._finder.held, ""
        return shown


def token_bytes(tokenizer: Tokenizer, i: int) -> bytes:
    """The bytes of one token, maybe a part of a character; of a special one those of its name, of an id without a token none."""
    piece = tokenizer.pieces[i]
    return piece or next((name.encode() for name, special in tokenizer.specials.items() if special == i), b"")


def text_offsets(tokenizer: Tokenizer, ids: Sequence[int], start: int = 0) -> list[int]:
    """Where in a text each token begins, in characters from `start` on: at the first character to which it adds.

    Two tokens that share a character begin at the same place. text_offsets(of bytes, ids of "aї!") -> [0, 1, 1, 2]
    """
    stream, offsets, n = StreamDecoder(tokenizer, continues=True), [], start
    for i in ids:
        offsets.append(n)
        n += len(stream.feed(i))
    return offsets

"""What is wrong with the characters of a text: decomposed letters, look-alikes of another script, mojibake, mixed apostrophes.

Ukrainian shows most of it: й and ї fall into two code points under NFD, і looks as Latin i does, and an apostrophe has three
spellings. Each kind is found by a test that its examples pass and clean text does not: decomposition by composing, mojibake by
undoing it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

LOOK_ALIKES = dict(zip("aceiopxysABCEHIKMOPTXYS", "асеіорхуѕАВСЕНІКМОРТХУЅ", strict=True))  # Latin -> Cyrillic
TO_LATIN = {cyrillic: latin for latin, cyrillic in LOOK_ALIKES.items()}
INVISIBLE = {
    "\ufeff": "U+FEFF, a byte order mark inside the text",
    "\u200b": "U+200B, a space of no width",
    "\u2060": "U+2060, a word joiner",
    "\u00ad": "U+00AD, a soft hyphen",
    "\u200e": "U+200E, a direction mark",
}
APOSTROPHES = {"'": "U+0027", "\u2019": "U+2019", "\u02bc": "U+02BC"}
_MARKS = re.compile("[\u0300-\u036f]")
_MIXED = re.compile("[A-Za-z][\u0400-\u04ff]|[\u0400-\u04ff][A-Za-z]")
_WORD = re.compile(r"[^\W\d_]+")
_APOSTROPHE = re.compile("['\u2019\u02bc]")
# Runs that mojibake is made of; each is undone before it is believed.
_AS_LATIN1 = re.compile("[\u00c0-\u00ff]{4,}(?:[ ,.!?-]+[\u00c0-\u00ff]+)*")  # cp1251 read as Latin-1
# UTF-8 read as cp1252 or Latin-1: Ã and what a capital is not followed by, or two such pairs; as cp1251: Р or С and a rare sign
_UTF8_AS = re.compile(
    "\u00c3[\u00a1-\u00aa\u00ac\u00ae-\u00b3\u00b5-\u00ba\u00bc-\u00bf\u0152-\u0192\u02c6\u2020-\u2022\u20ac\u2122]"
    "|\u00e2\u20ac[\u009d\u00a6\u0153\u02dc\u2122\u201c\u201d]"
    "|(?:[\u00c2-\u00f4][\u0080-\u00bf\u0152-\u0192\u02c6\u02dc\u2013-\u2122]{1,3}){2,}"
    "|(?:[\u0420\u0421\u0422][\u00a0-\u00bb\u0401-\u040f\u0451-\u045f\u0490\u0491\u0406\u0456\u2013-\u2122]){2,}"
)

_LATIN = re.compile("[\u00c0-\u00ff]")
_CYRILLIC_PAIRS = (
    "Р°",
    "Рѕ",
    "Рµ",
    "Рё",
    "СЂ",
    "С‚",
    "РЅ",
    "С–",
)  # а о е и р т н і, as UTF-8 read as cp1251 shows them


@dataclass
class Census:
    """Counts of what is doubtful, and a few examples of each in their context."""

    n_characters: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    apostrophes: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, count: int, examples: Iterable[str]) -> None:
        """Add `count` to a kind, and keep three examples."""
        self.counts[kind] += count
        kept = self.examples.setdefault(kind, [])
        for example in examples:
            if len(kept) < 3 and example not in kept:
                kept.append(example)


def count(blocks: Iterable[str]) -> Census:
    """The Census of a text."""
    census = Census()
    for block in blocks:
        census.n_characters += len(block)
        _between_letters(block, census)
        if block.isascii():
            continue
        _decomposed(block, census)
        _look_alikes(block, census)
        _mojibake(block, census)
        for character, name in INVISIBLE.items():
            if n := block.count(character):
                census.note(name, n, [context(block, block.find(character))])
        if n := block.count("\ufffd"):
            census.note("U+FFFD", n, [context(block, block.find("\ufffd"))])
    return census


def _between_letters(block: str, census: Census) -> None:
    """Apostrophes inside words: the same signs are quotation marks elsewhere."""
    for found in _APOSTROPHE.finditer(block):
        place = found.start()
        if block[place - 1 : place].isalpha() and block[place + 1 : place + 2].isalpha():
            census.apostrophes[found.group()] += 1
            kept = census.examples.setdefault(found.group(), [])
            if len(kept) < 2:
                kept.append(context(block, place, 8))


def context(text: str, place: int, width: int = 20) -> str:
    """What stands around a place, in ASCII escapes where it cannot be seen."""
    part = text[max(place - width, 0) : place + width].replace("\n", " ")
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in part)


def _decomposed(block: str, census: Census) -> None:
    """Letters that NFC would put together: и + U+0306 -> й. A stress mark that has no composed form is no fault."""
    if not _MARKS.search(block):
        return
    n, examples = 0, []
    for found in _MARKS.finditer(block):
        place = found.start()
        pair = block[max(place - 1, 0) : place + 1]
        if len(pair) == 2 and len(unicodedata.normalize("NFC", pair)) == 1:
            n += 1
            if len(examples) < 3:
                escaped = "".join(c if ord(c) < 0x300 or ord(c) > 0x36F else f"+U+{ord(c):04X}" for c in pair)
                examples.append(f"{escaped} for {unicodedata.normalize('NFC', pair)} in {context(block, place, 10)!r}")
    if n:
        census.note("decomposed", n, examples)


def _look_alikes(block: str, census: Census) -> None:
    """Words of two scripts that become words of one when look-alikes are exchanged: "кiт" with a Latin i."""
    end = 0
    for found in _MIXED.finditer(block):
        if found.start() < end:
            continue  # the same word
        start = found.start()
        while start > 0 and block[start - 1].isalpha() and found.start() - start < 60:
            start -= 1
        match = _WORD.match(block, start, start + 120)
        assert match is not None
        word, end = match.group(), match.end()
        cyrillic = sum("\u0400" <= c <= "\u04ff" for c in word)
        table, other = (LOOK_ALIKES, "Latin") if 2 * cyrillic >= len(word) else (TO_LATIN, "Cyrillic")
        fixed = "".join(table.get(c, c) for c in word)
        if len({"\u0400" <= c <= "\u04ff" for c in fixed}) == 1 and len(word) > 1:
            odd = [c for c in word if c in table]
            census.note("look-alike", 1, [f"{word!r} has {other} {', '.join(odd)}"])


def _mojibake(block: str, census: Census) -> None:
    if not _LATIN.search(block) and not any(pair in block for pair in _CYRILLIC_PAIRS):
        return  # the long patterns are slow
    for pattern, ways in (
        (_AS_LATIN1, (("latin-1", "cp1251"),)),
        (_UTF8_AS, (("cp1252", "utf-8"), ("latin-1", "utf-8"), ("cp1251", "utf-8"))),
    ):
        for found in pattern.finditer(block):
            for written, meant in ways:
                undone = _undone(found.group(), written, meant)
                if undone:
                    census.note(
                        "mojibake", 1, [f"{found.group()[:40]!r} is {undone[:40]!r} ({meant} read as {written})"]
                    )
                    break


def _undone(text: str, written: str, meant: str) -> str:
    """The text that mojibake was made of, "" where it is none. Latin-1 of cp1251 must become words of small Cyrillic
    letters."""
    try:
        raw = bytes(ord(c) for c in text) if written == "latin-1" else text.encode(written)
        fixed = raw.decode(meant)
    except (UnicodeError, ValueError):
        return ""
    letters = [c for c in fixed if c.isalpha()]
    if meant == "utf-8":
        return fixed if len(fixed) < len(text) and all(c.isprintable() or c in "\n\t" for c in fixed) else ""
    good = len(letters) >= 4 and all("\u0400" <= c <= "\u045f" or c in "ґҐ" for c in letters)
    vowels = sum(c in "аеиоуіїєюяёыэАЕИОУІЇЄЮЯ" for c in letters)
    good = good and 2 * sum(map(str.islower, letters)) > len(letters)  # capitals with accents are a word of their own
    return fixed if good and 0.2 <= vowels / len(letters) <= 0.8 else ""

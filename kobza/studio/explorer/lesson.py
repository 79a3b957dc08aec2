"""A lesson: a form and what it shows. Here are the fields of a form, read without trusting them; room.py serves the pages.

`ask` reads the fields, with a default for each, and `show` makes of them the values of the template explorer/NAME_part.html. The
page explorer/NAME.html holds the form, its fragment the result, so the same address serves a person, a link and a slider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

from kobza.config import InputError, nearest, require
from kobza.pages.shell import printable
from kobza.studio.explorer.sources import Eye
from kobza.tokenizer import Tokenizer

PROMPT = 2_000  # characters of a prompt
MARKS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
STARTS = ("the king and the queen", "Реве та стогне Дніпр широкий")  # prompts, the first that a vocabulary can spell


class Query(Protocol):
    """What was asked, by name; a name may stand several times."""

    def get(self, key: str) -> str | None: ...

    def getlist(self, key: str) -> list[str]: ...


class Asked:
    """The fields of a request: what is no number, too long or out of reach is refused by name."""

    def __init__(self, query: Query | None = None):
        self.query = query

    def given(self, name: str) -> str | None:
        """A field as it came; None where it was left out."""
        return None if self.query is None else self.query.get(name)

    def text(self, name: str, default: str, most: int = PROMPT) -> str:
        """A text of at most so many characters."""
        text = default if self.given(name) is None else str(self.given(name)).replace("\r\n", "\n")
        require(
            len(text) <= most, f"{name} has {len(text):,} characters and this page takes at most {most:,}; shorten it"
        )
        return text

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A finite number in [low, high]."""
        text = self.given(name)
        try:
            value = default if text is None or not text.strip() else float(text[:40])
        except ValueError:
            raise InputError(
                f"{name} is {text[:40]!r}, which is no number; give one from {low:g} to {high:g}"
            ) from None
        good = math.isfinite(value) and low <= value <= high
        require(good, f"{name} is {value:g}; give a number from {low:g} to {high:g}")
        return value

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        value = self.number(name, default, low, high)
        require(value == int(value), f"{name} is {value:g}; give a whole number")
        return int(value)

    def one_of(self, name: str, choices: Sequence[str], default: str) -> str:
        """One of some words."""
        word = default if self.given(name) is None else str(self.given(name))
        require(word in choices, f"{name} is {word[:80]!r}{nearest(word[:80], list(choices))}")
        return word

    def several(self, name: str, most: int) -> list[str]:
        """What was ticked, each once."""
        given = list(dict.fromkeys(self.query.getlist(name))) if self.query is not None else []
        require(len(given) <= most, f"{len(given)} of {name} are chosen and this page shows {most} at once; take fewer")
        return given


Form = SimpleNamespace


@dataclass(frozen=True)
class Lesson:
    """name: of its address and templates. line: what one learns. The paragraph of words stands in the template."""

    name: str
    title: str
    line: str
    ask: Callable[[Eye, Asked], Form]
    show: Callable[[Eye, Form], dict[str, Any]]
    wide: bool = True


def ask_model(eye: Eye, asked: Asked) -> Form:
    """The two fields that most lessons begin with. No model at all: an empty name, which `Eye.open` refuses in words."""
    names = eye.names()
    name = asked.one_of("model", names, names[0]) if names else ""
    return Form(
        models=[(each, each) for each in names], model=name, prompt=asked.text("prompt", default_prompt(eye, name))
    )


def default_prompt(eye: Eye, name: str) -> str:
    """A prompt that the model's vocabulary can spell."""
    if not name:
        return STARTS[0]
    tokenizer = eye.open(name)[1]
    for start in STARTS:
        try:
            if tokenizer.decode(tokenizer.encode(start)) == start:
                return start
        except InputError:
            continue
    return tokenizer.line_start()


def label(tokenizer: Tokenizer, i: int) -> str:
    """A token to be read: "␣cat", "<|endoftext|>", or its bytes where they are no text, or none that can be seen: "D1"."""
    name = next((name for name, special in tokenizer.specials.items() if special == i), None)
    if name is not None:
        return printable(name)
    text = "".join(MARKS.get(c, c) for c in tokenizer.pieces[i].decode("utf-8", errors="replace"))
    seen = text.isprintable() and "\ufffd" not in text
    return (text if seen else tokenizer.pieces[i].hex(" ").upper()) or "(nothing)"


def figure(x: float) -> str:
    """A number to be read: figure(0.123456) -> "0.123", figure(1234567) -> "1.23e+06"."""
    return f"{x:.3g}".replace("-", "−")

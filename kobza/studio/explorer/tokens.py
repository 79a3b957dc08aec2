"""Lesson: a text as tokens, under several tokenizers side by side."""

from __future__ import annotations

from typing import Any

from kobza.config import InputError, nearest, require
from kobza.pages.shell import printable
from kobza.studio.explorer.lesson import Asked, Form, Lesson
from kobza.studio.explorer.sources import Eye

CHARACTERS, TOKENS, AT_ONCE = 2_000, 400, 4
TEXT = "The cat sat. Кіт сидів. 👩‍👩‍👧 12345"
EXAMPLES = (
    ("Ukrainian", "Реве та стогне Дніпр широкий, сердитий вітер завива"),
    ("emoji", "👍 👍🏽 🇺🇦 👩‍👩‍👧"),
    ("numbers", "7 + 35 = 42; 1234567.89"),
    ("code", "def f(x):\n    return x ** 2"),
    ("spaces", "one two  three   four"),
)


def ask(eye: Eye, asked: Asked) -> Form:
    """The text and the tokenizers to cut it."""
    names, text = eye.tokenizer_names(), asked.text("text", TEXT, CHARACTERS)
    likely = [*eye.names()[:1], "bytes", *list(eye.sources.tokenizers)[:2]]
    ticked = asked.several("with", AT_ONCE)
    for name in ticked:
        require(name in names, f"no tokenizer {name[:80]!r}{nearest(name[:80], names)}")
    chosen = ticked or [name for name in likely if spells(eye, name, text)]
    return Form(text=text, names=names, chosen=chosen, examples=EXAMPLES)


def spells(eye: Eye, name: str, text: str) -> bool:
    """Whether a tokenizer has all that a text is written in: an alphabet of characters may not."""
    try:
        eye.tokenizer(name, text).encode(text)
        return True
    except InputError:
        return False


def show(eye: Eye, form: Form) -> dict[str, Any]:
    """A column a tokenizer."""
    size = len(form.text.encode("utf-8", errors="replace"))
    columns = [column(eye, name, form.text) for name in form.chosen]
    most = max((c["totals"]["tokens"] for c in columns if not c["line"]), default=1)
    return {"columns": columns, "size": size, "characters": len(form.text), "most": max(1, most)}


def column(eye: Eye, name: str, text: str) -> dict[str, Any]:
    """A text under one tokenizer, or why it cannot be cut by it."""
    try:
        split = eye.sources.split(name, eye.tokenizer(name, text), text)
    except InputError as error:
        return {"name": printable(name), "line": str(error)}
    chips, cut = [], []
    for k in range(min(TOKENS, len(split.ids))):
        token = split.token(k)
        spelled = " ".join(f"{byte:02X}" for byte in split.pieces[k])
        words = f"id {token['id']} · {len(split.pieces[k])} bytes: {spelled} · {token['script']}"
        chips.append({"text": printable(split.show(k)), "id": token["id"], "say": words, "shade": k % 4})
        cut += [part["character"] for part in token["characters"] if part["of"] > 1]
    cut_characters = [printable(character) for character in dict.fromkeys(cut)][:12]
    return {"name": printable(name), "line": "", "totals": split.totals(), "chips": chips, "cut": cut_characters}


LESSON = Lesson(
    "tokens",
    "Tokens",
    "a text is cut into pieces, and each piece is a number",
    ask,
    show,
)

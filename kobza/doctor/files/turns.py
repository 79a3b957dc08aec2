"""What a chat template does, learnt from what it writes: marked conversations in, the text around each turn out.

Nothing is known of any family. The contents are marked so that they can be found again in the rendered text; what stands
between them is the template's own. Laws about it are template.py's.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
SYSTEM = "zqs rules for zqs."
# What a control token looks like. A pattern, since a file of a template alone tells no list.
CONTROL = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|<｜[^<>｜]{1,40}｜>|</?s>|<(?:bos|eos|pad|start_of_turn|end_of_turn|end_of_text)>|\[/?INST\]"
)
THOUGHT = re.compile(
    r"<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)\s*|<\|?/?(?:think|thinking|channel)\|?>\s*", re.DOTALL
)
TEXTS = (
    "Hello there",
    "What is 2 + 2 * 3?",
    "Їхав козак за Дунай, сказав: «Дівчино, прощай!»",
    "日本語のテキスト、句読点。",
    "👩‍👩‍👧 family, naïve café, ﬁ ½",
    "def f(x):\n    if x:\n        return [1, 2]\n\treturn {}",
    "One\n\nTwo\r\nThree",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "Tags <b>bold</b> & \"quotes\" 'single' \\n {{ braces }} {% percent %}",
    "### Instruction: none\nUser: I say\nAssistant: you say",
    "https://example.com/?a=1&b=2#c",
    "a",
)
UNTRIMMED = ("  two spaces before, a line after\n", "\n\n\tindented")


def user(i: int) -> str:
    """The i-th marked question."""
    return f"zqu{i}x asks {i}?"


def answer(i: int) -> str:
    """The i-th marked answer."""
    return f"Zqa{i}x says {i}."


def dialogue(n: int, system: str = "", last_answer: bool = True) -> list[Message]:
    """n marked turns: user, assistant, user, ..."""
    messages = [{"role": "system", "content": system}] if system else []
    for i in range(n):
        messages += [{"role": "user", "content": user(i)}, {"role": "assistant", "content": answer(i)}]
    return messages if last_answer else messages[:-1]


def conversations(seed: int, count: int) -> list[list[Message]]:
    """Seeded conversations that end with the user: with and without a system message, of one to four turns, of many kinds of
    text. The first are plain, so that a difference is shown on the simplest that has it."""
    rng = random.Random(seed)
    made = [
        [{"role": "user", "content": "Hello there"}],
        dialogue(2, last_answer=False),
        dialogue(1, SYSTEM, last_answer=False),
    ]
    while len(made) < count:
        pool = TEXTS if len(made) < count - 4 else UNTRIMMED + TEXTS[:2]
        messages = [{"role": "system", "content": rng.choice(pool)}] if rng.random() < 0.4 else []
        for i in range(rng.randint(1, 4)):
            messages += [{"role": "assistant", "content": rng.choice(pool)}] if i else []
            messages += [{"role": "user", "content": rng.choice(pool)}]
        made.append(messages)
    return made[:count]


@dataclass(frozen=True)
class Turns:
    """A rendered dialogue taken apart: `head`, then for each turn its `to_answer` (between question and answer) and its
    `to_question` (between answer and the next question); `tail` is what follows the last answer."""

    text: str
    head: str
    to_answer: list[str]
    to_question: list[str]
    tail: str
    missing: list[str]
    """contents that are not in the text, or not in their order"""
    repeated: list[str]


def take_apart(text: str, n: int) -> Turns:
    """The Turns of the rendered dialogue(n)."""
    contents = [content for i in range(n) for content in (user(i), answer(i))]
    missing, between, place = [], [], 0
    for content in contents:
        found = text.find(content, place)
        if found < 0:
            missing.append(content)
            between.append("")
            continue
        between.append(text[place:found])
        place = found + len(content)
    repeated = [content for content in contents if text.count(content) > 1]
    return Turns(text, between[0], between[1::2], between[2::2], text[place:], missing, repeated)


def chunks(text: str) -> list[str]:
    """A text as control tokens and single characters: chunks("<s>ab") -> ["<s>", "a", "b"]."""
    made, place = [], 0
    for found in CONTROL.finditer(text):
        made += [*text[place : found.start()], found.group()]
        place = found.end()
    return made + list(text[place:])


def rest_after_common(text: str, other: str) -> str:
    """What is left of `text` after the beginning it shares with `other`, control tokens not cut."""
    a, b = chunks(text), chunks(other)
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return "".join(a[n:])


def difference(a: str, b: str, width: int = 40) -> tuple[int, str, str]:
    """The first place at which two texts differ, and what stands around it in each."""
    place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(place - width // 2, 0)
    return place, repr(a[start : place + width]), repr(b[start : place + width])


def shown(text: str, most: int = 120) -> str:
    """A text quoted, its end kept where it is too long: the end is what a model goes on from."""
    return repr(text) if len(text) <= most else "…" + repr(text[-most:])

r"""Rewards that a program can check: (answer, expected) -> float, by name, and weighted sums of them.

make_reward("answer:1,format:0.2")("<think>3 and 4</think> 7", "7") -> 1.2

What an answer finally says (`final`) is what it puts in a \boxed{}, else what stands behind the last ####, else what follows
its </think>, else all of it. Nothing in an answer is executed or evaluated: a number is read digit by digit, of bounded length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from kobza.config import nearest, require

Verifier = Callable[[str, str], float]

DIGITS = 40  # of a number that is read as one; a longer one is compared as text
# the minus of "5-3" is no sign; a fraction's slash and a comma between thousands belong to the number
NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/[1-9]\d*(?!\d|\.\d))?", re.ASCII)
THOUGHT = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>\s*(?!\s)(?:(?!</?think>).)+", re.DOTALL)


def answer(text: str, expected: str) -> float:
    """1 if the answer says what is expected, else 0. Where a number is expected the last one said counts, by its value ("1,250.0"
    says 1250); anything else is compared as text, but for case and white space."""
    wanted, said = number(expected.strip()), final(text)
    if wanted is None:
        return float(plain(said) == plain(final(expected)))
    numbers = NUMBER.findall(said.replace("\u2212", "-"))  # the true minus sign
    return float(bool(numbers) and number(numbers[-1]) == wanted)


def form(text: str, expected: str) -> float:
    r"""1 if the answer keeps one of the usual forms, else 0: one <think>...</think> and an answer after it, one "#### answer" at
    its end, or one \boxed{answer}."""
    boxed = boxes(text)
    said = text.rpartition("####")[2].strip()
    held = len(boxed) == 1 and bool(boxed[0].strip())
    marked = text.count("####") == 1 and bool(said) and "\n" not in said and "#" not in said
    return float(held or marked or THOUGHT.fullmatch(text) is not None)


def contains(text: str, expected: str) -> float:
    """1 if the expected words stand anywhere in the answer as whole words, but for case and white space, else 0."""
    words = re.escape(plain(expected))
    return float(re.search(rf"(?<!\w){words}(?!\w)", plain(text)) is not None)


def length(text: str, expected: str) -> float:
    """1 up to as many characters as the expected answer has, then falling as 1 / characters; 0 for silence."""
    return min(1.0, len(expected.strip()) / max(1, len(text.strip()))) if text.strip() else 0.0


REWARDS: dict[str, Verifier] = {"answer": answer, "format": form, "contains": contains, "length": length}
BLIND = {"format"}  # these judge an answer without knowing what was expected


# ---- what an answer says -------------------------------------------------------------------------------------------


def final(text: str) -> str:
    r"""What an answer comes to. final("so 3 + 4 is #### 7") -> "7" """
    boxed = boxes(text)
    if boxed:
        return boxed[-1].strip()
    return text.rpartition("####")[2].rpartition("</think>")[2].strip()


def boxes(text: str) -> list[str]:
    r"""What stands in each \boxed{...}, braces within it paired. boxes(r"\boxed{\frac{1}{2}}") -> [r"\frac{1}{2}"]"""
    found, after = [], text.split(r"\boxed{")[1:]
    for part in after:
        depth = 1
        for i, character in enumerate(part):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                found.append(part[:i])
                break
    return found


def number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else. number("-1,250.50") -> Fraction(-2501, 2)"""
    match = NUMBER.fullmatch(text.replace("\u2212", "-"))
    if match is None or len(text) > DIGITS:
        return None
    above, _, below = match[0].replace(",", "").partition("/")
    return Fraction(above) / int(below or 1)


def plain(text: str) -> str:
    """A text in lower case with single spaces."""
    return " ".join(text.casefold().split())


# ---- composition ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reward:
    """A weighted sum of verifiers."""

    weights: dict[str, float]

    def __call__(self, text: str, expected: str | None) -> float:
        return self.total(self.parts(text, expected))

    def total(self, parts: dict[str, float]) -> float:
        """The weighted sum."""
        return sum(self.weights[name] * value for name, value in parts.items())

    def parts(self, text: str, expected: str | None) -> dict[str, float]:
        """What each verifier says, before its weight."""
        return {name: REWARDS[name](text, expected or "") for name in self.weights}

    def check(self, expected: str | None, where: str) -> None:
        """Refuse a question without the expected answer that a verifier needs."""
        needing = [name for name in self.weights if name not in BLIND]
        known = not needing or bool(expected and expected.strip())
        require(
            known, f"{where}: no expected answer, which the reward {(needing or [''])[0]!r} compares with; fill it in"
        )


def make_reward(text: str) -> Reward:
    """A Reward from names with commas between, each with a weight (1) after a colon. make_reward("answer,format:0.2")"""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, colon, number_text = (word.strip() for word in part.partition(":"))
        if name not in REWARDS:
            known = ", ".join(REWARDS)
            require(False, f"--reward: there is no reward {name!r}{nearest(name, REWARDS)}; there are {known}")
        require(name not in weights, f"--reward names {name} twice; give it one weight")
        weights[name] = _weight(number_text, name) if colon else 1.0
    return Reward(weights)


def _weight(text: str, name: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    require(
        math.isfinite(weight) and weight != 0, f"--reward: the weight of {name} is {text!r}; give a number other than 0"
    )
    return weight

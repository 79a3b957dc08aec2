"""The nouns of the mutation proof: an injected bug, and a clean control on which nothing may be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Make = Callable[[Path, int, str], Any]
"""make(an empty folder, seed, "fp32" or "bf16") -> the subject that the area's checks take"""


@dataclass(frozen=True)
class Mutation:
    """A subject with one bug, that the check of `code` must find."""

    code: str
    name: str
    make: Make


@dataclass(frozen=True)
class Control:
    """A subject without a bug: any finding on it, of any severity, is a false alarm."""

    name: str
    make: Make

"""The noun of serving: ServeConfig, checked when made. Nothing heavy is imported: `kobza --help` reads this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kobza.config import check_types, require


@dataclass(frozen=True)
class ServeConfig:
    """How a model is served: in which numbers, how much at once, to whom."""

    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """of the weights; int8 is the fastest for one reader on a CPU, bf16 for many"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    cache: float = 0.0
    """GB for keys and values; 0: a share of the memory that is free"""
    running: int = 32
    """texts written at once"""
    queue: int = 256
    """requests that may wait; one more gets 429"""
    chunk: int = 256
    """tokens of prompts taken in a step, beside the texts that are being written"""
    guess: int = 0
    """tokens guessed ahead in a step, by --draft or by --lookup (Leviathan et al. 2023); 0: off, 4 is usual"""
    lookup: bool = False
    """guess what followed the last words where they stood before: quotations, code, summaries"""
    seconds: float = 600.0
    """time limit of a request"""
    max_tokens: int = 0
    """most tokens that one text may have; 0: what the context holds"""
    max_body: float = 4.0
    """MB of a request's body"""
    host: str = "127.0.0.1"
    """address to listen at; any but this machine's own demands a key"""
    port: int = 8000
    """0: a free one"""
    drain: float = 30.0
    """seconds that running texts have to end after SIGTERM"""

    def __post_init__(self) -> None:
        check_types(self, "--")
        for name in ("running", "queue", "chunk"):
            require(getattr(self, name) > 0, f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("cache", "guess", "max_tokens", "drain"):
            require(getattr(self, name) >= 0, f"--{flag(name)} is {getattr(self, name)}; it must be 0 or above")
        for name in ("seconds", "max_body"):
            require(getattr(self, name) > 0, f"--{flag(name)} is {getattr(self, name)}; it must be above 0")


def flag(name: str) -> str:
    """flag("max_body") -> "max-body" """
    return name.replace("_", "-")

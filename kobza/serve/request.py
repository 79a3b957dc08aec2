"""What is asked of the engine, what it tells while it works, and what a request may not be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from kobza.config import InputError, SampleConfig, nearest, require

if TYPE_CHECKING:
    from kobza.serve.constraint import Constraint
    from kobza.serve.runner import Runner

Finish = Literal["stop", "length", "cancelled", "timeout", "error"]
MOST_LOGPROBS = 100  # rivals told with each token
BIAS = 1e4  # far beyond any logit; -100 and 100 are what OpenAI's clients send


class QueueFull(InputError):
    """No place in the queue. Over HTTP a 429; everything else an InputError says is a 400."""


@dataclass(frozen=True)
class Request:
    """One text to write: the prompt's ids, how to choose, and where to stop."""

    ids: list[int]
    sampling: SampleConfig  # .tokens: most new tokens; .seed: of this request's draws alone
    ends: tuple[int, ...]  # the ids that end a text
    stops: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the raw logits
    logprobs: int | None = None  # k: tell the chosen token's log-probability and the k likeliest; None: none
    adapter: str | None = None
    constraint: Constraint | None = None
    ignore_ends: bool = False
    prompt_logprobs: bool = False
    seconds: float | None = None  # from submission to the last token


class Logprob(NamedTuple):
    """A token, its log-probability in the model's own distribution, before any knob, and the likeliest at its place."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Event(NamedTuple):
    """A token, or an end without one. `text` is what can be shown now: the start of a stop string is held back."""

    id: int | None = None
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None  # set on the last event, with the counts below
    error: str = ""  # one line, with finish "error"
    n_prompt: int = 0
    n_cached: int = 0  # tokens of the prompt whose keys and values were there already
    n_new: int = 0
    prompt: tuple[
        Logprob, ...
    ] = ()  # with Request.prompt_logprobs, on the first event: of the prompt's tokens but the first


@dataclass(frozen=True)
class Result:
    """A finished text. logprobs: one a new id where they were asked for."""

    ids: list[int]
    text: str
    logprobs: list[Logprob]
    finish: Finish
    n_cached: int = 0
    error: str = ""


class Collector:
    """A sink that makes a Result of its events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.result: Result | None = None

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.finish:
            self.result = collect(self.events)


def collect(events: Sequence[Event]) -> Result:
    """The result that a request's events tell."""
    written = [event for event in events if event.id is not None]
    logprobs = [Logprob(e.id, e.logprob, e.top) for e in written if e.id is not None and e.logprob is not None]
    last, text = events[-1], "".join(event.text for event in events)
    finish: Finish = last.finish or "error"
    return Result([e.id for e in written if e.id is not None], text, logprobs, finish, last.n_cached, last.error)


@dataclass(frozen=True)
class Limits:
    """How much at once. chunk: tokens of prompts that one step takes besides the rows that write."""

    max_running: int = 32
    max_queue: int = 256
    chunk: int = 256
    blocks: int | None = None  # of the cache, at most; None: all that the runner has

    def __post_init__(self) -> None:
        for name in ("max_running", "max_queue", "chunk", "blocks"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class Stats:
    """The engine now (the first two lines) and since it was made."""

    running: int
    queued: int
    blocks: int
    free: int
    cached: int
    tokens_in: int  # of prompts, the cached ones among them
    tokens_out: int
    prefix_hits: int  # tokens of prompts that were cached
    drafted: int
    accepted: int
    preempted: int
    forwards: int
    seconds: float  # spent in forwards
    finished: Mapping[str, int]


def check_request(request: Request, runner: Runner, room: int) -> None:
    """Raise InputError unless this runner can serve the request to its end; `room`: tokens that the cache holds in all."""
    n, tokens, size, vocab = len(request.ids), request.sampling.tokens, runner.max_seq_len, runner.vocab_size
    require(n > 0, "the prompt is empty; give at least one token")
    both = f"{n:,} tokens of prompt and {tokens:,} to write are {n + tokens:,}, but the context holds {size:,}"
    remedy = f"ask for at most {size - n:,} tokens" if n < size else f"shorten the prompt to {size - 1:,} at most"
    require(n + tokens <= size, f"{both}; {remedy}")
    require(n + tokens <= room, f"{both[: both.index(', but')]}, but the cache holds {room:,} in all; ask for less")
    bad = next((i for i in (*request.ids, *request.logit_bias, *request.ends) if not 0 <= i < vocab), None)
    require(bad is None, f"token id {bad} is not in the vocabulary of {vocab:,}; ids go from 0 to {vocab - 1:,}")
    wild = next((v for v in request.logit_bias.values() if not (math.isfinite(v) and abs(v) <= BIAS)), None)
    require(wild is None, f"logit_bias {wild} is no number between {-BIAS:,.0f} and {BIAS:,.0f}; -100 forbids a token")
    require("" not in request.stops, "a stop string is empty: it stands everywhere; leave it out or name one")
    k, most = request.logprobs or 0, min(MOST_LOGPROBS, vocab)
    require(0 <= k <= most, f"logprobs is {k}; it must be between 0 and {most}")
    known = list(runner.adapters)
    good = request.adapter is None or request.adapter in known
    hint = nearest(str(request.adapter), known) if known else "; none is loaded, start with --adapter NAME=DIR"
    require(good, f"adapter {request.adapter!r} is not loaded{hint}")
    s = request.seconds
    require(s is None or 0 < s < math.inf, f"the time limit is {s} seconds; it must be above 0, or left out")

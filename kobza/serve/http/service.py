"""What is served, and one client's texts on their way: between the engine's thread and the event loop.

An engine calls back from its own thread. A `Flow` takes its events over into the loop through a queue, which holds at most what
its requests may write, so that a slow reader costs memory for its own text and nobody's time. Whoever leaves, by hanging up, by
a limit or by an error, closes the flow, and that cancels what still runs: a slot is never held for nobody.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import anyio.to_thread
from anyio import CapacityLimiter
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from kobza.config import InputError, SampleConfig, nearest, require
from kobza.serve.request import Event, Logprob, Request
from kobza.serve.text import token_bytes
from kobza.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kobza.serve.chat import Talk
    from kobza.serve.constraint import Constraint, Grammars
    from kobza.serve.request import Stats

MOST_TEXTS = 64  # that one request may ask for: prompts times n
MOST_STOPS, LONGEST_STOP = 16, 200
COLDEST = 1e-3  # a temperature below it, and not 0, overflows logits instead of sharpening them
NEVER = -9999.0  # a log-probability
API_NAMES = {"tokens": "max_tokens"}  # SampleConfig's words -> a client's, where they differ


class UnknownModel(InputError):
    """No such model here. Over HTTP a 404."""


class Failed(RuntimeError):
    """The engine could not finish a text. Over HTTP a 500, or a 503 where it is being shut down."""

    def __init__(self, message: str, status: int = 500):
        super().__init__(message)
        self.status = status


class Engine(Protocol):
    """What is asked of kobza.serve.engine.Engine here."""

    def submit(self, request: Request, sink: Callable[[Event], None]) -> Any:
        """Queue a request; its events go to the sink, from any thread."""

    def cancel(self, ticket: Any) -> None:
        """End a request; nothing happens to one that has ended."""

    def stats(self) -> Stats:
        """The numbers of now."""


@dataclass(frozen=True)
class Served:
    """A model, or a model with an adapter, under the name that clients ask for.

    `facts`: digest, size (bytes), parameters, quantization, family, template: what Ollama's clients are told of it.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    max_seq_len: int
    talk: Talk | None = None
    grammars: Grammars | None = None
    sampling: SampleConfig = field(default_factory=SampleConfig)
    facts: Mapping[str, Any] = field(default_factory=dict)
    created: int = 0
    adapter: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of the weights and their number format: equal fingerprint, seed and request give an equal text."""
        weights, _, numbers = str(self.facts.get("digest", "")).partition(":")
        return "-".join(filter(None, ("kobza", weights[:12], numbers)))


class Service:
    """The models by name, and a thread or two for what takes long: encoding, templates, grammars."""

    def __init__(self, models: Mapping[str, Served], seconds: float = 600.0, most_tokens: int = 1 << 20):
        require(bool(models), "nothing is served; name a run or a model")
        self.models, self.seconds, self.most_tokens = dict(models), seconds, most_tokens
        self._limiter: CapacityLimiter | None = None

    def find(self, name: str) -> Served:
        """The model of a name; Ollama's clients may add :latest."""
        found = self.models.get(name) or self.models.get(name.removesuffix(":latest"))
        if found is None:
            raise UnknownModel(f"the model {name[:80]!r} is not served here{nearest(name[:80], list(self.models))}")
        return found

    async def aside(self, work: Callable[..., Any], *args: Any) -> Any:
        """work(*args) in a thread, two at once."""
        if self._limiter is None:
            self._limiter = CapacityLimiter(2)
        return await anyio.to_thread.run_sync(work, *args, limiter=self._limiter)

    async def encode(self, served: Served, text: str) -> list[int]:
        """Ids of a prompt; one that cannot fit by its length alone is not encoded at all."""
        most = served.max_seq_len * int(served.tokenizer.piece_bytes.max(initial=1))
        size = f"the prompt has {len(text):,} characters, and {served.max_seq_len:,} tokens hold {most:,} bytes at most"
        require(len(text) <= most, f"{size}; shorten it")
        ids: list[int] = await self.aside(served.tokenizer.encode_prompt, text)
        return ids

    def room(self, served: Served, n_prompt: int, size: int | None = None) -> int:
        """Tokens that may be written after a prompt, in a context of `size`."""
        size = served.max_seq_len if size is None else size
        require(
            size <= served.max_seq_len, f"a context of {size:,} is beyond the model's {served.max_seq_len:,}; lower it"
        )
        long = f"the prompt has {n_prompt:,} tokens, and the context of {size:,} must hold one more to write"
        require(n_prompt < size, f"{long}; shorten the prompt")
        return min(size - n_prompt, self.most_tokens)


@dataclass(frozen=True)
class Ask:
    """How a text shall be written, in the words that all interfaces share. `knobs`: fields of SampleConfig that were given."""

    knobs: Mapping[str, Any]
    stops: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ignore_ends: bool = False
    prompt_logprobs: bool = False
    constraint: Constraint | None = None


def requests_of(service: Service, served: Served, ids: list[int], ask: Ask, n: int) -> list[Request]:
    """n requests for one prompt; each draws from a seed of its own."""
    check_stops(ask.stops)
    given = {name: value for name, value in ask.knobs.items() if value is not None}
    seed = given.get("seed", secrets.randbelow(2**62))
    heat = given.get("temperature", 0)
    require(heat == 0 or not 0 < heat < COLDEST, f"temperature is {heat}; it must be 0 (greedy) or at least {COLDEST}")
    try:
        given.setdefault("min_tokens", min(served.sampling.min_tokens, given["tokens"]))
        first = replace(served.sampling, **given | {"seed": seed})
        seeds = [replace(first, seed=seed + i) for i in range(n)]
    except InputError as error:
        raise InputError(api_words(str(error))) from None
    return [
        Request(
            ids=ids,
            sampling=sampling,
            ends=served.ends,
            stops=ask.stops,
            logit_bias=ask.logit_bias,
            logprobs=ask.logprobs,
            adapter=served.adapter,
            constraint=ask.constraint,
            ignore_ends=ask.ignore_ends,
            prompt_logprobs=ask.prompt_logprobs,
            seconds=service.seconds,
        )
        for sampling in seeds
    ]


def check_stops(stops: Sequence[str]) -> None:
    """Refuse stop strings without characters, too many, too long."""
    require(len(stops) <= MOST_STOPS, f"stop has {len(stops)} strings and {MOST_STOPS} are the most; send fewer")
    require("" not in stops, "stop has an empty string, which stands everywhere; leave it out")
    longest = max(map(len, stops), default=0)
    require(longest <= LONGEST_STOP, f"a stop string has {longest:,} characters and {LONGEST_STOP} are the most")


def api_words(message: str) -> str:
    """The command line's words for a knob as a client knows it. api_words("--top-k is -1") -> "top_k is -1" """
    return re.sub(
        r"--([a-z][a-z_-]*)", lambda m: API_NAMES.get(m[1].replace("-", "_"), m[1].replace("-", "_")), message
    )


# ---- one client's texts ----------------------------------------------------------------------------------------------


@dataclass
class Text:
    """One text as far as it is written."""

    text: str = ""
    ids: list[int] = field(default_factory=list)  # likewise without the token that ended it
    tokens: list[Logprob] = field(default_factory=list)  # what was drawn, less the token that ended it
    prompt: tuple[Logprob, ...] = ()
    end: Event | None = None

    def take(self, event: Event, ends: Sequence[int]) -> None:
        """Add what an event tells."""
        self.text += event.text
        self.prompt = self.prompt or event.prompt
        if event.id is not None and event.id not in ends:
            self.ids.append(event.id)
            if event.logprob is not None:
                self.tokens.append(Logprob(event.id, event.logprob, event.top))
        if event.finish is not None:
            self.end = event


def answer_of(served: Served, text: Text, tools: list[dict[str, Any]]) -> tuple[str | None, list[dict[str, Any]]]:
    """Words and calls of an answer: by its ids, for the marks of a call may be special tokens, which its text does not show."""
    if not tools or served.talk is None:
        return text.text, []
    words, calls = served.talk.parse_ids(text.ids, tools)
    return (words, calls) if calls else (text.text, [])


class Flow:
    """Some requests in an engine, their events as one stream. `async with Flow(...) as flow: async for i, event in flow`"""

    def __init__(self, served: Served, requests: Sequence[Request]):
        most = f"one request asks for {len(requests)} texts and {MOST_TEXTS} are the most; send several"
        require(len(requests) <= MOST_TEXTS, most)
        self.served, self.requests = served, requests
        self.began = time.monotonic()
        self.first: float | None = None  # seconds until the first token
        self.texts = [Text() for _ in requests]
        self._tickets: list[Any] = []
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def __aenter__(self) -> Flow:
        loop = asyncio.get_running_loop()

        def sink(i: int) -> Callable[[Event], None]:
            return lambda event: loop.call_soon_threadsafe(self._queue.put_nowait, (i, event))

        def submit() -> None:  # in a thread: the engine may be in the midst of a step
            for i, request in enumerate(self.requests):
                self._tickets.append(self.served.engine.submit(request, sink(i)))

        try:
            await anyio.to_thread.run_sync(submit)
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what still runs."""
        for ticket, text in zip(self._tickets, self.texts, strict=False):
            if text.end is None:
                self.served.engine.cancel(ticket)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while any(text.end is None for text in self.texts):
            i, event = await self._queue.get()
            if self.first is None and event.id is not None:
                self.first = time.monotonic() - self.began
            self.texts[i].take(event, () if self.requests[i].ignore_ends else self.served.ends)
            if event.finish == "error":
                raise Failed(event.error or "the text could not be finished; the server's log says why")
            if event.finish == "cancelled":
                raise Failed("the server was shut down while it wrote; ask again", 503)
            yield i, event

    async def whole(self) -> list[Text]:
        """All texts to their ends."""
        async for _ in self:
            pass
        return self.texts

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompts, each counted once however many texts follow it."""
        return sum(len(ids) for ids in {id(r.ids): r.ids for r in self.requests}.values())

    @property
    def n_new(self) -> int:
        """Tokens written so far, in all texts that have ended."""
        return sum(text.end.n_new for text in self.texts if text.end)

    @property
    def n_cached(self) -> int:
        """Tokens of the prompts that were cached when first asked for."""
        firsts: dict[int, int] = {}
        for request, text in zip(self.requests, self.texts, strict=True):
            firsts.setdefault(id(request.ids), text.end.n_cached if text.end else 0)
        return sum(firsts.values())


async def unless_gone(receive: Callable[[], Awaitable[Any]], flow: Flow, seen: Callable[[Flow], None]) -> list[Text]:
    """All texts of a flow; a client that hangs up meanwhile frees it at once."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with flow:
        work, leaving = asyncio.ensure_future(flow.whole()), asyncio.ensure_future(left())
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return work.result()
        finally:
            work.cancel()
            leaving.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)
            seen(flow)


class Streamed(StreamingResponse):
    """A flow's events as they come. However it ends, the flow is closed."""

    def __init__(self, flow: Flow, lines: AsyncIterator[str], media_type: str, seen: Callable[[Flow], None]):
        super().__init__(lines, media_type=media_type, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.flow, self.seen = flow, seen

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send until the end, or until the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.flow.close()
            self.seen(self.flow)


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold: OpenAI's word for "never" is -9999."""
    return logprob if logprob > NEVER else NEVER


def token_text(tokenizer: Tokenizer, i: int) -> str:
    """A token's text for a client; bytes that are no whole character become U+FFFD."""
    return token_bytes(tokenizer, i).decode("utf-8", errors="replace")

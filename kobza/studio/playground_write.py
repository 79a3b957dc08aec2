"""An Ask -> the text as it is written, an event a token, sent as lines of JSON until it ends or nobody reads on."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from anyio import to_thread
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from torch import Tensor

from kobza.config import InputError
from kobza.generate import generate
from kobza.studio.playground_ask import Ask
from kobza.studio.playground_stages import Kept, check_finite, level
from kobza.tokenizer import StreamDecoder

Event = dict[str, Any]
BEHIND = 8  # ids before a text that goes on: more than a character has bytes
SECONDS = 0.04  # what is written in this time is sent together


def write(ask: Ask, kept: Kept) -> Iterator[Event]:
    """The events of one text: `start`, a token each, `end` (or `error`)."""
    tokenizer, ids, n, began = ask.playable.loaded.tokenizer, list(ask.ids), 0, time.perf_counter()
    stream = StreamDecoder(tokenizer, continues=True)
    if ask.prompt is None:  # it may go on from half a character
        for i in ids[-BEHIND:]:
            stream.feed(i)
    yield {"start": {"ids": ask.ids, "prompt": ask.prompt, "command": ask.command}}
    if ask.take is not None:
        logits = kept.logits(ask.name, ask.playable, ids)
        yield token(ask, stream, ask.take, logits, None)
        ids.append(ask.take)
    try:
        why = "end" if ask.take in ask.playable.ends else "length"
        choices = generate(ask.playable.loaded.model, [ids], ask.config, ask.playable.ends) if why == "length" else ()
        for n, choice in enumerate(choices, 1):
            check_finite(choice.logits, ask.name)
            (i,) = choice.ids
            assert i is not None
            yield token(ask, stream, i, choice.logits[0], n - 1)
            why = "end" if i in ask.playable.ends else "length"
    except InputError as error:
        yield {"error": str(error)}
        return
    yield {"end": {"why": why, "n": n, "seconds": time.perf_counter() - began, "rest": stream.flush()}}


def token(ask: Ask, stream: StreamDecoder, i: int, logits: Tensor, draw: int | None) -> Event:
    """What the page shows of a token: its text so far (t; empty inside a character), name (s), probability, colour, rank."""
    p = float(logits.softmax(-1)[i])
    rank = 1 + int((logits > logits[i]).sum())
    name = ask.playable.loaded.tokenizer.show(i)
    return {"id": i, "t": stream.feed(i), "s": name, "p": p, "c": level(p), "rank": rank, "draw": draw}


class Lines(StreamingResponse):
    """Events, made in a worker thread, as NDJSON. Whoever hangs up or stops ends them; `close` is called once at the end."""

    def __init__(self, events: Iterator[Event], close: Callable[[], None]):
        self.events, self.close = events, close
        super().__init__(self._batches(), media_type="application/x-ndjson")

    async def _batches(self) -> AsyncIterator[bytes]:
        while batch := await to_thread.run_sync(self._some):
            text = "".join(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n" for event in batch)
            yield text.encode("utf-8", errors="replace")

    def _some(self) -> list[Event]:
        """What comes in SECONDS, at least one; none at the end."""
        batch, until = [], time.perf_counter() + SECONDS
        for event in self.events:
            batch.append(event)
            if time.perf_counter() > until:
                break
        return batch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.events.close()  # type: ignore[attr-defined]  # generate stops here, in the middle of a text too
            self.close()

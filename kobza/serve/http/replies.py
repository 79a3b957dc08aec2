"""Texts -> OpenAI's answers: whole in one JSON object, or in parts as server-sent events.

A `Reply` knows its flow of events and says what each adds; Completions and Chats fill in OpenAI's two forms.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import Request

from kobza.serve.http.bodies import Knobs
from kobza.serve.http.service import Failed, Flow, Served, Streamed, Text, answer_of, finite, token_text, unless_gone
from kobza.serve.request import Event, Logprob
from kobza.serve.text import token_bytes
from kobza.tokenizer import StreamDecoder, Tokenizer
from kobza.web.guard import error_body

Seen = Callable[[Flow], None]
Json = dict[str, Any]


class Reply:
    """An answer on its way: whole in one JSON object, or in parts as server-sent events."""

    kind, part_kind, prefix = "", "", ""

    def __init__(self, served: Served, flow: Flow):
        self.served, self.flow = served, flow
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    async def respond(self, request: Request, body: Knobs, seen: Seen) -> Any:
        """The response, streamed if the client asked for it."""
        if not body.stream:
            await unless_gone(request.receive, self.flow, seen)
            choices = [self.choice(i, text) for i, text in enumerate(self.flow.texts)]
            return self.frame(self.kind, choices) | {"usage": self.usage()}
        await self.flow.__aenter__()  # refused here, before a stream begins; Streamed closes it
        wants = body.stream_options is not None and bool(body.stream_options.include_usage)
        return Streamed(self.flow, self.events(wants), "text/event-stream", seen)

    def frame(self, kind: str, choices: list[Json]) -> Json:
        """What surrounds choices."""
        facts = {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}
        return facts | {"system_fingerprint": self.served.fingerprint, "choices": choices}

    def usage(self) -> Json:
        """Tokens read and written."""
        n, new = self.flow.n_prompt, self.n_new()
        counts = {"prompt_tokens": n, "completion_tokens": new, "total_tokens": n + new}
        return counts | {"prompt_tokens_details": {"cached_tokens": self.flow.n_cached}}

    def n_new(self) -> int:
        """Tokens written."""
        return self.flow.n_new

    async def events(self, with_usage: bool) -> AsyncIterator[str]:
        """The stream, line by line, usage last; an error within it is an event too."""
        rest = {"usage": None} if with_usage else {}
        try:
            for choice in self.openings():
                yield sse(self.frame(self.part_kind, [choice]) | rest)
            async for i, event in self.flow:
                for choice in self.parts(i, event):
                    yield sse(self.frame(self.part_kind, [choice]) | rest)
        except Failed as failed:
            yield sse(error_body(failed.status, str(failed)))
            return
        if with_usage:
            yield sse(self.frame(self.part_kind, []) | {"usage": self.usage()})
        yield "data: [DONE]\n\n"

    def choice(self, i: int, text: Text) -> Json:
        """A whole text."""
        raise NotImplementedError

    def openings(self) -> list[Json]:
        """What comes before the first token."""
        return []

    def parts(self, i: int, event: Event) -> list[Json]:
        """What an event adds to text i."""
        raise NotImplementedError


class Completions(Reply):
    """Texts that continue prompts. `silent`: nothing is to be written, the prompt is only echoed, with its logprobs."""

    kind = part_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, served: Served, flow: Flow, silent: bool, echo: bool, logprobs: int | None):
        super().__init__(served, flow)
        self.silent, self.echo, self.logprobs = silent, echo, logprobs
        self.places = [Places(served.tokenizer, continues=not echo) for _ in flow.requests]
        self.echo_due = [echo] * len(flow.requests)

    def n_new(self) -> int:
        """Tokens written; the one that a silent request had to draw is not one."""
        return 0 if self.silent else super().n_new()

    def echoed(self, i: int) -> str:
        """The prompt as text, if it is wanted."""
        return self.served.tokenizer.decode(self.flow.requests[i].ids) if self.echo else ""

    def choice(self, i: int, text: Text) -> Json:
        """The text, after its prompt with echo."""
        assert text.end is not None
        written, tokens = ("", []) if self.silent else (text.text, text.tokens)
        finish = "length" if self.silent else finish_of(text.end)
        told = None
        if self.logprobs is not None:
            told = self.told(i, self.flow.requests[i].ids if self.echo else [], text.prompt, tokens)
        return {"index": i, "text": self.echoed(i) + written, "logprobs": told, "finish_reason": finish}

    def told(self, i: int, prompt: Sequence[int], before: Sequence[Logprob], tokens: Sequence[Logprob]) -> Json:
        """OpenAI's lists of tokens, log-probabilities and places. The first token of a prompt has none."""
        known = [*(before if prompt else ()), *tokens]
        ids = [*prompt[:1], *(t.id for t in known)]
        nothing: list[Any] = [None] * len(prompt[:1])
        show = partial(token_text, self.served.tokenizer)
        return {
            "tokens": [show(j) for j in ids],
            "token_logprobs": nothing + [finite(t.logprob) for t in known],
            "top_logprobs": nothing + [{show(j): finite(p) for j, p in t.top} for t in known]
            if self.logprobs
            else None,
            "text_offset": [self.places[i].of(j) for j in ids],
        }

    def openings(self) -> list[Json]:
        """The prompts, with echo and without log-probabilities, which are known with the first token only."""
        if not self.echo or self.logprobs is not None:
            return []
        self.echo_due = [False] * len(self.flow.requests)
        rows = range(len(self.flow.requests))
        return [{"index": i, "text": self.echoed(i), "logprobs": None, "finish_reason": None} for i in rows]

    def parts(self, i: int, event: Event) -> list[Json]:
        """A token's text; with echo and log-probabilities the prompt comes with the first."""
        text, prompt = event.text, list[int]()
        if self.silent:
            text, event = "", event._replace(id=None)
        if self.echo_due[i]:
            self.echo_due[i] = False
            text, prompt = self.echoed(i) + text, self.flow.requests[i].ids
        ends = () if self.flow.requests[i].ignore_ends else self.served.ends
        drawn = event.id is not None and event.id not in ends and event.logprob is not None
        tokens = [Logprob(event.id, event.logprob, event.top)] if drawn else []  # type: ignore[arg-type]
        finish = None if event.finish is None else "length" if self.silent else finish_of(event)
        if not text and not tokens and not prompt and finish is None:
            return []
        told = None if self.logprobs is None else self.told(i, prompt, event.prompt, tokens)
        return [{"index": i, "text": text, "logprobs": told, "finish_reason": finish}]


class Places:
    """Where in a text each token begins, in characters: two that share one begin at the same place."""

    def __init__(self, tokenizer: Tokenizer, continues: bool):
        self._stream, self._n = StreamDecoder(tokenizer, continues), 0

    def of(self, i: int) -> int:
        """The place of the next token."""
        place = self._n
        self._n += len(self._stream.feed(i))
        return place


class Chats(Reply):
    """Answers in a conversation."""

    kind, part_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, served: Served, flow: Flow, tools: list[Json], several: bool):
        super().__init__(served, flow)
        self.tools, self.several = tools, several
        self.logprobs = flow.requests[0].logprobs is not None

    def read(self, text: Text) -> tuple[str | None, list[Json]]:
        """An answer's words and calls."""
        words, calls = answer_of(self.served, text, self.tools)
        return words, calls if self.several else calls[:1]

    def choice(self, i: int, text: Text) -> Json:
        """The message, with its calls if it made some."""
        assert text.end is not None
        words, calls = self.read(text)
        message: Json = {"role": "assistant", "content": words, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        told = {"content": [self.told(t) for t in text.tokens], "refusal": None} if self.logprobs else None
        finish = "tool_calls" if calls else finish_of(text.end)
        return {"index": i, "message": message, "logprobs": told, "finish_reason": finish}

    def told(self, token: Logprob) -> Json:
        """A token with its log-probability, and its rivals'."""
        return self.entry(token.id, token.logprob) | {"top_logprobs": [self.entry(i, p) for i, p in token.top]}

    def entry(self, i: int, logprob: float) -> Json:
        """A token as text and as bytes, which may be a part of a character."""
        spelled = token_bytes(self.served.tokenizer, i)
        return {"token": token_text(self.served.tokenizer, i), "logprob": finite(logprob), "bytes": list(spelled)}

    def openings(self) -> list[Json]:
        """Who speaks."""
        return [self.part(i, {"role": "assistant", "content": ""}) for i in range(len(self.flow.requests))]

    def part(self, i: int, delta: Json, told: Json | None = None, finish: str | None = None) -> Json:
        """One choice of a chunk."""
        return {"index": i, "delta": delta, "logprobs": told, "finish_reason": finish}

    def parts(self, i: int, event: Event) -> list[Json]:
        """A token's text, and at the end why; with tools everything at the end."""
        parts, told, text = [], None, self.flow.texts[i]
        ends = () if self.flow.requests[i].ignore_ends else self.served.ends
        if self.logprobs and event.id is not None and event.id not in ends and event.logprob is not None:
            told = {"content": [self.told(Logprob(event.id, event.logprob, event.top))], "refusal": None}
        if told or (event.text and not self.tools):
            parts.append(self.part(i, {"content": "" if self.tools else event.text}, told))
        if event.finish is None:
            return parts
        finish = finish_of(event)
        if self.tools:
            words, calls = self.read(text)
            if words:
                parts.append(self.part(i, {"content": words}))
            if calls:
                numbered = [{"index": k} | call for k, call in enumerate(calls)]
                parts.append(self.part(i, {"tool_calls": numbered}))
                finish = "tool_calls"
        return [*parts, self.part(i, {}, None, finish)]


def finish_of(event: Event) -> str:
    """OpenAI's word for how a text ended: a time limit is a limit like others."""
    return "stop" if event.finish == "stop" else "length"


def sse(value: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

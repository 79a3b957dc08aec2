"""Ollama's interface: /api/generate, /api/chat, /api/tags, /api/show, /api/ps, /api/version; one JSON object a line in a stream.

Errors are Ollama's: {"error": "one line"}. Options that say how a model is loaded are taken and change no text here; those that
would change the text and that we have not are refused. What is left out is as the server was started, and num_predict is what
the context holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request

from kobza import __version__
from kobza.config import require
from kobza.serve.http.bodies import (
    NO_IMAGES,
    REFUSED_GENERATE,
    REFUSED_OLLAMA_CHAT,
    REFUSED_OPTIONS,
    Asked,
    Chat,
    Generate,
    Options,
    Show,
)
from kobza.serve.http.openai import asked
from kobza.serve.http.replies import Json, Seen
from kobza.serve.http.service import (
    Ask,
    Failed,
    Flow,
    Served,
    Service,
    Streamed,
    Text,
    answer_of,
    finite,
    requests_of,
    token_text,
    unless_gone,
)
from kobza.serve.http.strict import UntypedRoute
from kobza.serve.request import Event, Logprob
from kobza.serve.text import token_bytes

STREAM: Any = {
    200: {"description": "A JSON object a line; with stream=false one.", "content": {"application/x-ndjson": {}}}
}


def router(service: Service, seen: Seen) -> APIRouter:
    """The routes under /api. seen(flow) is called when a flow has ended."""
    routes = APIRouter(prefix="/api", route_class=UntypedRoute, tags=["Ollama"])

    @routes.get("/version")
    async def version() -> Json:
        """The version of kobza."""
        return {"version": __version__}

    @routes.get("/tags")
    async def tags() -> Json:
        """The models that are served, adapters among them."""
        return {"models": [tag(served) for served in service.models.values()]}

    @routes.get("/ps")
    async def running() -> Json:
        """The same: what is served is loaded, and stays so."""
        never = {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}
        rows = service.models.values()
        return {"models": [tag(served) | never | {"context_length": served.max_seq_len} for served in rows]}

    @routes.post("/show")
    async def show(body: Show) -> Json:
        """What a model is."""
        body.check_extra({})
        name = body.model or body.name
        require(name is not None, "model is missing; send it")
        return shown(service.find(str(name)))

    @routes.post("/generate", response_model=None, responses=STREAM)
    async def generate(body: Generate, request: Request) -> Any:
        """Continue a prompt, or with a chat template answer it."""
        body.check_extra(REFUSED_GENERATE)
        served = service.find(body.model)
        if not body.prompt and not body.system:  # Ollama's clients ask so for a model to be loaded
            return head(served) | {"response": "", "done": True, "done_reason": "load"}
        ids = await prompt_of(service, served, body)
        return await respond(Generated, service, served, body, request, seen, ids)

    @routes.post("/chat", response_model=None, responses=STREAM)
    async def chat(body: Chat, request: Request) -> Any:
        """Answer a conversation by the model's own template."""
        body.check_extra(REFUSED_OLLAMA_CHAT)
        served = service.find(body.model)
        if not body.messages:
            message = {"role": "assistant", "content": ""}
            return head(served) | {"message": message, "done": True, "done_reason": "load"}
        ids, _ = await asked(service, served, messages_of(body.messages), body.tools or [])
        return await respond(Chatted, service, served, body, request, seen, ids)

    for path in ("/embed", "/embeddings"):
        routes.post(path, include_in_schema=False)(no_embeddings)
    return routes


async def no_embeddings() -> Json:
    """There are none."""
    require(False, "this server writes text and gives no embeddings; use /api/generate or /api/chat")
    return {}


# ---- what a model is -------------------------------------------------------------------------------------------------


def tag(served: Served) -> Json:
    """A model as /api/tags lists it."""
    facts = served.facts
    row = {"name": served.name, "model": served.name, "modified_at": stamp(served.created)}
    digest = str(facts.get("digest", ""))
    return row | {"size": facts.get("size", 0), "digest": digest, "details": details(served)}


def details(served: Served) -> Json:
    """A model's kind, in Ollama's words."""
    family = str(served.facts.get("family", "kobza"))
    n = served.facts.get("parameters", 0)
    size = f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.2f}M" if n else ""
    quantization = str(served.facts.get("quantization", ""))
    kind = {"parent_model": "", "format": "kobza", "family": family, "families": [family]}
    return kind | {"parameter_size": size, "quantization_level": quantization}


def shown(served: Served) -> Json:
    """A model as /api/show has it."""
    talk, grammars = served.talk, served.grammars
    can = ["completion", *(["tools"] if talk is not None and talk.takes_tools else [])]
    info = {"general.architecture": served.facts.get("family", "kobza"), "kobza.context_length": served.max_seq_len}
    info |= {"general.parameter_count": served.facts.get("parameters", 0), "kobza.grammars": grammars is not None}
    s = served.sampling
    knobs = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p}
    lines = "\n".join(f"{name} {value}" for name, value in (knobs | {"repeat_penalty": s.repetition_penalty}).items())
    texts = {"modelfile": "", "parameters": lines, "template": str(served.facts.get("template", ""))}
    return texts | {
        "details": details(served),
        "model_info": info,
        "capabilities": can,
        "modified_at": stamp(served.created),
    }


def stamp(seconds: float) -> str:
    """A time as Ollama writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


# ---- bodies -> requests ----------------------------------------------------------------------------------------------


async def prompt_of(service: Service, served: Served, body: Generate) -> list[int]:
    """Ids of a prompt: by the chat template, where the model has one and raw is not asked for."""
    prompt = body.prompt or ""
    if body.raw or served.talk is None:
        require(
            not body.system, "system has no effect here: there is no chat template in use; write it into the prompt"
        )
        return await service.encode(served, prompt)
    system = [{"role": "system", "content": body.system}] if body.system else []
    ids, _ = await asked(service, served, [*system, {"role": "user", "content": prompt}], [])
    return ids


def messages_of(messages: list[Json]) -> list[Json]:
    """Ollama's messages as OpenAI's: its calls have no ids, which templates may want, and images stand beside the content."""
    read, last = [], 0
    for i, message in enumerate(messages):
        message = {key: value for key, value in message.items() if value is not None}
        images = message.pop("images", None)
        require(images in NO_IMAGES[0], f"messages[{i}].images cannot be honoured: {NO_IMAGES[1]}")
        message.pop("thinking", None)
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            numbered = enumerate(calls, last)
            message["tool_calls"] = [{"id": f"call{k:05d}"} | c if isinstance(c, dict) else c for k, c in numbered]
            last += len(calls)
        if message.get("role") == "tool":
            name = message.pop("tool_name", None)
            message |= {"tool_call_id": f"call{max(0, last - 1):05d}"} | ({"name": name} if name else {})
        read.append(message)
    return read


async def ask_of(service: Service, served: Served, body: Asked, n_prompt: int) -> Ask:
    """Options, format and log-probabilities."""
    options = body.options or Options()
    options.check_extra(REFUSED_OPTIONS)
    require(body.logprobs or not body.top_logprobs, "top_logprobs has no effect without logprobs=true; leave it out")
    room = service.room(served, n_prompt, options.num_ctx)
    tokens = options.num_predict if options.num_predict is not None else -1
    require(tokens != 0, "num_predict is 0; it must be at least 1, or -1 for what the context holds")
    fits = f"num_predict is {tokens:,}, and {room:,} tokens fit behind a prompt of {n_prompt:,}"
    require(tokens <= room, f"{fits}; lower it, or shorten the prompt")
    constraint = None
    if body.format:
        grammars = served.grammars
        require(grammars is not None, f"format needs grammars, which {served.name} is served without; leave it out")
        assert grammars is not None
        work = (grammars.json_object,) if body.format == "json" else (grammars.json_schema, body.format)
        constraint = await service.aside(*work)
    return Ask(
        knobs={
            "tokens": tokens if tokens > 0 else room,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "min_p": options.min_p,
            "repetition_penalty": options.repeat_penalty,
            "seed": options.seed,
        },
        stops=(options.stop,) if isinstance(options.stop, str) else tuple(options.stop or ()),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=constraint,
    )


# ---- texts -> answers ------------------------------------------------------------------------------------------------


async def respond(
    kind: type[Generated], service: Service, served: Served, body: Any, request: Request, seen: Seen, ids: list[int]
) -> Any:
    """The response, streamed unless the client asked for it whole."""
    ask = await ask_of(service, served, body, len(ids))
    flow = Flow(served, requests_of(service, served, ids, ask, 1))
    reply = kind(served, flow, getattr(body, "tools", None) or [])
    if body.stream is False:
        await unless_gone(request.receive, flow, seen)
        return reply.whole(flow.texts[0])
    await flow.__aenter__()  # refused here, before a stream begins; Streamed closes it
    return Streamed(flow, reply.lines(), "application/x-ndjson", seen)


def head(served: Served) -> Json:
    """What every object of an answer begins with."""
    return {"model": served.name, "created_at": stamp(time.time())}


class Generated:
    """The answer of /api/generate."""

    def __init__(self, served: Served, flow: Flow, tools: list[Json]):
        self.served, self.flow, self.tools = served, flow, tools
        self.logprobs = flow.requests[0].logprobs is not None

    def content(self, text: str, calls: list[Json]) -> Json:
        """The field that holds the text."""
        return {"response": text}

    def whole(self, text: Text) -> Json:
        """Text and counts in one object."""
        words, calls = self.read(text)
        told = {"logprobs": [self.told(t) for t in text.tokens]} if self.logprobs else {}
        return head(self.served) | self.content(words, calls) | told | self.ending(text)

    async def lines(self) -> AsyncIterator[str]:
        """The stream: an object a token, the last with the counts."""
        text = self.flow.texts[0]
        try:
            async for _, event in self.flow:
                told = self.part_told(event)
                shown = "" if self.tools else event.text
                if shown or told:
                    yield ndjson(head(self.served) | self.content(shown, []) | told | {"done": False})
        except Failed as failed:
            yield ndjson({"error": str(failed)})
            return
        words, calls = self.read(text) if self.tools else ("", [])
        yield ndjson(head(self.served) | self.content(words, calls) | self.ending(text))

    def read(self, text: Text) -> tuple[str, list[Json]]:
        """An answer's words, and its calls with their arguments as objects."""
        words, calls = answer_of(self.served, text, self.tools)
        inner = [call["function"] for call in calls]
        return words or "", [{"function": {"name": f["name"], "arguments": json.loads(f["arguments"])}} for f in inner]

    def ending(self, text: Text) -> Json:
        """How it ended, tokens and nanoseconds: until the first token the prompt was read, then it was written."""
        assert text.end is not None
        total = time.monotonic() - self.flow.began
        first = min(self.flow.first or total, total)
        seconds = {
            "total_duration": total,
            "load_duration": 0,
            "prompt_eval_duration": first,
            "eval_duration": total - first,
        }
        counts = {"prompt_eval_count": text.end.n_prompt, "eval_count": text.end.n_new}
        reason = {"done": True, "done_reason": "stop" if text.end.finish == "stop" else "length"}
        return reason | counts | {name: int(s * 1e9) for name, s in seconds.items()}

    def part_told(self, event: Event) -> Json:
        """A token's log-probability, if asked for."""
        if not self.logprobs or event.id is None or event.logprob is None or event.id in self.served.ends:
            return {}
        return {"logprobs": [self.told(Logprob(event.id, event.logprob, event.top))]}

    def told(self, token: Logprob) -> Json:
        """A token with its log-probability, and its rivals'."""
        return self.entry(token.id, token.logprob) | {"top_logprobs": [self.entry(i, p) for i, p in token.top]}

    def entry(self, i: int, logprob: float) -> Json:
        """A token as text and as bytes."""
        spelled = list(token_bytes(self.served.tokenizer, i))
        return {"token": token_text(self.served.tokenizer, i), "logprob": finite(logprob), "bytes": spelled}


class Chatted(Generated):
    """The answer of /api/chat."""

    def content(self, text: str, calls: list[Json]) -> Json:
        """The message."""
        return {"message": {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})}


def ndjson(value: Json) -> str:
    """One line of a stream."""
    return json.dumps(value, ensure_ascii=False) + "\n"

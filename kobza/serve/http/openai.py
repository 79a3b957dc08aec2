"""OpenAI's interface: /v1/models, /v1/completions, /v1/chat/completions, streamed or whole.

What is left out of a request is as the server was started (`Served.sampling`), but for max_tokens: 16 in a completion, as OpenAI
has it, and what the context holds in a chat. A setting that is 0 is 0. With tools on offer a stream brings its words or calls
when the answer is whole: before, nobody knows whether it is a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request

from kobza.config import require
from kobza.serve.http.bodies import REFUSED_CHAT, REFUSED_COMPLETION, ChatCompletion, Completion, Knobs
from kobza.serve.http.replies import Chats, Completions, Json, Reply, Seen
from kobza.serve.http.service import Ask, Flow, Served, Service, requests_of
from kobza.serve.http.strict import StrictRoute

STREAM: Any = {
    200: {"description": "Whole, or with stream=true as server-sent events.", "content": {"text/event-stream": {}}}
}


def router(service: Service, seen: Seen) -> APIRouter:
    """The routes under /v1. seen(flow) is called when a flow has ended."""
    routes = APIRouter(prefix="/v1", route_class=StrictRoute, tags=["OpenAI"])

    @routes.get("/models")
    async def models() -> Json:
        """The models that are served, adapters among them."""
        return {"object": "list", "data": [model_card(served) for served in service.models.values()]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> Json:
        """One model."""
        return model_card(service.find(name))

    @routes.post("/completions", response_model=None, responses=STREAM)
    async def completions(body: Completion, request: Request) -> Any:
        """Continue a prompt, or several."""
        body.check_extra(REFUSED_COMPLETION)
        reply = await completion(service, body)
        return await reply.respond(request, body, seen)

    @routes.post("/chat/completions", response_model=None, responses=STREAM)
    async def chat(body: ChatCompletion, request: Request) -> Any:
        """Answer a conversation by the model's own template."""
        body.check_extra(REFUSED_CHAT)
        reply = await chat_completion(service, body)
        return await reply.respond(request, body, seen)

    return routes


def model_card(served: Served) -> Json:
    """A model as /v1/models lists it."""
    card = {"id": served.name, "object": "model", "created": served.created, "owned_by": "kobza"}
    return card | {"max_model_len": served.max_seq_len}


# ---- bodies -> requests ----------------------------------------------------------------------------------------------


async def ask_of(service: Service, served: Served, body: Knobs, logprobs: int | None, tokens: int, **more: Any) -> Ask:
    """The settings that both endpoints share."""
    names = ("temperature", "top_p", "seed", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram", "min_tokens")
    require(
        body.stream or body.stream_options is None, "stream_options has no effect without stream=true; leave it out"
    )
    if body.stream_options is not None:
        body.stream_options.check_extra({})
    if "constraint" not in more:
        more["constraint"] = await constraint_of(service, served, body)
    return Ask(
        knobs={name: getattr(body, name) for name in names} | {"tokens": tokens},
        stops=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        logit_bias=bias_of(body.logit_bias or {}, served.tokenizer.vocab_size),
        logprobs=logprobs,
        ignore_ends=bool(body.ignore_eos),
        **more,
    )


def bias_of(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    """logit_bias by ids. {"50256": -100} -> {50256: -100}"""
    for key in given:
        good = key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocab_size
        require(good, f"logit_bias has the key {key[:40]!r}; it must be a token id below {vocab_size:,}")
    return {int(key): value for key, value in given.items()}


async def constraint_of(service: Service, served: Served, body: Knobs) -> Any:
    """What response_format, grammar or regex demand; one of them at most."""
    form = body.response_format or {"type": "text"}
    kind = form.get("type")
    require(
        kind in ("text", "json_object", "json_schema"),
        f"response_format.type is {kind!r}; it must be text, json_object or json_schema",
    )
    asked = [name for name in ("grammar", "regex") if getattr(body, name) is not None]
    asked += ["response_format"] if kind != "text" else []
    require(len(asked) <= 1, f"{' and '.join(asked)} are both given; a text can follow one")
    if not asked:
        return None
    require(
        served.grammars is not None, f"{asked[0]} needs grammars, which {served.name} is served without; leave it out"
    )
    assert served.grammars is not None
    if body.grammar is not None:
        return await service.aside(served.grammars.grammar, body.grammar)
    if body.regex is not None:
        return await service.aside(served.grammars.regex, body.regex)
    if kind == "json_object":
        return await service.aside(served.grammars.json_object)
    inner = form.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    require(isinstance(schema, dict), "response_format.json_schema.schema is missing; send a JSON schema")
    return await service.aside(served.grammars.json_schema, schema)


async def completion(service: Service, body: Completion) -> Reply:
    """The texts of /v1/completions before they are written."""
    served = service.find(body.model)
    prompts = await prompts_of(service, served, body.prompt)
    tokens = 16 if body.max_tokens is None else body.max_tokens
    require(tokens > 0 or bool(body.echo), "max_tokens is 0; it must be at least 1, or ask for echo")
    told = bool(body.echo) and body.logprobs is not None
    ask = await ask_of(service, served, body, body.logprobs, max(tokens, 1), prompt_logprobs=told)
    requests = [r for ids in prompts for r in requests_of(service, served, ids, ask, body.n or 1)]
    return Completions(served, Flow(served, requests), tokens == 0, bool(body.echo), body.logprobs)


async def prompts_of(service: Service, served: Served, prompt: Any) -> list[list[int]]:
    """Ids of one prompt or several, given as text or as ids."""
    if isinstance(prompt, str):
        return [await service.encode(served, prompt)]
    if isinstance(prompt[0], str):
        return [await service.encode(served, text) for text in prompt]
    rows = [prompt] if isinstance(prompt[0], int) else prompt
    vocab = served.tokenizer.vocab_size
    bad = next((i for row in rows for i in row if not 0 <= i < vocab), None)
    require(bad is None, f"prompt has the token id {bad}; ids go from 0 to {vocab - 1:,}")
    return [list(row) for row in rows]


async def chat_completion(service: Service, body: ChatCompletion) -> Reply:
    """The answers of /v1/chat/completions before they are written."""
    served = service.find(body.model)
    twice = body.max_tokens is None or body.max_completion_tokens in (None, body.max_tokens)
    require(twice, "max_tokens and max_completion_tokens differ; send one of them")
    require(body.logprobs or not body.top_logprobs, "top_logprobs has no effect without logprobs=true; leave it out")
    tools, choice = body.tools or [], body.tool_choice
    require(bool(tools) or choice in (None, "none", "auto"), "tool_choice has no effect without tools; leave it out")
    ids, forced = await asked(service, served, body.messages, tools, choice)
    most = body.max_completion_tokens or body.max_tokens
    tokens = service.room(served, len(ids)) if most is None else most
    more: dict[str, Any] = {}
    if forced is not None:
        both = (
            body.grammar is None and body.regex is None and (body.response_format or {}).get("type", "text") == "text"
        )
        require(both, "tool_choice demands a call and another field demands a form; send one of them")
        more["constraint"] = forced
    ask = await ask_of(service, served, body, (body.top_logprobs or 0) if body.logprobs else None, tokens, **more)
    flow = Flow(served, requests_of(service, served, ids, ask, body.n or 1))
    return Chats(served, flow, [] if choice == "none" else tools, body.parallel_tool_calls is not False)


async def asked(
    service: Service, served: Served, messages: list[Json], tools: list[Json], choice: Any = None
) -> tuple[list[int], Any]:
    """Ids of a conversation, and what a call must look like where one is demanded."""
    talk = served.talk
    require(talk is not None, f"{served.name} has no chat template; use /v1/completions, or /api/generate")
    assert talk is not None
    size = sum(len(part) for part in texts_of(messages)) + sum(len(part) for part in texts_of(tools))
    most = served.max_seq_len * int(served.tokenizer.piece_bytes.max(initial=1))
    long = f"the messages have {size:,} characters, and {served.max_seq_len:,} tokens hold {most:,} bytes at most"
    require(size <= most, f"{long}; shorten them")
    offered = None if choice == "none" else tools or None
    ids = await service.aside(talk.ids, messages, offered)
    forced = (
        await service.aside(talk.constraint, tools, choice, served.grammars) if offered and served.grammars else None
    )
    demanded = choice not in (None, "auto", "none")
    require(not demanded or forced is not None, f"tool_choice needs grammars, which {served.name} is served without")
    return ids, forced


def texts_of(value: Any) -> Iterator[str]:
    """All texts within a JSON value."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)

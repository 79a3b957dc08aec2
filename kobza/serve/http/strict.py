"""JSON from strangers, and what is wrong with it in one line.

Python's parser takes NaN, lets the last of two equal keys win, turns 1e999 into infinity, dies of nesting and hands on half
surrogate pairs that no UTF-8 holds. Here each of these is refused before anything else sees it, and so is a field that nobody
knows, by the nearest name that somebody does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import anyio.to_thread
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kobza.config import InputError, nearest, require

DEPTH = 64  # of nested lists and objects
DIGITS = 19  # of a whole number: 64 bits
LARGE = 64 << 10  # bytes from which a body is parsed in a thread, so that others are answered meanwhile


def strict_json(raw: bytes) -> Any:
    """The value of a JSON text. InputError says where it is none."""
    try:
        value = json.loads(
            raw.decode("utf-8"),
            parse_constant=lambda name: _refuse(f"{name} is no JSON; send a number or null"),
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_distinct,
        )
    except UnicodeDecodeError as error:
        raise InputError(
            f"the body is not UTF-8: byte 0x{raw[error.start]:02x} at {error.start:,}; send UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"the body is no JSON: {error.msg} at {place}; send one JSON object") from None
    except RecursionError:
        raise InputError(f"the body is nested deeper than {DEPTH} levels; send a flatter one") from None
    _check_depth(value)
    return value


def _refuse(message: str) -> Any:
    raise InputError(message)


def _finite(text: str) -> float:
    require(
        len(text) <= 400 and math.isfinite(float(text)), f"the number {text[:40]} is out of range; send a smaller one"
    )
    return float(text)


def _whole(text: str) -> int:
    require(len(text.lstrip("-")) <= DIGITS, f"the number {text[:40]} has over {DIGITS} digits; send a smaller one")
    return int(text)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InputError(f"the field {twice[:80]!r} stands twice in one object; send it once")
    return values


def _check_depth(value: Any) -> None:
    """Level by level: what nests too deep, and text that no UTF-8 can hold."""
    level = [value]
    for _ in range(DEPTH):
        try:
            for text in (text for item in level for text in _texts(item)):
                text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                "a text holds half of a surrogate pair (\\ud800 to \\udfff); send whole characters"
            ) from None
        level = [part for item in level if isinstance(item, list | dict) for part in _parts(item)]
        if not level:
            return
    raise InputError(f"the body is nested deeper than {DEPTH} levels; send a flatter one")


def _texts(item: Any) -> Iterator[str]:
    if isinstance(item, str):
        yield item
    elif isinstance(item, dict):
        yield from item


def _parts(item: list[Any] | dict[str, Any]) -> Iterator[Any]:
    return iter(item.values() if isinstance(item, dict) else item)


class StrictRequest(Request):
    """A request whose JSON is parsed strictly."""

    async def json(self) -> Any:
        """The body's value."""
        raw = await self.body()
        try:
            return await anyio.to_thread.run_sync(strict_json, raw) if len(raw) > LARGE else strict_json(raw)
        except InputError as error:
            raise HTTPException(400, str(error)) from None


class StrictRoute(APIRoute):
    """A route that reads its body by StrictRequest."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """FastAPI's handler, handed our request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            response: Response = await handler(StrictRequest(request.scope, request.receive))
            return response

        return handle


class UntypedRoute(StrictRoute):
    """The same where clients do not say that they send JSON: the examples that people copy for Ollama do not."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """The handler, told that it is JSON."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            headers = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
            request.scope["headers"] = [*headers, (b"content-type", b"application/json")]
            response: Response = await handler(Request(request.scope, request.receive))
            return response

        return handle


class Body(BaseModel):
    """What all bodies share: types are not converted ("1" is no number), unknown fields are refused by `check_extra`."""

    model_config = {"extra": "allow", "strict": True, "json_schema_extra": {"additionalProperties": False}}

    def check_extra(self, without_effect: dict[str, tuple[tuple[Any, ...], str]]) -> None:
        """Refuse unknown fields, and those that are known but have no effect here unless their value asks for none.
        {"audio": ((None,), "this model writes text")} takes audio=null and refuses the rest, with the reason."""
        for name, value in (self.model_extra or {}).items():
            known = [*type(self).model_fields, *without_effect]
            hint = nearest(name[:80], known)
            hint = hint if hint.startswith("; did you mean") else "; /openapi.json has those there are"
            require(name in known, f"unknown field {name[:80]!r}{hint}")
            harmless, why = without_effect[name]
            good = any(value == h and isinstance(value, bool) == isinstance(h, bool) for h in harmless)
            require(good or ... in harmless, f"{name} {short(value)} cannot be honoured: {why}")


def short(value: Any) -> str:
    """A value for a line of words."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def in_words(error: RequestValidationError) -> tuple[str, str | None]:
    """The first thing that is wrong with a body -> one line, and the field's name."""
    errors = error.errors()
    first, place = errors[0], [str(part) for part in errors[0]["loc"][1:]]
    if not place:
        return "the body is no JSON object; send one, with Content-Type: application/json", None
    if first["type"] == "missing":
        return f"{'.'.join(place)} is missing; send it", place[0]
    same = [e for e in errors if e["loc"][:2] == first["loc"][:2]]  # a field of several forms has an error for each
    forms = list(dict.fromkeys(lowered(e["msg"]) for e in same)) if len(same) > 1 else [lowered(first["msg"])]
    inner = [part for part in place[1:] if len(same) == 1 and (part.isdigit() or part.isidentifier())]
    name = place[0] + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in inner)
    return f"{name} is {short(first.get('input'))}; it must be {' or '.join(forms[:3])}", place[0]


def lowered(message: str) -> str:
    """pydantic's words as the end of a sentence. "Input should be a valid string" -> "a valid string" """
    what = message.removeprefix("Input should be ").removeprefix("Value error, ")
    return what[:1].lower() + what[1:]

"""What the playground's page asks -> a checked Ask. Everything comes as text in form fields, and may be anything."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request

from kobza.config import InputError, SampleConfig, nearest, require
from kobza.studio.app import Playable

MOST_BYTES = 2 << 20  # of a request
MOST_TEXT = 200_000  # characters of a prompt; its tokens are counted once it is short enough to encode
MOST_TOKENS = 4096  # to write at once
MOST_MESSAGES = 200
ROLES = ("system", "user", "assistant")
KNOBS: dict[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "tokens": int,
    "seed": int,
}
FIELDS = [*KNOBS, "model", "at", "prompt", "system", "messages", "ids", "take", "chosen", "draw"]
PAGE_ONLY = {"mode", "compare", "other"}  # of the form, and for the page's own script


async def fields(request: Request) -> dict[str, str]:
    """The form fields of a request, each once and known."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"the request is over {MOST_BYTES:,} bytes; shorten the prompt")
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=40, errors="strict")
    except ValueError:
        raise InputError("the request is no form of at most 40 fields in UTF-8; send it from the page") from None
    found = {name: value for name, value in pairs if name not in PAGE_ONLY}
    for name in found:
        require(name in FIELDS, f"there is no field {name[:40]!r}{nearest(name[:40], FIELDS)}")
    return found


@dataclass(frozen=True)
class Ask:
    """A place in a text (`ids`: what stands before it) and how to go on. `take`: the id to put there first; `chosen`: what stands
    there now; `draw`: which of the seed's draws falls there."""

    playable: Playable
    name: str
    ids: list[int]
    config: SampleConfig
    prompt: str | None  # None: the ids came as such, or from messages
    take: int | None = None
    chosen: int | None = None
    draw: int = 0

    @property
    def command(self) -> str:
        """The line that writes the same in a terminal; empty where there is none."""
        if self.prompt is None:
            return ""
        knobs = {
            name: getattr(self.config, name) for name in KNOBS if getattr(self.config, name) != getattr(PLAIN, name)
        }
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in knobs.items()]
        folder, here = self.playable.loaded.folder, Path.cwd()
        name = folder.relative_to(here) if folder.is_relative_to(here) else folder
        return " ".join(["kobza generate", shlex.quote(str(name)), "--prompt", shlex.quote(self.prompt), *flags])


PLAIN = SampleConfig()


def read(found: Mapping[str, str], name: str, playable: Playable) -> Ask:
    """Fields -> an Ask of an open model, or an InputError that names the field."""
    size, vocab = playable.loaded.run.model.max_seq_len, playable.loaded.tokenizer.vocab_size
    config, ids, prompt = sampling(found), None, None
    if found.get("ids"):
        good = re.fullmatch(r"\d{1,9}(,\d{1,9})*", found["ids"], re.ASCII)
        require(bool(good), f"ids is {found['ids'][:40]!r}; it must be numbers of tokens joined by commas")
        ids = [_token("ids", text, vocab) for text in found["ids"].split(",")]
    elif found.get("messages"):
        require(playable.chat is not None, f"{name} has no chat template; choose Complete")
        assert playable.chat is not None
        ids = list(playable.chat(conversation(found["messages"], found.get("system", ""))))
    else:
        prompt = found.get("prompt") or playable.loaded.tokenizer.line_start()
        require(
            len(prompt) <= MOST_TEXT, f"the prompt has {len(prompt):,} characters; at most {MOST_TEXT:,}; shorten it"
        )
        ids = playable.loaded.tokenizer.encode_prompt(prompt)
    long = f"the text has {len(ids):,} tokens and the context of {name} is {size:,}; shorten it"
    require(0 < len(ids) <= size, long)
    take, chosen = (_token(field, found[field], vocab) if found.get(field) else None for field in ("take", "chosen"))
    draw = _number("draw", found.get("draw", ""), int, 0)
    require(0 <= draw < config.tokens, f"draw is {draw}; it must be in [0, tokens {config.tokens})")
    return Ask(playable, name, ids, config, prompt, take, chosen, draw)


def sampling(found: Mapping[str, str]) -> SampleConfig:
    """The knobs' values, each checked as on the command line and within what the page can show."""
    values = {name: _number(name, found.get(name, ""), kind, getattr(PLAIN, name)) for name, kind in KNOBS.items()}
    for name, most in (("temperature", 2), ("repetition_penalty", 10), ("tokens", MOST_TOKENS)):
        require(values[name] <= most, f"{name} is {values[name]:.6g}; it must be at most {most:,}")
    try:
        return replace(PLAIN, **values)
    except InputError as error:
        raise InputError(str(error).removeprefix("--")) from None


def conversation(text: str, system: str) -> list[dict[str, Any]]:
    """A JSON list of {"role", "content"} -> messages, the system's first."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"messages is {text[:40]!r}; it must be a JSON list") from None
    good = isinstance(said, list) and 0 < len(said) <= MOST_MESSAGES and all(_is_message(one) for one in said)
    require(
        good, f"messages must be 1 to {MOST_MESSAGES} of role ({', '.join(ROLES)}) and content (text); start a new chat"
    )
    length = len(system) + sum(len(one["content"]) for one in said)
    require(length <= MOST_TEXT, f"the chat has {length:,} characters; at most {MOST_TEXT:,}; start a new one")
    return [{"role": "system", "content": system}, *said] if system else said


def _is_message(one: Any) -> bool:
    shaped = isinstance(one, dict) and one.keys() == {"role", "content"} and one["role"] in ROLES
    return shaped and isinstance(one["content"], str)


def _token(name: str, text: str, vocab_size: int) -> int:
    i = _number(name, text, int, 0)
    require(0 <= i < vocab_size, f"{name} has {i}; the vocabulary has ids from 0 to {vocab_size - 1:,}")
    return i


def _number(name: str, text: str, kind: type, default: Any) -> Any:
    try:
        return kind(text) if text else default
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"{name} is {text[:40]!r}; it must be {what}") from None

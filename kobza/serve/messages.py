"""OpenAI's messages and tools, checked and read into the form that chat templates know; what is wrong is named in one line."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from kobza.config import require
from kobza.formats.chat import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_TOOLS = 128  # OpenAI's limit
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of a tool: OpenAI's rule
NAMED = "a name has 1 to 64 letters, digits, _ and -"
Tool = dict[str, Any]


def read_messages(messages: Any, arguments_as_text: bool) -> list[Message]:
    """All messages of a chat; a template wants the arguments of calls as objects, or as JSON text."""
    require(isinstance(messages, list) and bool(messages), "messages must be a list of at least one message")
    return [read_message(message, i, arguments_as_text) for i, message in enumerate(messages)]


def read_message(message: Any, i: int, arguments_as_text: bool = False) -> Message:
    """One of OpenAI's messages as templates know it: content a text, arguments an object (or text), no developers."""
    where = f"messages[{i}]"
    require(
        isinstance(message, dict), f"{where} is a {type(message).__name__}; it must be an object with role and content"
    )
    role = message.get("role")
    known = isinstance(role, str) and role in ROLES
    require(known, f"{where}.role is {str(role)[:40]!r}; it must be one of {', '.join(ROLES)}")
    read: Message = {
        "role": "system" if role == "developer" else role,
        "content": _content(message.get("content"), where),
    }
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            require(
                isinstance(message[key], str), f"{where}.{key} is a {type(message[key]).__name__}; it must be a text"
            )
            read[key] = message[key]
    calls = message.get("tool_calls")
    if calls:
        require(role == "assistant", f"{where}.tool_calls: only an assistant calls tools, and its role is {role}")
        require(isinstance(calls, list), f"{where}.tool_calls is a {type(calls).__name__}; it must be a list")
        read["tool_calls"] = [
            _read_call(call, f"{where}.tool_calls[{j}]", arguments_as_text) for j, call in enumerate(calls)
        ]
    empty = message.get("content") is None and not calls
    require(not empty, f"{where} has no content; give a text")
    return read


def _content(content: Any, where: str) -> str:
    """A message's text, out of a text or a list of parts of text."""
    if content is None or isinstance(content, str):
        return content or ""
    require(
        isinstance(content, list),
        f"{where}.content is a {type(content).__name__}; it must be a text or a list of parts",
    )
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        readable = kind == "text" and isinstance(part.get("text"), str)
        require(
            readable,
            f"{where}.content[{j}] is of type {str(kind)[:40]!r}; this model reads text alone: send type 'text'",
        )
    return "".join(part["text"] for part in content)


def _read_call(call: Any, where: str, arguments_as_text: bool) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    require(
        isinstance(name, str) and bool(NAME.fullmatch(name)), f"{where}.function.name is {str(name)[:64]!r}; {NAMED}"
    )
    given = function.get("arguments", "{}")
    arguments = as_object(given)
    require(arguments is not None, f"{where}.function.arguments is no JSON object: {str(given)[:60]!r}")
    said = json.dumps(arguments, ensure_ascii=False) if arguments_as_text else arguments
    return tool_call(name, said, str(call.get("id") or _new_id()))


def check_tools(tools: Any) -> None:
    """Refuse what are no tools in OpenAI's form."""
    require(isinstance(tools, list), f"tools is a {type(tools).__name__}; it must be a list")
    require(len(tools) <= MOST_TOOLS, f"{len(tools)} tools; at most {MOST_TOOLS} are offered at once")
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        require(isinstance(function, dict), f"{where} must be {{'type': 'function', 'function': {{'name': ...}}}}")
        name = function.get("name")
        require(
            isinstance(name, str) and bool(NAME.fullmatch(name)),
            f"{where}.function.name is {str(name)[:64]!r}; {NAMED}",
        )
        good = isinstance(function.get("parameters", {}), dict)
        require(
            good,
            f"{where}.function.parameters is a {type(function.get('parameters')).__name__}; it must be a JSON schema",
        )
    names = tool_names(tools)
    twice = next((name for name in names if names.count(name) > 1), "")
    require(not twice, f"two tools are named {twice!r}; give each a name of its own")


def tool_names(tools: list[Tool]) -> list[str]:
    """In the order in which they are offered."""
    return [tool["function"]["name"] for tool in tools]


def as_object(value: Any) -> dict[str, Any] | None:
    """A JSON object, itself or as text; None where it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def tool_call(name: str, arguments: Any, i: str = "") -> dict[str, Any]:
    """A call in OpenAI's form."""
    return {"id": i or _new_id(), "type": "function", "function": {"name": name, "arguments": arguments}}


def _new_id() -> str:
    """Nine letters and digits: what the strictest templates take back."""
    return secrets.token_hex(5)[:9]

"""How a template writes tool calls, found by probing; and how such calls are read back and asked for.

A made-up tool is offered: where the text changes and holds its name, tools reach the model. A made-up call of it is rendered as
an assistant's: what stands before, between and behind the name and the arguments is the frame, `CallForm`. Forms whose arguments
are JSON are known: objects or lists, bare or between marks (Hermes, Qwen, Llama, Mistral Nemo, Granite), and a name before JSON
arguments (Mistral Small, Kimi, gpt-oss). From a form come the heads by which an answer is read, with special tokens spelled or
left out, and the Lark grammar that holds a model to one well-formed call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from kobza.config import InputError
from kobza.formats.chat import Message, Template
from kobza.serve.constraint import COMPACT
from kobza.serve.messages import NAME, Tool, as_object, tool_call

ID = "zq0id0001"  # of the probe's call: nine letters and digits, as Mistral's templates demand
ARGUMENTS = {"zqkey": "zqvalue"}
PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "zqname",
        "description": "zqdescription",
        "parameters": {"type": "object", "properties": {"zqkey": {"type": "string", "description": "zq"}}},
    },
}
ASK = {"role": "user", "content": "zquser"}
Call = tuple[str, str]  # name, arguments as JSON text


@dataclass(frozen=True)
class CallForm:
    """How a template writes a call: `before` JSON `after`, or with a `middle`: `before` name `middle` JSON `after`."""

    before: str
    after: str
    middle: str | None = None
    again: str | None = None  # from the JSON of one call to the next call's JSON, or its name; None: one call at a time
    lead: str = ""  # what the template puts before any answer (an empty thought), and a model may leave out
    name_path: tuple[str, ...] = ()  # of the name in the JSON, where it has no `middle`
    arguments_path: tuple[str, ...] = ()
    listed: bool = False  # the JSON is a list of calls
    constants: dict[str, Any] = field(default_factory=dict)  # what else stands in each call's JSON
    as_text: bool = False  # the template wants a call's arguments as JSON text


class Heads(NamedTuple):
    """What stands before the JSON of a first call and of a further one; the only group is the name, where it stands outside."""

    first: re.Pattern[str]
    further: re.Pattern[str] | None
    marked: bool  # else the call must begin the text


# ---- found -----------------------------------------------------------------------------------------------------------


def offers(template: Template) -> bool:
    """Whether tools given to the template reach the model."""
    try:
        plain = template.render([ASK], add_generation_prompt=True)
        told = template.render([ASK], add_generation_prompt=True, tools=[PROBE_TOOL])
    except InputError:
        return False
    return told != plain and "zqname" in told and "zqname" not in plain


def find_form(template: Template, end_names: Collection[str]) -> CallForm | None:
    """How a template writes an assistant's call; None where it takes no tools, writes no calls, or not as JSON."""
    for content in ("", None) if offers(template) else ():
        whole = _called(template, content, ARGUMENTS)
        as_text = not whole or str(ARGUMENTS) in whole  # it wants text: an object fails it, or stands as Python's
        arguments = json.dumps(ARGUMENTS) if as_text else ARGUMENTS
        form = _form(template, _called(template, content, arguments), end_names)
        if form is not None:
            return replace(form, as_text=as_text, again=_again(_called(template, content, arguments, 2), form))
    return None


def _called(template: Template, content: str | None, arguments: Any, n: int = 1) -> str:
    """A conversation that ends in n calls, rendered; "" where the template refuses it."""
    calls = [tool_call("zqname", arguments, ID) for _ in range(n)]
    answer: Message = {"role": "assistant", "content": content, "tool_calls": calls}
    try:
        return template.render([ASK, answer], tools=[PROBE_TOOL])
    except InputError:
        return ""


def _form(template: Template, whole: str, end_names: Collection[str]) -> CallForm | None:
    """The frame of the one call that a rendered conversation ends in."""
    if not whole:
        return None
    prompt = template.render([ASK], add_generation_prompt=True, tools=[PROBE_TOOL])
    plain = template.render([ASK, {"role": "assistant", "content": "zqanswer"}], tools=[PROBE_TOOL])
    header = plain.partition("zqanswer")[0]
    start = max((text for text in (prompt, header) if whole.startswith(text)), key=len, default=None)
    form = None if start is None else _frame(whole[len(start) :], end_names)
    lead = start.removeprefix(prompt) if start and start.startswith(prompt) else ""
    return form and replace(form, lead=lead)


def _frame(text: str, end_names: Collection[str]) -> CallForm | None:
    """The frame of the probe's call in what a template renders behind a prompt."""
    for start, value, stop in _json_values(text):
        call = value[0] if isinstance(value, list) and value else value
        name, arguments = _path(call, "zqname"), _path(call, ARGUMENTS)
        after = _up_to(text[stop:], end_names)
        if name and arguments:
            others = {key: v for key, v in call.items() if key not in (name[0], arguments[0]) and v != ID}
            paths = {"name_path": name, "arguments_path": arguments, "listed": isinstance(value, list)}
            return CallForm(text[:start], after, **paths, constants=others)
        place = text.rfind("zqname", 0, start)
        if value == ARGUMENTS and place >= 0:
            return CallForm(text[:place], after, text[place + len("zqname") : start])
    return None


def _again(text: str, form: CallForm) -> str | None:
    """What stands between two calls of a rendered conversation; None where it has no two."""
    spans = [
        (start, stop)
        for start, value, stop in _json_values(text)
        if ARGUMENTS in (value, _at(value, form.arguments_path))
    ]
    if len(spans) < 2:
        return None
    between = text[spans[-2][1] : spans[-1][0]]
    return between if form.middle is None else between[: between.rindex("zqname")] if "zqname" in between else None


def _up_to(text: str, names: Collection[str]) -> str:
    """A text up to the first of the names in it."""
    return text[: min((i for name in names if (i := text.find(name)) >= 0), default=len(text))]


def _json_values(text: str) -> list[tuple[int, Any, int]]:
    """The JSON objects and lists that stand in a text, the outermost: (start, value, stop)."""
    values, stop = [], 0
    for match in re.finditer(r"[{\[]", text):
        value, end = _json_at(text, match.start()) if match.start() >= stop else (None, 0)
        if value:
            values.append((match.start(), value, end))
            stop = end
    return values


def _json_at(text: str, place: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, and where it ends; None where none does."""
    try:
        return json.JSONDecoder().raw_decode(text, place)
    except (ValueError, RecursionError):
        return None, place


def _path(value: Any, wanted: Any) -> tuple[str, ...]:
    """The keys that lead to a value in nested objects; () where it is not there. _path({"a": {"b": 1}}, 1) -> ("a", "b")"""
    for key, part in value.items() if isinstance(value, dict) else ():
        if part == wanted or (isinstance(wanted, dict) and isinstance(part, str) and as_object(part) == wanted):
            return (key,)
        if deeper := _path(part, wanted):
            return (key, *deeper)
    return ()


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


# ---- read ------------------------------------------------------------------------------------------------------------


def heads_of(form: CallForm, hidden: re.Pattern[str]) -> list[Heads]:
    """The heads of a text that shows special tokens, and of one that does not; `hidden` matches their names."""
    parts = (form.before, form.middle, form.again)
    ways = dict.fromkeys([parts, tuple(part and hidden.sub("", part) for part in parts)])
    return [
        Heads(
            _head(before or "", middle), None if again is None else _head(again, middle), bool((before or "").strip())
        )
        for before, middle, again in ways
    ]


def _head(before: str, middle: str | None) -> re.Pattern[str]:
    """What stands before the JSON of a call, white space and numbers free; its only group is the name, where it has a middle."""

    def loose(text: str) -> str:
        escaped = r"\s*".join(map(re.escape, text.split())).replace(ID, "[A-Za-z0-9]+")
        return re.sub(r"(?<![\w-])\d+(?![\w-])", r"\\d+", escaped)  # Kimi counts its calls

    named = "" if middle is None else rf"\s*({NAME.pattern})\s*{loose(middle)}"
    return re.compile(rf"{loose(before)}{named}\s*")


def read_calls(text: str, heads: Heads, form: CallForm) -> tuple[int, list[Call]]:
    """Where the first call of a text begins, and all of them."""
    first, further, marked = heads
    match = first.search(text) if marked else first.match(text, len(text) - len(text.lstrip()))
    start, found = match.start() if match else 0, []
    while match:
        read, stop = _calls_at(text, match, form)
        found += read
        match = None
        if read:
            bare = re.compile(r"[\s;,]*(?=[{\[])").match(text, stop) if form.middle is None else None
            match = (further and further.match(text, stop)) or (first.search(text, stop) if marked else None) or bare
    return start, found


def _calls_at(text: str, head: re.Match[str], form: CallForm) -> tuple[list[Call], int]:
    """The calls behind one head, and where their JSON ends; none unless all are well-formed."""
    value, stop = _json_at(text, head.end())
    if form.middle is not None:
        pairs = [(head[1], value)]
    else:
        pairs = [
            (_at(v, form.name_path), _at(v, form.arguments_path))
            for v in (value if isinstance(value, list) else [value])
        ]
    read = [(name, as_object(arguments)) for name, arguments in pairs if isinstance(name, str)]
    if not read or len(read) < len(pairs) or any(arguments is None for _, arguments in read):
        return [], stop
    return [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in read], stop


# ---- asked for -------------------------------------------------------------------------------------------------------


def lark_of(form: CallForm, tools: list[Tool], specials: Mapping[str, int]) -> str:
    """The grammar of one call of one of the tools."""
    before, after = _literal(form.before, specials), _literal(form.after, specials)
    lead = f"({_literal(form.lead, specials)})? " if form.lead else ""
    if form.middle is None:
        calls = [_call_schema(form, tool["function"]) for tool in tools]
        schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if form.listed:
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
        return f"start: {lead}{before} %json {_json(schema)} {after}"
    rules = [
        f"call{i}: {_literal(form.before + tool['function']['name'] + form.middle, specials)} "
        f"%json {_json(_parameters(tool['function']))} {after}"
        for i, tool in enumerate(tools)
    ]
    return "\n".join([f"start: {lead}({' | '.join(f'call{i}' for i in range(len(rules)))})", *rules])


def _literal(text: str, specials: Mapping[str, int]) -> str:
    """A text in a Lark grammar, its special tokens as such, and any id where the probe's stands."""
    names, spelled = sorted(filter(None, specials), key=len, reverse=True), []
    for part in re.split(f"({'|'.join(map(re.escape, [*names, ID]))})", text):
        if part in specials:
            spelled.append(f"<[{specials[part]}]>")
        elif part:
            spelled.append("/[a-zA-Z0-9]{9}/" if part == ID else json.dumps(part, ensure_ascii=False))
    return " ".join(spelled)


def _json(schema: dict[str, Any]) -> str:
    """A schema within a Lark grammar."""
    return json.dumps(schema | {"x-guidance": COMPACT})


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments: always an object."""
    return {"type": "object"} | (function.get("parameters") or {"properties": {}, "additionalProperties": False})


def _call_schema(form: CallForm, function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a call's JSON, its keys where the template puts them."""

    def nested(parts: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
        keys = list(dict.fromkeys(path[0] for path, _ in parts))
        inner = {key: [(path[1:], schema) for path, schema in parts if path[0] == key] for key in keys}
        made = {key: rest[0][1] if rest[0][0] == () else nested(rest) for key, rest in inner.items()}
        return {"type": "object", "properties": made, "required": keys, "additionalProperties": False}

    constants: list[tuple[tuple[str, ...], Any]] = [((key,), {"const": value}) for key, value in form.constants.items()]
    return nested(
        [*constants, (form.name_path, {"const": function["name"]}), (form.arguments_path, _parameters(function))]
    )

"""Chats in OpenAI's messages -> token ids, tools included, and a model's answer -> text and tool calls.

What a template can do is probed, never guessed from a family's name (calls.py). Tools are offered only to templates that have a
place for them and write calls that can be read back; all else is refused in a line. Nothing a user says, nor a tool's
description or a key of its schema, can be a control token: see formats/chat.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from functools import cached_property
from threading import Lock
from typing import Any, Protocol

from kobza.config import InputError, nearest, require
from kobza.formats.chat import NAMES, ChatEncoder, Message, Template
from kobza.serve.calls import CallForm, find_form, heads_of, lark_of, read_calls
from kobza.serve.constraint import Constraint
from kobza.serve.messages import Tool, check_tools, read_messages, tool_call, tool_names
from kobza.tokenizer import Tokenizer


class Grammar(Protocol):
    """What is needed of constraint.Grammars."""

    def grammar(self, lark: str) -> Constraint:
        """A text of a Lark grammar."""


class Talk:
    """A chat template at work for one tokenizer. Thread-safe; renders in milliseconds, so call it off the event loop.

    `ends`: the ids a model was released to stop at, which its template may not know of (Llama's <|eom_id|> behind a call).
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, ends: Collection[int] = ()):
        self.template, self.tokenizer = template, tokenizer
        self.name = getattr(template, "name", "the chat template")
        self._encoder, self._lock = _Encoder(template, tokenizer, ends), Lock()
        self.ends = sorted({*ends, *self._encoder.ends.values()})

    def ids(self, messages: list[Message], tools: list[Tool] | None = None, **extra: Any) -> list[int]:
        """The ids to be continued by an answer. An assistant's message that comes last is what the answer begins with.

        messages: OpenAI's, content as text or as parts of text. `extra` are further variables of the template.
        """
        read = read_messages(messages, self.form is not None and self.form.as_text)
        none = f"{self.name} has no tool calls, or none whose arguments are JSON; leave out"
        if tools:
            check_tools(tools)
            require(self.form is not None, f"{none} `tools`, or serve a model that was trained with them")
            extra["tools"] = tools
        calls = any(message.get("tool_calls") or message["role"] == "tool" for message in read)
        require(not calls or self.form is not None, f"{none} messages with calls and their results")
        with self._lock:
            return self._encoder.ask(read, **extra)

    def parse(self, text: str, tools: list[Tool]) -> tuple[str | None, list[dict[str, Any]]]:
        """An answer -> its words (None where there are only calls) and OpenAI's tool_calls, arguments as JSON text.

        `text` may spell special tokens or leave them out. What is no well-formed call of a tool on offer remains words.
        """
        if self.form is None or not tools:
            return text, []
        for heads in heads_of(self.form, self._hidden):
            start, calls = read_calls(text, heads, self.form)
            if calls and all(name in tool_names(tools) for name, _ in calls):
                return text[:start].strip() or None, [tool_call(name, arguments) for name, arguments in calls]
        return text, []

    def parse_ids(self, ids: Sequence[int], tools: list[Tool]) -> tuple[str | None, list[dict[str, Any]]]:
        """The same from an answer's ids: surer, where marks of a call are special tokens, which a decoded text does not show."""
        names = {i: name for name, i in self.tokenizer.specials.items() if i not in self.ends}
        spelled = b"".join(names[i].encode() if i in names else self.tokenizer.pieces[i] for i in ids)
        words, calls = self.parse(spelled.decode("utf-8", errors="replace"), tools)
        if not calls:
            return self.tokenizer.decode(ids, continues=True), []
        return words and self._hidden.sub("", words).strip() or None, calls

    def constraint(self, tools: list[Tool], choice: Any, grammars: Grammar) -> Constraint | None:
        """What tool_choice demands: None for "auto" and "none"; a well-formed call for "required" and {"function": {"name"}}."""
        if choice in (None, "auto", "none"):
            return None
        check_tools(tools)
        wanted = tools
        if choice != "required":
            inner = choice.get("function") if isinstance(choice, dict) else None
            name = inner.get("name") if isinstance(inner, dict) else None
            known = "auto, none, required or {'type': 'function', 'function': {'name': ...}}"
            require(isinstance(name, str), f"tool_choice is {str(choice)[:60]!r}; it must be {known}")
            wanted = [tool for tool in tools if tool["function"]["name"] == name]
            require(
                bool(wanted),
                f"tool_choice names {str(name)[:64]!r}, no tool here{nearest(str(name), tool_names(tools))}",
            )
        require(bool(wanted), "tool_choice is 'required' and there are no tools; give some")
        if self.form is None:
            raise InputError(f"{self.name} has no form for tool calls; tool_choice must be 'auto' or 'none'")
        return grammars.grammar(lark_of(self.form, wanted, self.tokenizer.specials))

    @property
    def takes_tools(self) -> bool:
        """Whether tools can be offered: they reach the model, and its calls can be read."""
        return self.form is not None

    @cached_property
    def form(self) -> CallForm | None:
        """How the template writes an assistant's call, if it does."""
        names = [name for name, i in self.tokenizer.specials.items() if i in self.ends]
        return find_form(self.template, names)

    @cached_property
    def _hidden(self) -> re.Pattern[str]:
        """The names of special tokens, which a decoded text does not show."""
        names = sorted(filter(None, self.tokenizer.specials), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")


class _Encoder(ChatEncoder):
    """A ChatEncoder that also guards what it is not given in messages: tools, and the keys of their schemas and of arguments."""

    def ask(self, messages: list[Message], **extra: Any) -> list[int]:
        """Ids up to an answer; one that is begun (an assistant's message comes last) is gone on with."""
        self._open(messages, extra)
        self._extra = self._guard(extra)
        begun = messages[-1]["role"] == "assistant"
        require(
            not begun or not messages[-1].get("tool_calls"), "the last message is a finished tool call; add its result"
        )
        asked = messages[:-1] if begun else messages
        require(bool(asked), "the only message is an assistant's; begin with a user's")
        text = self._text(len(asked), True)
        lost = self._lost(asked, text) or self._lost_result(asked, text)
        require(not lost, lost)
        return self._ids(text + (self._guarded_messages[-1]["content"] if begun else ""))

    def _lost_result(self, messages: list[Message], text: str) -> str:
        """Which tool's result a rendered text leaves out, as a complaint; "" where it has all. Some quote it as JSON."""
        words = self._words(text)
        for message, safe in zip(messages, self._guarded_messages, strict=False):
            said = safe["content"].strip() if message["role"] == "tool" else ""
            forms = (said, json.dumps(said, ensure_ascii=False)[1:-1])
            if not any(form in words for form in forms) and said[:1] not in ("{", "["):
                return f"{self._name}: drops what the tool says ({message['content'][:40]!r}); leave it out"
        return ""

    def _guard(self, value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {self._word(name): self._guard(part, name) for name, part in value.items()}
        return self._word(value) if isinstance(value, str) and key in NAMES else super()._guard(value, key)

    def _word(self, name: str) -> str:
        """A key, or a name that templates compare: plain words stay, else nothing is replaced but what could be a token."""
        plain = re.fullmatch(r"\w*", name) and not self._special.search(name)
        return name if plain else self._guarded(name)

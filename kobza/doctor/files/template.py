"""Chat templates: the laws a rendering must keep, each broken one shown by a conversation that breaks it.

`open_` takes a model's folder, a .jinja file, a .gguf or a Modelfile, and makes a TemplateSubject. No weights are read and no
torch is loaded; templates are rendered by formats/template.py, where they can do no harm. A law is broken only by what no
released template does on purpose: Phi-3 closes a whole conversation with its end-of-text, Llama-2 leaves the space before an
answer to the model, Qwen3 takes thoughts out of the history, Gemma refuses a system message. Those are facts here, no findings.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kobza.config import InputError, require
from kobza.doctor.files.coder import Coder
from kobza.doctor.files.turns import (
    CONTROL,
    SYSTEM,
    THOUGHT,
    Message,
    answer,
    conversations,
    dialogue,
    difference,
    rest_after_common,
    shown,
    take_apart,
    user,
)
from kobza.doctor.finding import Check, Finding, Severity, Skip
from kobza.doctor.training.sources import Source, messages_of
from kobza.formats.gotemplate import GoTemplate, Modelfile, read_modelfile
from kobza.formats.template import ChatTemplate, Refused, find_template, inside, read_text, token_text

NOW = "2024-07-26T12:00:00"  # what strftime_now says here: two renderings must not differ by the clock
OWN_ENDS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")
STAND_INS = {"bos": "<s>", "eos": "</s>"}
TOOLS = [
    {"type": "function", "function": {"name": "zqadd", "description": "Adds <2>", "parameters": {"type": "object"}}}
]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": user(0)},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "zqadd", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "name": "zqadd", "content": "42"},
]
N_CONVERSATIONS = 40  # compared with another template
MOST_ROWS = 2000  # of a training file
ANSWERS = (answer(0), "the answer", "Sure, here it is.", "In 1 word: yes", "Так", "{}")
INDENTED = "Look:\n    def f():\n\n        return  1\n# end"
# Ordinary text in which no stop string may occur.
ORDINARY = (
    "Sure! Here is a list:\n1. One\n2. Two\n\nAnd a table:\n| a | b |\n|---|---|\n\n### Heading\n\n**Bold**, _italic_, `code`.",
    'def f(x):\n    """Doc."""\n    return {"a": [1, 2]}  # note\n\n\nif __name__ == "__main__":\n    print(f(3) < 4 and 5 > 4)',
    "The user said: hello. The assistant answered; the system was down. User input is end of line. Question? Answer!\n---\nend",
    "Dear Sir or Madam,\n\nWe are 10% off (really) on 3/4 of <b>all</b> items & more...\n\nYours,\nJ. [signed]",
)


@dataclass
class TemplateSubject:
    """A template and what is known of the model around it. `render` remembers; after a hostile template was stopped once, it is
    not tried again."""

    name: str
    template: ChatTemplate | GoTemplate
    tokens: Tokens | None = None
    ends: list[str] | None = None
    """the texts of the tokens that end a generation; None where no file says"""
    modelfile: Modelfile | None = None
    against: TemplateSubject | None = None
    rows: Path | None = None
    _done: dict[str, str | InputError] = field(default_factory=dict)
    _stopped: InputError | None = None

    @property
    def go(self) -> bool:
        """Whether the template is Ollama's, which always asks for an answer."""
        return isinstance(self.template, GoTemplate)

    def render(self, messages: Sequence[Message], ask: bool = False, tools: list[Any] | None = None) -> str:
        """The rendered text; Refused or InputError as the template does."""
        if self._stopped is not None:
            raise Skip(f"the template does not render: {self._stopped}")
        key = json.dumps([messages, ask, tools])
        if key not in self._done:
            try:
                self._done[key] = self.template.render(messages, add_generation_prompt=ask, tools=tools)
            except Refused as refusal:
                self._done[key] = refusal
            except InputError as error:
                self._done[key] = error
                hostile = any(word in str(error) for word in ("stopped", "sandbox", "not a Jinja", "process"))
                if hostile or messages == dialogue(1, last_answer=False):
                    self._stopped = error
        result = self._done[key]
        if isinstance(result, InputError):
            raise result
        return result

    def try_render(self, messages: Sequence[Message], ask: bool = False, tools: list[Any] | None = None) -> str | None:
        """The rendered text, None where the template does not render this."""
        try:
            return self.render(messages, ask, tools)
        except InputError:
            return None

    def training(self, n: int, system: str = "") -> str:
        """dialogue(n) as a model is trained on it, with the end of its last turn where the dialect can show it."""
        return self.render(dialogue(n, system))


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokenizer: special tokens, and an `encode` of text with (or without) them read out of it."""

    specials: frozenset[str]
    bos: str
    adds_bos: bool | None
    """whether plain text gets a beginning put before it; None where no file says"""
    encode: Callable[[str], list[int]] | None = None
    show: Callable[[Sequence[int]], list[str]] | None = None


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_(path: Path, against: Path | None = None, train_jsonl: Path | None = None) -> TemplateSubject:
    """The subject behind a folder, .jinja, .gguf or Modelfile. `against`: another of these, which must render the same."""
    subject = _open_one(Path(path))
    if against is not None:
        subject.against = _open_one(Path(against))
    if train_jsonl is not None:
        require(Path(train_jsonl).is_file(), f"{train_jsonl}: no such file; give a .jsonl of messages")
        subject.rows = Path(train_jsonl)
    return subject


def _open_one(path: Path) -> TemplateSubject:
    require(
        path.exists(), f"{path}: no such file or folder; give a model's folder, a .jinja file, a .gguf or a Modelfile"
    )
    if path.name == "chat_template.jinja" and (path.parent / "tokenizer_config.json").is_file():
        path = path.parent
    if path.is_file() and path.suffix not in (".jinja", ".jinja2", ".j2", ".gguf", ".json"):
        return _of_modelfile(path)
    template = find_template(path)
    require(
        template is not None,
        f"{path}: no chat template in it; a base model has none, and then there is nothing to check",
    )
    assert template is not None
    if isinstance(template, GoTemplate):
        return _of_modelfile(path / "Modelfile" if path.is_dir() else path)
    template = dataclasses.replace(template, now=NOW)
    if path.is_dir():
        tokens, ends = _folder_tokens(path)
    elif path.suffix == ".gguf":
        tokens, ends = _gguf_tokens(path)
    else:
        tokens, ends = None, None  # and for the tokens that a file of a template cannot know, stand-ins
        named = {name: text for name, text in STAND_INS.items() if f"{name}_token" in template.source}
        template = dataclasses.replace(template, **named)
    return TemplateSubject(path.name or str(path), template, tokens, ends)


def _of_modelfile(path: Path) -> TemplateSubject:
    modelfile = read_modelfile(path)
    tokens, ends, template = None, None, modelfile.template
    beside = path.parent / modelfile.from_
    if beside.suffix == ".gguf" and inside(path.parent, modelfile.from_):
        tokens, ends = _gguf_tokens(beside)
    require(
        template is not None,
        f"{path}: no TEMPLATE in it; Ollama then takes the one of {modelfile.from_}: check that file",
    )
    assert template is not None
    return TemplateSubject(path.name, template, tokens, ends, modelfile)


def _json(folder: Path, name: str) -> dict[str, Any]:
    file = inside(folder, name)
    try:
        value = json.loads(read_text(file)) if file else {}
    except (ValueError, RecursionError):
        return {}  # config.py and tokenizer.py report what cannot be read
    return value if isinstance(value, dict) else {}


def _folder_tokens(folder: Path) -> tuple[Tokens | None, list[str] | None]:
    """What tokenizer.json, tokenizer_config.json and generation_config.json say, as far as they are there."""
    file = inside(folder, "tokenizer.json")
    coder = Coder(file) if file else None  # it loads while this process reads the same file
    config, whole = _json(folder, "tokenizer_config.json"), _json(folder, "tokenizer.json")
    added = whole.get("added_tokens")
    listed = [token for token in (added if isinstance(added, list) else []) if isinstance(token, dict)]
    decoder = config.get("added_tokens_decoder")
    listed += [t | {"id": i} for i, t in decoder.items() if isinstance(t, dict)] if isinstance(decoder, dict) else []
    names = {str(token.get("id")): token["content"] for token in listed if isinstance(token.get("content"), str)}
    if not names:
        return None, None
    ends = None
    for source in (_json(folder, "generation_config.json"), _json(folder, "config.json")):
        if ends is None and source.get("eos_token_id") is not None:
            given = source["eos_token_id"]
            ends = [names.get(str(i), f"id {i}") for i in (given if isinstance(given, list) else [given])]
    if ends is None and token_text(config.get("eos_token")):
        ends = [token_text(config.get("eos_token"))]
    bos, known = token_text(config.get("bos_token")), frozenset(names.values())
    try:
        adds = _adds(coder, bos)
    except InputError:  # tokenizer.py says what is wrong with it
        coder = adds = None
    return Tokens(known, bos, adds, coder and coder.ids, coder and coder.names), ends


def _adds(coder: Coder | None, bos: str) -> bool | None:
    """Whether plain text gets the beginning put before it; None where nothing tells."""
    if coder is None:
        return None
    first = coder.ids("zq", special=True)[:1]  # asked in any case: a tokenizer that fails must fail here
    return bool(bos) and coder.names(first) == [bos]


def _gguf_tokens(path: Path) -> tuple[Tokens | None, list[str] | None]:
    from kobza.formats.gguf import read_gguf

    metadata = read_gguf(path).metadata
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return None, None  # gguf.py reports what is wrong with it
    kinds = types.tolist() if isinstance(types, np.ndarray) else []
    specials = frozenset(
        token for token, kind in zip(tokens, kinds, strict=False) if kind in (3, 4)
    )  # control, user defined

    def named(key: str) -> str:
        i = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[i] if isinstance(i, int) and 0 <= i < len(tokens) else ""

    ends = [token for token in (named("eos"), named("eot"), named("eom")) if token]
    adds = metadata.get("tokenizer.ggml.add_bos_token")
    return Tokens(specials, named("bos"), adds if isinstance(adds, bool) else None), ends or None


# ---- C1, C2: what asks for an answer ---------------------------------------------------------------------------------


def check_generation_prompt(subject: TemplateSubject) -> Iterator[Finding]:
    """The prompt for an answer is the beginning of the conversation with the answer in it, and stands there only once."""
    messages = dialogue(1, last_answer=False)
    asked, whole = subject.render(messages, ask=True), _whole(subject)
    place = whole.find(answer(0))
    if place < 0:
        return  # C3's
    before = whole[:place]
    yield from _header_at_end(subject, asked)
    left, opened = (a[len(b) :] if a.startswith(b) else None for a, b in ((before, asked), (asked, before)))
    if left in ("", " ") or any(text is not None and _thought(text) for text in (left, opened)):
        return  # Llama-2 leaves the blank before an answer to the model; others leave it a thought, or open one for it
    where, show = subject.name, f"messages = {json.dumps(messages)}"
    _, got, expected = (
        difference(asked[-200:], before[-200:]) if len(asked) == len(before) else (0, shown(asked), shown(before))
    )
    example = f"{show}, answer {answer(0)!r}: asked {shown(asked)}, trained {shown(before + answer(0))}"
    if "".join(asked.split()) == "".join(before.split()):
        why = "the model is asked after other white space than it was trained after; it writes the rest itself, or goes astray"
        fix = "end the generation prompt in exactly the white space that precedes an answer in the history"
        yield Finding("C2", "error", "proven", where, f"a prompt that ends {expected}", got, why, fix, example)
        return
    if _reasons(subject, messages, asked):
        return
    header = _opened(subject, messages, asked, before)
    fix = "{% if add_generation_prompt %}...{% endif %} at the end, with exactly what precedes an answer in the history"
    severity: Severity = "error"
    if header and before.startswith(asked):
        why, severity = (
            f"the model writes {shown(before[len(asked) :], 60)} itself, as it does after every question",
            "info",
        )
    elif header and asked.startswith(before):
        why, severity = f"the prompt says {shown(asked[len(before) :], 60)}, which the history leaves out", "warn"
    elif header and MARKS.fullmatch(asked[header:]) and MARKS.fullmatch(before[header:]):
        why, severity = "the prompt opens another part of the answer than the history has", "warn"
    elif before.startswith(asked):
        why = "without the assistant's header the model goes on with the user's turn"
    else:
        why = "what the model is asked to go on from never stood before an answer in training"
    yield Finding("C1", severity, "proven", where, f"a prompt that ends {expected}", got, why, fix, example)


MARKS = re.compile(r"(?:<[^<>]*>|\[[^\[\]]*\]|\s)*")  # nothing but control tokens


def _opened(subject: TemplateSubject, messages: list[Message], asked: str, before: str) -> int:
    """Where prompt and history part, at the start of a control token, if both open an answer before that; else 0. So models
    that reason or have channels are told from a wrong header: after the common one they differ in the part that comes next."""
    closed = subject.try_render(messages) or ""
    place, _, _ = difference(asked, before)
    at = max(asked.rfind(sign, 0, place) for sign in "<[")
    inside = at >= 0 and not set(asked[at:place]) & set(">]")
    place = at if inside else place
    common = len(os.path.commonprefix([closed, asked]))
    return place if place > common and asked[common:place].strip() else 0


def _reasons(subject: TemplateSubject, messages: list[Message], asked: str) -> bool:
    """Whether the prompt opens a reasoning that stands before an answer which has one."""
    thought = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "zqr0x thinks.")
    whole = subject.try_render([*messages, {"role": "assistant", "content": answer(0), **thought}]) or ""
    return "zqr0x" in whole and whole[: whole.find("zqr0x")].rstrip() == asked.rstrip()


def _whole(subject: TemplateSubject) -> str:
    """One turn as trained on. A Go template shows the end of an answer only when another question follows."""
    return subject.render([*dialogue(1), {"role": "user", "content": user(1)}]) if subject.go else subject.training(1)


def _thought(text: str) -> bool:
    """Whether it is nothing but the marks of a thought."""
    return bool(THOUGHT.search(text)) and not THOUGHT.sub("", text).strip()


def _header_at_end(subject: TemplateSubject, asked: str) -> Iterator[Finding]:
    """A finished conversation must not end in the assistant's header: Llama-3's first template always put it there."""
    if subject.go:
        return
    two = subject.try_render(dialogue(2))
    if two is None:
        return
    turns = take_apart(two, 2)
    if turns.missing:
        return
    rest = rest_after_common(turns.tail, turns.to_question[0])
    if rest.strip() and turns.to_answer[-1].endswith(rest):
        messages = dialogue(2)
        got = f"it ends {shown(turns.tail, 80)}, add_generation_prompt or not"
        why = "training text ends in an empty answer, so the model learns to open turns after its own"
        fix = "write the header only {% if add_generation_prompt %}"
        expected = f"a finished conversation that ends {shown(turns.tail[: len(turns.tail) - len(rest)], 80)}"
        example = f"render({json.dumps(messages[-2:])}, add_generation_prompt=False) -> {shown(two)}"
        yield Finding("C1", "error", "proven", subject.name, expected, got, why, fix, example)


def check_prompt_tokens(subject: TemplateSubject) -> Iterator[Finding]:
    """The ids of the prompt are the first ids of the whole."""
    tokens = subject.tokens
    if tokens is None or tokens.encode is None or tokens.show is None:
        raise Skip("no tokenizer.json beside the template")
    question = dialogue(1, last_answer=False)
    asked = subject.render(question, ask=True)
    for said in ANSWERS:
        whole = subject.try_render([*question, {"role": "assistant", "content": said}])
        if whole is None or not whole.startswith(asked):
            return  # the texts differ already: C1 or C2 by text
        a, b = tokens.encode(asked), tokens.encode(whole)
        if b[: len(a)] == a:
            continue
        i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))
        got, expected = tokens.show(a[i : i + 3]), tokens.show(b[i : i + 3])
        why = "the prompt's last tokens never stood there in training: white space at its end belongs to the next token"
        fix = "let the generation prompt end before white space that merges with an answer's first word"
        prompt = f"prompt {shown(asked, 60)} -> ids {a[i : i + 3]} {got}"
        example = f"{prompt}; with the answer {said!r} -> ids {b[i : i + 3]} {expected}"
        yield Finding("C2", "warn", "proven", subject.name, f"tokens {expected}", f"tokens {got}", why, fix, example)
        return


# ---- C3: turns -------------------------------------------------------------------------------------------------------


def check_turns(subject: TemplateSubject) -> Iterator[Finding]:
    """Three turns: all there, once, and parted by the same text each time."""
    messages = dialogue(3)
    try:
        text = subject.training(3)
    except Refused as refusal:
        example = f"messages = {json.dumps(messages)}"
        why, fix = "a conversation cannot go on", "render every message in a loop"
        yield Finding("C3", "warn", "proven", subject.name, "three turns", f"refused: {refusal}", why, fix, example)
        return
    turns = take_apart(text, 3)
    example = f"messages = {json.dumps(messages)} -> {shown(text, 300)}"
    if turns.missing:
        why = "the model does not see what was said before"
        got = f"not rendered: {', '.join(map(repr, turns.missing))}"
        yield Finding(
            "C3",
            "error",
            "proven",
            subject.name,
            "every message, in order",
            got,
            why,
            "loop over all messages",
            example,
        )
        return
    yield from _constant(subject, "between question and answer", turns.to_answer, example)
    yield from _constant(subject, "between answer and question", turns.to_question, example)
    yield from _dangling(subject, turns.tail, turns.to_question[-1], example)


def _constant(subject: TemplateSubject, what: str, texts: list[str], example: str) -> Iterator[Finding]:
    bare = [THOUGHT.sub("", text) for text in texts]
    if len(set(bare)) > 1:
        other = next(text for text in bare if text != bare[0])
        why = "the model is trained on one form of a turn and asked in another"
        expected, got = f"{what} always {shown(bare[0], 80)}", f"also {shown(other, 80)}"
        yield Finding(
            "C3", "error", "proven", subject.name, expected, got, why, "write each role's turn in one way", example
        )


def _dangling(subject: TemplateSubject, tail: str, between: str, example: str) -> Iterator[Finding]:
    """The last answer ends as the others do; an end-of-text after it is a matter of taste (Phi-3)."""
    if subject.go:
        return  # Ollama cuts there
    rest = rest_after_common(tail, between)
    allowed = {*(subject.tokens.specials if subject.tokens else ()), subject.template.eos, subject.template.bos}
    left = CONTROL.sub("", rest)
    for token in sorted(filter(None, allowed), key=len, reverse=True):
        left = left.replace(token, "")
    if not rest or not left:
        return
    if left.strip():
        return  # a header: C1's
    why = "the last turn ends otherwise than every turn before it, so history and training text part there"
    got = f"the last one ends {shown(tail, 60)}"
    fix = f"take {rest!r} away after the loop, or write it after every turn"
    expected = f"an answer that ends {shown(between, 60)}"
    yield Finding("C3", "error", "proven", subject.name, expected, got, why, fix, example)


# ---- C4: roles and contents ------------------------------------------------------------------------------------------


def check_roles(subject: TemplateSubject) -> Iterator[Finding]:
    """The system message is there or refused, each message once, its lines as they were, and who speaks can be told."""
    text = subject.try_render(dialogue(1, SYSTEM, last_answer=False), ask=True)
    example = f"messages = {json.dumps(dialogue(1, SYSTEM, last_answer=False))} -> {shown(text or '', 300)}"
    if text is not None and SYSTEM not in text:
        why = "instructions are silently ignored"
        fix = "write the system message, or refuse it by raise_exception"
        yield Finding("C4", "error", "proven", subject.name, "the system message", "it is dropped", why, fix, example)
    elif text is not None and text.find(SYSTEM) > text.find(user(0)) >= 0:
        why, fix = "the model reads its instructions after the question", "render messages in their order"
        yield Finding("C4", "error", "proven", subject.name, "system before user", "it comes after", why, fix, example)
    yield from _repeated(subject)
    yield from _contents(subject)
    yield from _speakers(subject)


def _repeated(subject: TemplateSubject) -> Iterator[Finding]:
    text = subject.try_render(dialogue(2, last_answer=False), ask=True)
    for content in take_apart(text, 2).repeated if text else []:
        example = f"messages = {json.dumps(dialogue(2, last_answer=False))} -> {shown(text or '', 300)}"
        why, fix = "the model sees a message that nobody sent", "render each message once"
        yield Finding(
            "C4",
            "error",
            "proven",
            subject.name,
            f"{content!r} once",
            f"{(text or '').count(content)} times",
            why,
            fix,
            example,
        )


def _contents(subject: TemplateSubject) -> Iterator[Finding]:
    """The inside of a content comes out as it went in. What is trimmed at its ends is a fact: released Llama and Gemma do
    it."""
    for role, text in (
        ("user", INDENTED),
        ("assistant", INDENTED),
        ("user", "Zq <b> & \"q\" 'Їжак' 👩‍👩‍👧 {{ x }} \\n."),
    ):
        messages = [{"role": role, "content": text} if m["role"] == role else m for m in dialogue(1)]
        messages += [{"role": "user", "content": user(1)}]
        got = subject.try_render(messages)
        if got is not None and text not in got:
            first = text.split("\n")[0][:6]
            found = got[got.find(first) :][: len(text) + 20] if first in got else got
            place, one, other = difference(text, found)
            why = f"the {role}'s text is changed before the model reads it: code loses its indentation, marks their meaning"
            fix = "write message['content'] as it is; trim at most its ends"
            example = f"content {text!r} -> {shown(got, 300)}, differs at character {place}"
            yield Finding("C4", "error", "proven", subject.name, one, other, why, fix, example)
            return


def _speakers(subject: TemplateSubject) -> Iterator[Finding]:
    """The same three contents, spoken the other way round, must read differently."""
    contents = ("zqone", "zqtwo", "zqthree")
    one = [{"role": role, "content": c} for role, c in zip(("user", "assistant", "user"), contents, strict=True)]
    two = [{"role": role, "content": c} for role, c in zip(("assistant", "user", "assistant"), contents, strict=True)]
    a, b = subject.try_render(one), subject.try_render(two)
    if subject.go or a is None or a != b:
        return
    why, fix = "the model cannot know who said what", "write message['role'], or a header for each role"
    example = f"{json.dumps(one)} and the same with the roles exchanged -> {shown(a)}"
    yield Finding(
        "C4", "error", "proven", subject.name, "another text for other speakers", "the same text", why, fix, example
    )


# ---- C5: two templates -----------------------------------------------------------------------------------------------


def check_against(subject: TemplateSubject) -> Iterator[Finding]:
    """The other template renders every conversation alike."""
    other = subject.against
    if other is None:
        raise Skip("no other template to compare with; give --against")
    go = subject.go or other.go
    tried = [(messages, True, None) for messages in conversations(0, N_CONVERSATIONS)]
    if not go:
        said = {"role": "assistant", "content": answer(0)}
        tried += [([*messages, said], False, None) for messages, _, _ in tried]
        tried += [(dialogue(1, last_answer=False), True, TOOLS), (CALLED, True, TOOLS)]
    for messages, ask, tools in tried:
        texts = [_served(one, messages, ask, tools, go) for one in (subject, other)]
        if texts[0] != texts[1]:
            yield _differs(subject, other, messages, ask, tools, texts)
            return
    if subject.tokens and other.tokens and subject.tokens.encode and other.tokens.encode:
        yield from _other_ids(subject, other)


def _served(subject: TemplateSubject, messages: list[Message], ask: bool, tools: Any, bare: bool) -> str | None:
    """The text, without the BOS that Ollama adds behind the template where one of the two is Ollama's."""
    text = subject.try_render(messages, ask, tools)
    bos = subject.tokens.bos if subject.tokens else subject.template.bos
    return text.removeprefix(bos) if text is not None and bare else text


def _differs(
    subject: TemplateSubject, other: TemplateSubject, messages: list[Message], ask: bool, tools: Any, texts: list[Any]
) -> Finding:
    why = "the model is served in another form than it was trained in"
    fix = "derive one template from the other"
    where = f"{subject.name} and {other.name}"
    call = f"messages = {json.dumps(messages, ensure_ascii=False)}, add_generation_prompt={ask}"
    call += f", tools={json.dumps(tools)}" if tools else ""
    if None in texts:
        got = f"{(subject if texts[0] is None else other).name} refuses what the other renders"
        return Finding("C5", "error", "proven", where, "the same from both", got, why, fix, call)
    place, a, b = difference(texts[0], texts[1])
    ids = ""
    if subject.tokens and subject.tokens.encode:
        one, two = (subject.tokens.encode(text) for text in texts)
        i = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), min(len(one), len(two)))
        ids = f", token {i}: {one[i : i + 4]} and {two[i : i + 4]}"
    example = f"{call}: character {place}{ids}"
    return Finding("C5", "error", "proven", where, f"{subject.name}: {a}", f"{other.name}: {b}", why, fix, example)


def _other_ids(subject: TemplateSubject, other: TemplateSubject) -> Iterator[Finding]:
    assert subject.tokens and other.tokens and subject.tokens.encode and other.tokens.encode
    for messages in conversations(0, N_CONVERSATIONS):
        text = subject.try_render(messages, True)
        if text is None:
            continue
        a, b = subject.tokens.encode(text), other.tokens.encode(text)
        if a == b:
            continue
        i = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        why, fix = "the same chat becomes other ids", "take tokenizer and template from one place"
        example = f"messages = {json.dumps(messages, ensure_ascii=False)}: token {i}: {a[i : i + 4]} and {b[i : i + 4]}"
        yield Finding(
            "C5", "error", "proven", f"{subject.name} and {other.name}", "the same ids", "others", why, fix, example
        )
        return


# ---- C6: dialect -----------------------------------------------------------------------------------------------------


def check_dialect(subject: TemplateSubject) -> Iterator[Finding]:
    """The text does not hang on trim_blocks and lstrip_blocks."""
    if not isinstance(subject.template, ChatTemplate):
        raise Skip("a Go template has no such settings")
    plain = dataclasses.replace(subject.template, trim=False)
    for messages, ask in ((dialogue(2, last_answer=False), True), (dialogue(2), False), (dialogue(1, SYSTEM), False)):
        text = subject.try_render(messages, ask)
        if text is None:
            continue
        other = plain.render(messages, add_generation_prompt=ask)
        if text == other:
            continue
        place, a, b = difference(text, other)
        line = _block_line(subject.template.source)
        where = f"{subject.template.name}{f' line {line}' if line else ''}"
        why = "an engine with Jinja's own settings puts line ends and blanks into every chat"
        fix = "write {%- and -%} where a line end is not meant"
        example = f"messages = {json.dumps(messages)}: character {place}"
        yield Finding(
            "C6", "info", "proven", where, f"{a} (as transformers renders it)", f"{b} (plain Jinja)", why, fix, example
        )
        return


def _block_line(source: str) -> int | None:
    """The first line whose block tag leans on trim_blocks or lstrip_blocks."""
    for number, line in enumerate(source.split("\n"), 1):
        if re.search(r"[^-]%\}$", line) or re.match(r"\s+\{%[^-]", line):
            return number
    return None


# ---- P5, F4: turn ends and control tokens ----------------------------------------------------------------------------


def first_control(subject: TemplateSubject) -> str:
    """The control token that ends an answer, "" where there is none."""
    text = subject.try_render(dialogue(2)) or ""
    after = (
        text[text.find(answer(0)) + len(answer(0)) : text.find(user(1))]
        if answer(0) in text and user(1) in text
        else ""
    )
    if not after:
        after = _whole(subject).partition(answer(0))[2]
    names = set(subject.tokens.specials if subject.tokens else ()) | set(CONTROL.findall(after))
    names |= {match.group() for match in CONTROL.finditer(after)}
    places = [(after.find(name), -len(name), name) for name in names if name and name in after]
    return min(places)[2] if places else ""


def check_turn_end(subject: TemplateSubject) -> Iterator[Finding]:
    """What ends an answer ends the generation."""
    if subject.ends is None:
        raise Skip("no file says which tokens end a generation")
    end = first_control(subject)
    ends = ", ".join(subject.ends)
    example = f"render({json.dumps(dialogue(1))}) -> {shown(_whole(subject))}"
    if not end:
        why = "nothing marks the end of an answer, so the model cannot learn to stop"
        fix = f"write {subject.ends[0]} after each answer"
        yield Finding(
            "P5",
            "warn",
            "proven",
            subject.name,
            f"an answer that ends in {ends}",
            "no control token",
            why,
            fix,
            example,
        )
    elif end not in subject.ends:
        why = "the model ends its turn and is not stopped: it goes on as the user, or for ever"
        fix = f"add {end} to eos_token_id of generation_config.json"
        where = "generation_config.json:eos_token_id" if not subject.go else subject.name
        yield Finding("P5", "error", "proven", where, f"{end} among the ends", ends, why, fix, example)


def check_control_tokens(subject: TemplateSubject) -> Iterator[Finding]:
    """What looks like a control token in the template is one in the tokenizer."""
    tokens = subject.tokens
    if tokens is None or not tokens.specials:
        raise Skip("no tokenizer to ask which control tokens there are")
    text = _whole(subject)
    for name in dict.fromkeys(match.group() for match in CONTROL.finditer(text)):
        if name in tokens.specials or name in ("[INST]", "[/INST]"):
            continue
        ids = tokens.encode(name) if tokens.encode else []
        if len(ids) == 1:
            continue
        spelled = f"{len(ids)} tokens of text: {tokens.show(ids)}" if ids and tokens.show else "text"
        why = "it is read as text: costly, and a user can write it too"
        fix = f"add {name} to the tokenizer's special tokens, or write the one that the model knows"
        example = f"{name!r} -> ids {ids}, in render({json.dumps(dialogue(1))})"
        yield Finding("F4", "warn", "proven", subject.name, f"{name} as one token", spelled, why, fix, example)


# ---- L2, G1: the beginning -------------------------------------------------------------------------------------------


def bos_counts(subject: TemplateSubject) -> dict[str, int] | None:
    """How many beginnings stand in front, by the path a chat takes; None where there is no such token."""
    tokens = subject.tokens
    bos = tokens.bos if tokens else subject.template.bos
    if not bos:
        return None
    text, count = subject.render(dialogue(1, last_answer=False), ask=True), 0
    while text.startswith(bos):
        text, count = text.removeprefix(bos).lstrip(" \n"), count + 1
    adds = int(bool(tokens and tokens.adds_bos))
    if subject.go:
        return {"Ollama (the runner adds one, unless add_bos is false)": count + (adds if tokens else 1)}
    return {"apply_chat_template": count, "render, then encode with special tokens": count + adds}


def check_bos(subject: TemplateSubject) -> Iterator[Finding]:
    """One beginning where the tokenizer puts one, never two."""
    counts = bos_counts(subject)
    if counts is None:
        raise Skip("no BOS token is known")
    bos = (subject.tokens.bos if subject.tokens else "") or subject.template.bos
    written = next(iter(counts.values()))
    text = subject.render(dialogue(1, last_answer=False), ask=True)
    example = f"render({json.dumps(dialogue(1, last_answer=False))}, add_generation_prompt=True) -> {shown(text, 200)}"
    if written > 1:
        fix = f"write {bos} once"
        why = "the model was trained with one beginning; after two its answers get worse"
        yield Finding("L2", "error", "proven", subject.name, f"{bos} once", f"{written} times", why, fix, example)
    elif written == 0 and not subject.go and subject.tokens and subject.tokens.adds_bos:
        why = "plain text gets a beginning and a chat does not, as apply_chat_template adds none itself"
        fix = "begin the template with {{ bos_token }}"
        yield Finding("G1", "warn", "proven", subject.name, f"{bos} in front", "none", why, fix, example)


# ---- G10, F1 ---------------------------------------------------------------------------------------------------------


def check_gemma_turn(subject: TemplateSubject) -> Iterator[Finding]:
    """Gemma's turns: <end_of_turn>, a line end, <start_of_turn>. Its report shows them without the last two."""
    text = _whole(subject)
    if "<end_of_turn>" not in text:
        raise Skip("no <end_of_turn> in it")
    asked = subject.render(dialogue(1, last_answer=False), ask=True)
    for found in re.finditer(r"<end_of_turn>(?!\Z|\n(?:<start_of_turn>|<eos>|\Z))", asked + "\n" + text):
        got = (asked + "\n" + text)[found.start() : found.start() + 40]
        why = "the model was trained with a line end between turns; the report that shows it without is a misprint"
        fix = r"write <end_of_turn>\n<start_of_turn>model\n"
        example = f"render({json.dumps(dialogue(1, last_answer=False))}, add_generation_prompt=True) -> {shown(asked)}"
        yield Finding(
            "G10", "error", "proven", subject.name, r"'<end_of_turn>\n<start_of_turn>'", repr(got), why, fix, example
        )
        return


def check_modelfile(subject: TemplateSubject) -> Iterator[Finding]:
    """A Modelfile's stops and beginning."""
    modelfile = subject.modelfile
    if modelfile is None:
        raise Skip("not a Modelfile")
    end = first_control(subject) or _last_words(subject)
    ends = [*modelfile.stops, *(subject.ends or [])]
    where = f"{subject.name}:PARAMETER stop"
    example = f"render({json.dumps(dialogue(1))}) -> {shown(_whole(subject))}"
    own = end in OWN_ENDS and not subject.ends  # a model's end-of-text: Ollama reads that from the weights' file
    if end and not own and not any(stop in end or end in stop for stop in ends):
        why = "where the model's own end token is not this one, the answer runs on into a user's turn that nobody wrote"
        fix = f'PARAMETER stop "{end}"'
        got = f"stops: {', '.join(map(repr, ends)) or 'none'}"
        yield Finding("F1", "warn", "proven", where, f"{end!r} stops an answer", got, why, fix, example)
    for stop in modelfile.stops:
        text = next((text for text in ORDINARY if stop and stop in text), None)
        if text is not None:
            place = text.find(stop)
            got = f"it cuts {text[max(place - 30, 0) : place + 20]!r}"
            why, fix = "ordinary answers are cut off there", f"take {stop!r} away, or stop at a control token"
            line = f"stop {stop!r} occurs in {shown(text)}"
            yield Finding(
                "F1", "warn", "proven", where, f"a stop that no ordinary text holds, not {stop!r}", got, why, fix, line
            )
    bos = re.match(
        r"\s*(<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>)",
        subject.render(dialogue(1, last_answer=False), ask=True),
    )
    if bos and (subject.tokens is None or subject.tokens.adds_bos is not False):
        why, fix = (
            "Ollama puts a beginning before the text too: the model sees two",
            f"take {bos.group(1)} out of TEMPLATE",
        )
        got = f"TEMPLATE writes {bos.group(1)}"
        yield Finding(
            "F1", "warn", "proven", f"{subject.name}:TEMPLATE", "no beginning in TEMPLATE", got, why, fix, example
        )


def _last_words(subject: TemplateSubject) -> str:
    """What opens the user's next turn, for a template without control tokens: "### Instruction:"."""
    text = subject.try_render([*dialogue(1), {"role": "user", "content": user(1)}], ask=True) or ""
    between = text.partition(answer(0))[2].partition(user(1))[0]
    return between.strip()


# ---- training rows ---------------------------------------------------------------------------------------------------


def check_rows(subject: TemplateSubject) -> Iterator[Finding]:
    """Every row of the training file renders, with every message in it."""
    if subject.rows is None:
        raise Skip("no training file; give --train-jsonl")
    for number, messages in training_rows(subject.rows):
        where = f"{subject.rows.name}:{number}"
        roles = sorted({message["role"] for message in messages})
        try:
            text = subject.render(messages)
        except InputError as error:
            why, fix = "the row cannot be trained on", "mend the row's roles and their order, or the template"
            line = f"messages = {json.dumps(messages, ensure_ascii=False)[:300]}"
            yield Finding("C4", "error", "proven", where, "a row that renders", str(error), why, fix, line)
            return
        lost = [m for m in messages if m["content"].strip() and THOUGHT.sub("", m["content"]).strip() not in text]
        if lost:
            why, fix = (
                "the message is not trained on",
                f"give the template a branch for {lost[0]['role']!r} (roles here: {', '.join(roles)})",
            )
            line = f"messages = {json.dumps(messages, ensure_ascii=False)[:300]} -> {shown(text)}"
            got = f"{lost[0]['role']}: {lost[0]['content'][:60]!r} is not in the text"
            yield Finding("C4", "error", "proven", where, "every message in the text", got, why, fix, line)
            return


def training_rows(path: Path) -> Iterator[tuple[int, list[Message]]]:
    """(line, messages) of at most MOST_ROWS rows: {"messages"} or {"conversations"}, or {"prompt", "completion"}."""
    for where, row in islice(Source(path, "chat", [path]).rows(), MOST_ROWS):
        number = where.rpartition(":")[2]
        yield int(number), messages_of(row, f"{path.name} line {number}")


# ---- facts -----------------------------------------------------------------------------------------------------------


def facts(subject: TemplateSubject) -> dict[str, list[list[str]]]:
    """What the template writes, for people: prompt, turns, beginnings, what it trims and refuses, how users' control tokens
    read."""
    try:
        rows = [["what", "text"], *_written(subject)]
    except (InputError, Skip) as error:
        return {"What it writes": [["what", "text"], ["nothing", str(error)]]}
    made = {"What it writes": rows}
    if subject.rows is not None:
        made["Training rows"] = _row_facts(subject)
    return made


def _written(subject: TemplateSubject) -> Iterator[list[str]]:
    asked = subject.render(dialogue(1, last_answer=False), ask=True)
    yield ["one question, asked", shown(asked, 300)]
    turns = take_apart(subject.try_render(dialogue(3)) or "", 3)
    if not turns.missing:
        yield ["between question and answer", shown(turns.to_answer[0])]
        yield ["between answer and question", shown(turns.to_question[0])]
        yield ["after the last answer", shown(turns.tail) if not subject.go else "(Ollama cuts there)"]
    system = subject.try_render(dialogue(1, SYSTEM, last_answer=False), ask=True)
    yield ["a system message", "refused" if system is None else "kept" if SYSTEM in system else "dropped"]
    padded = "  zq padded  "
    text = subject.try_render([{"role": "user", "content": padded}], ask=True)
    yield ["white space around a content", "-" if text is None else "kept" if padded in text else "trimmed"]
    yield ["ends an answer", first_control(subject) or "nothing"]
    yield ["ends a generation", ", ".join(subject.ends) if subject.ends else "no file says"]
    yield from ([f"beginnings: {path}", str(n)] for path, n in (bos_counts(subject) or {}).items())
    if isinstance(subject.template, ChatTemplate):
        typed = [{"role": "user", "content": [{"type": "text", "text": "zqtyped"}]}]
        text = subject.try_render(typed, ask=True)  # type: ignore[arg-type]
        good = text is not None and "zqtyped" in text and "'type'" not in text
        yield [
            "content as a list of parts",
            "understood" if good else "refused" if text is None else "written as Python prints it",
        ]
    if subject.tokens and subject.tokens.encode and (end := first_control(subject)):
        ids = subject.tokens.encode(end)
        yield [
            f"a user who writes {end}",
            "forges a turn unless the program guards against it" if len(ids) == 1 else "writes text",
        ]


def _row_facts(subject: TemplateSubject) -> list[list[str]]:
    assert subject.rows is not None
    lengths, roles = [], {}
    encode = subject.tokens.encode if subject.tokens else None
    for _, messages in training_rows(subject.rows):
        text = subject.try_render(messages)
        for message in messages:
            roles[message["role"]] = roles.get(message["role"], 0) + 1
        lengths.append(0 if text is None else len(encode(text)) if encode else len(text))
    unit, ordered = "tokens" if encode else "characters", sorted(lengths) or [0]
    return [
        ["what", "value"],
        ["rows", f"{len(lengths):,}" + (f" (the first {MOST_ROWS:,})" if len(lengths) == MOST_ROWS else "")],
        ["roles", ", ".join(f"{role} {n:,}" for role, n in sorted(roles.items()))],
        [f"{unit}, shortest", f"{ordered[0]:,}"],
        [f"{unit}, median", f"{ordered[len(ordered) // 2]:,}"],
        [f"{unit}, longest", f"{ordered[-1]:,}"],
    ]


CHECKS: tuple[Check, ...] = (
    Check("C1 C2", "the prompt for an answer is what stands before an answer", check_generation_prompt),
    Check("C2", "the prompt's tokens are the first of the whole", check_prompt_tokens),
    Check("C3", "turns are constant, and all are there", check_turns),
    Check("C4", "roles and contents are kept", check_roles),
    Check("P5", "what ends an answer ends the generation", check_turn_end),
    Check("L2 G1", "one beginning", check_bos),
    Check("C5", "the other template renders alike", check_against),
    Check("C6", "no need of trim_blocks", check_dialect),
    Check("F4", "control tokens are tokens", check_control_tokens),
    Check("G10", "Gemma's turns have their line end", check_gemma_turn),
    Check("F1", "the Modelfile stops and begins right", check_modelfile),
    Check("C4", "every training row renders whole", check_rows),
)

"""Records -> Examples: what the rows of a file say as conversations, in any of the forms that table.py tells apart.

A table becomes questions and answers by a person's own templates (prompt.py); the other forms name their questions and answers
themselves, and give way to templates where there are some. What lacks its question or answer is skipped, and named; what is
not of the form it claims to be is refused. Splitting is split.py's, and comes first: `join_turns` joins one side's examples.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from kobza.config import InputError, nearest, require
from kobza.finetune.config import RowsConfig
from kobza.finetune.example import Example, Message
from kobza.finetune.prompt import Prompt, cell_text
from kobza.finetune.table import Form, Record, Records, parse

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
SPEAKERS |= {role: role for role in ("system", "user", "assistant", "tool")}
TRUTH = {"true": True, "yes": True, "1": True, "1.0": True, "false": False, "no": False, "0": False, "0.0": False}
PAIRED = ("dpo", "orpo")


@dataclass(frozen=True)
class Made:
    """The examples of a file, and what was left out: (where, why)."""

    examples: list[Example]
    skipped: list[tuple[str, str]]


class Found(NamedTuple):
    """What a row says, whatever its form."""

    question: list[Message]
    """the conversation up to the answer"""
    answer: Message | None
    rejected: str | None = None
    desirable: bool | None = None
    tools: Any = None


class Skip(Exception):
    """This row has nothing to learn; its text says why."""


def make_examples(
    records: Records, prompt: str | None, answer: str | None, system: str | None, rows: RowsConfig, objective: str
) -> Made:
    """The rows as conversations. `prompt`, `answer` and `system` are templates over the columns."""
    given = {"--prompt": prompt, "--answer": answer, "--system": system}
    templates = asked, told, system_of = [Prompt(text, option) if text else None for option, text in given.items()]
    for template in templates:
        if template:
            template.check(records.columns, records.path.name)
    require_columns(records, rows)
    read = reader_of(records, asked, told, objective)
    examples: list[Example] = []
    skipped: list[tuple[str, str]] = []
    bare = 0  # conversations without a system message of their own
    for i, row in enumerate(records.rows):
        where = records.where(i)
        try:
            found = read(row, where)
            if found.question[0]["role"] != "system":
                bare += 1
                head = [{"role": "system", "content": filled(system_of, row, where)}] if system_of else []
                found = found._replace(question=head + found.question)
            side = {"group": label(row, rows.group, where), "stratum": label(row, rows.stratify, where)}
            examples += [replace(example, **side_of(example, side)) for example in examples_of(found, where, objective)]
        except Skip as skip:
            skipped.append((where, str(skip)))
    check_most(records, skipped)
    require(not system_of or bare > 0, "--system has no effect: every row has a system message of its own")
    return Made(examples, skipped)


def join_turns(examples: Sequence[Example], n: int, seed: int) -> list[Example]:
    """Conversations of n questions and answers, out of examples of one each, drawn by seed; each is used once, so that the last
    one may have fewer. Only those under the same system message come together."""
    if n == 1:
        return list(examples)
    kinds: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        alone = example.rejected is None and example.desirable is None and example.expected is None
        require(alone, f"--turns {n} is for --objective sft or distill; an answer that is judged stands alone")
        head = example.messages[0]
        kinds[str(head["content"]) * (head["role"] == "system") + repr(example.extra)].append(example)
    generator = np.random.default_rng(seed)
    joined = []
    for kind in kinds.values():
        order = [kind[k] for k in generator.permutation(len(kind))]
        for start in range(0, len(order), n):
            first, *others = order[start : start + n]
            more = [message for other in others for message in other.messages if message["role"] != "system"]
            where = " + ".join(example.where for example in (first, *others))
            joined.append(replace(first, messages=(*first.messages, *more), where=where))
    return [joined[k] for k in generator.permutation(len(joined))]


# ---- what a row says -----------------------------------------------------------------------------------------------


def reader_of(
    records: Records, asked: Prompt | None, told: Prompt | None, objective: str
) -> Callable[[Record, str], Found]:
    """How to read a row of these records towards this objective."""
    form, name, columns = records.form, records.path.name, ", ".join(records.columns)
    if objective in (*PAIRED, "kto"):
        forms = ("preference",) if objective in PAIRED else ("unpaired", "preference")
        wants = "chosen and rejected" if objective in PAIRED else "prompt, completion and label, or chosen and rejected"
        require(form in forms, f"{name}: --objective {objective} wants columns {wants}; it has {columns}")
        require(told is None, f"--answer has no effect: with --objective {objective} the answers are columns of {name}")
        return lambda row, where: judged(form, row, where, asked)
    if asked or told or form == "table":
        lacks = "--prompt" if asked is None else "--answer"
        example = '--prompt "...{column}..."' if asked is None else "--answer {column}"
        complete = bool(asked and (told or objective == "grpo"))
        require(complete, f"{name}: a table wants {lacks}: give {example}; its columns: {columns}")
        for template in (asked, told):
            if template:
                hint = f"; write {{{template.text}}}" if template.text in records.columns else f"; columns: {columns}"
                require(bool(template.columns), f"{template.option} {template.text!r} names no column{hint}")
        return lambda row, where: tabled(row, where, asked, told)
    if objective == "grpo":
        unjudged = f"{name}: --objective grpo wants questions; this file has answers already judged: take dpo or kto"
        require(form not in ("preference", "unpaired"), unjudged)
    read = {"alpaca": instructed, "sharegpt": spoken, "messages": spoken, "prompts": prompted}
    return read.get(form) or (lambda row, where: judged(form, row, where, None))


def tabled(row: Record, where: str, asked: Prompt, told: Prompt | None) -> Found:
    """A row of a person's own table."""
    question = [{"role": "user", "content": filled(asked, row, where)}]
    return Found(question, {"role": "assistant", "content": filled(told, row, where)} if told else None)


def instructed(row: Record, where: str) -> Found:
    """Alpaca: instruction, input, output (Taori et al. 2023)."""
    parts = [cell_text(row, name, where) for name in ("instruction", "input") if row.get(name)]
    return Found([*system_in(row, where), *question_of("\n\n".join(parts))], answer_in(row, "output", where))


def prompted(row: Record, where: str) -> Found:
    """A question, and perhaps the answer to it."""
    column = "completion" if row.get("completion") else "answer"
    return Found([*system_in(row, where), *question_in(row, where)], answer_in(row, column, where))


def spoken(row: Record, where: str) -> Found:
    """A conversation, up to its last answer: a list of messages, or of ShareGPT's turns."""
    column = "messages" if row.get("messages") else "conversations"
    messages = messages_of(row.get(column), where, column)
    if messages and messages[0]["role"] != "system":
        messages = system_in(row, where) + messages
    tools = row.get("tools")
    tools = parse(tools, f"{where}: column 'tools'") if isinstance(tools, str) else tools
    require(tools is None or isinstance(tools, list), f"{where}: column 'tools' is no list of tools")
    return Found(*at_last_answer(messages), tools=tools)


def judged(form: Form, row: Record, where: str, asked: Prompt | None) -> Found:
    """An answer with a worse one to the same question, or one that is said to be good or bad."""
    if form == "unpaired":
        said = cell_text(row, "label", where).lower() if row.get("label") else _skip("its label is empty")
        require(said in TRUTH, f"{where}: label is {said!r}; it must be true or false")
        question = [{"role": "user", "content": filled(asked, row, where)}] if asked else question_in(row, where)
        answer = answer_in(row, "completion", where)
        return Found([*system_in(row, where), *question], answer, desirable=TRUTH[said])
    sides = []
    for column in ("chosen", "rejected"):
        cell = row.get(column)
        messages = messages_of(cell, where, column) if isinstance(cell, list) else [answer_in(row, column, where)]
        if not messages[-1] or messages[-1]["role"] != "assistant":
            _skip(f"no answer in its column {column!r}")
        sides.append((messages[:-1], messages[-1]))
    (question, chosen), (other, rejected) = sides
    if question != other:
        _skip("chosen and rejected answer different questions")
    if chosen == rejected:
        _skip("chosen and rejected are the same")
    if asked:
        question = [{"role": "user", "content": filled(asked, row, where)}]
    elif not question:
        known = f"{where}: no question: neither a column prompt nor messages before the answers; give --prompt"
        require("prompt" in row, known)
        question = [*system_in(row, where), *question_in(row, where)]
    return Found(question, chosen, rejected=rejected["content"])


def _skip(why: str) -> Any:
    raise Skip(why)


# ---- parts of it ---------------------------------------------------------------------------------------------------


def filled(template: Prompt, row: Record, where: str) -> str:
    """The template's text for this row, which is skipped where a column that it needs is empty."""
    if empty := template.empty(row):
        _skip(f"column {empty[0]!r} is empty, which {template.option} needs")
    text = template.fill(row, where)
    return text if text.strip() else _skip(f"{template.option} has nothing to fill in")


def system_in(row: Record, where: str) -> list[Message]:
    """The row's system message, if its file has such a column."""
    return [{"role": "system", "content": cell_text(row, "system", where)}] if row.get("system") else []


def question_in(row: Record, where: str) -> list[Message]:
    """The column prompt: a text, or the messages that lead to the answer."""
    if isinstance(row.get("prompt"), list):
        return messages_of(row["prompt"], where, "prompt")
    return question_of(cell_text(row, "prompt", where) if row.get("prompt") else "")


def question_of(text: str) -> list[Message]:
    return [{"role": "user", "content": text}] if text else _skip("its question is empty")


def answer_in(row: Record, column: str, where: str) -> Message | None:
    """A column's text, or the one message in it, as an answer."""
    if isinstance(row.get(column), list):
        messages = messages_of(row[column], where, column)
        one = len(messages) == 1 and messages[0]["role"] == "assistant"
        require(one, f"{where}: column {column!r} has {len(messages)} messages; it must be one of the assistant")
        return messages[0]
    return {"role": "assistant", "content": cell_text(row, column, where)} if row.get(column) else None


def messages_of(value: Any, where: str, column: str) -> list[Message]:
    """Messages as chat templates take them, out of messages or ShareGPT's turns; empty ones are a reason to skip the row."""
    if value is None:
        _skip(f"its column {column!r} is empty")
    listed = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    require(listed, f"{where}: column {column!r} is no list of messages")
    return [message_of(turn, f"{where}: message {i} of {column!r}") for i, turn in enumerate(value, 1)]


def message_of(turn: dict[str, Any], where: str) -> Message:
    """One message; parts of a content that are text are joined."""
    shared = "from" in turn
    role, content = (turn.get("from"), turn.get("value")) if shared else (turn.get("role"), turn.get("content"))
    require(isinstance(role, str) and bool(role), f"{where} has no role")
    if shared:
        require(
            role in SPEAKERS, f"{where} is from {role!r}{'' if role in SPEAKERS else nearest(role, list(SPEAKERS))}"
        )
        role = SPEAKERS[role]
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        only = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        require(only, f"{where} has parts that are not text; take pictures and sounds out")
        content = "".join(texts)
    require(content is None or isinstance(content, str), f"{where} is a {type(content).__name__}, not text")
    more = {k: v for k, v in turn.items() if v is not None and k not in ("role", "content", "from", "value", "weight")}
    if not (content and content.strip()) and not more.get("tool_calls"):
        _skip(f"a message of the {role} is empty")
    return {"role": role, "content": content or "", **more}


def at_last_answer(messages: list[Message]) -> tuple[list[Message], Message | None]:
    """(what leads to the last answer, that answer); what follows it is not learned and falls away."""
    first = next((message["role"] for message in messages if message["role"] != "system"), None)
    if first in (None, "assistant"):
        _skip("it begins with an answer" if first else "it has no question")
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    return (messages, None) if last is None else (messages[:last], messages[last])


# ---- what an objective takes of it ---------------------------------------------------------------------------------


def examples_of(found: Found, where: str, objective: str) -> list[Example]:
    """What a row gives to learn: one example, or for kto from a pair a good and a bad one."""
    extra = {"tools": found.tools} if found.tools else {}
    if objective == "grpo":
        expected = found.answer["content"] if found.answer else None
        return [Example(tuple(found.question), where, expected=expected, extra=extra)]
    if found.answer is None:
        raise Skip("its answer is empty")
    example = Example((*found.question, found.answer), where, extra=extra)
    if objective in PAIRED:
        return [replace(example, rejected=found.rejected)]
    if objective == "kto" and found.rejected is not None:
        worse = (*found.question, {"role": "assistant", "content": found.rejected})
        return [
            replace(example, desirable=True, group=where),
            replace(example, messages=worse, desirable=False, group=where),
        ]
    if objective == "kto":
        return [replace(example, desirable=found.desirable)]
    return (
        _skip("its answer is a bad one, which --objective kto learns from") if found.desirable is False else [example]
    )


def side_of(example: Example, side: dict[str, str]) -> dict[str, str]:
    """Group and stratum of an example; the two of one pair stay together even where no group is asked for."""
    return side | {"group": side["group"] or example.group}


def label(row: Record, column: str, where: str) -> str:
    """The text in a column that rows are grouped by, "" where it is empty or none was asked for."""
    return cell_text(row, column, where) if column and row.get(column) is not None else ""


def require_columns(records: Records, rows: RowsConfig) -> None:
    """Refuse to group or stratify by a column that the file does not have."""
    for option, column in (("--group", rows.group), ("--stratify", rows.stratify)):
        if column and column not in records.columns:
            near = nearest(column, records.columns)
            raise InputError(f"{option}: {records.path.name} has no column {column!r}{near}")


def check_most(records: Records, skipped: list[tuple[str, str]]) -> None:
    """Refuse a file most of whose rows have nothing to learn: something else is meant than was said."""
    if 2 * len(skipped) > len(records.rows):
        why, count = Counter(why for _, why in skipped).most_common(1)[0]
        where = next(where for where, reason in skipped if reason == why)
        many = f"{len(skipped):,} of {len(records.rows):,} rows have nothing to learn"
        raise InputError(
            f"{records.path}: {many}: in {count:,} {why}, the first is {where}; fill them or name other columns"
        )

"""Conversations -> rows of ids and what is learned of them.

One law: training sees what serving sees. A row's ids up to an answer are those a server sends to ask for it, token by token, and
behind them stands what the model is to write, down to the token that ends its turn. The template's encoder (formats/chat.py)
keeps that law for a conversation in one row. Where a template shows the past otherwise than it was (Qwen3 drops earlier
thoughts), or a token spans prompt and answer, the conversation becomes a row an answer, and a note says so. A model without a
template gets the plain form: the prompt's text, the answer's, the end token.

What is learned is kept beside the ids, never read out of them: padding is no token here (batches mark it by document -1), so it
may have the id of the end token, and the end token is learned all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from kobza.config import InputError, require
from kobza.finetune.config import RowsConfig
from kobza.finetune.example import Example, Message, Row
from kobza.formats.chat import Rewritten, has_thought
from kobza.tokenizer import Tokenizer


class Encoder(Protocol):
    """Messages -> ids: formats/chat.py's by a template, or PlainEncoder."""

    @property
    def ends(self) -> dict[str, int]:
        """The tokens that end an answer, by name."""

    def encode(self, messages: list[Message], add_generation_prompt: bool = False, **extra: Any) -> list[int]:
        """What a server sends."""

    def encode_learned(
        self, messages: list[Message], learn: Any, reasoning: Any, **extra: Any
    ) -> tuple[list[int], list[bool]]:
        """The whole conversation, and what is learned of it; may raise Rewritten."""

    def encode_answer(self, messages: list[Message], reasoning: Any, **extra: Any) -> tuple[list[int], list[bool]]:
        """The conversation up to its last answer, which alone is learned."""


class Encoded(NamedTuple):
    rows: list[Row]
    notes: list[str]
    """for a person, a line each"""


class PromptRow(NamedTuple):
    """A question whose answer the model writes itself, for a reward to measure."""

    ids: np.ndarray  # (T,) int32, up to where the answer begins
    expected: str | None
    where: str


@dataclass(frozen=True)
class PlainEncoder:
    """The plain form, for a model without a chat template: the prompt's text, the answer's, the end token. It begins as
    `kobza generate --prompt` does, which serves such a model. `end` is the id of a special token of the tokenizer."""

    tokenizer: Tokenizer
    end: int

    @property
    def ends(self) -> dict[str, int]:
        return {self.tokenizer.show(self.end): self.end}

    def encode(self, messages: list[Message], add_generation_prompt: bool = False, **extra: Any) -> list[int]:
        """The ids of one question, with its answer where it has one; a question alone always asks."""
        roles = [message["role"] for message in messages]
        remedy = "a model without a chat template; write all into --prompt, or give --template"
        require(not extra, f"{', '.join(extra)}: nothing for {remedy}")
        require(
            roles[:1] == ["user"] and roles[1:] in ([], ["assistant"]), f"the turns {', '.join(roles)} for {remedy}"
        )
        ids = self.tokenizer.encode_prompt(messages[0]["content"])
        for message in messages[1:]:
            ids += [*self.tokenizer.encode(message["content"], continues=True).tolist(), self.end]
        return ids

    def encode_learned(
        self, messages: list[Message], learn: str = "answers", reasoning: str = "learned", **extra: Any
    ) -> tuple[list[int], list[bool]]:
        """As ChatEncoder's; the marks of a reasoning are a template's, so "masked" is refused."""
        require(
            reasoning == "learned",
            "--reasoning masked needs a chat template, which marks the reasoning; give --template",
        )
        ids = self.encode(messages, **extra)
        start = 1 if learn == "all" else len(self.encode(messages[:-1], True))
        return ids, [i >= start for i in range(len(ids))]

    def encode_answer(
        self, messages: list[Message], reasoning: str = "learned", **extra: Any
    ) -> tuple[list[int], list[bool]]:
        """The same: there is one answer."""
        return self.encode_learned(messages, "last", reasoning, **extra)


def plain_encoder(tokenizer: Tokenizer, ends: Sequence[int] = ()) -> PlainEncoder:
    """The encoder of a model without a template; the first of its ends that is a special token ends an answer."""
    special = set(tokenizer.specials.values())
    end = next((i for i in (*ends, *tokenizer.ends) if i in special), None)
    require(
        end is not None,
        "neither a chat template nor an end token: the model could not learn to stop; give --template, or --add-tokens "
        "'<|endoftext|>' with --method full",
    )
    return PlainEncoder(tokenizer, int(end or 0))


def encode(examples: Sequence[Example], encoder: Encoder, rows: RowsConfig, ends: Sequence[int] = ()) -> Encoded:
    """A row each, or where that would not be as served a row an answer; cut at rows.max_len, at the end (0: not cut, for the
    model's context is not known here). `ends`: the ids at which the model stops.

    A row whose answers fall away wholly has nothing learned, and is for the caller to leave out."""
    _check_reasoning(examples, rows)
    made: list[Row] = []
    parted: list[tuple[str, str]] = []
    for example in examples:
        with _at(example.where):
            _check_answers(example)
            try:
                pair = encoder.encode_learned(list(example.messages), rows.learn, rows.reasoning, **example.extra)
                made.append(_row(*pair, example.where, rows))
            except Rewritten as why:
                parted.append((example.where, str(why)))
                made += _rows_of_answers(example, encoder, rows)
    return Encoded(made, _notes(made, parted, encoder, rows, ends))


def encode_last(examples: Sequence[Example], encoder: Encoder, rows: RowsConfig) -> list[Row]:
    """A row each, of whose answers the last alone is learned: examples that are judged one by one (KTO)."""
    _check_reasoning(examples, rows)
    return [_answer_row(example, encoder, rows) for example in examples]


def encode_pairs(examples: Sequence[Example], encoder: Encoder, rows: RowsConfig) -> list[tuple[Row, Row]]:
    """(chosen, rejected) each, the ids of the question the same in both."""
    _check_reasoning(examples, rows)
    pairs = []
    for example in examples:
        with _at(example.where):
            require(example.rejected is not None, "no rejected answer; preferences need one to every question")
            require(bool((example.rejected or "").strip()), "an empty rejected answer; leave the row out")
            require(example.rejected != example.messages[-1].get("content"), "chosen and rejected are the same answer")
        rejected = {"role": "assistant", "content": example.rejected}
        worse = replace(example, messages=(*example.messages[:-1], rejected))
        pairs.append((_answer_row(example, encoder, rows), _answer_row(worse, encoder, rows)))
    return pairs


def encode_prompts(examples: Sequence[Example], encoder: Encoder, rows: RowsConfig) -> list[PromptRow]:
    """The questions alone, as a server sends them; an answer at the end is left out. One of rows.max_len or more is refused: cut
    at its end it would ask nothing."""
    prompts = []
    for example in examples:
        answered = example.messages[-1]["role"] == "assistant"
        with _at(example.where):
            asked = list(example.messages[: -1 if answered else None])
            ids = encoder.encode(asked, True, **example.extra)
            fits = not rows.max_len or len(ids) < rows.max_len
            require(
                fits,
                f"the question has {len(ids):,} tokens and --max-len is {rows.max_len:,}; raise it or shorten that",
            )
        prompts.append(PromptRow(np.array(ids, dtype=np.int32), example.expected, example.where))
    return prompts


def _rows_of_answers(example: Example, encoder: Encoder, rows: RowsConfig) -> Iterator[Row]:
    """A row for each answer that is learned: all before it as context, as the server has it when the answer is due."""
    answers = [k for k, message in enumerate(example.messages) if message["role"] == "assistant"]
    answers = answers if rows.learn == "answers" else answers[-1:]
    for k in answers:
        which = f"{example.where}, message {k + 1}" if len(answers) > 1 else example.where
        pair = encoder.encode_answer(list(example.messages[: k + 1]), rows.reasoning, **example.extra)
        yield _row(*pair, which, rows)


def _answer_row(example: Example, encoder: Encoder, rows: RowsConfig) -> Row:
    with _at(example.where):
        _check_answers(example)
        pair = encoder.encode_answer(list(example.messages), rows.reasoning, **example.extra)
        return _row(*pair, example.where, rows)


def _row(ids: list[int], learned: list[bool], where: str, rows: RowsConfig) -> Row:
    """A row, less what stands behind its last target, which nothing needs. The first token follows nothing and is no target."""
    learned[0] = False
    n = len(ids) - learned[::-1].index(True) if True in learned else len(ids)
    kept = min(n, rows.max_len or n)
    return Row(np.array(ids[:kept], dtype=np.int32), np.array(learned[:kept], dtype=bool), where, n - kept)


def _notes(
    made: list[Row], parted: list[tuple[str, str]], encoder: Encoder, rows: RowsConfig, ends: Sequence[int]
) -> list[str]:
    notes = []
    if parted:
        where, why = parted[0]
        notes.append(f"{len(parted):,} conversations became a row an answer, as the server sees them: {where}: {why}")
    cut = [row for row in made if row.cut]
    if cut:
        empty = sum(not row.learned.any() for row in cut)
        lost = f"; of {empty:,} no answer is left" if empty else ""
        long = f"{len(cut):,} of {len(made):,} rows are longer than {rows.max_len:,} tokens"
        notes.append(f"{long} and cut at their end{lost}")
    if ends and not set(ends) & set(encoder.ends.values()):
        names = ", ".join(encoder.ends)
        notes.append(f"answers end in {names}, where the model did not stop so far; from now on it must")
    return notes


def _check_answers(example: Example) -> None:
    for k, message in enumerate(example.messages):
        said = message.get("tool_calls") or message.get("content")
        if message["role"] == "assistant" and not (said.strip() if isinstance(said, str) else said):
            raise InputError(f"message {k + 1} is an empty answer; fill it in or leave the row out")


def _check_reasoning(examples: Sequence[Example], rows: RowsConfig) -> None:
    """Refuse to mask what is not there."""
    if rows.reasoning == "learned":
        return
    require(rows.learn != "all", "--reasoning masked has no effect with --learn all; leave one of them out")
    thinks = any(has_thought(message) for example in examples for message in example.messages)
    require(
        thinks, "--reasoning masked has no effect: no answer has a reasoning, as in <think>...</think>; leave it out"
    )


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Put where an example stands before what is wrong with it."""
    try:
        yield
    except Rewritten:
        raise
    except InputError as error:
        raise InputError(f"{where}: {error}") from None

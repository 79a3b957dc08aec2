"""Tasks from a JSONL file: multiple choice by likelihood, and generation judged by a match. A line is one of

    {"prompt": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}             answer: a place from 0, or the choice itself
    {"prompt": "2 + 2 =", "answer": "4", "match": "exact", "tokens": 8}     match: exact, contains or regex

Choices are put after the prompt as they stand (a blank between belongs into the choice). They are judged by their
log-likelihood, and by it a character, as lm-evaluation-harness does in acc and acc_norm. Generation is greedy; `exact` compares
its first line without blanks around it, `contains` and `regex` search all of it. `tokens` (default 32) bounds it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kobza.config import InputError, SampleConfig, nearest, require
from kobza.data import read_object
from kobza.evals.score import encode_pair, score
from kobza.evals.stats import Estimate, share
from kobza.evals.texts import continue_all
from kobza.model import GPT
from kobza.tokenizer import Tokenizer

CHOICE_KEYS = ["prompt", "choices", "answer"]
GENERATION_KEYS = ["prompt", "answer", "match", "tokens"]
MATCHES = ["exact", "contains", "regex"]
TOKENS = 32
GREEDY = SampleConfig(temperature=0.0)


@dataclass(frozen=True)
class Item:
    """A line of a tasks file; `answer` is a choice's place, or what the generation must match."""

    line: int
    prompt: str
    choices: tuple[str, ...]
    answer: int | str
    match: str = ""
    tokens: int = TOKENS


def read_tasks(path: Path) -> list[Item]:
    """The items of a tasks file; a bad line is refused by its number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; name a .jsonl file of tasks") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None
    items = [read_item(line, f"{path} line {n}", n) for n, line in enumerate(lines, 1) if line.strip()]
    require(bool(items), f"{path}: no task in this file; a line is {{prompt, choices, answer}} or {{prompt, answer}}")
    return items


def read_item(text: str, where: str, number: int) -> Item:
    """One line of a tasks file -> its item."""
    record = read_object(text, where, "prompt and answer")
    known = CHOICE_KEYS if "choices" in record else GENERATION_KEYS
    for key in record:
        require(key in known, f"{where}: unknown key {key!r}{nearest(key, known)}")
    for key in ("prompt", "answer"):
        require(key in record, f"{where}: no {key!r}; give {', '.join(known)}")
    require(isinstance(record["prompt"], str), f"{where}: prompt is {record['prompt']!r}; it must be a string")
    return _choice_item(record, where, number) if "choices" in record else _generation_item(record, where, number)


def _choice_item(record: dict[str, Any], where: str, number: int) -> Item:
    choices, answer = record["choices"], record["answer"]
    strings = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    require(strings and len(choices) > 1, f"{where}: choices must be a list of at least two strings that are not empty")
    require(len(set(choices)) == len(choices), f"{where}: two choices are the same; one of them must be the answer")
    if isinstance(answer, str):
        require(answer in choices, f"{where}: the answer {answer!r} is none of the choices{nearest(answer, choices)}")
        answer = choices.index(answer)
    whole = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
    require(whole, f"{where}: answer is {answer!r}; it must be a choice, or its place from 0 to {len(choices) - 1}")
    return Item(number, record["prompt"], tuple(choices), answer)


def _generation_item(record: dict[str, Any], where: str, number: int) -> Item:
    answer, match, tokens = record["answer"], record.get("match", "exact"), record.get("tokens", TOKENS)
    require(isinstance(answer, str) and answer != "", f"{where}: answer is {answer!r}; it must be a string, not empty")
    require(match in MATCHES, f"{where}: match is {match!r}{nearest(str(match), MATCHES)}")
    whole = isinstance(tokens, int) and not isinstance(tokens, bool) and tokens > 0
    require(whole, f"{where}: tokens is {tokens!r}; it must be a whole number of at least 1")
    if match == "regex":
        try:
            re.compile(answer)
        except re.error as error:
            raise InputError(f"{where}: the answer is no regular expression: {error}") from None
    return Item(number, record["prompt"], (), answer, match, tokens)


@dataclass(frozen=True)
class Judged:
    """What the model made of an item: its answer (by character in `normalised` for a choice) and whether these are right."""

    item: Item
    given: str
    right: bool
    normalised_right: bool | None
    logprobs: tuple[float, ...]


def judge(model: GPT, tokenizer: Tokenizer, items: Sequence[Item]) -> list[Judged]:
    """Every item answered, in order."""
    choosing = [item for item in items if item.choices]
    writing = [item for item in items if not item.choices]
    found = {item.line: one for item, one in zip(choosing, choose(model, tokenizer, choosing), strict=True)}
    found |= {item.line: one for item, one in zip(writing, answer(model, tokenizer, writing), strict=True)}
    return [found[item.line] for item in items]


def choose(model: GPT, tokenizer: Tokenizer, items: Sequence[Item]) -> list[Judged]:
    """Multiple choice: the likeliest, and the likeliest a character."""
    pairs = [
        _at_line(item, lambda i=item, c=c: encode_pair(tokenizer, i.prompt, c)) for item in items for c in item.choices
    ]
    scored = iter(score(model, tokenizer, [ids for ids, _ in pairs], [begin for _, begin in pairs]))
    judged = []
    for item in items:
        sums = np.array([next(scored).logprob.sum() for _ in item.choices])
        best, best_by_length = int(sums.argmax()), int((sums / [len(c) for c in item.choices]).argmax())
        right, also = best == item.answer, best_by_length == item.answer
        judged.append(Judged(item, item.choices[best], right, also, tuple(float(s) for s in sums)))
    return judged


def _at_line(item: Item, work: Any) -> Any:
    try:
        return work()
    except InputError as error:
        raise InputError(f"line {item.line}: {error}") from None


def answer(model: GPT, tokenizer: Tokenizer, items: Sequence[Item]) -> list[Judged]:
    """Generation: greedy, then the match."""
    prompts = [_at_line(item, lambda i=item: tokenizer.encode_prompt(i.prompt)) for item in items]
    texts = continue_all(model, tokenizer, prompts, [item.tokens for item in items], GREEDY)
    judged = [matches(item, text) for item, text in zip(items, texts, strict=True)]
    return [Judged(i, text, right, None, ()) for i, text, right in zip(items, texts, judged, strict=True)]


def matches(item: Item, text: str) -> bool:
    """Whether a generation is right."""
    wanted = str(item.answer)
    if item.match == "contains":
        return wanted in text
    if item.match == "regex":
        return re.search(wanted, text) is not None
    return text.strip().split("\n")[0].strip() == wanted.strip()


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers by kind; `chance` is what guessing gives among the choices."""

    choices: Estimate
    choices_by_length: Estimate
    chance: float
    generation: Estimate


def accuracy(judged: Sequence[Judged]) -> Accuracy:
    """The accuracy over judged items, with Wilson's intervals."""
    chosen = [one for one in judged if one.item.choices]
    written = [one for one in judged if not one.item.choices]
    chance = float(np.mean([1 / len(one.item.choices) for one in chosen])) if chosen else float("nan")
    return Accuracy(
        share(sum(one.right for one in chosen), len(chosen)),
        share(sum(bool(one.normalised_right) for one in chosen), len(chosen)),
        chance,
        share(sum(one.right for one in written), len(written)),
    )

"""Lesson: the logit lens: what the model would answer if it ended after a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kobza.model import GPT
from kobza.studio.explorer.lesson import Asked, Form, Lesson, ask_model, label
from kobza.studio.explorer.sources import Eye, check_finite, most_traced

TOKENS = 32


@dataclass(frozen=True)
class Row:
    """A layer at each place: the likeliest token, its probability, that of the final answer, and that one's rank (0 first)."""

    name: str
    best: list[int]
    share: list[float]
    final: list[float]
    rank: list[int]


def ask(eye: Eye, asked: Asked) -> Form:
    """A model and a prompt."""
    return ask_model(eye, asked)


def show(eye: Eye, form: Form) -> dict[str, Any]:
    """A row a layer, a column a place."""
    model, tokenizer = eye.open(form.model)
    most = most_traced(model, TOKENS)
    ids = eye.ids(form.model, form.prompt, most)
    rows = eye.look("lens", form.model, ids, lambda model, ids: taken(eye, form.model, model, ids))
    answers = rows[-1].best
    first = [appears([row.best[t] for row in rows]) for t in range(len(ids))]
    return {
        "tokens": [label(tokenizer, i) for i in ids],
        "most": most,
        "rows": [
            {
                "name": words(row.name),
                "cells": [cell(row, t, tokenizer, answers[t], n >= first[t]) for t in range(len(ids))],
            }
            for n, row in enumerate(rows)
        ],
        "answer": {
            "token": label(tokenizer, answers[-1]),
            "where": words(rows[first[-1]].name),
            "share": rows[-1].share[-1],
        },
    }


def taken(eye: Eye, name: str, model: GPT, ids: list[int]) -> list[Row]:
    """What is kept of a trace: four numbers a layer and place, not the whole vocabulary."""
    trace, rows = eye.sources.trace(model, ids), []
    check_finite(name, *trace.lens.values())
    answers = list(trace.lens.values())[-1].argmax(-1)  # (T,)
    for layer, logits in trace.lens.items():
        p = logits.softmax(-1)  # (T, V)
        best, final = p.max(-1), p.gather(-1, answers[:, None])  # (T,), (T, 1)
        rank = (p > final).sum(-1)
        rows.append(Row(layer, best.indices.tolist(), best.values.tolist(), final[:, 0].tolist(), rank.tolist()))
    return rows


def cell(row: Row, t: int, tokenizer: Any, answer: int, settled: bool) -> dict[str, Any]:
    """A cell with what it says when touched."""
    token, final = label(tokenizer, row.best[t]), label(tokenizer, answer)
    says = f"{words(row.name)}: “{token}” {row.share[t]:.1%}; the final answer “{final}” is number {row.rank[t] + 1}"
    return {
        "token": token,
        "share": row.share[t],
        "right": row.best[t] == answer,
        "settled": settled,
        "shade": round(8 * row.final[t] ** 0.5),
        "say": f"{says}, with {row.final[t]:.1%}",
    }


def appears(best: list[int]) -> int:
    """From which layer on the likeliest token is the last one's and stays so. appears([5, 7, 5, 5]) -> 2"""
    changed = [n for n, i in enumerate(best) if i != best[-1]]
    return changed[-1] + 1 if changed else 0


def words(name: str) -> str:
    """words("blocks.3") -> "after block 3"."""
    return f"after block {name.removeprefix('blocks.')}" if name.startswith("blocks.") else name


LESSON = Lesson(
    "lens",
    "Logit lens",
    "what the model would say if it ended here",
    ask,
    show,
)

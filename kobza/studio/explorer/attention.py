"""Lesson: where each head looks: a map a head, and one of them large."""

from __future__ import annotations

from typing import Any

import numpy as np

from kobza.config import require
from kobza.model import GPT
from kobza.studio.explorer import draw
from kobza.studio.explorer.lesson import Asked, Form, Lesson, ask_model, label
from kobza.studio.explorer.sources import Eye, check_finite, most_traced

TOKENS = 32
CELLS = 60_000  # of all small maps together: what a phone scrolls without effort


def ask(eye: Eye, asked: Asked) -> Form:
    """A prompt and which map is large."""
    form = ask_model(eye, asked)
    form.layer, form.head = asked.whole("layer", 0, 0, 9_999), asked.whole("head", 0, 0, 9_999)
    form.map = asked.text("map", "", 12)  # of a click: "2.0"
    if form.map:
        layer, _, head = form.map.partition(".")
        require(layer.isdecimal() and head.isdecimal(), f"map is {form.map!r}; give a layer and a head, as 0.1")
        form.layer, form.head = int(layer), int(head)
    return form


def show(eye: Eye, form: Form) -> dict[str, Any]:
    """The maps of as many layers as fit, from the chosen one's neighbourhood, and the chosen one."""
    model, tokenizer = eye.open(form.model)
    ids = eye.ids(form.model, form.prompt, most_traced(model, TOKENS))
    maps = eye.look("attention", form.model, ids, lambda model, ids: taken(eye, form.model, model, ids))
    require(bool(maps), "this model has no attention: its blocks have only feed-forwards")
    choose(form, [len(heads) for heads in maps])
    tokens = [label(tokenizer, i) for i in ids]
    fit = max(1, CELLS // (len(ids) ** 2 * max(len(heads) for heads in maps)))
    first = max(0, min(form.layer - fit // 2, len(maps) - fit))
    layers = [
        {"layer": i, "heads": [draw.shares(w) for w in maps[i]]} for i in range(first, min(first + fit, len(maps)))
    ]
    large = maps[form.layer][form.head]
    return {
        "tokens": tokens,
        "layers": layers,
        "n_layers": len(maps),
        "large": {"cells": cells(large, tokens), "looks": looks(large, tokens), "back": back(large)},
    }


def choose(form: Form, heads: list[int]) -> None:
    """A map that was clicked on must be there; one that is left over from another model gives way to the nearest."""
    layer = min(form.layer, len(heads) - 1)
    head = min(form.head, heads[layer] - 1)
    there = not form.map or (layer, head) == (form.layer, form.head)
    require(there, f"map is {form.map}: the model has {len(heads)} layers of {heads[layer]} heads, counted from 0")
    form.layer, form.head = layer, head


def taken(eye: Eye, name: str, model: GPT, ids: list[int]) -> list[np.ndarray]:
    """The maps of each attention, (H, T, T)."""
    maps = [w.float() for w in eye.sources.trace(model, ids).attention.values()]
    check_finite(name, *maps)
    return [w.numpy() for w in maps]


def cells(w: np.ndarray, tokens: list[str]) -> list[dict[str, Any]]:
    """Every cell that a token may look at, with what it says when touched."""
    return [
        {
            "x": j,
            "y": i,
            "shade": int(np.rint(np.sqrt(w[i, j]) * draw.SHADES)),
            "say": f"“{tokens[i]}” ({i}) looks at “{tokens[j]}” ({j}): {w[i, j]:.1%}",
        }
        for i in range(len(w))
        for j in range(i + 1)
    ]


def looks(w: np.ndarray, tokens: list[str]) -> list[dict[str, Any]]:
    """What each token looks at most."""
    best = w.argmax(-1).tolist()
    return [{"token": tokens[i], "at": tokens[j], "same": i == j, "share": float(w[i, j])} for i, j in enumerate(best)]


def back(w: np.ndarray) -> float:
    """How many tokens back a head looks, on average over the tokens that have a choice."""
    distance = np.arange(len(w))[:, None] - np.arange(len(w))
    return float((w * distance).sum(-1)[1:].mean()) if len(w) > 1 else 0.0


LESSON = Lesson(
    "attention",
    "Attention",
    "where each head looks, and which token it takes from",
    ask,
    show,
)

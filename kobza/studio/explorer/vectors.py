"""Lesson: tokens as vectors: their rows of the table, their neighbours, a map of them, and how their place is told.

All of it is read from the model's own tables: the embedding, learned or sinusoidal positions, and the cosines of its rope, of
which the page shows what turning does to q · k of two equal vectors. draw.py makes the pictures.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kobza.model import GPT
from kobza.studio.explorer import draw
from kobza.studio.explorer.lesson import Asked, Form, Lesson, ask_model, figure, label
from kobza.studio.explorer.sources import Eye, check_finite
from kobza.tokenizer import Tokenizer

TOKENS, COMPONENTS, NEIGHBOURS, PLACES = 24, 64, 8, 64
MAPPED = 120  # points that can be told apart
PLOT, DIALS = (320.0, 220.0), 6


def ask(eye: Eye, asked: Asked) -> Form:
    """A prompt, which of its tokens has the neighbours shown, and how far apart two places are."""
    form = ask_model(eye, asked)
    form.at, form.distance = asked.whole("at", 0, 0, TOKENS - 1), asked.whole("distance", 1, 0, PLACES - 1)
    return form


def show(eye: Eye, form: Form) -> dict[str, Any]:
    """Rows, neighbours, similarities, a map, places."""
    ids = eye.ids(form.model, form.prompt, TOKENS)
    model, tokenizer = eye.open(form.model)
    return eye.look(
        f"vectors {form.at} {form.distance}", form.model, ids, lambda *_: looked(model, tokenizer, ids, form)
    )


@torch.no_grad()
def looked(model: GPT, tokenizer: Tokenizer, ids: list[int], form: Form) -> dict[str, Any]:
    """What the page shows."""
    config = model.config
    table = model.embed.weight[: config.vocab_size].float().cpu() * config.embed_scale  # (V, C)
    check_finite(form.model, table)
    rows, at = table[ids], min(form.at, len(ids) - 1)
    near = neighbours(table, ids[at])
    return {
        "tokens": [label(tokenizer, i) for i in ids],
        "ids": ids,
        "at": at,
        "shape": f"{config.vocab_size:,} × {config.n_embd}",
        "components": min(COMPONENTS, config.n_embd),
        "width": config.n_embd,
        "strip": draw.signed(rows[:, :COMPONENTS].numpy(), 3 * rows.std(correction=0).item()),
        "lengths": [figure(x) for x in rows.norm(dim=-1).tolist()],
        "near": [{"token": label(tokenizer, i), "id": i, "cosine": c} for i, c in near],
        "alike": draw.signed(cosines(rows, rows).numpy(), 1.0),
        "map": chart(table, tokenizer, ids, at, [i for i, _ in near]),
        "places": places(model, form.distance),
    }


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of each row of a (n, C) with each of b (m, C) -> (n, m); of a row of zeros 0."""
    unit_a, unit_b = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (a, b))
    return unit_a @ unit_b.mT


def neighbours(table: Tensor, i: int) -> list[tuple[int, float]]:
    """The tokens whose rows point nearest to where token i's does, itself left out."""
    similar = cosines(table[i : i + 1], table)[0]  # (V,)
    similar[i] = -2
    best = similar.topk(min(NEIGHBOURS, len(similar) - 1))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def chart(table: Tensor, tokenizer: Tokenizer, ids: list[int], at: int, near: list[int]) -> dict[str, Any]:
    """Rows on the plane in which they differ most (PCA): a whole small vocabulary, of a large one the prompt and neighbours."""
    small = len(table) <= MAPPED
    chosen = list(range(len(table))) if small else list(dict.fromkeys([*ids, *near]))
    centred = table[chosen] - table[chosen].mean(0)  # (n, C)
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    plane = torch.zeros(len(chosen), 2)
    plane[:, : left.shape[1]] = (left * sizes)[:, :2]
    span = plane.abs().amax(0).clamp_min(1e-12)
    where = (plane / span + 1) / 2  # (n, 2) in [0, 1]
    kinds = {i: "in" for i in ids} | {i: "near" for i in near} | {ids[at]: "at"}
    points = [
        {"x": 8 + 304 * x, "y": 10 + 204 * y, "token": label(tokenizer, i), "kind": kinds.get(i, "other")}
        for i, (x, y) in zip(chosen, where.tolist(), strict=True)
    ]
    power = sizes.square()
    return {"points": points, "share": float(power[:2].sum() / power.sum().clamp_min(1e-30)), "whole": small}


# ---- places --------------------------------------------------------------------------------------------------------


def places(model: GPT, distance: int) -> dict[str, Any]:
    """How the model tells a token its place, as a picture."""
    kind, n = model.config.position, min(PLACES, model.config.max_seq_len)
    if kind == "rope" and model.config.n_attention:
        return rotary(model, n, min(distance, n - 1))
    if model.position is None:
        return {"kind": "none"}
    table = model.position(torch.arange(n, device=model.embed.weight.device)).float().cpu()  # (n, C)
    shown = table[:, :COMPONENTS].numpy()
    similar = cosines(table, table)  # (n, n)
    return {
        "kind": kind,
        "n": n,
        "wide": shown.shape[1],
        "picture": draw.signed(shown, 3 * float(table.std(correction=0)) or None),
        "alike": draw.signed(similar.numpy(), 1.0),
    }


def rotary(model: GPT, n: int, distance: int) -> dict[str, Any]:
    """Angles by place, and what they do to q · k of two equal vectors so far apart: the mean of the cosines."""
    cos, sin = model.rope.cos[:n].cpu(), model.rope.sin[:n].cpu()  # (n, D/2)
    gain = cos[0, 0].item()  # yarn's; 1 otherwise
    dots = (cos / gain).mean(-1).tolist()  # pair m of equal halves gives cos(distance · f_m)
    pairs = np.linspace(0, cos.shape[1] - 1, min(DIALS, cos.shape[1])).round().astype(int).tolist()
    dials = [dial(m, cos[:, m].tolist(), sin[:, m].tolist(), distance, gain) for m in dict.fromkeys(pairs)]
    low = min(0.0, *dots)
    return {
        "kind": "rope",
        "n": n,
        "wide": cos.shape[1],
        "picture": draw.signed(cos.numpy(), gain),
        "curve": draw.curve(dots, low, 1.0, *PLOT),
        "zero": PLOT[1] * (1 / (1 - low)),
        "x": PLOT[0] * distance / max(1, n - 1),
        "y": PLOT[1] * (1 - dots[distance]) / (1 - low),
        "distance": distance,
        "dot": dots[distance],
        "dials": dials,
    }


def dial(m: int, cos: list[float], sin: list[float], distance: int, gain: float) -> dict[str, Any]:
    """A pair of channels as a hand that has turned; y grows downwards in a picture."""
    degrees = math.degrees(math.atan2(sin[1], cos[1])) if len(cos) > 1 else 0.0
    x, y = cos[distance] / gain, sin[distance] / gain
    return {"pair": m, "x": 20 * x, "y": -20 * y, "a_place": figure(degrees), "cosine": x}


LESSON = Lesson(
    "vectors",
    "Vectors",
    "each token becomes a row of numbers, and learns where it stands",
    ask,
    show,
)

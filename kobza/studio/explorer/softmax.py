"""Lesson: softmax and temperature: scores become probabilities."""

from __future__ import annotations

import math
from typing import Any

import torch

from kobza.generate import temperature
from kobza.studio.explorer.lesson import Asked, Form, Lesson, figure
from kobza.studio.explorer.sources import Eye

NAMES = ("the", "a", "cat", "blue", "42")
SCORES = (3.0, 2.0, 1.0, 0.0, -2.0)


def ask(eye: Eye, asked: Asked) -> Form:
    """Five scores and a temperature."""
    scores = [asked.number(f"z{i}", SCORES[i], -10, 10) for i in range(len(NAMES))]
    return Form(names=NAMES, scores=scores, temperature=asked.number("temperature", 1.0, 0.05, 5.0))


def show(eye: Eye, form: Form) -> dict[str, Any]:
    """Each step of softmax, by the very knob that `kobza generate` turns."""
    logits = torch.tensor([form.scores], dtype=torch.float64)
    plain, scaled = logits[0].softmax(-1).tolist(), temperature(form.temperature)(logits, [[]])[0]
    p = scaled.softmax(-1)
    rows = [
        {"name": name, "z": f"{z:g}", "scaled": figure(s), "power": figure(math.exp(s)), "before": b, "p": q}
        for name, z, s, b, q in zip(NAMES, form.scores, scaled.tolist(), plain, p.tolist(), strict=True)
    ]
    entropy = float(torch.special.entr(p).sum())
    return {
        "rows": rows,
        "total": figure(sum(math.exp(s) for s in scaled.tolist())),
        "entropy": f"{entropy:.2f}",
        "choices": f"{math.exp(entropy):.1f}",
    }


LESSON = Lesson(
    "softmax",
    "Softmax",
    "scores become probabilities, and temperature makes them sharper or flatter",
    ask,
    show,
    wide=False,
)

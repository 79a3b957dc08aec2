"""Lesson: where a model's parameters are, what they weigh in each number format, and the equations they stand in."""

from __future__ import annotations

from typing import Any

from kobza.model import n_parameters
from kobza.studio.explorer.lesson import Asked, Form, Lesson
from kobza.studio.explorer.linear import in_bytes
from kobza.studio.explorer.sources import Eye

FORMATS = {"fp32": 4.0, "bf16, fp16": 2.0, "int8, fp8": 1.0, "4 bits": 0.5}


def ask(eye: Eye, asked: Asked) -> Form:
    """A model."""
    names = eye.names()
    return Form(models=[(n, n) for n in names], model=asked.one_of("model", names, names[0]) if names else "")


def show(eye: Eye, form: Form) -> dict[str, Any]:
    """Its parts with their shares, and its equations."""
    model, _ = eye.open(form.model)
    parts, total = list(eye.sources.parts(model.config)), n_parameters(model)
    flops = sum(part.flops_per_token for part in parts) or 1
    return {
        "total": total,
        "flops": flops,
        "rows": [
            {
                "name": part.name,
                "copies": part.copies,
                "shapes": part.shapes.replace(" x ", " × "),
                "parameters": part.parameters,
                "share": part.parameters / max(1, total),
                "flops": part.flops_per_token / flops,
            }
            for part in parts
        ],
        "formats": [
            {"name": name, "bytes": in_bytes(size * total), "share": size / 4} for name, size in FORMATS.items()
        ],
        "equations": [line._asdict() for line in eye.sources.equations(model.config)],
    }


LESSON = Lesson(
    "parameters",
    "Parameters",
    "where a model's numbers are, and its equations",
    ask,
    show,
)

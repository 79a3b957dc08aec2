"""Two lessons: a linear layer in numbers that one can follow, and what one of given sizes holds and how long it takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kobza.studio.explorer.lesson import Asked, Form, Lesson, figure
from kobza.studio.explorer.sources import Eye

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "fp4": 0.5}
MACHINES = (  # words, FLOPs a second, bytes a second: makers' data sheets, dense, rounded
    ("laptop", "a laptop's processor: 200 GFLOP/s, 50 GB/s", 200.0, 50.0),
    ("gpu", "an NVIDIA H100: 989 TFLOP/s in bf16, 3,350 GB/s", 989_000.0, 3_350.0),
    ("own", "another: give its figures below", 0.0, 0.0),
)
W, BIAS, X = ((1, 2, 0), (-1, 0, 3)), (0.5, -1), (1, 2, 3)  # of the small example


def ask(eye: Eye, asked: Asked) -> Form:
    """The numbers of the example."""
    return Form(
        x=[asked.number(f"x{j}", X[j], -10, 10) for j in range(3)],
        w=[[asked.number(f"w{i}{j}", W[i][j], -100, 100) for j in range(3)] for i in range(2)],
        b=[asked.number(f"b{i}", BIAS[i], -100, 100) for i in range(2)],
    )


def show(eye: Eye, form: Form) -> dict[str, Any]:
    """The example, worked out."""
    return {"example": example(form.w, form.x, form.b)}


def ask_cost(eye: Eye, asked: Asked) -> Form:
    """Sizes and a machine."""
    return Form(
        n_in=asked.whole("in", 512, 1, 65_536),
        n_out=asked.whole("out", 2048, 1, 262_144),
        bias=asked.one_of("bias", ("no", "yes"), "no"),
        batch=asked.whole("batch", 1, 1, 4096),
        tokens=asked.whole("tokens", 64, 1, 131_072),
        dtype=asked.one_of("dtype", list(BYTES), "bf16"),
        dtypes=[(name, f"{name}, {size:g} bytes") for name, size in BYTES.items()],
        machine=asked.one_of("machine", [name for name, *_ in MACHINES], "laptop"),
        machines=[(name, words) for name, words, *_ in MACHINES],
        gflops=asked.number("gflops", 1000, 0.001, 1e9),
        gbytes=asked.number("gbytes", 100, 0.001, 1e7),
    )


def show_cost(eye: Eye, form: Form) -> dict[str, Any]:
    """What the sizes cost."""
    return {"cost": cost(form), "drawing": drawing(form.n_in, form.n_out)}


def cost(form: Form) -> dict[str, Any]:
    """Parameters, bytes, FLOPs, and the time that a machine needs at least: to compute, and to move the bytes."""
    rows, size = form.batch * form.tokens, BYTES[form.dtype]
    parameters = form.n_in * form.n_out + (form.n_out if form.bias == "yes" else 0)
    flops = 2 * rows * form.n_in * form.n_out + (rows * form.n_out if form.bias == "yes" else 0)
    moved = {"weights": size * parameters, "in": size * rows * form.n_in, "out": size * rows * form.n_out}
    gflops, gbytes = next(m[2:] for m in MACHINES if m[0] == form.machine)
    gflops, gbytes = (form.gflops, form.gbytes) if form.machine == "own" else (gflops, gbytes)
    total = sum(moved.values())
    compute, memory = flops / (gflops * 1e9), total / (gbytes * 1e9)
    return {
        "rows": rows,
        "parameters": parameters,
        "weights": in_bytes(moved["weights"]),
        "moved": in_bytes(total),
        "flops": f"{flops:,}",
        "intensity": flops / total,
        "balance": gflops / gbytes,
        "compute": in_seconds(compute),
        "memory": in_seconds(memory),
        "bound": "computing" if compute >= memory else "memory",
        "compute_share": compute / max(compute, memory),
        "memory_share": memory / max(compute, memory),
    }


def example(w: list[list[float]], x: list[float], b: list[float]) -> list[dict[str, str]]:
    """W x + b a row at a time, in words and as torch has it. ([[1, 2]], [3, 4], [5]) -> "1·3 + 2·4 + 5 = 16" """
    y = F.linear(torch.tensor(x, dtype=torch.float64), torch.tensor(w).double(), torch.tensor(b).double()).tolist()
    lines = []
    for row, bias, value in zip(w, b, y, strict=True):
        terms = " + ".join(f"{plain(a)}·{plain(each)}" for a, each in zip(row, x, strict=True))
        lines.append({"terms": f"{terms} + {plain(bias)}", "value": plain(value)})
    return lines


def plain(x: float) -> str:
    """A number as one writes it: (−1) in a sum, 0.5, 3."""
    text = f"{round(x, 6):g}".replace("-", "−")
    return f"({text})" if x < 0 else text


def drawing(n_in: int, n_out: int) -> dict[str, float]:
    """Sides of the matrix in a picture of 150 x 110, true to their ratio where that can be seen."""
    scale = min(150 / n_in, 110 / n_out)
    return {"wide": max(8.0, n_in * scale), "high": max(8.0, n_out * scale)}


def in_bytes(n: float) -> str:
    """in_bytes(2_097_152) -> "2.1 MB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n:,.0f} bytes" if n == int(n) else f"{n:,.1f} bytes"


def in_seconds(seconds: float) -> str:
    """in_seconds(0.00067) -> "670 µs"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:,.4g} {unit}"
    return f"{figure(seconds / 1e-9)} ns"


LESSON = Lesson(
    "linear",
    "Linear layer",
    "y = W x + b: nearly all of a model's numbers and nearly all of its work",
    ask,
    show,
    wide=False,
)
COST = Lesson(
    "cost",
    "Cost of a layer",
    "what a linear layer of given sizes holds, and how long it takes",
    ask_cost,
    show_cost,
)

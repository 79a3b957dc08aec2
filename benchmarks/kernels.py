"""Each Triton kernel, forward and backward, beside its plain twin, torch.compile of that, and Liger where it is installed.

    python benchmarks/kernels.py [--tokens 8192] [--note WORDS]

Prints rows for results.csv: milliseconds (median, 20% and 80% of the calls), peak memory above the inputs, and where memory is
the bound, the share of it: the bytes that must move over what a copy on this device moves then. Llama 3 8B's shapes in bf16.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kobza.layers import rms_norm as plain_norm
from kobza.layers import rotate, widen

Form = Callable[..., Tensor | tuple[Tensor, ...]]


class Case(NamedTuple):
    """A kernel's forms by name, their inputs, and the elements that must be read or written, forward and back (0: products
    take the time)."""

    forms: dict[str, Form]
    inputs: list[Tensor]
    elements: int


def cases(tokens: int, C: int, n_ff: int, heads: tuple[int, int, int], V: int, device: str) -> dict[str, Case]:
    """All kernels at one model's sizes; heads: H, K, D."""
    from kobza.kernels.head_loss import head_loss as chunked_head_loss
    from kobza.kernels.lora import lora_linear
    from kobza.kernels.triton.cross_entropy import cross_entropy
    from kobza.kernels.triton.glu import glu
    from kobza.kernels.triton.head_loss import head_loss
    from kobza.kernels.triton.rms_norm import rms_norm
    from kobza.kernels.triton.rope import rope

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_()

    H, K, D = heads
    angles = torch.randn(tokens, D // 2, device=device)
    targets = torch.randint(V, (tokens,), device=device)
    theirs, x, norm_weight = liger(), drawn(tokens, C), torch.ones(C, device=device, requires_grad=True)
    q, k = (drawn(1, tokens, n, D).detach().transpose(1, 2).requires_grad_() for n in (H, K))
    forms = {
        "rms_norm": (lambda x, w: plain_norm(x, 1e-5) * w.to(x.dtype), lambda x, w: rms_norm(x, w, 1e-5)),
        "rope": (lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin)), rope),
        "glu": (lambda g, u: F.silu(g) * u, lambda g, u: glu(g, u, "silu")),
        "cross_entropy": (lambda z, t: F.cross_entropy(widen(z), t, reduction="sum"), cross_entropy),
        "head_loss": (lambda x, w, t: F.cross_entropy(widen(F.linear(x, w)), t, reduction="sum"), head_loss),
        "lora": (
            lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * 2.0,
            lambda x, w, a, b: lora_linear(x, SimpleNamespace(weight=w, bias=None), a, b, 2.0),
        ),
    }
    inputs = {
        "rms_norm": [x, norm_weight],
        "rope": [q, k, angles.cos(), angles.sin()],
        "glu": [drawn(tokens, n_ff), drawn(tokens, n_ff)],
        "cross_entropy": [drawn(tokens, V), targets],
        "head_loss": [x, drawn(V, C).detach() * 0.02, targets],  # a frozen head, as under LoRA
        "lora": [
            x,
            drawn(n_ff, C).detach(),
            *(drawn(*shape).detach().float().requires_grad_() for shape in ((16, C), (n_ff, 16))),
        ],
    }
    elements = {
        "cross_entropy": 3 * tokens * V,
        "rms_norm": 5 * x.numel(),
        "rope": 4 * (q.numel() + k.numel()),
        "glu": 8 * tokens * n_ff,
    }
    found = {}
    for name, (plain, ours) in forms.items():
        beside = {"plain": plain, "compile": torch.compile(plain), "kobza": ours}
        beside |= {"kobza torch": chunked_head_loss} if name == "head_loss" else {}
        beside |= {"liger": theirs[name]} if name in theirs else {}
        found[name] = Case(beside, inputs[name], elements.get(name, 0))
    return found


def liger() -> dict[str, Form]:
    """Liger's forms of the same; {} where it is not installed."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except ImportError:
        return {}
    return {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-5, 0.0, "llama", False),
        "rope": lambda q, k, cos, sin: liger_rotary_pos_emb(q, k, cos.repeat(1, 2)[None], sin.repeat(1, 2)[None]),
        "glu": LigerSiLUMulFunction.apply,
        "cross_entropy": LigerCrossEntropyLoss(reduction="sum"),
        "head_loss": lambda x, w, t: LigerFusedLinearCrossEntropyLoss(reduction="sum")(w, x, t),
    }


def once(form: Form, inputs: list[Tensor]) -> None:
    """Forward and backward. Through views, since kernels write gradients over what an operation made, and copy what is a leaf."""
    made = [x.view_as(x) if x.requires_grad else x for x in inputs]
    outputs = form(*made)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], [torch.ones_like(y) for y in outputs])


def measure(form: Form, inputs: list[Tensor]) -> tuple[tuple[float, float, float], float]:
    """Milliseconds (median, low, high) and peak MB above the inputs."""
    from triton.testing import do_bench

    once(form, inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    once(form, inputs)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return tuple(do_bench(lambda: once(form, inputs), quantiles=[0.5, 0.2, 0.8])), peak


def main() -> None:
    """Measure every form of every kernel."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        return print("no CUDA device here: kernels are timed on one; nothing measured")
    from triton.testing import do_bench

    commit = (
        subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or "-"
    )
    machine = f"{torch.cuda.get_device_name()} torch {torch.__version__}"
    block = torch.empty(2**28, dtype=torch.int32, device="cuda")  # 1 GiB, far beyond the cache
    copied = 2 * block.nbytes / do_bench(block.clone)  # bytes a millisecond
    del block
    out = csv.writer(sys.stdout)
    for name, case in cases(args.tokens, 4096, 14336, (32, 8, 128), 128_256, "cuda").items():
        for kind, form in case.forms.items():
            try:
                times, peak = measure(form, case.inputs)
            except torch.OutOfMemoryError:
                times, peak = (float("nan"),) * 3, float("nan")
            start = [datetime.date.today().isoformat(), commit, machine, f"kernel {name} {args.tokens} tokens"]
            found = {"ms": times, "peak_mb": (peak,) * 3}
            found |= {"share_of_memory_bound": (2 * case.elements / copied / times[0],) * 3} if case.elements else {}
            for metric, figures in found.items():
                out.writerow(
                    [*start, f"{kind}_{metric}".replace(" ", "_"), *(f"{x:.4g}" for x in figures), 1, args.note]
                )
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

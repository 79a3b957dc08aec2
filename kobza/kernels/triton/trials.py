"""A small odd-shaped task for each kernel, its plain twin beside it: what `kobza.kernels.choose` tries on a device before it
takes the kernel. TRIALS[name](dtype) -> plain form, fast form, inputs."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from kobza.kernels import head_loss as plain_head
from kobza.kernels.lora import lora_linear
from kobza.kernels.trial import Form
from kobza.kernels.triton.glu import ACTIVATIONS, glu
from kobza.kernels.triton.head_loss import head_loss
from kobza.kernels.triton.rms_norm import rms_norm
from kobza.kernels.triton.rope import rope
from kobza.layers import ACTIVATIONS as MODULES
from kobza.layers import RMSNorm, rotate

Trial = tuple[Form, Form, list[Tensor]]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, learns: bool = True) -> Tensor:
    """N(0, 1), the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(learns)


def norm_trial(dtype: torch.dtype) -> Trial:
    """Both cast orders, the later one with Gemma's offset."""

    def plain(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return tuple(plain_norm(x, w, 1e-5, offset, late) for offset, late in ((0.0, False), (1.0, True)))

    def fast(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return rms_norm(x, w, 1e-5), rms_norm(x, w, 1e-5, 1.0, True)

    return plain, fast, [drawn(5, 123, dtype=dtype), drawn(123, seed=1)]


def plain_norm(x: Tensor, w: Tensor | None, eps: float, offset: float, late: bool) -> Tensor:
    """The module's own arithmetic on a weight given."""
    norm = RMSNorm(x.shape[-1], eps, False, offset, late)
    norm.weight = w
    return norm(x)


def rope_trial(dtype: torch.dtype) -> Trial:
    """Four query heads to two of keys, 10 of 14 channels turned."""
    angles = drawn(5, 5, learns=False)
    q, k = drawn(2, 5, 4, 14, dtype=dtype), drawn(2, 5, 2, 14, seed=1, dtype=dtype)

    def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)

    def fast(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    return plain, fast, [q, k, angles.cos(), angles.sin()]


def glu_trial(dtype: torch.dtype) -> Trial:
    """All three activations."""

    def plain(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return tuple(MODULES[name]()(gate) * up for name in ACTIVATIONS)

    def fast(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return tuple(glu(gate, up, name) for name in ACTIVATIONS)

    return plain, fast, [drawn(5, 123, dtype=dtype), drawn(5, 123, seed=1, dtype=dtype)]


def head_trial(dtype: torch.dtype) -> Trial:
    """Three chunks of rows, one target that is not learned, a softcap."""
    targets = torch.tensor([0, 300, -100, 3, 5, 6, 7])

    def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return plain_head.head_loss(x, weight, targets, 5.0, 3)

    def fast(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return head_loss(x, weight, targets, 5.0, 3)

    return plain, fast, [drawn(7, 20, dtype=dtype), drawn(301, 20, seed=1), targets]


def lora_trial(dtype: torch.dtype) -> Trial:
    """Rank 3 on a frozen layer with a bias."""
    w, bias = drawn(19, 23, seed=1, dtype=dtype, learns=False), drawn(19, seed=2, dtype=dtype, learns=False)

    def plain(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w, bias) + 2.0 * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    def fast(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, SimpleNamespace(weight=w, bias=bias), a, b, 2.0)

    return plain, fast, [drawn(2, 5, 23, dtype=dtype), w, bias, drawn(3, 23, seed=3), drawn(19, 3, seed=4)]


TRIALS = {
    "rms_norm": norm_trial,
    "rope": rope_trial,
    "glu": glu_trial,
    "lora": lora_trial,
    "head_loss": head_trial,
}

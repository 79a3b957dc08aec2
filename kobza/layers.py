"""The parts of model.py that act on each token alone: linear layer, norms, positions, activations, feed-forward.

Each is built from numbers and equations of ModelConfig and knows nothing of the network around it.

Shapes: B batch, T tokens, C n_embd, D head_dim, F width of the feed-forward.
Precision: weights are float32; each Linear casts its weight to the dtype of what flows in. Norms and rope compute in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.config import ModelConfig


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input. (..., in) -> (..., out)."""

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` draws every tensor."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Embedding):
    """Rows of a table in `dtype` (None: its own), times `scale` in it (Gemma: sqrt(C); 1: none). ids (...) -> (..., C)."""

    def __init__(self, n_rows: int, size: int, scale: float = 1.0):
        super().__init__(n_rows, size)
        self.scale = scale

    def reset_parameters(self) -> None:
        """Nothing: as in Linear. Torch's own draw imports its compiler's machinery where the table is on the meta device."""

    def forward(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        x = F.embedding(ids, self.weight)
        if self.scale == 1:
            return x  # a position may be added to it before it is cast
        x = x if dtype is None else x.to(dtype)
        return x * x.new_full((), self.scale)  # rounded as Gemma's: in bf16 55.5, where a Python float stays 55.4256


# ---- norms ---------------------------------------------------------------------------------------------------------


def widen(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64 (proofs run in it)."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32. rms_norm([3., 4.], 0) -> [0.85, 1.13]. Zhang & Sennrich 2019."""
    return F.rms_norm(widen(x), (x.shape[-1],), eps=eps).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * (weight + offset), in float32. (..., C) -> (..., C).

    Cast down before the weight is applied, as Llama does, or with `cast_late` after it, as Gemma does: in bf16 these differ.
    """

    def __init__(self, size: int, eps: float, weight: bool = True, offset: float = 0.0, cast_late: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset)) if weight else None
        self.eps, self.offset, self.cast_late = eps, offset, cast_late

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return rms_norm(x, self.eps)
        weight = widen(self.weight) + self.offset if self.offset else self.weight  # 1 + w keeps few bits of w in bf16
        if self.cast_late:
            return (rms_norm(widen(x), self.eps) * widen(weight)).to(x.dtype)
        return rms_norm(x, self.eps) * weight.to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * (weight + offset) + bias, in float32. (..., C) -> (..., C). Ba et al. 2016."""

    def __init__(self, size: int, eps: float, weight: bool, bias: bool, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset)) if weight else None
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight is None or not self.offset else widen(self.weight) + self.offset
        weight, bias = (None if part is None else part.to(x.dtype) for part in (weight, self.bias))
        return torch.layer_norm(x, x.shape[-1:], weight, bias, self.eps)  # torch's kernel computes in float32 inside


def make_norm(config: ModelConfig, *places: str) -> nn.Module:
    """The norm that the config names, over n_embd, where its placement is one of `places`; elsewhere nothing."""
    if config.norm == "none" or config.norm_place not in places:
        return nn.Identity()
    offset = float(config.norm_offset)
    if config.norm == "rmsnorm":
        late = config.norm_cast == "after"
        return RMSNorm(config.n_embd, config.norm_eps, config.norm_weight, offset, late)
    return LayerNorm(config.n_embd, config.norm_eps, config.norm_weight, config.bias, offset)


def make_head_norm(config: ModelConfig) -> nn.Module:
    """The norm of queries or keys, over head_dim; always RMS."""
    if not config.qk_norm:
        return nn.Identity()
    offset, late = float(config.norm_offset), config.norm_cast == "after"
    return RMSNorm(config.head_dim, config.norm_eps, config.qk_norm_weight, offset, late)


# ---- positions -----------------------------------------------------------------------------------------------------


class Sinusoids(nn.Module):
    """Sines and cosines of geometric wavelengths, added to the embedding. positions (...) -> (..., C). Vaswani et al. 2017."""

    def __init__(self, max_seq_len: int, size: int):
        super().__init__()
        angles = rope_angles(max_seq_len, size + size % 2, 10_000.0)
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :size]  # sin, cos, sin, cos, ...
        self.register_buffer("table", table, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        return self.table[positions]


def rope_angles(max_seq_len: int, head_dim: int, theta: float, divide: Tensor | None = None) -> Tensor:
    """Rotary angles of every position, (max_seq_len, D/2), radians, float32. Su et al. 2021, halves layout as in Llama.
    `divide` (D/2,) slows the frequencies down: `rope_slowdown`."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    frequencies = frequencies if divide is None else frequencies / divide
    return torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequencies)


def rope_slowdown(config: ModelConfig) -> tuple[Tensor, float]:
    """By what each rotary frequency is divided, (D/2,), and the factor on cos and sin, so that a model trained at
    rope_original_len reads rope_factor times as far.

    linear  all by s                                                              Chen et al. 2023
    ntk     theta grows by s^(D/(D-2)): the fastest by 1, the slowest by s         "NTK-aware", bloc97 2023
    llama3  wavelengths below L/4 by 1, above L by s, a ramp between               Llama 3.1
    yarn    turns over L above 32 by 1, below 1 by s, a ramp between; cos and sin times 0.1 ln s + 1    Peng et al. 2023
    """
    s, length, half = config.rope_factor, config.rope_original_len, (config.rope_dim or config.head_dim) // 2
    fraction = torch.arange(half, dtype=torch.float32) / half  # 2 i / D
    turns = length / (2 * math.pi) * config.rope_theta ** (-fraction)  # over the original length
    if config.rope_scaling == "linear":
        return torch.full((half,), s), 1.0
    if config.rope_scaling == "ntk":
        return s ** (fraction * half / max(1, half - 1)), 1.0
    if config.rope_scaling == "llama3":
        kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
        return 1 / (kept + (1 - kept) / s), 1.0

    def pair_with(n_turns: float) -> float:  # the index of the pair of dimensions that turns so often over the length
        return half * math.log(length / (n_turns * 2 * math.pi)) / math.log(config.rope_theta)

    first, last = max(0, math.floor(pair_with(32))), min(2 * half - 1, math.ceil(pair_with(1)))
    slowed = ((torch.arange(half) - first) / max(last - first, 0.001)).clamp(0, 1)
    return 1 / (1 - slowed + slowed / s), 0.1 * math.log(s) + 1


class Rope(nn.Module):
    """cos and sin of the rotary angles. positions (T,) -> (T, D/2) each; (B, T) -> (B, 1, T, D/2)."""

    def __init__(self, config: ModelConfig, theta: float, scaled: bool):
        super().__init__()
        divide, gain = rope_slowdown(config) if scaled else (None, 1.0)
        angles = rope_angles(config.max_seq_len, config.rope_dim or config.head_dim, theta, divide)
        self.register_buffer("cos", angles.cos() * gain, persistent=False)
        self.register_buffer("sin", angles.sin() * gain, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rope:
        """Go with the model to its device, but stay float32: model.to(bf16) would make the angles of neighbours equal."""
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)
        self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos[positions], self.sin[positions]
        return (cos, sin) if positions.ndim == 1 else (cos[:, None], sin[:, None])


class NoRope(nn.Module):
    """In a Rope's place where positions are learned, sinusoidal or not told at all. positions -> None."""

    def forward(self, positions: Tensor) -> None:
        return None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) by their angles, in float32. x (B, H, T, D); cos, sin (T, D/2) or (B, 1, T, D/2).
    With fewer angles only the first channels are turned, as if they were all."""
    half = cos.shape[-1]  # split_with_sizes, not split: a Python wrapper the less, 3 of 20 us on a generated token
    left, right, rest = widen(x).split_with_sizes((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1).to(x.dtype)


# ---- feed-forward --------------------------------------------------------------------------------------------------


class ReLU2(nn.Module):
    """max(x, 0)^2. So et al. 2021 (Primer)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu2": ReLU2,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}  # Shazeer 2020: the gate's activation


class MLP(nn.Module):
    """down(act(up(x))), each token on its own. (B, T, C) -> (B, T, C), F wide inside."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        self.up_proj = Linear(config.n_embd, width, bias=config.bias)
        self.act = ACTIVATIONS[config.mlp]()
        self.down_proj = Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU, GEGLU; Shazeer 2020. (B, T, C) -> (B, T, C), F wide inside."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, width, bias=config.bias)
        self.up_proj = Linear(config.n_embd, width, bias=config.bias)
        self.act = ACTIVATIONS[GATES[config.mlp]]()
        self.down_proj = Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Ahead(nn.Module):
    """What the head reads to predict a token further ahead: x + silu(W x). (B, T, C) -> (B, T, C).

    The trunk and the head are shared (Gloeckle et al. 2024); a residual layer a token as in Medusa (Cai et al. 2024).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.proj = Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.proj(x))

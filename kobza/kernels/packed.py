"""Blocks for generating on a CPU: weights in bf16, in the order in which oneDNN's product reads them, q k v in one.

A new token costs one pass over all weights, so bytes decide: bf16 halves them, and a weight that lies packed is not rearranged on
every call, which halves the rest. Bias and activation ride in the product. For inference only: packed weights are no
parameters. A text comes out the same alone and in a batch, to the bit where tried
(AVX512-BF16). The ops are those that torch.compile itself calls on a CPU; `supports` says whether this torch has them.

Shapes as in model.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kobza.device import cpu_multiplies_bf16
from kobza.layers import MLP, GatedMLP, rotate
from kobza.model import GPT, Attention, Cache, View
from kobza.surgery import replace_modules

# oneDNN shares a long sum among threads when there is a single row, which rounds otherwise than in a batch
LONG_SUM = 512


def supports(model: GPT) -> bool:
    """Whether blocks of this model can be packed here: on a CPU with bf16 products and a torch with oneDNN's linear."""
    ops = [getattr(torch.ops.mkldnn, name, None) for name in ("_reorder_linear_weight", "_linear_pointwise")]
    on_cpu = next(model.parameters()).device.type == "cpu"
    return on_cpu and torch.backends.mkldnn.is_available() and all(ops) and cpu_multiplies_bf16()


def use(model: GPT) -> list[str]:
    """Turn the model to bf16 and pack its sub-layers and its head -> the names of the sub-layers. It generates only."""
    model.to(torch.bfloat16).requires_grad_(False)
    replace_modules(model, lambda name, _: name == "lm_head", PackedHead)
    return replace_modules(model, lambda _, module: type(module) in PACKED, lambda module: PACKED[type(module)](module))


class PackedLinear:
    """One or more Linear layers of the same input as one product, its weight packed. (..., in) -> (..., sum of outs).

    No Module: it has no parameters, and a Module's call costs as much as a tenth of the product."""

    def __init__(self, *layers: nn.Linear, gelu: str | None = None):
        weight = torch.cat([layer.weight for layer in layers]).detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers]).detach()
        self.post = ("none", [], "") if gelu is None else ("gelu", [], gelu)

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1] > LONG_SUM:
            twice = x.expand(2, *x.shape[1:]).contiguous()
            return torch.ops.mkldnn._linear_pointwise(twice, self.weight, self.bias, *self.post)[:1]
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.post)


class PackedHead(nn.Module):
    """The lm_head, packed. (B, T, C) -> (B, T, V)."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.product = PackedLinear(plain)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class PackedAttention(nn.Module):
    """Attention over packed weights. (B, T, C) -> (B, T, C)."""

    def __init__(self, plain: Attention):
        super().__init__()
        self.layer, self.head_dim, self.view, self.scale = plain.layer, plain.head_dim, plain.view, plain.scale
        n_kv_head = plain.k_proj.out_features // plain.head_dim
        self.heads = [plain.q_proj.out_features // plain.head_dim, n_kv_head, n_kv_head]
        self.qkv_proj = PackedLinear(plain.q_proj, plain.k_proj, plain.v_proj)
        self.o_proj = PackedLinear(plain.o_proj)
        self.q_norm, self.k_norm = plain.q_norm, plain.k_norm
        self.cap = getattr(plain.attend, "keywords", {}).get("cap", 0.0)

    def forward(self, x: Tensor, views: list[View], cache: Cache | None) -> Tensor:
        B, T, _ = x.shape
        rope, mask = views[self.view]
        q, k, v = (
            self.qkv_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2).split(self.heads, dim=1)
        )  # (B, H | K, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = attend_by_products(q.to(k.dtype), k, v, mask, self.scale, self.cap)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float = 0.0) -> Tensor:
    """softmax(q k^T scale) v in two batched products, causal where there is no mask. q (B, H, T, D); k, v (B, K, S, D) ->
    (B, H, T, D). Torch's fused form rounds by the number of rows; this one gives each row the same bits alone and in a batch."""
    B, H, T, D = q.shape
    groups, S = H // k.shape[1], k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.bmm((q * scale).reshape(B * H, T, D), k.flatten(0, 1).mT)  # (B H, T, S)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if mask is None and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if mask is not None:
        scores.view(B, H, T, S).masked_fill_(~mask, float("-inf"))
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(B, H, T, D)


class PackedMLP(nn.Module):
    """MLP over packed weights, GELU within the product. (B, T, C) -> (B, T, C)."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        gelu = plain.act.approximate if isinstance(plain.act, nn.GELU) else None
        self.up_proj = PackedLinear(plain.up_proj, gelu=gelu)
        self.act = nn.Identity() if gelu else plain.act
        self.down_proj = PackedLinear(plain.down_proj)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


class PackedGatedMLP(nn.Module):
    """A gated MLP over packed weights, gate and up in one product. (B, T, C) -> (B, T, C)."""

    def __init__(self, plain: GatedMLP):
        super().__init__()
        self.gate_up = PackedLinear(plain.gate_proj, plain.up_proj)
        self.act = plain.act
        self.down_proj = PackedLinear(plain.down_proj)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)


PACKED = {Attention: PackedAttention, MLP: PackedMLP, GatedMLP: PackedGatedMLP}

"""Sub-layers for training small models on a CPU: one autograd node for x + attn(norm(x)), one for x + mlp(norm(x)).

At this size a step is some hundred operations of tens of microseconds, so the number of passes over the activations decides.
Against the plain modules a fused sub-layer projects q, k and v in one product, adds the residual within the last product,
multiplies whole matrices where torch's CPU attention goes block by block, keeps only what the backward needs, and derives that
by hand. Weights stay the plain modules' own: names, checkpoints and optimizers see no difference.

Shapes: B batch, T tokens, C n_embd, H n_head, D head_dim, F n_ff, M = B T rows.

Attention, z = norm(x):  [q k v] = z W^T;  p = softmax(q k^T / sqrt(D) + causal);  y = p v;  out = x + y Wo^T.  Backward of g:
    dWo = g^T y      dy = g Wo       dv = p^T dy      ds = softmax'(dy v^T, p)/sqrt(D)      dq = ds k      dk = ds^T q
MLP, z = norm(x):  h = z W1^T;  a = act(h);  out = x + a W2^T.  Backward of g:
    dW2 = g^T a      da = g W2       dh = act'(h) da      dW1 = dh^T z      dz = dh W1
and in both dx = g + norm'(dz).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.config import ModelConfig
from kobza.layers import ReLU2
from kobza.model import GPT, Block, Cache, View
from kobza.surgery import replace_modules

aten = torch.ops.aten


def supports(config: ModelConfig) -> bool:
    """Whether the fused sub-layers compute this model: LayerNorm before, no biases, no dropout, no QK-norm, no gate, no GQA, and
    attention over all that went before, scaled as usual."""
    usual = config.pattern == "AF" and config.norm == "layernorm" and config.norm_place == "before"
    plain = not (config.bias or config.dropout or config.qk_norm or config.norm_offset or config.qkv_bias)
    special = config.attn_scale or config.attn_softcap or config.window or config.rope_dim
    attention = config.n_kv_head == config.n_head and not special
    return usual and plain and attention and config.mlp in ("relu2", "gelu", "gelu_tanh")


def use(model: GPT) -> list[str]:
    """Put a FusedBlock in place of each Block -> the names replaced."""
    return replace_modules(model, lambda _, module: type(module) is Block, FusedBlock)


class FusedBlock(Block):
    """A Block whose training and evaluation run in two autograd nodes; with a cache or a mask it is the plain Block."""

    def __init__(self, block: nn.Module):
        nn.Module.__init__(self)
        self.names = block.names
        for name, child in block.named_children():
            self.add_module(name, child)
        self.act = ACTIVATIONS[type(self.mlp.act), getattr(self.mlp.act, "approximate", "none")]

    def forward(self, x: Tensor, views: list[View], cache: Cache | None) -> Tensor:
        rope, mask = views[0]
        if cache is not None or mask is not None or (rope is not None and rope[0].ndim != 2):
            return super().forward(x, views, cache)
        a, m = self.attn, self.mlp
        weights = (a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, a.o_proj.weight)
        x = FusedAttention.apply(x, self.attn_norm.weight, *weights, rope, a.head_dim, self.attn_norm.eps)
        return FusedMLP.apply(
            x, self.mlp_norm.weight, m.up_proj.weight, m.down_proj.weight, self.act, self.mlp_norm.eps
        )


class FusedAttention(torch.autograd.Function):
    """x + attn(norm(x)). x (B, T, C) in the compute dtype, weights in their own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        w_q: Tensor,
        w_k: Tensor,
        w_v: Tensor,
        w_o: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        head_dim: int,
        eps: float,
    ) -> Tensor:
        B, T, C = x.shape
        H = w_q.shape[0] // head_dim
        x = x.view(B * T, C)
        gain, w_o = cast(norm_weight, x.dtype), w_o.to(x.dtype)
        w_qkv = torch.cat((w_q, w_k, w_v)).to(x.dtype)  # (3 H D, C)
        z, mean, rstd = torch.native_layer_norm(x, (C,), gain, None, eps)
        qkv = F.linear(z, w_qkv).view(B, T, 3, H, head_dim).permute(2, 0, 3, 1, 4).reshape(3, B * H, T, head_dim)
        turn = None if rope is None else full_turn(*rope, x.dtype)
        if turn is not None:
            q, k = rotate_full(qkv[:2], *turn)
        else:
            q, k = qkv[0], qkv[1]
        v = qkv[2]
        p = torch.baddbmm(causal(T, x.dtype), q, k.mT, alpha=head_dim**-0.5).softmax(-1)  # (B H, T, T)
        y = torch.bmm(p, v).view(B, H, T, head_dim).transpose(1, 2).reshape(B * T, H * head_dim)
        ctx.save_for_backward(x, gain, w_qkv, w_o, z, mean, rstd, q, k, v, p, y)
        ctx.turn, ctx.shape = turn, (B, T, C, H, head_dim)
        return torch.addmm(x, y, w_o.t()).view(B, T, C)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, w_qkv, w_o, z, mean, rstd, q, k, v, p, y = ctx.saved_tensors
        B, T, C, H, D = ctx.shape
        g = g.reshape(B * T, C)
        dw_o = g.t() @ y
        dy = (g @ w_o).view(B, T, H, D).transpose(1, 2).reshape(B * H, T, D)
        ds = aten._softmax_backward_data(torch.bmm(dy, v.mT), p, -1, p.dtype).mul_(D**-0.5)
        d = torch.empty((3, B * H, T, D), dtype=x.dtype)
        torch.bmm(ds, k, out=d[0])
        torch.bmm(ds.mT, q, out=d[1])
        torch.bmm(p.mT, dy, out=d[2])
        if ctx.turn is not None:
            cos, sin = ctx.turn
            d[:2] = rotate_full(d[:2], cos, -sin)  # a rotation's transpose turns back
        d = d.view(3, B, H, T, D).permute(1, 3, 0, 2, 4).reshape(B * T, 3 * H * D)
        dw_q, dw_k, dw_v = (d.t() @ z).chunk(3)
        dx, dgain = norm_backward(d @ w_qkv, x, gain, mean, rstd, g)
        return dx.view(B, T, C), dgain, dw_q, dw_k, dw_v, dw_o, None, None, None


class FusedMLP(torch.autograd.Function):
    """x + down(act(up(norm(x)))). x (B, T, C) in the compute dtype, weights in their own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor | None, w_up: Tensor, w_down: Tensor, act: Activation, eps: float
    ) -> Tensor:
        shape = x.shape
        x = x.view(-1, shape[-1])
        gain, w_up, w_down = cast(norm_weight, x.dtype), w_up.to(x.dtype), w_down.to(x.dtype)
        z, mean, rstd = torch.native_layer_norm(x, (shape[-1],), gain, None, eps)
        h = F.linear(z, w_up)  # (M, F)
        kept, a = act[0](h)
        ctx.save_for_backward(x, gain, w_up, w_down, z, mean, rstd, kept, a)
        ctx.act = act
        return torch.addmm(x, a, w_down.t()).view(shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, w_up, w_down, z, mean, rstd, kept, a = ctx.saved_tensors
        shape, g = g.shape, g.reshape(x.shape)
        dw_down = g.t() @ a
        dh = ctx.act[1](g @ w_down, kept)
        dw_up = dh.t() @ z
        dx, dgain = norm_backward(dh @ w_up, x, gain, mean, rstd, g)
        return dx.view(shape), dgain, dw_up, dw_down, None, None


def norm_backward(
    dz: Tensor, x: Tensor, gain: Tensor | None, mean: Tensor, rstd: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the gain through z = layer_norm(x) * gain, with the residual path's added to x's."""
    wanted = [True, gain is not None, False]
    dx, dgain, _ = aten.native_layer_norm_backward(dz, x, (x.shape[1],), mean, rstd, gain, None, wanted)
    return dx.add_(residual), dgain


# An activation: h -> (what its backward needs, act(h)), and (gradient of act(h), that) -> gradient of h, which may reuse it.
Activation = tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]]


def relu2_forward(h: Tensor) -> tuple[Tensor, Tensor]:
    """h -> max(h, 0) and its square."""
    positive = h.relu_()
    return positive, positive.square()


def relu2_backward(da: Tensor, positive: Tensor) -> Tensor:
    """d/dh max(h, 0)^2 = 2 max(h, 0)."""
    return da.mul_(positive).mul_(2)


def gelu(approximate: str) -> Activation:
    """GELU in its exact or tanh form."""
    return (
        lambda h: (h, F.gelu(h, approximate=approximate)),
        lambda da, h: aten.gelu_backward(da, h, approximate=approximate),
    )


def activation_table() -> dict[tuple[type, str], Activation]:
    """The model's activation modules -> their fused forms."""
    table = {(nn.GELU, name): gelu(name) for name in ("none", "tanh")}
    return {(ReLU2, "none"): (relu2_forward, relu2_backward)} | table


ACTIVATIONS = activation_table()


def cast(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A weight in the compute dtype; None stays None."""
    return None if weight is None else weight.to(dtype)


def full_turn(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin (T, D/2) -> (T, D) each, such that x * cos + roll(x, D/2) * sin turns the pairs (x[i], x[i + D/2])."""
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate_full(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (..., T, D) by the angles of `full_turn`."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


@functools.lru_cache(maxsize=8)
def causal(T: int, dtype: torch.dtype) -> Tensor:
    """(T, T) to add to scores: 0 for what a token may see, else so low that its softmax is 0."""
    return torch.full((T, T), -1e4).triu(1).to(dtype)

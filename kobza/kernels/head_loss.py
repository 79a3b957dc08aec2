"""The head and the cross-entropy as one operation that never holds all logits; plain torch, for any device.

A row of logits is as long as the vocabulary: 1,000 targets of 49,152 tokens are 200 MB in float32, and autograd keeps three such.
Here a chunk of rows at a time becomes logits, loss and gradient, and only the gradients of x and of the weight remain:

    z = x W^T,  l = cap tanh(z / cap) or z;   loss = sum of logsumexp(l) - l[target]
    dl = softmax(l) - onehot(target);   dz = dl (1 - (l / cap)^2) or dl;   dx = dz W;   dW = dz^T x

The loss being one number, its gradients are final but for a factor, so they are taken in the forward pass while the chunk is
there. A frozen weight costs no dW.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kobza.layers import widen
from kobza.model import GPT
from kobza.train import IGNORE

CHUNK_LOGITS = 1 << 23  # 32 MB of float32: larger chunks gain no speed


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0, chunk: int | None = None) -> Tensor:
    """Cross-entropy in nats, summed over the targets that are not IGNORE; 0-d, float32. x (N, C), weight (V, C), targets (N,).

    The products are in the dtype of x, the softmax in float32, as in the plain form. chunk: rows at a time.
    """
    learned = (targets != IGNORE).nonzero().flatten()  # what is not learned needs no logits
    if len(learned) < len(targets):
        x, targets = x[learned], targets[learned]
    chunk = chunk or max(1, CHUNK_LOGITS // weight.shape[0])
    return HeadLoss.apply(x, weight, targets, softcap, chunk)


def model_head_loss(model: GPT, x: Tensor, targets: Tensor) -> Tensor:
    """`head_loss` of a model's own head; a head that is no plain linear layer goes through `model.logits`."""
    head, config = model.lm_head, model.config
    if isinstance(head, nn.Linear) and not (head._forward_hooks or head._forward_pre_hooks):
        return head_loss(x, head.weight[: config.vocab_size], targets, config.softcap)
    return F.cross_entropy(widen(model.logits(x)), targets, ignore_index=IGNORE, reduction="sum")


class HeadLoss(torch.autograd.Function):
    """x (N, C), weight (V, C), targets (N,) -> the summed loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float, chunk: int) -> Tensor:
        wants_dx, wants_dw = ctx.needs_input_grad[:2]
        w = weight.to(x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.empty_like(x) if wants_dx else None
        dw = torch.zeros(weight.shape, dtype=wide, device=x.device) if wants_dw else None
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            loss, dz = chunk_loss(F.linear(x[rows], w), targets[rows], softcap, wants_dx or wants_dw)
            total += loss
            if wants_dx:
                torch.mm(dz, w, out=dx[rows])
            if wants_dw:
                dw += dz.t() @ x[rows]
        ctx.save_for_backward(*(d for d in (dx, dw) if d is not None))
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        dx = saved.pop(0) * g if ctx.needs_input_grad[0] else None
        dw = (saved.pop(0) * g).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None


def chunk_loss(z: Tensor, targets: Tensor, softcap: float, differentiate: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of a chunk's logits before the cap, z (n, V), and its gradient in z, in z's dtype. The memory of z is used up."""
    logits = widen(softcap * torch.tanh(z / softcap) if softcap else z)  # rounded as the model rounds it
    at = targets[:, None]
    norm = logits.logsumexp(-1, keepdim=True)
    loss = (norm - logits.gather(1, at)).sum()
    if not differentiate:
        return loss, None
    slope = 1 - (logits / softcap).square() if softcap else None
    dz = logits.sub_(norm).exp_().scatter_add_(1, at, torch.full_like(norm, -1.0))
    return loss, (dz if slope is None else dz.mul_(slope)).to(z.dtype)

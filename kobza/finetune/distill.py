"""Learning a teacher's whole distribution over the next token in place of the one token of the text: Hinton et al. 2015.

A teacher's logits over a large vocabulary are what costs memory here, and the student's as much again. Only hidden states at
targets go through the two heads, some rows at a time, and the backward pass computes each stretch anew: never are all logits of
either at hand.

Shapes: N targets, C width, V vocab_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kobza.config import require
from kobza.finetune.example import Packed
from kobza.finetune.sft import Hidden, hidden_of
from kobza.layers import widen
from kobza.model import GPT
from kobza.train import IGNORE, LossFn

CHUNK = 256  # targets whose logits are at hand at once: 100 MB each of teacher and student at V = 100,000


def distill_loss(
    teacher: GPT,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    chunk: int = CHUNK,
    hidden: Hidden = hidden_of,
) -> LossFn:
    """temperature^2 KL(teacher || student), nats, summed over targets, both distributions softened by the temperature; its square
    keeps the gradient's size, which softening divides by it. The teacher runs in eval mode and learns nothing."""
    teacher.eval().requires_grad_(False)

    def loss_fn(model: GPT, batch: Packed) -> tuple[Tensor, Tensor]:
        same_vocabulary(teacher, model)
        learned = batch.targets != IGNORE
        with torch.no_grad():
            taught = hidden(teacher, batch, dtype)[learned]  # (N, C of the teacher)
        x = hidden(model, batch, dtype)[learned]  # (N, C)
        total = x.new_zeros((), dtype=widen(x[:0]).dtype)
        for i in range(0, len(x), chunk):
            pieces = x[i : i + chunk], taught[i : i + chunk]
            total = total + checkpoint(divergence, model, teacher, *pieces, temperature, use_reentrant=False)
        return total, learned.sum()

    return loss_fn


def divergence(model: GPT, teacher: GPT, x: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """temperature^2 KL(teacher || student) from what the two heads read, (N, C) each; 0-d, float32."""
    with torch.no_grad():
        wanted = F.log_softmax(widen(teacher.logits(taught)) / temperature, -1)  # (N, V)
    found = F.log_softmax(widen(model.logits(x)) / temperature, -1)
    return temperature**2 * F.kl_div(found, wanted, reduction="sum", log_target=True)


def same_vocabulary(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse a teacher whose tokens are others, told by their number."""
    theirs, ours = teacher.config.vocab_size, student.config.vocab_size
    require(
        theirs == ours,
        f"--teacher has {theirs:,} tokens but the model has {ours:,}; take a teacher of the model's own family",
    )

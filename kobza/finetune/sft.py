"""The supervised loss: each document of a batch by itself, and only what is learned goes through the head.

Documents that stand in one line must not see each other and must each count their places from 0; either without the other is
wrong (tests/test_finetune_rows.py plants both). The mask is quadratic in the line's length; where a line holds one document and
padding after it, plain causality says the same and no mask is made.

Shapes: B batch, T tokens, C n_embd, N targets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kobza.finetune.example import Packed
from kobza.layers import widen
from kobza.model import GPT
from kobza.train import IGNORE, LossFn

HeadLoss = Callable[[GPT, Tensor, Tensor], Tensor]  # model, x (N, C), targets (N,) -> summed nats, float32
CHUNK = 1024  # targets whose logits are at hand at once: 400 MB at 100,000 tokens
Hidden = Callable[[GPT, Packed, torch.dtype | None], Tensor]  # -> what the head reads (B, T, C)


def plain_head_loss(model: GPT, x: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in float32 of hidden states x (N, C) on targets (N,), by way of all their logits (N, V)."""
    return F.cross_entropy(widen(model.logits(x)), targets, reduction="sum")


def learned_places(batch: Packed) -> Tensor:
    """Where the targets are in the flattened batch, (N,). Asked before the forward pass: a GPU then waits once, not in it."""
    return (batch.targets.flatten() != IGNORE).nonzero().squeeze(1)


def hidden_of(model: GPT, batch: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """What the head reads (B, T, C), each document computed as if it stood alone."""
    if one_document_a_line(batch.documents):
        return model.hidden(batch.inputs, dtype=dtype)
    return model.hidden(batch.inputs, batch.positions, document_mask(batch.documents), dtype=dtype)


def one_document_a_line(documents: Tensor) -> bool:
    """Whether every line (B, T) is document 0 from its beginning, then padding: causality alone keeps what is after from it."""
    return bool((documents[:, 0] <= 0).all() & (documents.diff(dim=1) <= 0).all())


def document_mask(documents: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T), True where a token sees another: an earlier one, or itself, of its document. Padding is as a
    document of its own. Within a document places and positions differ by a constant, so a window cuts it right (model.views)."""
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()


def sft_loss(
    dtype: torch.dtype | None = None, head_loss: HeadLoss = plain_head_loss, hidden: Hidden = hidden_of
) -> LossFn:
    """A LossFn over Packed: cross-entropy of the learned tokens, summed, and their number; computed in `dtype`. hidden:
    hidden_of, or prefix.shared_hidden, which computes once what the documents begin with alike."""

    def loss_fn(model: GPT, batch: Packed) -> tuple[Tensor, Tensor]:
        at = learned_places(batch)
        x = hidden(model, batch, dtype).flatten(0, 1).index_select(0, at)  # (N, C)
        return head_loss(model, x, batch.targets.flatten()[at]), (batch.targets != IGNORE).sum()

    return loss_fn


def token_logprobs(
    model: GPT, batch: Packed, dtype: torch.dtype | None = None, temperature: float = 1.0, hidden: Hidden = hidden_of
) -> Tensor:
    """Log-probability of each target (B, T), float32, under logits divided by the temperature; 0 where there is no target. Of
    many targets some logits at a time, computed anew on the way back."""
    at = learned_places(batch)
    x = hidden(model, batch, dtype).flatten(0, 1).index_select(0, at)  # (N, C)
    pieces = list(zip(x.split(CHUNK), batch.targets.flatten()[at].split(CHUNK), strict=True))
    if len(pieces) > 1:
        parts = [checkpoint(_of_targets, model, *piece, temperature, use_reentrant=False) for piece in pieces]
    else:
        parts = [_of_targets(model, *piece, temperature) for piece in pieces]
    found = torch.cat(parts)  # (N,)
    return found.new_zeros(batch.targets.numel()).index_copy(0, at, found).view_as(batch.targets)


def _of_targets(model: GPT, x: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """x (N, C), targets (N,) -> (N,)"""
    return -F.cross_entropy(widen(model.logits(x)) / temperature, targets, reduction="none")

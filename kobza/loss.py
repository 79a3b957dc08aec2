"""What is minimised, where it is more than the next token: make_loss(TrainConfig, n_ahead) -> a LossFn for `train`.

Each objective is a function over a finished model; none needs a flag in it. All of them are sums over targets with their number,
as train.py asks, so that a window cut into micro-batches is one batch. Evaluation never uses these: it measures the plain
`next_token_loss` of train.py, so validation losses compare between objectives.

Training losses then do not: Step.loss is the mean of what is trained on. Label smoothing, z_loss and extra heads raise it above
the cross-entropy, min_context lowers it by leaving out the hard beginnings. Its distance from the validation loss says how far a
model has overfitted only where the objective is the plain one (`is_plain`).

Shapes: B batch, T tokens, C n_embd, V vocab_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.config import TrainConfig
from kobza.layers import widen
from kobza.train import IGNORE, Batch, LossFn, next_token_loss


def is_plain(config: TrainConfig, n_ahead: int = 1) -> bool:
    """Whether training minimises the plain cross-entropy of every next token."""
    return n_ahead == 1 and not (config.label_smoothing or config.z_loss or config.min_context)


def make_loss(config: TrainConfig, n_ahead: int = 1, dtype: torch.dtype | None = None) -> LossFn:
    """The LossFn of training: of the next token with the settings' terms, and with n_ahead > 1 of the extra heads too.

    make_loss(TrainConfig(label_smoothing=0.1)) -> loss_fn(model, (inputs, targets)) -> (sum in nats, number of targets)
    """
    if is_plain(config, n_ahead):
        return next_token_loss(dtype)

    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        return summed_loss(logits, targets, config.label_smoothing, config.z_loss)

    def next_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        targets = with_context(targets, config.min_context)
        return losses(model(inputs, dtype=dtype), targets), (targets != IGNORE).sum()

    def ahead_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Head i reads the place of token t and tells token t + 1 + i: its targets are the next token's, i places on. All
        are divided by the next token's number of targets, since that of each head is not known before the window's end."""
        inputs, targets = batch
        x = model.hidden(inputs, dtype=dtype)  # (B, T, C)
        learned = with_context(targets, config.min_context)
        total, share = losses(model.logits(x), learned), config.ahead_weight / (n_ahead - 1)
        for i, head in enumerate(model.ahead, start=1):
            later = with_context(targets[:, i:], config.min_context)  # (B, T - i)
            total = total + share * losses(model.logits(head(x[:, : later.shape[1]])), later)
        return total, (learned != IGNORE).sum()

    return next_loss if n_ahead == 1 else ahead_loss


def with_context(targets: Tensor, n_tokens: int) -> Tensor:
    """targets (B, T) with IGNORE where fewer than n_tokens of the window come before. Target t comes after t + 1 tokens:
    with_context([[5, 6, 7]], 3) -> [[IGNORE, IGNORE, 7]]"""
    early = torch.arange(1, targets.shape[1] + 1, device=targets.device) < n_tokens  # (T,)
    return targets.masked_fill(early, IGNORE)


def summed_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Cross-entropy plus z_loss * log(Z)^2, Z = sum of exp(logits), over the targets that are learned, in float32, 0-d.

    With smoothing s a target is (1 - s) its token and s the uniform distribution (Szegedy et al. 2016). The z term keeps log Z
    near 0 (Chowdhery et al. 2022, PaLM). logits (B, T, V), targets (B, T).
    """
    logits, targets = widen(logits.flatten(0, 1)), targets.flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(-1).square() * (targets != IGNORE)).sum()
    return loss

"""BLOCK 3: next_token_loss, train_step, train (a generator of Step), evaluate.

The step is a function and the loop is a generator: what to do every N steps (evaluate, save, print) is ordinary code in the
recipe that pulls the steps. `loss_fn` is an argument and returns a SUM over targets; the step divides by the number of targets
of its whole window, since a mean of micro-batch means is wrong once some targets are masked. Here is the plain loss, loss.py has
the others. The loop knows no files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.config import TrainConfig
from kobza.layers import widen
from kobza.optim import schedule, set_lr

IGNORE = -100  # a target that is not learned; torch's own default for cross_entropy

Batch = tuple[Tensor, ...]  # inputs, targets (B, T) int64, what else a loss reads; a target of IGNORE is not learned
LossFn = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]  # -> summed loss in nats, number of targets; 0-d


def next_token_loss(dtype: torch.dtype | None = None) -> LossFn:
    """A LossFn: cross-entropy of each next token, summed, in float32 over logits computed in `dtype`."""

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        logits = model(inputs, dtype=dtype)  # (B, T, V)
        loss = F.cross_entropy(widen(logits.flatten(0, 1)), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return loss, (targets != IGNORE).sum()

    return loss_fn


class NonFinite(ArithmeticError):
    """A loss or gradient is inf or nan. The weights are untouched. Carries step, what, value and the micro-batches."""

    def __init__(self, step: int, what: str, value: float, window: list[Batch], rng: dict[str, Tensor]):
        super().__init__(f"{what} is {value} at step {step}; the update was not made")
        self.step, self.what, self.value, self.window, self.rng = step, what, value, window, rng


@dataclass(frozen=True)
class Step:
    """One update: its number (1 = the first), mean loss in nats a target, gradient norm, rate multiplier, tokens, time.

    The loss is of what is trained on: with an objective of loss.py not the cross-entropy that `evaluate` measures."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float


def train_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    window: list[Batch],
    loss_fn: LossFn,
    grad_clip: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[float, float]:
    """One update from a window of micro-batches -> (mean loss over all its targets, gradient norm before clipping).

    Raises ArithmeticError("loss" or "gradient norm", value) before the update if either is not finite.
    """
    n_targets = total = torch.zeros(())
    for batch in window:
        loss, n = loss_fn(model, batch)
        (scaler.scale(loss) if scaler else loss).backward()
        total, n_targets = loss.detach() + total, n + n_targets
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if scaler:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm(gradients) / n_targets
    mean, grad_norm, n_learned = torch.stack((total / n_targets, norm, n_targets)).tolist()  # one wait for the device
    overflowed = scaler is not None and not math.isfinite(grad_norm)  # the scaler's own business: it skips and halves
    if not math.isfinite(mean):
        raise ArithmeticError("loss", mean)
    if not math.isfinite(grad_norm) and not overflowed:
        raise ArithmeticError("gradient norm", grad_norm)
    shrink = grad_clip / (grad_norm + 1e-6) if grad_clip and grad_norm > grad_clip and not overflowed else 1.0
    torch._foreach_mul_(gradients, shrink / n_learned)
    for optimizer in optimizers:
        scaler.step(optimizer) if scaler else optimizer.step()
    if scaler:
        scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return mean, grad_norm


def train(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batches: Iterator[Batch],
    config: TrainConfig,
    loss_fn: LossFn,
    first_step: int = 0,
    scaler: torch.amp.GradScaler | None = None,
    rng_state: Callable[[], dict[str, Tensor]] = lambda: {"rng.cpu": torch.get_rng_state()},
) -> Iterator[Step]:
    """Yield a Step after each update from first_step to config.steps. Stop pulling to stop training.

    Raises NonFinite before an update that would spoil the weights; a fp16 scaler's overflow only skips that update.
    """
    multiplier = schedule(config)
    for step in range(first_step, config.steps):
        started = time.perf_counter()
        model.train()
        set_lr(optimizers, multiplier(step))
        window = [next(batches) for _ in range(config.accumulate)]
        rng = rng_state()
        try:
            loss, grad_norm = train_step(model, optimizers, window, loss_fn, config.grad_clip, scaler)
        except ArithmeticError as error:
            what, value = error.args
            raise NonFinite(step + 1, what, value, window, rng) from None
        tokens = sum(batch[0].numel() for batch in window)
        yield Step(step + 1, loss, grad_norm, multiplier(step), tokens, time.perf_counter() - started)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn) -> float:
    """Mean loss in nats a target over the batches, in eval mode; the model is left as it was found."""
    was_training = model.training
    model.eval()
    n_targets = total = torch.zeros(())
    for batch in batches:
        loss, n = loss_fn(model, batch)
        total, n_targets = loss + total, n + n_targets
    model.train(was_training)
    return float(total / n_targets)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Loss that does not depend on the tokenizer. bits_per_byte(ln 2, 1.0) -> 1.0"""
    return nats_per_token / math.log(2) / bytes_per_token

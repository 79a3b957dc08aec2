"""What a step's optimizer is given and holds: checks R12, R13, R15, R16 of `kobza doctor train`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kobza.doctor.finding import Finding, Skip
from kobza.doctor.training.steps import LOW, Subject, flatten, perturbed, without_dropout


def amp_order(subject: Subject) -> Iterator[Finding]:
    """R12: unscale before clip before step; a scaler wherever the forward pass is in fp16; the optimizer outside autocast."""
    step = subject.fresh()
    n = step.row_tokens
    record = step.update(step.window([[n], [n]]))
    calls, trace = record.calls, " -> ".join(squeezed(record.calls))
    fp16 = any(x.dtype == torch.float16 for x in record.logits)
    if "scaler.scale" not in calls:
        if fp16 and not any(p.dtype == torch.float16 for p in step.named.values()):
            zeros = sum(int((g == 0).sum()) for g in record.gradients.values()) / max(
                1, sum(g.numel() for g in record.gradients.values())
            )
            yield Finding(
                "R12",
                "warn",
                "proven",
                "step(window)",
                "a GradScaler beside fp16",
                "none is called",
                "small gradients underflow to 0",
                "scale the loss with torch.amp.GradScaler, or take bf16",
                f"logits are float16; {zeros:.1%} of the gradient is exactly 0; calls: {trace}",
            )
    elif "clip" in calls and "scaler.unscale_" not in calls[: calls.index("clip")]:
        example = f"calls in order: {trace}"
        yield Finding(
            "R12",
            "error",
            "proven",
            "step(window)",
            "scaler.unscale_ before the clip",
            "the clip sees scaled gradients",
            "every gradient is clipped, by as much as the scale is (65,536 at first)",
            "scaler.unscale_(optimizer) before clip_grad_norm_",
            example,
            "https://github.com/Lightning-AI/pytorch-lightning/issues/9599",
        )
    else:
        yield from scale_free(subject, trace)
    if record.optimizer_autocast:
        example = f"autocast is on when optimizer.step begins; calls: {trace}"
        yield Finding(
            "R12",
            "warn",
            "proven",
            "optimizer.step",
            "the update outside autocast",
            "inside",
            "the update may be computed in half precision",
            "end the autocast block after the loss",
            example,
        )


def scale_free(subject: Subject, trace: str) -> Iterator[Finding]:
    """The optimizer is given the same gradient at any loss scale: catches a clip by the user's own hands, too."""
    given = {}
    for scale in (2.0**4, 2.0**12):
        step = perturbed(without_dropout(subject.fresh()))
        scaler = step.get("scaler")
        if scaler is None:
            return
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale})
        low, n = any(p.dtype in LOW for p in step.named.values()), step.row_tokens
        given[scale] = flatten(step.update(step.window([[n], [n]])).gradients)
    small, large = (float(given[scale].norm()) for scale in (2.0**4, 2.0**12))
    if abs(large / max(small, 1e-30) - 1) > (0.05 if low else 0.01):
        yield Finding(
            "R12",
            "error",
            "proven",
            "step(window)",
            "the same gradient at any loss scale",
            f"x {large / max(small, 1e-30):.3g} at 256 times the scale",
            "the clip, or something else before the update, sees scaled gradients",
            "scaler.unscale_(optimizer) before anything reads the gradients",
            f"the optimizer was given |g| {small:.6g} at scale 16 and {large:.6g} at scale 4,096; calls: {trace}",
            "https://github.com/Lightning-AI/pytorch-lightning/issues/9599",
        )


def squeezed(calls: list[str]) -> list[str]:
    """Repeats in a row counted. squeezed(["a", "a", "b"]) -> ["a x2", "b"]"""
    made: list[list[Any]] = []
    for call in calls:
        if made and made[-1][0] == call:
            made[-1][1] += 1
        else:
            made.append([call, 1])
    return [call if n == 1 else f"{call} x{n}" for call, n in made]


def low_precision_weights(subject: Subject) -> Iterator[Finding]:
    """R13: bf16 or fp16 weights that an update is too small to move."""
    step = subject.fresh()
    low = {name: p for name, p in step.named.items() if p.dtype in LOW and p.requires_grad}
    if not low:
        return
    before = step.values()
    record = step.update(step.window([[step.row_tokens] * 2]))
    after = step.values()
    share = {
        name: moved_share(before[name], after[name], record.gradients[name]) for name in low if name in record.gradients
    }
    share = {name: value for name, value in share.items() if value is not None}
    if not share:
        raise Skip("no half-precision weight had a gradient")
    worst = min(share, key=lambda name: share[name])
    total = sum(share.values()) / len(share)
    if (
        total < 0.9
    ):  # float32 moves them all; stochastic rounding would move some, and Kahan's sum keeps what is left: look
        example = (
            f"{worst} ({str(low[worst].dtype).removeprefix('torch.')}): {share[worst]:.1%} of the values with a "
            f"gradient changed at lr {max(record.rates):.3g}"
        )
        yield Finding(
            "R13",
            "warn",
            "proven",
            f"{len(low)} of {len(step.named)} weights",
            "float32 weights in the optimizer",
            f"an update moves {total:.1%} of the values",
            "updates below 2^-9 of a weight are rounded away: learning stops as the rate falls, and weight "
            "decay never acts",
            "keep float32 weights and compute under autocast, or use stochastic rounding",
            example,
            "https://github.com/pytorch/ao/issues/1124",
        )


def moved_share(before: Tensor, after: Tensor, gradient: Tensor) -> float | None:
    """Share of the values with a gradient that moved."""
    on = gradient != 0
    return float((before != after)[on].float().mean()) if bool(on.any()) else None


def decay_groups(subject: Subject) -> Iterator[Finding]:
    """R15: nothing of one axis decays; every trainable weight is in the groups once."""
    step = subject.fresh()
    names = {id(p): name for name, p in step.named.items()}
    seen: dict[int, list[str]] = {}
    decayed = []
    for i, optimizer in enumerate(step.optimizers):
        for j, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                seen.setdefault(id(p), []).append(f"optimizer {i} group {j}")
                if p.ndim < 2 and group.get("weight_decay", 0) > 0:
                    decayed.append((names.get(id(p), "?"), tuple(p.shape), f"group {j}", group["weight_decay"]))
    if decayed:
        name, shape, where, decay = decayed[0]
        got = f"{len(decayed)} tensors of one axis decay"
        yield Finding(
            "R15",
            "warn",
            "proven",
            where,
            "weight_decay 0 for norms and biases",
            got,
            "norm gains are pulled to 0, which costs a little everywhere",
            "decay = [p for p in parameters if p.ndim >= 2]; the rest in a group with weight_decay=0",
            f"{name} {shape} has weight_decay {decay:g} in {where}",
            "https://github.com/huggingface/transformers/issues/35927",
        )
    twice = {names.get(i, "?"): places for i, places in seen.items() if len(places) > 1}
    missing = [name for name, p in step.named.items() if p.requires_grad and id(p) not in seen]
    fix = "check that the groups are a partition of the trainable weights"
    if twice:
        name = next(iter(twice))
        yield Finding(
            "R15",
            "error",
            "proven",
            name,
            "each weight in one group",
            f"{len(twice)} stand in two",
            "it is updated twice a step",
            fix,
            f"{name} is in {' and '.join(twice[name])}",
        )
    if missing:
        yield Finding(
            "R15",
            "error",
            "proven",
            missing[0],
            "each trainable weight in a group",
            f"{len(missing)} are in none",
            "it never learns",
            fix,
            f"{missing[0]} has requires_grad and no optimizer holds it",
        )


def schedule(subject: Subject) -> Iterator[Finding]:
    """R16: the rate of each update is the one the user's lr(i) says; the scheduler moves once an update."""
    step = subject.fresh()
    n, wanted = step.row_tokens, step.get("lr")
    stepped, rates = [], []
    for i in range(6):
        record = step.update(step.window([[n], [n]], seed=i))
        stepped.append(record.calls.count("scheduler.step"))
        rates.append(record.rates)
    if wanted is None and not any(stepped):
        raise Skip("make_step gives no lr(i), and no torch scheduler is stepped")
    fix = "step the schedule once after each optimizer.step, not once a micro-batch or a process"
    for i, got in enumerate(rates):
        right = None if wanted is None else float(wanted(i))
        if right is not None and not any(abs(rate - right) <= 1e-6 * abs(right) + 1e-12 for rate in got):
            ahead = next(
                (j for j in range(i + 1, 4 * i + 8) if abs(float(wanted(j)) - got[0]) <= 1e-6 * abs(got[0])), None
            )
            told = f", which is lr({ahead})" if ahead is not None else ""
            example = (
                f"update {i} (from 0): lr {got[0]:.6g}, and lr({i}) is {right:.6g}; scheduler.step was called "
                f"{stepped[i]} times in it"
            )
            yield Finding(
                "R16",
                "error",
                "proven",
                f"update {i}",
                f"lr {right:.6g}",
                f"{got[0]:.6g}{told}",
                "warm-up and decay end early or late",
                fix,
                example,
                R16_SOURCE,
            )
            return
    per_update = max(stepped)
    if wanted is None and per_update > len(step.optimizers):
        example = f"a window of 2 micro-batches: scheduler.step was called {per_update} times"
        yield Finding(
            "R16",
            "warn",
            "proven",
            "step(window)",
            "one scheduler.step an update",
            str(per_update),
            "warm-up and decay end early",
            fix,
            example,
            R16_SOURCE,
        )


R16_SOURCE = "https://github.com/huggingface/accelerate/issues/963"

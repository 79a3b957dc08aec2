"""Two runs of a step that ought to be one: checks R9, R10, R11, R17, R18 and R20 of `kobza doctor train` (M8, M9, M12, M13).

One batch and its micro-batches, one process and two, a run and its resumption, the same seed twice, an evaluation cut otherwise.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kobza.doctor.finding import Finding, Skip
from kobza.doctor.training.steps import Record, Step, Subject, digest, flatten, has_dropout, perturbed, without_dropout
from kobza.doctor.training.world import Rank, groups_of, two_ranks

# Relative differences of gradients that ought to be equal, in half precision or not. Largest seen on the clean controls
# (5 flavours, 3 manners, seeds 0-2): 2.1e-7 and 2.4e-3, since bf16 rounds each micro-batch's gradient to 2^-9; a bug moves
# them by 0.1 and more.
TOLERANCE = {False: 1e-4, True: 0.05}
LOSS_TOLERANCE = {False: 1e-5, True: 0.01}


def apart(a: Tensor, b: Tensor) -> float:
    """Relative L2 difference."""
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    """The first tensor that differs in a bit, with the place and both numbers; "" where none does."""
    for name in a:
        bad = (a[name] != b[name]) & ~(a[name].isnan() & b[name].isnan())
        if bad.any():
            at = [int(i) for i in bad.nonzero()[0]]
            return f"{name}{at}: {a[name][tuple(at)].item():.9g} against {b[name][tuple(at)].item():.9g}"
    return ""


# ---- M8: accumulation ----------------------------------------------------------------------------------------------


def accumulation(subject: Subject) -> Iterator[Finding]:
    """R9: the gradient of one batch is that of its micro-batches together, however their tokens are spread."""
    step = subject.fresh()
    low, n = step.low_precision(), step.row_tokens
    groups = [[n], [n // 2, 3], [4], [n, n]] if step.takes_uneven else [[n], [n], [n], [n]]
    everything = [[length for group in groups for length in group]]
    together, apart_ = one_update(subject, everything), one_update(subject, groups)
    a, b = apart_.raw(), together.raw()
    if apart(one_update(subject, everything).raw(), b) > TOLERANCE[low]:
        raise Skip("the step is not the same twice, so two ways of cutting it cannot be compared")
    norms = float(b.norm()), float(a.norm())
    if not norms[0]:
        raise Skip("the gradient of the whole batch is zero")
    if apart(a, b) <= TOLERANCE[low]:
        return
    ratio, cosine = norms[1] / norms[0], float(a @ b) / max(norms[0] * norms[1], 1e-30)
    size = len(groups)
    means = [one_update(subject, groups, i).raw() for i in range(size)]
    kind = "another normalisation than over the whole window"
    if abs(ratio / size - 1) < 0.02 and cosine > 0.999:
        kind = f"gradients times the {size} micro-batches: the sum was not divided"
    elif abs(ratio * size - 1) < 0.02 and cosine > 0.999:
        kind = f"gradients divided by the {size} micro-batches twice"
    elif apart(a, sum(means[1:], means[0]) / size) <= TOLERANCE[low]:
        kind = "a mean of micro-batch means"
    elif apart(a, sum(means[1:], means[0])) <= TOLERANCE[low]:
        kind = "a sum of micro-batch means"
    example = (
        f"rows of {groups} tokens: |g| {norms[1]:.6g} in {size} micro-batches, {norms[0]:.6g} in one; cosine "
        f"{cosine:.4f}"
    )
    yield Finding(
        "R9",
        "error",
        "proven",
        "step(window)",
        "one batch = its micro-batches",
        f"norm x {ratio:.3g}, cosine {cosine:.3f}: {kind}",
        "tokens of short micro-batches weigh more, or the rate is another than was set",
        "sum the token losses, count the targets of the whole window, divide once",
        example,
        "https://github.com/huggingface/transformers/issues/34191",
    )


def one_update(subject: Subject, groups: list[list[int]], only: int | None = None) -> Record:
    """A fresh step's first update with the rows of these lengths, or with the micro-batch `only` of them."""
    step = perturbed(without_dropout(subject.fresh()))
    window = step.window(groups)
    return step.update(window if only is None else [window[only]], unclip=True)


# ---- M9: evaluation ------------------------------------------------------------------------------------------------


def evaluation(subject: Subject) -> Iterator[Finding]:
    """R17: the same weights twice give the same loss; no dropout; training goes on; how batches are cut does not matter."""
    step = subject.fresh()
    (evaluate,) = step.need("evaluate")
    n = step.row_tokens
    window = step.window([[n, n]])
    modes: list[bool] = []
    hook = step.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    step.model.train()
    before = step.values()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = float(evaluate(window))
        torch.manual_seed(2)
        second = float(evaluate(window))
    hook.remove()
    fix = "model.eval() and torch.no_grad() around it, model.train() after it"
    if changed := differ(step.values(), before):
        yield Finding(
            "R17",
            "error",
            "proven",
            "evaluate",
            "weights stay",
            "weights moved",
            "validation text is trained on",
            fix,
            changed,
        )
    if first != second:
        kind = " (the model is in training mode: dropout is on)" if any(modes) and has_dropout(step) else ""
        example = f"the same 2 rows, the same weights: {first:.9g}, then {second:.9g}"
        yield Finding(
            "R17",
            "error",
            "proven",
            "evaluate",
            "the same loss twice",
            f"two losses{kind}",
            "evaluations are noisy and too high",
            fix,
            example,
        )
    if not step.model.training and has_dropout(step):
        step.update(window)
        if not step.model.training:
            example = "model.training is False after evaluate() and still after the next update"
            yield Finding(
                "R17",
                "error",
                "proven",
                "evaluate",
                "training goes on in train mode",
                "it goes on without dropout",
                "dropout is off from the first evaluation on",
                fix,
                example,
            )
    yield from evaluated_cut(subject)


def evaluated_cut(subject: Subject) -> Iterator[Finding]:
    """R17: the same rows in one batch and in two give the same loss."""
    step = subject.fresh()
    evaluate, uneven = step.get("evaluate"), step.takes_uneven
    n, low = step.row_tokens, step.low_precision()
    lengths = [n, n // 2, 4] if uneven else [n, n, n]
    whole, cut = float(evaluate(step.window([lengths]))), float(evaluate(step.window([lengths[:1], lengths[1:]])))
    if abs(whole - cut) > LOSS_TOLERANCE[low] * abs(whole):
        example = f"rows of {lengths} tokens: loss {whole:.6f} in one batch, {cut:.6f} in batches of 1 and 2 rows"
        yield Finding(
            "R17",
            "error",
            "proven",
            "evaluate",
            "a loss that does not depend on the batches",
            f"{cut - whole:+.4f} when cut in two",
            "a mean of unequal batches' means weighs short batches more",
            "sum losses and targets over all batches, divide once",
            example,
        )


# ---- M12 and R20: the same again -----------------------------------------------------------------------------------

STEPS, KEPT = 6, 3  # N updates against KEPT + save + load + the rest


def windows_for(step: Step, i: int) -> list[Any]:
    """The window of update i: from the user's own data where the step has them, else the doctor's rows."""
    own = step.get("next_window")
    return own() if own else step.window([[step.row_tokens] * 2], seed=i)


def determinism(subject: Subject) -> Iterator[Finding]:
    """R20: two fresh steps of one seed agree bit by bit, whatever state torch's generator was in before."""
    one = subject.fresh(noise=1)
    start = one.values()
    first = [(digest(window), one.update(window).loss, one.values()) for window in run_windows(one, 4)]
    two = subject.fresh(noise=2)  # only now: both draw from torch's one generator
    if told := differ(two.values(), start):
        yield nondeterminism("before the first update", told)
        return
    for i, window in enumerate(run_windows(two, 4)):
        hashed, loss, weights = first[i]
        if digest(window) != hashed:
            yield nondeterminism(f"update {i + 1}", f"another batch: hash {digest(window)} against {hashed}")
            return
        again = two.update(window).loss
        told = differ(two.values(), weights)
        if again != loss or told:
            yield nondeterminism(f"update {i + 1}", told or f"loss {again:.9g} against {loss:.9g}")
            return


def run_windows(step: Step, n: int) -> Iterator[list[Any]]:
    """Windows one after the other, each drawn when it is asked for."""
    for i in range(n):
        yield windows_for(step, i)


def nondeterminism(where: str, example: str) -> Finding:
    """The finding of R20."""
    return Finding(
        "R20",
        "warn",
        "proven",
        where,
        "the same seed, the same run",
        "two runs differ",
        "no result can be had again, no bug bisected",
        "seed torch, numpy, random and the workers of the loader from make_step's seed",
        example,
    )


def keep(step: Step, folder: Path) -> Callable[[Step], None]:
    """Save a step as its user does -> a function that loads it into another."""
    if step.get("state_dict") is not None and step.get("load_state_dict") is not None:
        state = copy.deepcopy(step.get("state_dict")())
        return lambda other: other.get("load_state_dict")(state)
    save, _ = step.need("save", "load")
    save(folder)
    return lambda other: other.get("load")(folder)


def optimizer_state(step: Step) -> dict[str, Tensor]:
    """Every tensor and number of the optimizers' state."""
    found = {}
    for i, optimizer in enumerate(step.optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            found |= {
                f"optimizer {i} weight {index} {k}": torch.as_tensor(v).clone().float()
                for k, v in state.items()
                if v is not None
            }
    return found


def resume(subject: Subject) -> Iterator[Finding]:
    """R18: N updates are k updates, save, load into a new process, N - k updates."""
    probe = subject.fresh(noise=1)
    once = [probe.update(window).loss for window in run_windows(probe, 2)]
    probe = subject.fresh(noise=1)  # one after the other: both draw from torch's one generator
    if once != [probe.update(window).loss for window in run_windows(probe, 2)]:
        raise Skip("the step is not the same twice (R20), so a resumed one cannot be compared")
    straight = subject.fresh(noise=1)
    for window in run_windows(straight, KEPT):
        straight.update(window)
    with tempfile.TemporaryDirectory(prefix="kobza-resume-") as folder:
        load = keep(straight, Path(folder))
        weights, moments, scale = straight.values(), optimizer_state(straight), scale_of(straight)
        course = follow(straight)
        resumed = subject.fresh(noise=5)
        load(resumed)
    at = f"update {KEPT + 1}"
    lost = [
        what
        for what, bad in (
            ("weights", differ(weights, resumed.values())),
            ("optimizer state", differ_state(moments, optimizer_state(resumed))),
            ("the scaler's scale", "" if scale == scale_of(resumed) else f"scale {scale_of(resumed)} against {scale}"),
        )
        if bad
    ]
    again = follow(resumed)
    for i, (one, two) in enumerate(zip(course, again, strict=True)):
        if one.batches != two.batches:
            yield lost_on_resume(
                [*lost, "the place in the data"],
                at,
                f"update {KEPT + i + 1}: batch {two.batches} where the unbroken run had {one.batches}",
            )
            return
        if one.rates != two.rates:
            yield lost_on_resume(
                [*lost, "the schedule"],
                at,
                f"update {KEPT + i + 1}: lr {two.rates[0]:.6g} where the unbroken run had {one.rates[0]:.6g}",
            )
            return
        if one.loss != two.loss or differ(one.weights, two.weights):
            told = differ(two.weights, one.weights) or "the loss alone"
            example = f"update {KEPT + i + 1}: loss {two.loss:.9g} where the unbroken run had {one.loss:.9g}; {told}"
            yield lost_on_resume(lost or ["the random generators"], at, example)
            return
    if lost:
        yield lost_on_resume(
            lost, at, f"after load, {', '.join(lost)} differ from what was saved, though {STEPS - KEPT} losses agree"
        )


class Course(NamedTuple):
    """One update of a run, to compare with another's."""

    batches: str
    rates: list[float]
    loss: float
    weights: dict[str, Tensor]


def follow(step: Step) -> list[Course]:
    """The last updates of a run."""
    made = []
    for i in range(KEPT, STEPS):
        window = windows_for(step, i)
        record = step.update(window)
        made.append(Course(digest(window), record.rates, record.loss, step.values()))
    return made


def scale_of(step: Step) -> float | None:
    """The loss scale, where there is a scaler."""
    scaler = step.get("scaler")
    return None if scaler is None else float(scaler.get_scale())


def differ_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    """As `differ`, for states that may lack tensors."""
    lacking = sorted(set(a) ^ set(b))
    return f"{lacking[0]} is missing" if lacking else differ(a, b)


def lost_on_resume(lost: list[str], where: str, example: str) -> Finding:
    """The finding of R18. Generators alone leave a run that is as good as the unbroken one, only not the same."""
    severity = "warn" if lost == ["the random generators"] else "error"
    return Finding(
        "R18",
        severity,
        "proven",
        where,
        "a resumed run goes on as if nothing had been",
        f"not restored: {', '.join(lost)}",
        "the loss steps at each restart, or the same batches are read again",
        "save and load weights, optimizer, schedule, scaler, generators and the place in the data",
        example,
        "https://github.com/huggingface/transformers/issues/46628",
    )


# ---- M13: world size -----------------------------------------------------------------------------------------------


def world_size(subject: Subject) -> Iterator[Finding]:
    """R10, R11: two ranks with unequal tokens do what one process does with all of them, and end with the same weights."""
    if not subject.takes_world:
        raise Skip("make_step takes no rank and world")
    step = perturbed(without_dropout(subject.fresh(rank=0, world=1)), 0.0)
    low, groups = step.low_precision(), groups_of(step)
    step = without_dropout(subject.fresh(rank=0, world=1))
    rows = step.rows([n for mine in groups for group in mine for n in group])
    alone = step.update([step.collate(rows, uneven=False)], unclip=True)
    ranks = two_ranks(subject)
    names = f"rows of {groups[0]} tokens on rank 0, {groups[1]} on rank 1"
    if told := differ(ranks[0].weights, ranks[1].weights):
        yield Finding(
            "R11",
            "error",
            "proven",
            "after one update",
            "all ranks hold the same weights",
            "they differ",
            "each rank trains a model of its own, and the one that is saved saw part of the data",
            "with no_sync for all micro-batches but the last, set before its forward pass",
            f"{names}: {told}",
            "https://github.com/karpathy/build-nanogpt/issues/30",
        )
        return
    yield from against_one(alone, ranks, names, low)


def against_one(alone: Record, ranks: list[Rank], names: str, low: bool) -> Iterator[Finding]:
    """Gradient, norm and loss of the ranks beside those of one process."""
    a, b = flatten(ranks[0].gradients), flatten(alone.gradients)
    told = alone.told.get("grad_norm")
    fix = (
        "all_reduce the number of targets before dividing; DDP takes a mean over ranks, so multiply by world; "
        "clip after the reduction"
    )
    why = "the run at 2 ranks is another run than at 1"
    ratio, cosine = float(a.norm() / b.norm()), float(a @ b / (a.norm() * b.norm()).clamp_min(1e-30))
    clipped = told is not None and float(b.norm()) < 0.999 * float(told)
    if apart(a, b) > TOLERANCE[low] and not (clipped and cosine > 1 - TOLERANCE[low]):
        example = f"{names}: |g| {float(a.norm()):.6g} on 2 ranks, {float(b.norm()):.6g} on 1; cosine {cosine:.4f}"
        got = f"norm x {ratio:.3g}, cosine {cosine:.3f}"
        yield Finding("R10", "error", "proven", "gradient", "2 ranks = 1 process", got, why, fix, example, R10_SOURCE)
    norm = ranks[0].grad_norm
    if told is not None and norm is not None and abs(norm / float(told) - 1) > TOLERANCE[low]:
        example = f"{names}: grad_norm {norm:.6g} on 2 ranks, {float(told):.6g} on 1"
        yield Finding(
            "R10",
            "error",
            "proven",
            "grad_norm",
            "the whole gradient's norm",
            f"x {norm / float(told):.3g}",
            "each rank clips by another norm",
            fix,
            example,
            R10_SOURCE,
        )
    for rank, got in enumerate(ranks):
        if math.isfinite(got.loss) and abs(got.loss - alone.loss) > LOSS_TOLERANCE[low] * abs(alone.loss):
            example = f"{names}: rank {rank} logs {got.loss:.6f}, one process {alone.loss:.6f}"
            yield Finding(
                "R10",
                "warn",
                "proven",
                "logged loss",
                "the loss of all tokens",
                f"that of rank {rank}'s share or of means",
                "curves of different world sizes do not compare",
                fix,
                example,
                R10_SOURCE,
            )
            return


R10_SOURCE = "https://github.com/huggingface/transformers/issues/34373"

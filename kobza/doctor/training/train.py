"""`kobza doctor train module:make_step`: what a user's own training step really does. The contract is steps.CONTRACT.

Every check makes fresh steps, gives them token rows of its own and compares two runs that ought to agree, or looks at what
the optimizer was given. Nothing of the user's is written anywhere. Here are the checks of a start, of the gradient's way, of the
loss's number format and of averages; update_targets.py, update_equals.py and update_groups.py have the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kobza.doctor.finding import Check, Finding, Skip
from kobza.doctor.training.steps import CONTRACT, LOW, Record, Step, Subject, open_, perturbed, without_dropout
from kobza.doctor.training.update_equals import accumulation, determinism, evaluation, resume, world_size
from kobza.doctor.training.update_groups import amp_order, decay_groups, low_precision_weights, schedule
from kobza.doctor.training.update_targets import end_learned, label_shift, padding_learned, row_edge, supervised_rows

__all__ = ["CHECKS", "CONTRACT", "open_"]

# The first loss beside ln V: -0.008 to +0.054 nats on the clean controls, seeds 0-2; a head drawn 40 times too wide gives +2.
FIRST_LOSS_ABOVE, FIRST_LOSS_BELOW = 0.5, 0.5
RMS_GROWTH = 10.0  # last block's output over the first's: 1.55 on the clean controls; sqrt(n_layer) is natural


def first_loss(subject: Subject) -> Iterator[Finding]:
    """R14: a fresh model is about as good as a guess: loss ln V, small logits, a residual stream that does not grow."""
    step = without_dropout(subject.fresh())
    if step.get("pretrained"):
        raise Skip("the step says that its weights are pretrained")
    n, guess = step.row_tokens, math.log(step.vocab_size)
    sizes: list[float] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: sizes.append(rms(out))) for block in blocks_of(step.model)]
    record = step.update(step.window([[n] * 4]))
    for hook in hooks:
        hook.remove()
    logits = record.logits[-1].detach().float() if record.logits else None
    loss = record.loss if logits is None else cross_entropy(step, record, logits)
    spread = "" if logits is None else f", logits of standard deviation {float(logits.std()):.3g}"
    example = f"first loss {loss:.4f} on random tokens, ln {step.vocab_size} = {guess:.4f}{spread}"
    if loss > guess + FIRST_LOSS_ABOVE or not math.isfinite(loss):
        yield Finding(
            "R14",
            "warn",
            "proven",
            "first update",
            f"loss about ln V = {guess:.3f}",
            f"{loss:.3f}{spread}",
            "the first hundred steps unlearn a bad start, or the run diverges",
            "draw embedding and head with standard deviation 0.02, or the head at zero",
            example,
        )
    elif loss < guess - FIRST_LOSS_BELOW:
        yield Finding(
            "R14",
            "warn",
            "proven",
            "first update",
            f"loss about ln V = {guess:.3f}",
            f"{loss:.3f}",
            "random tokens cannot be guessed: the target leaks, or the loss is divided wrongly",
            "look at the mask and the targets; say pretrained = True if the weights are",
            example,
        )
    if len(sizes) > 1 and sizes[-1] > RMS_GROWTH * sizes[0]:
        growth = f"output rms {sizes[0]:.3g} after the first block, {sizes[-1]:.3g} after the last of {len(sizes)}"
        yield Finding(
            "R14",
            "warn",
            "proven",
            "blocks",
            "a residual stream flat within a few times",
            f"grows {sizes[-1] / sizes[0]:.1f} times",
            "deep layers drown the early ones",
            "draw the projections into the residual stream with 0.02 / sqrt(2 n_layer), or at zero",
            growth,
        )


def cross_entropy(step: Step, record: Record, logits: Tensor) -> float:
    """The mean cross-entropy of the last forward's logits at the token that follows each, whatever the step tells."""
    ids = record.inputs[-1] if record.inputs else None
    if ids is None or ids.shape != logits.shape[:2]:
        return record.loss
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks: the longest ModuleList."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def rms(output: Any) -> float:
    """Root mean square of a block's output, a tensor or the first of a tuple."""
    x = output[0] if isinstance(output, tuple) else output
    return float(x.detach().float().square().mean().sqrt()) if isinstance(x, Tensor) else math.nan


def plumbing(subject: Subject) -> Iterator[Finding]:
    """R23: a repeated batch has the same gradient each time; every trainable weight has one and moves."""
    step = perturbed(without_dropout(subject.fresh()))
    window = step.window([[step.row_tokens] * 2])
    start, norms, first = step.values(), [], None
    for _ in range(3):
        record = step.update(window, unclip=True)
        first = first or record
        norms.append(float(record.raw().norm()))
        with torch.no_grad():
            for name, p in step.named.items():
                p.copy_(start[name])
    assert first is not None
    growth = norms[2] / max(norms[0], 1e-30)
    if abs(norms[2] - norms[0]) > 0.1 * norms[0]:
        kind = (
            "gradients pile up: zero_grad is missing" if growth > 2 else "something besides weights and batch moves it"
        )
        example = "the same batch and weights three times: gradient norm " + ", ".join(f"{norm:.5g}" for norm in norms)
        yield Finding(
            "R23",
            "error",
            "proven",
            "step(window)",
            "the same gradient each time",
            f"x {growth:.2f} at the third: {kind}",
            "every update repeats all batches before it",
            "optimizer.zero_grad() after each update",
            example,
        )
    nothing = [name for name, p in step.named.items() if p.requires_grad and name not in first.gradients]
    nothing = [name for name in nothing if name in first.without]
    zero = [name for name, g in first.gradients.items() if not bool(g.any())]
    if nothing or zero:
        name = (nothing + zero)[0]
        state = "no gradient" if nothing else "a gradient of exactly 0"
        example = f"{name} has {state} on {2 * step.row_tokens} tokens with noise on every weight"
        yield Finding(
            "R23",
            "error",
            "proven",
            name,
            "a gradient for every trainable weight",
            f"{len(nothing)} have none, {len(zero)} only zeros",
            "these weights never learn",
            "look for detach(), no_grad() or .data between the weight and the loss",
            example,
        )
    yield from unmoved(subject)


def unmoved(subject: Subject) -> Iterator[Finding]:
    """Weights that have a gradient and do not change, and a few that are frozen beside many that are not."""
    step = perturbed(without_dropout(subject.fresh()))
    start, rates, gradients = step.values(), [], {}
    for i in range(3):
        record = step.update(step.window([[step.row_tokens] * 2], seed=i))
        rates += record.rates
        gradients |= {name: g for name, g in record.gradients.items() if bool(g.any())}
    after = step.values()
    if not any(rates):
        raise Skip("the rate was 0 in the first 3 updates, so nothing can move")
    full = [name for name in gradients if name in after and step.named[name].dtype not in LOW]
    still = [name for name in full if torch.equal(start[name], after[name])]
    if still and len(still) < len(full):
        example = (
            f"{still[0]}: gradient norm {float(gradients[still[0]].norm()):.4g}, and no value changed in 3 "
            f"updates at lr {max(rates):.3g}"
        )
        yield Finding(
            "R23",
            "error",
            "proven",
            still[0],
            "weights with a gradient move",
            f"{len(still)} do not",
            "these weights never learn",
            "see that the optimizer holds the model's own tensors, made after it was moved or tied",
            example,
        )
    frozen = [name for name, p in step.named.items() if not p.requires_grad]
    if frozen and len(frozen) < len(step.named) / 2:
        yield Finding(
            "R23",
            "warn",
            "heuristic",
            frozen[0],
            "every weight learns",
            f"{len(frozen)} of {len(step.named)} are frozen",
            "frozen by mistake, they never learn; on purpose, this is right",
            "requires_grad_(True), if it was not meant",
        )


def loss_precision(subject: Subject) -> Iterator[Finding]:
    """R24: the softmax of the loss is computed in float32."""
    step = subject.fresh()
    record = step.update(step.window([[step.row_tokens] * 2]), softmax=True)
    if not record.softmax_in:
        raise Skip("no log-softmax over the vocabulary was seen")
    low = [(dtype, off) for dtype, off, _ in record.softmax_in if dtype in LOW]
    if low:
        dtype, off = low[0][0], max(off for _, off in low)
        name = str(dtype).removeprefix("torch.")
        example = (
            f"log_softmax over {step.vocab_size} tokens in {name}: up to {off:.3g} nats from float32 on the same logits"
        )
        yield Finding(
            "R24",
            "warn",
            "proven",
            "loss",
            "cross-entropy in float32",
            name,
            "losses are rounded to 1 in 256: small gains drown, and gradients of likely tokens are lost",
            "cross_entropy(logits.float(), ...)",
            example,
        )


def averaged(subject: Subject) -> Iterator[Finding]:
    """R25: the averaged weights follow the raw ones at the rate that their decay says."""
    step = subject.fresh()
    (_,) = step.need("ema")
    decay = step.get("ema_decay")
    window = step.window([[step.row_tokens] * 2])
    start, last = ema_of(step), None
    expected = start
    for _ in range(3):
        step.update(window)
        raw = step.values()
        if decay is not None:
            expected = {
                name: decay * expected[name] + (1 - decay) * raw[name].float() for name in expected if name in raw
            }
    last, raw = ema_of(step), step.values()
    shared = [name for name in last if name in raw]
    if not shared:
        raise Skip("no averaged weight has the name of a weight")
    fix = "after each optimizer.step: ema = decay * ema + (1 - decay) * weight"
    moved = [name for name in shared if not torch.equal(raw[name].float(), start[name])]
    frozen = [name for name in moved if torch.equal(last[name], start[name])]
    if frozen:
        example = f"{frozen[0]}: the weight moved in 3 updates, its average did not"
        yield Finding(
            "R25",
            "error",
            "proven",
            frozen[0],
            "the average follows",
            f"{len(frozen)} of {len(moved)} stand still",
            "what is evaluated or saved is the start of the run",
            fix,
            example,
        )
    elif decay is not None:
        off = {
            name: float((last[name] - expected[name]).norm()) / max(float((last[name] - start[name]).norm()), 1e-12)
            for name in moved
            if name in expected
        }
        worst = max(off, key=lambda name: off[name], default="")
        if worst and off[worst] > 0.05:
            example = f"{worst} after 3 updates: off by {off[worst]:.0%} of its way from decay {decay:g}"
            yield Finding(
                "R25",
                "error",
                "proven",
                worst,
                f"decay {decay:g}",
                "another",
                "the average is of more or fewer updates than was set",
                fix,
                example,
            )


def ema_of(step: Step) -> dict[str, Tensor]:
    """The averaged weights by name, in float32."""
    ema = step.get("ema")
    pairs = dict(ema.named_parameters()) if isinstance(ema, nn.Module) else dict(ema)
    plain = ("module.", "_orig_mod.")
    return {name.removeprefix(plain[0]).removeprefix(plain[1]): v.detach().clone().float() for name, v in pairs.items()}


CHECKS: tuple[Check, ...] = (
    Check("R2", "logits learn the next token", label_shift),
    Check("R3", "the end of text is learned", end_learned),
    Check("R4", "padding is not learned", padding_learned),
    Check("R5", "every example has something to learn", supervised_rows),
    Check("R6", "no target beyond a row's end", row_edge),
    Check("R9", "micro-batches add up to their batch", accumulation),
    Check("R10 R11", "two ranks do what one does", world_size),
    Check("R12", "scaler, clip and update in order", amp_order),
    Check("R13", "updates move the weights' own format", low_precision_weights),
    Check("R14", "a fresh model knows nothing", first_loss),
    Check("R15", "groups and weight decay", decay_groups),
    Check("R16", "the learning rate is the one set", schedule),
    Check("R17", "evaluation", evaluation),
    Check("R18", "a resumed run goes on unbroken", resume),
    Check("R20", "the same seed, the same run", determinism),
    Check("R23", "gradients reach every weight once", plumbing),
    Check("R24", "cross-entropy in float32", loss_precision),
    Check("R25", "averaged weights", averaged),
)

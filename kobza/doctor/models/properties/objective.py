"""M7: what the loss really asks for, read off its gradient. M8: micro-batches add up to the window. M9: eval() is exact.

dL/dlogits[t] is negative at the target alone, so its argmin says which id position t is being taught; and it is exactly zero
where nothing is taught. Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kobza.doctor.finding import Finding, Skip
from kobza.doctor.models.properties.probe import SEED, distinct, draw_ids, home, settled, training
from kobza.doctor.models.subject import ModuleSubject, Subject
from kobza.train import IGNORE

# Clean subjects: shares of a window add up to within 4e-7, the loss of a batch to within 2e-7 (float32, 3 seeds).
TOLERANCE = 1e-3
MANY = 20_000_000  # weights above which only the last block's gradients are compared


# ---- M7: the target ----------------------------------------------------------------------------------------------------


def target(subject: ModuleSubject) -> Iterator[Finding]:
    """Two rows of disjoint alphabets, some labels left out: who is taught what?"""
    subject.need("loss", "cast")
    subject = subject.at("fp32")
    T = min(12, subject.max_seq_len, subject.vocab_size // 2)
    if T < 5:
        raise Skip(
            f"needs 10 different ids and 5 positions; the vocabulary has {subject.vocab_size}, the context {subject.max_seq_len}"
        )
    ids = distinct(subject.vocab_size, 2 * T, torch.Generator().manual_seed(SEED)).view(2, T).to(home(subject))
    labels = ids.clone()
    labels[0, :3], labels[1, -2:] = IGNORE, IGNORE  # a prompt, and padding
    with subject.learning():
        loss, logits = subject.loss(ids, labels)
        gradient = torch.autograd.grad(loss, logits, allow_unused=True)[0]
    if gradient is None:
        raise Skip("the logits that it returns are not those that its loss was computed from")
    yield from judge_target(ids, labels, gradient)


def judge_target(ids: Tensor, labels: Tensor, gradient: Tensor) -> Iterator[Finding]:
    """Findings from dL/dlogits (2, T or T-1, V) of labels (2, T) that stand under their own ids."""
    T, taught = ids.shape[1], gradient.abs().amax(-1) > 0  # (2, T)
    lowest = gradient.argmin(-1)
    hits = {offset: _hits(labels, lowest, taught, offset) for offset in (0, 1, 2)}
    right, n = hits[1]
    seen = f"ids of seed {SEED}, {T} a row, labels {IGNORE} at row 0 0..2 and row 1 {T - 2}..{T - 1}"
    if right < n:
        other = max((0, 2), key=lambda offset: hits[offset][0])
        if hits[other][0] > right:
            words = "itself (not shifted at all)" if other == 0 else "the token after the next (shifted twice)"
            yield _finding(
                "R2",
                "loss",
                f"position t is taught ids[t+1]: {n} of {n}",
                f"position t is taught {words}: {right} of {n} right",
                "it learns another task: "
                + ("copying, and the loss falls to 0" if other == 0 else "its text skips words"),
                "shift once: either the data or the model's forward does it, not both, not neither",
                f"{seen}: argmin dL/dlogits equals ids[t+{other}] at {hits[other][0]} of {hits[other][1]} places",
            )
            return
        missing = [t for t in range(T - 1) if labels[1, t + 1] != IGNORE and not bool(taught[1, t])]
        yield _finding(
            "R6" if missing else "R2",
            "loss",
            f"{n} of {n} positions are taught the next token",
            f"{right} of {n} are",
            "targets are lost or wrong",
            "compare the labels after the shift with the ids, position by position",
            f"{seen}: row 1 positions without a gradient: {missing}",
        )
        return
    if taught.shape[1] == T and bool(taught[0, -1]):
        yield _finding(
            "R6",
            "row 0, last position",
            "it has no target: its gradient is 0",
            f"it is taught id {int(lowest[0, -1])}" + (", the first of row 1" if lowest[0, -1] == ids[1, 0] else ""),
            "one target a row comes from another text",
            "shift inside each row, then flatten",
            f"{seen}: dL/dlogits[0, {T - 1}] has its minimum at {int(lowest[0, -1])}; row 1 begins with {int(ids[1, 0])}",
        )
    ignored = [(b, t) for b in (0, 1) for t in range(T - 1) if labels[b, t + 1] == IGNORE and bool(taught[b, t])]
    if ignored:
        b, t = ignored[0]
        yield _finding(
            "R4",
            f"row {b}, position {t}",
            f"no gradient where the label is {IGNORE}",
            f"{len(ignored)} such positions have one",
            "prompts and padding are trained on: samples fill with padding",
            f"give the loss ignore_index={IGNORE}",
            f"{seen}: dL/dlogits[{b}, {t}] reaches {float(gradient[b, t].abs().max()):.3g}, lowest at id {int(lowest[b, t])}",
        )


def _hits(labels: Tensor, lowest: Tensor, taught: Tensor, offset: int) -> tuple[int, int]:
    """At how many of the places t whose label at t + offset counts is that label the one taught."""
    n = min(labels.shape[1] - offset, lowest.shape[1])
    wanted = labels[:, offset : offset + n]
    counts = wanted != IGNORE
    right = (lowest[:, :n] == wanted) & taught[:, :n] & counts
    return int(right.sum()), int(counts.sum())


def _finding(code: str, where: str, expected: str, got: str, why: str, fix: str, counterexample: str) -> Finding:
    source = {
        "R2": "https://github.com/huggingface/transformers/issues/37830",
        "R4": "https://github.com/huggingface/trl/issues/976",
        "R6": "https://github.com/huggingface/transformers/issues/47394",
        "R9": "https://unsloth.ai/blog/gradient",
        "R17": "https://pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.eval",
    }[code]
    return Finding(code, "error", "proven", where, expected, got, why, fix, counterexample, source)


# ---- M8: accumulation --------------------------------------------------------------------------------------------------


def accumulation(subject: ModuleSubject) -> Iterator[Finding]:
    """Gradients of one batch against those of its rows, of unequal counts of targets, added up."""
    subject.need("accumulate", "cast")
    settled(subject)
    subject = subject.at("fp32")
    T = min(16, subject.max_seq_len)
    counts = [max(1, (T - 1) * part // 15) for part in (1, 4, 9, 15)]
    ids = draw_ids(subject, 4, T)
    labels = ids.clone()
    for row, count in zip(labels, counts, strict=True):
        row[: T - count] = IGNORE
    total = sum(counts)
    whole = _gradient(subject, [(ids, labels)], total)
    parts = _gradient(subject, [(ids[i : i + 1], labels[i : i + 1]) for i in range(4)], total)
    error = float((parts - whole).norm() / whole.norm().clamp(min=1e-30))
    if error <= TOLERANCE:
        return
    ratio = float(parts.norm() / whole.norm().clamp(min=1e-30))
    cosine = float(torch.nn.functional.cosine_similarity(parts, whole, dim=0))
    yield _finding(
        "R9",
        "loss",
        "4 micro-batches have the gradient of the one batch they make",
        f"relative error {error:.2g}, norm x{ratio:.2g}, cosine {cosine:.2f}",
        "accumulating changes what is trained: short texts weigh as much as long ones, or gradients are a multiple too large",
        "divide the SUM of token losses by the targets of the whole window (num_items_in_batch), not each micro-batch by its own",
        f"rows with {counts} targets, ids of seed {SEED}: gradients differ by {error:.3g} of their norm",
    )


def _gradient(subject: ModuleSubject, window: list[tuple[Tensor, Tensor]], total: int) -> Tensor:
    """The gradient of the window's loss as one vector; of the last block alone where the model is large."""
    weights = list(subject.module.parameters())
    if sum(weight.numel() for weight in weights) > MANY and "hidden" in subject.capabilities:
        weights = list(subject.layers()[-1][1].parameters())
    with subject.learning():
        loss = sum(subject.share(ids, labels, total) for ids, labels in window)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


# ---- M9: evaluation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluation(subject: Subject) -> Iterator[Finding]:
    """eval() twice is bit-equal; train() differs just where dropout is declared; the loss of a batch is that of its rows."""
    T = min(16, subject.max_seq_len)
    ids = draw_ids(subject, 4, T)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        first, second = subject.logits(ids), subject.logits(ids)
    if not torch.equal(first, second):
        yield _finding(
            "R17",
            "eval()",
            "two forwards of the same ids are bit-equal",
            f"they differ by up to {float((first - second).abs().max()):.2g}",
            "validation losses and answers are drawn by lot",
            "switch dropout and other noise off when not self.training",
            f"ids of seed {SEED} in eval(), twice: logits differ by {float((first - second).abs().max()):.3g}",
        )
        return
    if "train" in subject.capabilities:
        yield from _train_differs(subject, ids)
    if {"loss", "cast"} <= subject.capabilities:
        yield from _batch_loss(subject.at("fp32"), ids)


def _train_differs(subject: ModuleSubject, ids: Tensor) -> Iterator[Finding]:
    """Dropout that is declared does something, and none that is not."""
    if subject.dropout is None:
        return
    draws = []
    for seed in (SEED, SEED + 1):
        with training(subject, seed):
            draws.append(subject.logits(ids))
    differ = not torch.equal(*draws)
    if differ == (subject.dropout > 0):
        return
    yield Finding(
        code="R17",
        severity="warn",
        confidence="proven",
        where="train()",
        expected=f"a declared dropout of {subject.dropout:g} "
        + ("changes" if subject.dropout else "changes nothing in")
        + " a forward",
        got="two seeds give " + ("different" if differ else "bit-equal") + " logits",
        why="what is regularised is not what the config says",
        fix="pass the declared dropout to the layers" if subject.dropout else "declare the noise, or take it out",
        counterexample=f"ids of seed {SEED} in train() under seeds {SEED} and {SEED + 1}",
    )


def _batch_loss(subject: ModuleSubject, ids: Tensor) -> Iterator[Finding]:
    """The mean loss of a batch is that of its rows, weighed by their targets."""
    labels = ids.clone()
    for i, row in enumerate(labels):
        row[: 1 + i * (ids.shape[1] - 2) // 4] = IGNORE
    counts = (labels[:, 1:] != IGNORE).sum(1)
    together = float(subject.loss(ids, labels).value)
    rows = [float(subject.loss(ids[i : i + 1], labels[i : i + 1]).value) for i in range(len(ids))]
    apart = sum(loss * int(n) for loss, n in zip(rows, counts, strict=True)) / int(counts.sum())
    if abs(together - apart) <= TOLERANCE * max(abs(apart), 1e-6):
        return
    yield _finding(
        "R17",
        "loss in eval()",
        f"the mean over the batch's {int(counts.sum())} targets, {apart:.4f}",
        f"{together:.4f}",
        "a validation loss depends on how texts fall into batches",
        "sum the losses of all targets and divide by their number",
        f"4 rows of {counts.tolist()} targets: together {together:.5f}, row by row {apart:.5f}",
    )

"""What a step's logits are pulled towards (M7): checks R2 to R6 of `kobza doctor train`.

The gradient of a cross-entropy has one entry below zero a place, the target's. So what is really predicted is read off the
gradient of the logits, whatever collator, shift and mask made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kobza.doctor.finding import Finding, Skip
from kobza.doctor.training.steps import Step, Subject, without_dropout


class Row(NamedTuple):
    """A row of ids as it stands in the model's input, and what each of its logits is pulled towards."""

    ids: list[int]
    batch_row: int
    start: int
    length: int  # of the batch row, padding and all
    pulled: list[int | None]  # for every place of the batch row: the token pulled up, None where the gradient is 0


def targets_of(step: Step, lengths: list[int]) -> list[Row]:
    """Give the step rows of these lengths in one batch, and read its targets off the gradient of the logits: the only entry of
    it that is below zero is the token to be predicted."""
    without_dropout(step)
    rows = step.rows(lengths)
    record = step.update([step.collate(rows, uneven=len(set(lengths)) > 1)])
    if not record.inputs:
        raise Skip("the model is not called with token ids (B, T)")
    inputs = record.inputs[0]
    grad = next((x.grad for x in reversed(record.logits) if x.grad is not None), None)
    if grad is None or grad.shape[:2] != inputs.shape:
        raise Skip("no logits (B, T, V) come out of the model's modules, so their gradient cannot be read")
    live = grad.abs().amax(-1) > 0
    lowest = grad.argmin(-1)
    found = []
    for ids in rows:
        place = find_row(inputs, ids)
        if place is None:
            raise Skip("the rows given to batch() do not stand in the model's input as they are")
        b, start = place
        pulled = [int(t) if on else None for t, on in zip(lowest[b].tolist(), live[b].tolist(), strict=True)]
        found.append(Row(ids, b, start, inputs.shape[1], pulled))
    return found


def find_row(inputs: Tensor, ids: list[int]) -> tuple[int, int] | None:
    """Where the ids (the last may be a target only) stand in the inputs (B, T) -> (row, column)."""
    wanted, width = torch.tensor(ids[:-1], device=inputs.device), len(ids) - 1
    if inputs.shape[1] < width:
        return None
    hits = (inputs.unfold(1, width, 1) == wanted).all(-1).nonzero()
    return (int(hits[0][0]), int(hits[0][1])) if len(hits) else None


def label_shift(subject: Subject) -> Iterator[Finding]:
    """R2: logits at t are pulled towards token t+1; not t (no shift), not t+2 (shifted twice)."""
    step = subject.fresh()
    n = step.row_tokens
    rows = targets_of(step, [n, n])
    for row in rows:
        votes = {0: 0, 1: 0, 2: 0}
        for t in range(n - 2):
            pulled = row.pulled[row.start + t]
            for shift in votes:
                votes[shift] += pulled is not None and pulled == row.ids[t + shift]
        learned = sum(row.pulled[row.start + t] is not None for t in range(n - 2))
        best = max(votes, key=lambda shift: votes[shift])
        if learned and best != 1 and votes[best] > 0.5 * learned:
            kind = {0: "not shifted: it learns to copy", 2: "shifted twice"}[best]
            where, t = f"row {row.batch_row}", 3
            got = f"logits at t learn token t+{best} at {votes[best]} of {learned} places ({kind})"
            example = (
                f"ids {row.ids}: the logits after {row.ids[t]} (place {t}) are pulled to {row.ids[t + best]}, not "
                f"{row.ids[t + 1]}"
            )
            why = (
                "the loss falls to nearly 0 by copying"
                if best == 0
                else "the model learns to skip a token, and writes nonsense"
            )
            fix = "shift exactly once: either the collator or the loss, not both, and not neither"
            yield Finding(
                "R2", "error", "proven", where, "logits at t learn token t+1", got, why, fix, example, R2_SOURCE
            )
            return


R2_SOURCE = "https://github.com/huggingface/transformers/issues/37830"


def padding_learned(subject: Subject) -> Iterator[Finding]:
    """R4: no gradient at places after a row's end (right padding) or before its beginning (left)."""
    step = subject.fresh()
    n = step.row_tokens
    for row in targets_of(step, [n, n // 2, n - 3]):
        end = row.start + len(row.ids)
        # the last token's own place may learn an end of text, and the place before the first one its first token
        outside = [t for t in range(row.length) if t >= end or t < row.start - 1]
        learned = [t for t in outside if row.pulled[t] is not None]
        if learned:
            t = learned[0]
            example = (
                f"ids {row.ids} padded to {row.length}: place {t} is padding and is pulled to token {row.pulled[t]}"
            )
            got = f"{len(learned)} of {len(outside)} places of padding have a gradient"
            yield Finding(
                "R4",
                "error",
                "proven",
                f"row {row.batch_row}",
                "gradient 0 at padding",
                got,
                "the loss falls fast by predicting padding, and samples end in it",
                "labels[attention_mask == 0] = -100",
                example,
            )
            return


def row_edge(subject: Subject) -> Iterator[Finding]:
    """R6: the last logits of a row are not pulled towards the first token of the next."""
    step = subject.fresh()
    n = step.row_tokens
    rows = sorted(targets_of(step, [n, n, n]), key=lambda row: (row.batch_row, row.start))
    for row, after in zip(rows, rows[1:], strict=False):
        t = row.start + n - 1
        if after.batch_row == row.batch_row or t >= row.length:
            continue  # packed into one row: M4's business; or the last token is a target only
        if row.pulled[t] == after.ids[0]:
            example = (
                f"row {row.batch_row} ends in {row.ids[-1]}, row {after.batch_row} begins with {after.ids[0]}: "
                "the first learns the second"
            )
            yield Finding(
                "R6",
                "error",
                "proven",
                f"row {row.batch_row}, place {t}",
                "no target beyond the row's end",
                f"pulled to {after.ids[0]}, the first token of the next row",
                "one target in each row is a token of an unrelated text",
                "shift inside each row (logits[:, :-1], labels[:, 1:]) before flattening",
                example,
                "https://github.com/huggingface/transformers/issues/47394",
            )
            return


def end_learned(subject: Subject) -> Iterator[Finding]:
    """R3: the end of text that closes a row is a target."""
    step = subject.fresh()
    (eos,) = step.need("eos_id")
    n = step.row_tokens
    rows = targets_of(step, [n, n // 2, n - 3] if step.takes_uneven else [n, n])
    lost = [row for row in rows if row.pulled[row.start + len(row.ids) - 2] != eos]
    if lost:
        row = lost[0]
        t = row.start + len(row.ids) - 2
        got = f"it is in {len(rows) - len(lost)} of {len(rows)} rows"
        example = (
            f"ids {row.ids}: the place before the end {eos} has "
            f"{'no gradient' if row.pulled[t] is None else f'target {row.pulled[t]}'}"
        )
        yield Finding(
            "R3",
            "error",
            "proven",
            f"row {row.batch_row}, place {t}",
            f"the end of text {eos} is a target",
            got,
            "a model that never learns the end never stops",
            "mask labels by attention_mask, not by id: pad == eos masks every end",
            example,
            "https://github.com/huggingface/trl/issues/976",
        )


def supervised_rows(subject: Subject) -> Iterator[Finding]:
    """R5: every row of the user's examples has a token to learn."""
    step = without_dropout(subject.fresh())
    (examples,) = step.need("examples")
    for i, batch in enumerate(list(examples)[:8]):
        record = step.update([batch])
        grad = next((x.grad for x in reversed(record.logits) if x.grad is not None), None)
        if grad is None or not record.inputs:
            raise Skip("no logits (B, T, V) come out of the model's modules, so their gradient cannot be read")
        learned = (grad.abs().amax(-1) > 0).sum(-1)
        empty = (learned == 0).nonzero().flatten().tolist()
        if empty:
            ids = record.inputs[0][empty[0]].tolist()[:24]
            yield Finding(
                "R5",
                "error",
                "proven",
                f"examples[{i}], row {empty[0]}",
                "at least 1 supervised token a row",
                f"{len(empty)} of {len(learned)} rows have none",
                "the row teaches nothing; a batch of such rows has loss 0 or nan",
                "look for the response marker by ids as they occur in the text, not by tokenising it alone",
                f"ids {ids}: 0 of {grad.shape[1]} places have a gradient",
                "https://github.com/huggingface/trl/issues/598",
            )
            return

"""M2: what a cache gives is what a whole forward gives. M3: a row is the same alone and in a batch, padded at either side.
M4: a document is the same alone and packed behind another.

All in float32: these are laws of the algorithm, and the noise of bf16 would hide a small breach.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kobza.doctor.finding import Finding, Skip
from kobza.doctor.models.properties.probe import LONG, SEED, apart, draw_ids, layer_name, settled, shifted, small, spans
from kobza.doctor.models.subject import ModuleSubject, Subject

# Largest on clean subjects (5 families of ours and 5 of transformers, fp32 and bf16, 3 seeds): see tests/test_doctor_model.py.
TOLERANCE = 1e-4


def causal(subject: Subject) -> None:
    """Raise Skip where another law is broken that these follow from: with the future in sight, nothing here can hold."""
    settled(subject)
    if subject.notes.get("leak"):
        raise Skip("the future moves the past (M1); mend that first")


# ---- M2: the cache -----------------------------------------------------------------------------------------------------


def cache(subject: ModuleSubject) -> Iterator[Finding]:
    """Prefill n, then one token at a time, against the whole forward; also in chunks."""
    subject.need("cache", "cast")
    causal(subject)
    subject = subject.at("fp32")
    with small(subject):
        found = _first_breach(subject)
    if found is not None:
        yield found


def _first_breach(subject: ModuleSubject) -> Finding | None:
    """The first plan whose streams are not those of one forward, as a finding."""
    windows, ctx = spans(subject), subject.max_seq_len
    T = min(ctx, max(24, windows[-1] + 8 if windows else 0))
    starts = {1, 2, *(n for w in windows for n in (w - 1, w, w + 1))}
    plans = [[n] + [1] * min(6, T - n) for n in sorted(starts) if 0 < n < T]
    plans.append([T // 4, T // 4 + 1, T - 2 * (T // 4) - 1])  # chunks
    if ctx <= LONG:
        plans.append([ctx - 1, 1])
    for plan in plans:
        found = _breach(subject, plan)
        if found is not None:
            return found
    return None


def _breach(subject: ModuleSubject, plan: list[int]) -> Finding | None:
    """The finding where the streams of a plan (tokens fed at once, one call after the other) are not those of one forward."""
    ids = draw_ids(subject, 1, sum(plan))
    whole, feed, at = subject.hidden(ids), subject.cache(), 0
    for n in plan:
        streams = feed(ids[:, at : at + n])
        errors = [apart(got, want[:, at : at + n]) for got, want in zip(streams, whole, strict=True)]
        layer = next((i for i, error in enumerate(errors) if not error <= TOLERANCE), None)
        if layer is not None:
            offset = _offset(subject) if at else None
            return _cache_finding(subject, plan, at, n, layer, errors[layer], offset)
        at += n
    return None


def _offset(subject: ModuleSubject) -> str | None:
    """The wrong positions of new tokens that explain what the cache gives, in words; None: none of them. Asked of the third new
    token: of the first several wrong rules give the same position."""
    start = min(5, subject.max_seq_len - 4)
    if start < 2:
        return None
    ids, feed = draw_ids(subject, 1, start + 3), subject.cache()
    feed(ids[:, :start])
    got = torch.cat([feed(ids[:, i : i + 1])[-1] for i in range(start, start + 3)], dim=1)
    right = torch.arange(start + 3)
    wrong = {f"{by:+d}": right + by * (right >= start) for by in (1, -1, 2)}
    wrong |= {"always 0": right * (right < start), "from 0 again": torch.where(right < start, right, right - start)}
    wrong |= {"always 1": torch.where(right < start, right, torch.ones_like(right))}
    for words, positions in wrong.items():
        if not 0 <= int(positions.min()) <= int(positions.max()) < subject.max_seq_len:
            continue
        if apart(got, subject.hidden(ids, positions[None])[-1][:, start:]) <= TOLERANCE:
            return words
    return None


def _alike_error(subject: ModuleSubject, at: int, n: int) -> float:
    """How far off the cache is after one token repeated."""
    ids = draw_ids(subject, 1, 1).expand(1, at + n)
    feed = subject.cache()
    streams = (feed(ids[:, :at]), feed(ids[:, at:]))[1] if at else feed(ids)
    return apart(streams[-1], subject.hidden(ids)[-1][:, at:])


def _cache_finding(
    subject: ModuleSubject, plan: list[int], at: int, n: int, layer: int, error: float, offset: str | None
) -> Finding:
    """I1: the positions are wrong (an offset explains all of it, or the first layer is right and the later ones are not);
    I2: what is kept or seen is wrong."""
    # a text of one token repeated: wherever it looks, attention mixes the same values, so wrong positions do not show
    mixed = layer > 0 and _alike_error(subject, at, n) > TOLERANCE
    where = layer_name(subject, layer)
    positions = offset is not None or (layer > 0 and not mixed)
    if offset is not None:
        got = f"exactly what a whole forward gives with the positions of new tokens {offset}"
    elif positions:
        before = layer_name(subject, layer - 1)
        got = f"{before} is right and {where} off by {error:.2g}: between them the count moves"
    else:
        got = f"off by {error:.2g} of the largest value from {where} on, and no shift of positions explains it"
    return Finding(
        code="I1" if positions else "I2",
        severity="error",
        confidence="proven",
        where=where,
        expected="tokens fed through the cache give the streams of one whole forward",
        got=got,
        why="text is generated by another model than the one that was trained and evaluated",
        fix="give a new token the position `cache length`, counted once a forward, not once a layer"
        if positions
        else "keep and show exactly the tokens seen so far: check the stored length, the mask and what a window evicts",
        counterexample=f"{sum(plan)} ids of seed {SEED}, fed {plan}: positions {at}..{at + n - 1} differ by {error:.3g}",
        source="https://github.com/fla-org/flash-linear-attention/issues/766",
    )


# ---- M3: rows ----------------------------------------------------------------------------------------------------------


def batch(subject: Subject) -> Iterator[Finding]:
    """Rows of unequal length alone, and together: padded right and left, in either order, whole and through the cache."""
    causal(subject)
    subject = subject.at("fp32") if "cast" in subject.capabilities else subject
    longest = min(12, subject.max_seq_len)
    rows = [
        draw_ids(subject, 1, n, seed)[0]
        for seed, n in enumerate((max(1, longest // 3), max(2, longest * 3 // 4), longest))
    ]
    with torch.no_grad():
        alone = [subject.logits(row[None])[0] for row in rows]
    sides = ("right", "left") if "mask" in subject.capabilities else ("right",)
    for side in sides:
        for order in ((0, 1, 2), (2, 0, 1)):
            found = _batch_breach(subject, rows, alone, side, order)
            if found is not None:
                yield found
                return
    if "cache" in subject.capabilities:
        yield from _left_padded_cache(subject, rows)


def _padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """ids (B, T) and mask (B, T) of rows padded with id 0."""
    T = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(T - len(row), None)
        ids[i, place], mask[i, place] = row.cpu(), True
    return ids.to(rows[0].device), mask.to(rows[0].device)


def _batch_breach(
    subject: Subject, rows: list[Tensor], alone: list[Tensor], side: str, order: tuple[int, ...]
) -> Finding | None:
    ids, mask = _padded([rows[i] for i in order], side)
    positions = (
        (mask.long().cumsum(-1) - 1).clamp(min=0) if side == "left" and "positions" in subject.capabilities else None
    )
    with torch.no_grad():
        together = subject.logits(ids, positions, mask if "mask" in subject.capabilities else None)
    for place, i in enumerate(order):
        error = apart(together[place][mask[place]], alone[i])
        if not error <= TOLERANCE:
            told = side == "right" or "positions" in subject.capabilities
            return _batch_finding(side, [len(rows[j]) for j in order], place, error, "logits", told)
    return None


def _left_padded_cache(subject: ModuleSubject, rows: list[Tensor]) -> Iterator[Finding]:
    """The same rows, all but their last two tokens prefilled, then fed one by one."""
    rows = [row for row in rows if len(row) > 2]
    ids, mask = _padded([row[:-2] for row in rows], "left")
    feed = subject.cache(mask)
    got = [feed(ids)[-1][:, -1]] + [feed(torch.stack([row[i] for row in rows])[:, None])[-1][:, 0] for i in (-2, -1)]
    for place, row in enumerate(rows):
        want = subject.hidden(row[None])[-1][0, -3:]
        error = apart(torch.stack([step[place] for step in got]), want)
        if not error <= TOLERANCE:
            yield _batch_finding("left", [len(row) for row in rows], place, error, "streams through the cache")
            return


def _batch_finding(side: str, lengths: list[int], place: int, error: float, what: str, told: bool = True) -> Finding:
    """told: the model has been given all it takes to get the row right; if it takes no positions, this is but a warning."""
    shorter = lengths[place] < max(lengths)
    return Finding(
        code="I3",
        severity="error" if told else "warn",
        confidence="proven",
        where=f"row {place} of a batch padded {side}",
        expected="a row's logits do not depend on the rows beside it, nor on padding",
        got=f"a row of {lengths[place]} tokens in a batch of lengths {lengths}: {what} off by {error:.2g} of the largest value",
        why="answers change with what else is being served" + (": only the shorter rows go bad" if shorter else ""),
        fix=f"count positions from the first real token (cumsum(mask) - 1) and hide the padding at the {side}"
        if shorter
        else "let no operation mix rows: norms over the batch, positions shared by rows",
        counterexample=f"rows of lengths {lengths}, ids of seeds 0..2, padded {side} with id 0: "
        f"row {place} differs by {error:.3g}",
        source="https://github.com/huggingface/transformers/issues/22707",
    )


# ---- M4: packing -------------------------------------------------------------------------------------------------------


def packing(subject: ModuleSubject) -> Iterator[Finding]:
    """Document B alone, behind A, and behind another A: all the same."""
    subject.need("packing", "cast")
    causal(subject)
    subject = subject.at("fp32")
    half = min(12, subject.max_seq_len // 2)
    ids = draw_ids(subject, 1, 2 * half)
    other = torch.cat((shifted(ids[:, :half], subject, 0), ids[:, half:]), dim=1)
    with torch.no_grad():
        alone = subject.logits(ids[:, half:])
        behind, behind_other = (subject.packed(row, [half, half])[:, half:] for row in (ids, other))
    across, off = apart(behind_other, behind), apart(behind, alone)
    if across <= TOLERANCE and off <= TOLERANCE:
        return
    sees = not across <= TOLERANCE
    by_mask = (
        subject.kind == "kobza"
    )  # told by a mask, it must obey; told by positions alone, a library may not claim to
    yield Finding(
        code="R7" if sees else "R8",
        severity="error" if by_mask else "warn",
        confidence="proven",
        where=f"positions {half}..{2 * half - 1} of a packed row",
        expected="a packed document gives the logits that it gives alone",
        got=f"replacing the document before it moves it by {across:.2g} of the largest logit"
        if sees
        else f"it does not see the document before it, and is off by {off:.2g} all the same: its positions do not start at 0",
        why="documents are trained on with a context that they never have when served",
        fix="mask attention to the document's own tokens" if sees else "start the positions of each document at 0",
        counterexample=f"{2 * half} ids of seed {SEED} packed as [{half}, {half}]: logits of the second document differ by "
        f"{max(across, off):.3g}",
        source="https://github.com/huggingface/transformers/issues/46634"
        if sees
        else "https://github.com/huggingface/nanoVLM/issues/204",
    )

"""M1: tokens from c on are changed; nothing before c may move. In eval() and train(), with each attention, padded or not.

What leaks is named: the first stream that moves, and the blocks that leak by themselves, each asked alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from kobza.doctor.finding import Finding
from kobza.doctor.models.properties.probe import (
    LONG,
    SEED,
    block_moves,
    draw_ids,
    layer_name,
    length_of,
    settled,
    shifted,
    small,
    spans,
    streams_of,
    training,
)
from kobza.doctor.models.subject import Subject

# Clean subjects (5 families of ours and 5 of transformers, fp32 and bf16, 3 seeds) move by exactly 0: rows of a product do not
# depend on each other. 1e-5 leaves room for kernels that sum in another order, and a real leak is above 1e-3.
TOLERANCE = 1e-5
CUTS = (1, 3, 7, 15, 31, 32, 63)


class Way(NamedTuple):
    """One way of calling: train or eval, an attention backend, padding at the left, the right or nowhere."""

    train: bool
    backend: str
    padding: str

    def __str__(self) -> str:
        words = ["train()" if self.train else "eval()", self.backend, f"padding {self.padding}" if self.padding else ""]
        return ", ".join(word for word in words if word)


def ways(subject: Subject) -> Iterator[Way]:
    """The ways to ask in: not each with each, but each attention in eval(), in train() and with padding."""
    able = subject.capabilities
    for backend in subject.backends():
        yield Way(False, backend, "")
        if "train" in able:
            yield Way(True, backend, "")
        for padding in ("right", "left") if "mask" in able else ():
            yield Way(False, backend, padding)


def causality(subject: Subject) -> Iterator[Finding]:
    """Change the future; the past must stay. Once per number format: as it is, and in float32."""
    settled(subject)
    for asked in {
        id(s): s for s in (subject, subject.at("fp32") if "cast" in subject.capabilities else subject)
    }.values():
        for way in ways(asked):
            with small(asked):
                leak = find_leak(asked, way)
            if leak is not None:
                subject.notes["leak"] = not way.train and not way.padding
                yield leak
                return  # the others would say the same again


def find_leak(subject: Subject, way: Way) -> Finding | None:
    """The first cut at which the past moves, as a finding."""
    T = length_of(subject)
    plain = T <= LONG and not way.train and not way.padding
    cuts = [*(CUTS if plain else CUTS[2:3]), *(c for w in spans(subject) for c in (w - 1, w, w + 1))]
    ids, more = draw_ids(subject, 1, T), padded(subject, T, way.padding)
    with subject.backend(way.backend):
        base = run(subject, ids, way, more)
        for cut in sorted({c for c in cuts if 0 < c < T}):
            start = cut if way.padding != "left" else min(T - 1, cut + 3)
            moved = run(subject, shifted(ids, subject, start), way, more)
            first = 3 if way.padding == "left" else 0  # padding itself may hold anything
            for index, (a, b) in enumerate(zip(base, moved, strict=True)):
                size = a[:, first:].float().abs().max().clamp(min=1e-30)
                change = (a[:, first:start].float() - b[:, first:start].float()).abs().amax((0, -1)) / size  # (start,)
                if change.numel() and not float(change.max()) <= TOLERANCE:
                    return describe(
                        subject, way, start, index, int(change.argmax()) + first, float(change.max()), more, T
                    )
    return None


def run(subject: Subject, ids: torch.Tensor, way: Way, more: dict[str, Any]) -> list[torch.Tensor]:
    """The streams, dropout drawing the same each time."""
    with training(subject, SEED) if way.train else nullcontext(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return streams_of(subject, ids, **more)


def padded(subject: Subject, T: int, side: str) -> dict[str, Any]:
    """Arguments that call three positions at one side padding."""
    if not side:
        return {}
    mask = torch.ones(1, T, dtype=torch.bool)
    mask[:, slice(None, 3) if side == "left" else slice(T - 3, None)] = False
    more: dict[str, Any] = {"mask": mask}
    if "positions" in subject.capabilities:
        more["positions"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return more


def leaking_blocks(subject: Subject, way: Way, more: dict[str, Any], T: int) -> list[int]:
    """The blocks that, asked alone, let a later position move an earlier one."""
    if "hidden" not in subject.capabilities:
        return []
    ids, place, leaking = draw_ids(subject, 1, T), T // 2, []
    for index in range(len(subject.layers())):
        with training(subject, SEED) if way.train else nullcontext():
            state = torch.random.get_rng_state()
            moves = seeded_moves(subject, index, ids, place, more, state)
        first = 3 if way.padding == "left" else 0
        if float(moves[first:place].max()) > TOLERANCE:
            leaking.append(index)
    return leaking


def seeded_moves(
    subject: Subject, index: int, ids: torch.Tensor, place: int, more: dict[str, Any], state: Any
) -> torch.Tensor:
    """block_moves with the same dropout in each of its forwards."""
    handle = subject.module.register_forward_pre_hook(lambda *_: torch.random.set_rng_state(state))
    try:
        return block_moves(subject, index, ids, place, **more)
    finally:
        handle.remove()


def describe(
    subject: Subject, way: Way, cut: int, index: int, place: int, size: float, more: dict[str, Any], T: int
) -> Finding:
    """The finding: R1, or G11 where only the windowed attentions leak."""
    leaking = leaking_blocks(subject, way, more, T)
    windows = subject.windows or ()
    windowed = bool(leaking) and all(windows and windows[i] for i in leaking)
    names = ", ".join(subject.layers()[i][0] for i in leaking) or layer_name(subject, index)
    stream = layer_name(subject, index)
    number = str(subject.dtype).removeprefix("torch.")
    return Finding(
        code="G11" if windowed else "R1",
        severity="error",
        confidence="proven",
        where=stream,
        expected=f"positions before {cut} do not move when tokens from {cut} on change",
        got=f"position {place} of {stream} moves by {size:.2g} of the largest value; leaking by itself: {names}",
        why="the model is told the answer it is trained to give: losses fall too low and its samples are bad",
        fix="windowed layers: keep the causal mask (a window hides more, never less)"
        if windowed
        else f"make the mask of {names} causal: a query sees keys up to its own place",
        counterexample=f"{way}, {number}"
        + (f", window {spans(subject)[-1]}" if spans(subject) else "")
        + f": {T} ids of seed {SEED}, each from {cut} on replaced by id + 1; "
        f"{stream} at position {place} differs by {size:.3g}",
        source="https://github.com/huggingface/transformers/issues/31673",
    )

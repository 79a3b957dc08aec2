"""Vectors in place of ids: `with vectors_at(model, placeholder_id, vectors): model(ids)`. How models see pictures, hear sound.

Shapes: B batch, T tokens, P placeholders a row, N in all, C n_embd, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kobza.config import require
from kobza.train import IGNORE


@contextmanager
def vectors_at(model: nn.Module, placeholder_id: int, vectors: Tensor) -> Iterator[None]:
    """Within the context the places of one batch where ids == placeholder_id take `vectors`, (N, C) or (B, P, C), row by row, in
    place of model.embed's output: scaled already, positions yet to come. Gradients flow into them. In generation a row that
    fills the context forgets its oldest vectors with its oldest tokens; give generate extra=[never(placeholder_id)]."""
    V, C, shape = model.config.vocab_size, model.config.n_embd, tuple(vectors.shape)
    require(0 < placeholder_id < V, f"placeholder is id {placeholder_id}; take 1 to {V - 1} (0 fills short rows)")
    require(vectors.ndim in (2, 3) and shape[-1] == C, f"vectors are {shape}; give (N, C) or (B, P, C), C = n_embd {C}")
    held: list[Tensor] = []  # placeholders a row (B,), of each forward that had any

    def place(_module: nn.Module, inputs: tuple[Tensor], rows: Tensor) -> Tensor:
        places = inputs[0] == placeholder_id  # (B, T)
        if not places.any():
            return rows
        now, flat = places.sum(1), vectors.reshape(-1, C).to(rows)
        drawn = f"placeholder {placeholder_id} was drawn; give generate extra=[never({placeholder_id})]"
        require(not held or places.shape[1] > 1, drawn)
        if held and not torch.is_grad_enabled() and len(now) == len(held[0]) and bool((now <= held[0]).all()):
            flat = flat[newest(held[0], now)]
        require(
            now.sum() == len(flat), f"{now.sum()} placeholders {placeholder_id}, {len(flat)} vectors; give one each"
        )
        held.append(now)
        return rows.masked_scatter(places[..., None], flat)

    hook = model.embed.register_forward_hook(place)
    try:
        yield
    finally:
        hook.remove()
    require(bool(held) or shape[0] == 0, f"{shape[0]} vectors had no effect: no id is the placeholder {placeholder_id}")


def newest(held: Tensor, kept: Tensor) -> Tensor:
    """Which vectors, `held` (B,) a row, are the last `kept` (B,) of their row. newest([3, 1], [2, 0]) -> [F, T, T, F]"""
    row = torch.repeat_interleave(held)  # (N,)
    return held.cumsum(0)[row] - torch.arange(len(row), device=row.device) <= kept[row]


def ignore(targets: Tensor, placeholder_id: int) -> Tensor:
    """The targets (B, T) with IGNORE where the placeholder stands, which is never learned."""
    return targets.masked_fill(targets == placeholder_id, IGNORE)


def never(placeholder_id: int) -> Callable[[Tensor, list[list[int]]], Tensor]:
    """A processor for `generate`: the placeholder is not drawn. logits (B, V) -> (B, V)."""
    return lambda logits, _: logits.index_fill(-1, torch.tensor(placeholder_id).to(logits.device), -torch.inf)

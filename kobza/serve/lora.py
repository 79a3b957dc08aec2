"""Low-rank adapters by row: in one step some rows have one, others another, most none. Hu et al. 2021 (LoRA).

    y[rows] += x[rows] A^T B^T      A (r, in), B (out, r) with its scale in it

A product of several layers, q k v say, gets the A of all of them below each other and their B along a diagonal, so that an
adapter costs two small products wherever it is. Rows are never fewer than four, ranks a multiple of sixteen: otherwise MKL
takes kernels that round by the number of rows (attention.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kobza.config import nearest, require
from kobza.serve.attention import LEAST_ROWS

RANK = 16


class LowRank(NamedTuple):
    """What an adapter adds to one layer: scale b a."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA: what it adds to which of the model's Linear layers, by name ("blocks.0.attn.q_proj"), and the digest of it all."""

    digest: str
    parts: Mapping[str, LowRank]


class Part(NamedTuple):
    """One layer's place in a product."""

    name: str
    order: Tensor  # (n,) the product's rows in the layer's own numbering; -1: a row of padding


class Shift:
    """What the adapters add to one product."""

    def __init__(self, adapters: Mapping[str, Adapter], parts: Sequence[Part], width: int, device: torch.device):
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, adapter in adapters.items():
            found = [(adapter.parts.get(part.name), part.order) for part in parts]
            if all(low is None for low, _ in found):
                continue
            down = [low.a.float() for low, _ in found if low is not None]
            up, at, column = torch.zeros(sum(len(order) for _, order in found), sum(map(len, down))), 0, 0
            for low, order in found:
                if low is not None:
                    rows = (low.b.float() * low.scale)[order.clamp(min=0)] * (order >= 0)[:, None]
                    up[at : at + len(order), column : column + len(low.a)] = rows
                    column += len(low.a)
                at += len(order)
            more = -column % RANK
            a = F.pad(torch.cat(down), (0, width - down[0].shape[1], 0, more))  # a product's input may be padded
            up = F.pad(up, (0, more))
            self.factors[name] = a.T.contiguous()[None].to(device), up.T.contiguous()[None].to(device)

    def add(self, x: Tensor, y: Tensor, rows_of: Mapping[str, Tensor]) -> None:
        """Add each adapter's part to its rows of y (N, out), from x (N, in)."""
        for name, rows in rows_of.items():
            if name in self.factors:
                a, b = self.factors[name]
                n = len(rows)
                padded = rows if n >= LEAST_ROWS else rows[[min(i, n - 1) for i in range(LEAST_ROWS)]]
                change = torch.bmm(torch.bmm(x.index_select(0, padded)[None].float(), a), b)[0, :n]
                y.index_add_(0, rows, change.to(y.dtype))


def check_adapters(adapters: Mapping[str, Adapter], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse an adapter that does not fit the model's layers, whose (out, in) are given by name."""
    for name, adapter in adapters.items():
        for part, low in adapter.parts.items():
            require(part in shapes, f"adapter {name}: the model has no layer {part!r}{nearest(part, list(shapes))}")
            n_out, n_in = shapes[part]
            fits = low.a.ndim == low.b.ndim == 2 and low.a.shape[1] == n_in and low.b.shape[0] == n_out
            fits = fits and low.a.shape[0] == low.b.shape[1]
            a, b = tuple(low.a.shape), tuple(low.b.shape)
            require(
                fits,
                f"adapter {name}: {part} is {n_in} -> {n_out}, and its factors are {a} and {b}; tune it on this model",
            )

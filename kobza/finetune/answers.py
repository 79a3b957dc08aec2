"""What preferences and rewards share: examples in turn, their rows beneath each other, and how likely the answers are."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kobza.finetune.example import Packed, Row
from kobza.finetune.rows import collate
from kobza.finetune.sft import Hidden, hidden_of, learned_places
from kobza.layers import widen
from kobza.model import GPT

CHUNK = 1024  # targets whose logits are at hand at once: 400 MB at 100,000 tokens


class Order:
    """The places 0..n-1, `count` at a time, without end: every epoch has each once, in an order that seed and epoch decide. The
    last of an epoch may be fewer."""

    def __init__(self, n: int, count: int, seed: int):
        assert n > 0 and count > 0, f"{n} places, {count} at a time"
        self.n, self.count, self.seed = n, count, seed
        self.epoch, self.position = 0, 0
        self.places = self._shuffled()

    def take(self) -> tuple[int, list[int]]:
        """The epoch, and its next places."""
        epoch, places = self.epoch, self.places[self.position : self.position + self.count]
        self.position += len(places)
        if self.position == self.n:
            self.epoch, self.position = self.epoch + 1, 0
            self.places = self._shuffled()
        return epoch, places

    @property
    def n_per_epoch(self) -> int:
        """How often one takes in an epoch."""
        return -(-self.n // self.count)

    def _shuffled(self) -> list[int]:
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.n).tolist()

    def state_dict(self) -> dict[str, int]:
        """Where the order stands, and what it was made of."""
        return {"epoch": self.epoch, "position": self.position} | self._made_of()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where state_dict was taken."""
        other = {name: state.get(name) for name in self._made_of()}
        assert other == self._made_of(), f"an order of {other}, not {self._made_of()}"
        self.epoch, self.position = state["epoch"], state["position"]
        self.places = self._shuffled()

    def _made_of(self) -> dict[str, int]:
        return {"seed": self.seed, "n": self.n, "count": self.count}


def below_each_other(rows: list[Row], device: torch.device) -> Packed:
    """A line for each row, as wide as the longest."""
    return collate([[row] for row in rows], max(len(row.ids) for row in rows) - 1, device)


def answer_logprobs(
    model: GPT, batch: Packed, dtype: torch.dtype | None = None, temperature: float = 1.0, hidden: Hidden = hidden_of
) -> Tensor:
    """Log-probability of each target (B, T), float32, under logits divided by the temperature; 0 where there is no target. Of
    many targets some logits at a time, computed anew on the way back."""
    at = learned_places(batch)
    x = hidden(model, batch, dtype).flatten(0, 1).index_select(0, at)  # (N, C)
    pieces = list(zip(x.split(CHUNK), batch.targets.flatten()[at].split(CHUNK), strict=True))
    if len(pieces) > 1:
        parts = [checkpoint(_of_targets, model, *piece, temperature, use_reentrant=False) for piece in pieces]
    else:
        parts = [_of_targets(model, *piece, temperature) for piece in pieces]
    found = torch.cat(parts)  # (N,)
    return found.new_zeros(batch.targets.numel()).index_copy(0, at, found).view_as(batch.targets)


def _of_targets(model: GPT, x: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """x (N, C), targets (N,) -> (N,)"""
    return -F.cross_entropy(widen(model.logits(x)) / temperature, targets, reduction="none")

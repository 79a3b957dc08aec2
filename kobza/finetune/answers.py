"""What preferences and rewards share: examples in turn, and their rows beneath each other."""

from __future__ import annotations

import numpy as np
import torch

from kobza.finetune.example import Packed, Row
from kobza.finetune.rows import collate


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

"""The solver: which toggles make a kobza model equal its reference, at every station and on every probe.

A set of toggles counts only if afterwards every stretch of the network, run on the reference's own values, is at the noise floor:
stretches are judged one by one, so two mistakes cannot cancel, and the search can take the first wrong station, find what mends
it alone or in pairs, and go on to the next. The smallest sets win; if several of one size do, nothing that was run can tell
them apart, and all are reported.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kobza.config import InputError
from kobza.doctor.models.measure import Reference, like, over
from kobza.doctor.models.stations import Tap, distance, kind, run, trainable
from kobza.doctor.models.toggles import KINDS, NORMED, Base, Toggle, one, rebuilt
from kobza.model import GPT

# ---- what can be read off the reference ----------------------------------------------------------------------------


def measured(reference: Reference, model: nn.Module) -> dict[str, Any]:
    """Numbers that need no search: the factor between the embeddings, the tokens each attention sees, the head's weights."""
    found: dict[str, Any] = {"windows": windows(reference)}
    mine = run(model, like(model, reference.where), reference.what, Tap(stop="embed"))["embed"].double()
    theirs = reference.values["embed"].double()
    factor = float((mine * theirs).sum() / mine.square().sum().clamp(min=1e-300))
    if factor > 0 and distance(mine * factor, theirs) < 1e-5 and isinstance(model, GPT):
        found["embed_scale"] = float(f"{model.config.embed_scale * factor:.7g}")
    head = reference.where.head
    if head is not None and isinstance(getattr(head, "weight", None), Tensor):
        found["head"] = head.weight.detach().float()
    return found


def windows(reference: Reference) -> list[int]:
    """Tokens that each attention of the reference sees, itself included; 0: all that there were. From the gradient of its last
    position: what it does not see has none."""
    model, where, T = reference.model, reference.where, reference.what.ids.shape[1]
    places = [name for name in reference.stations if kind(name) == "attn"]
    tap = Tap(reference.values, learns=True)
    with trainable(model):
        values = run(model, where, reference.what, tap)
        reach = []
        for name in places:
            (grad,) = torch.autograd.grad(
                values[name][:, -1].square().sum(), tap.leaves[f"{name}.in"], retain_graph=True
            )
            seen = grad.abs().amax(dim=(0, 2)).nonzero()
            first = int(seen.min()) if len(seen) else T - 1
            reach.append(T - first if first else 0)
    return reach


# ---- the search ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """The smallest sets that equal the reference (all of one size; empty: none was found), the best of the rest as a number of
    stations still wrong, and what it took."""

    sets: tuple[tuple[Toggle, ...], ...]
    nearest: tuple[Toggle, ...]
    wrong: tuple[str, ...]  # stations that `nearest` leaves wrong
    runs: int
    seconds: float


class Search:
    """Best-first over sets of toggles, by size."""

    def __init__(self, base: Base, reference: Reference, options: list[Toggle], seconds: float = 60.0, most: int = 6):
        self.base, self.reference, self.options, self.most = base, reference, options, most
        self.until, self.runs, self.start = time.perf_counter() + seconds, 0, time.perf_counter()
        self.known: dict[tuple[int, ...], list[str]] = {}
        self.mended: dict[tuple[tuple[int, ...], str], bool] = {}
        self.bases: dict[int, Base] = {0: base}

    def extend(self, more: list[Toggle], seconds: float) -> None:
        """More options, and more time; what was run is still known."""
        self.options = [*self.options, *more]
        self.until = time.perf_counter() + seconds

    def model(self, chosen: tuple[int, ...]) -> GPT | None:
        """After the toggles of these numbers."""
        self.runs += 1
        return rebuilt(self.base, tuple(self.options[i] for i in chosen))

    def wrong(self, chosen: tuple[int, ...]) -> list[str] | None:
        """Stations that are over their limit, in order; None: these toggles do not go together."""
        if chosen not in self.known:
            model = self.model(chosen)
            if model is None:
                return None
            worst = over(model, self.reference)
            self.known[chosen] = [s for s in self.reference.stations if not worst[s][0] <= worst[s][1]]
        return self.known[chosen]

    def mends(self, chosen: tuple[int, ...], station: str) -> bool:
        """Whether that one station is right afterwards. What lies behind it is not built."""
        if (chosen, station) not in self.mended:
            self.runs += 1
            model = rebuilt(self.shallow(station), tuple(self.options[i] for i in chosen))
            worst = model and over(model, self.reference, stop=station, first_only=True)[station]
            self.mended[chosen, station] = bool(worst) and worst[0] <= worst[1]
        return self.mended[chosen, station]

    def moves(self, chosen: tuple[int, ...], station: str, start: dict[str, tuple[float, float, str]]) -> bool:
        """Whether anything is another there than at the start: what has no effect alone is half of no pair."""
        model = rebuilt(self.shallow(station), tuple(self.options[i] for i in chosen))
        return model is not None and over(model, self.reference, stop=station) != start

    def shallow(self, station: str) -> Base:
        """The base up to the block of a station."""
        block = station.split(".")
        depth = {"embed": 1, "blocks": int(block[1]) + 1 if len(block) > 1 else 0}.get(block[0], 0)
        if depth not in self.bases:
            self.bases[depth] = cut(self.base, depth)
        return self.bases[depth]

    def touching(self, chosen: tuple[int, ...], station: str) -> list[int]:
        """Toggles that can move a station and are not excluded by those chosen."""
        slots = {self.options[i].slot for i in chosen}
        return [i for i, t in enumerate(self.options) if kind(station) in t.kinds and t.slot not in slots]

    def solve(self) -> Solution:
        """The smallest sets after which no station is wrong."""
        queue: list[tuple[int, int, bool, tuple[int, ...], frozenset[int]]] = [(0, 0, False, (), frozenset())]
        order, found, seen = itertools.count(1), [], set()
        best: tuple[int, ...] = ()
        while queue and time.perf_counter() < self.until:
            size, _, in_pairs, chosen, singly = heapq.heappop(queue)
            if size > self.most or (found and size > len(found[0])):
                break
            wrong = self.wrong(chosen)
            if wrong is None or (not in_pairs and chosen in seen):
                continue
            if len(wrong) < len(self.known.get(best, self.reference.stations)):
                best = chosen
            if not wrong:
                found.append(chosen)
                continue
            if not in_pairs:
                seen.add(chosen)
                singles = [i for i in self.touching(chosen, wrong[0]) if self.mends(added(chosen, i), wrong[0])]
                for i in singles:
                    heapq.heappush(queue, (size + 1, next(order), False, added(chosen, i), frozenset()))
                late = size + (3 if singles else 2)  # a pair where one is enough: only if that one leads nowhere
                heapq.heappush(queue, (late, next(order), True, chosen, frozenset(singles)))
            else:
                for pair_ in self.pairs(chosen, wrong[0], singly):
                    heapq.heappush(queue, (len(chosen) + 2, next(order), False, added(chosen, *pair_), frozenset()))
        sets = [tuple(self.options[i] for i in chosen) for chosen in dict.fromkeys(found)]
        left = () if sets else tuple(self.known.get(best) or ())
        nearest = tuple(self.options[i] for i in best)
        return Solution(tuple(sets), nearest, left, self.runs, time.perf_counter() - self.start)

    def pairs(self, chosen: tuple[int, ...], station: str, singly: frozenset[int]) -> Iterator[tuple[int, int]]:
        """Pairs that mend a station which neither of the two mends alone."""
        start = over(
            rebuilt(self.shallow(station), tuple(self.options[i] for i in chosen)), self.reference, stop=station
        )
        able = [
            i
            for i in self.touching(chosen, station)
            if i not in singly and self.moves(added(chosen, i), station, start)
        ]
        for i, j in itertools.combinations(able, 2):
            if time.perf_counter() > self.until:
                return
            if self.options[i].slot != self.options[j].slot and self.mends(added(chosen, i, j), station):
                yield i, j


def cut(base: Base, n_layer: int) -> Base:
    """The base with so many blocks; as it is where its config names blocks that would then not be there."""
    if base.config.ff_widths or base.config.omit_heads:
        return base
    try:
        return replace(base, config=replace(base.config, n_layer=n_layer))
    except InputError:
        return base


def added(chosen: tuple[int, ...], *more: int) -> tuple[int, ...]:
    """A set of numbers, in order."""
    return tuple(sorted({*chosen, *more}))


# ---- values that no list has ---------------------------------------------------------------------------------------

FITTED = {  # field -> (least, most, code): searched in its logarithm
    "rope_theta": (1e2, 1e8, "L5"),
    "attn_scale": (1e-3, 1.5, "G13"),
    "attn_softcap": (1.0, 300.0, "G12"),
    "softcap": (1.0, 300.0, "G12"),
    "norm_eps": (1e-12, 1e-2, "G4"),
}


def fitted(base: Base, reference: Reference, wrong: list[str]) -> list[Toggle]:
    """For each number of the config that can move a wrong station, the value at which that station is nearest to the reference's,
    where that is within a hundredth: a candidate to be tried, not an answer."""
    found = []
    for name, (least, most, code) in FITTED.items():
        kinds = NORMED if name == "norm_eps" else frozenset(KINDS.get(name, "attn").split())
        station = next((s for s in wrong if kind(s) in kinds), None)
        if station is None:
            continue
        short = cut(base, int(station.split(".")[1]) + 1) if station.startswith("blocks") else base

        def error(value: float, name: str = name, station: str = station, short: Base = short) -> float:
            model = rebuilt(short, (one(name, value, "", frozenset()),))
            if model is None:
                return math.inf
            return max(e / top for e, top, _ in over(model, reference, stop=station).values())

        value = least_at(lambda x, error=error: error(math.exp(x)), math.log(least), math.log(most))
        for digits in (2, 3, 5, 8):
            rounded = float(f"{math.exp(value):.{digits}g}")
            if error(rounded) <= 1:
                found.append(one(name, rounded, code, kinds))
                break
    return found


def least_at(f: Callable[[float], float], low: float, high: float, grid: int = 20, steps: int = 30) -> float:
    """Where f is least: a grid, then golden sections around its best point."""
    points = [low + (high - low) * i / grid for i in range(grid + 1)]
    best = min(points, key=f)
    width = (high - low) / grid
    low, high, ratio = best - width, best + width, (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = f(left), f(right)
    for _ in range(steps):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = f(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = f(right)
    return (low + high) / 2

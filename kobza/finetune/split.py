"""Examples -> those that are learned and those held out: by group, stratified, by seed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from kobza.config import require
from kobza.finetune.example import Example


def split(examples: Sequence[Example], val_fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, val), each in the order given and neither empty. Examples of one group stay together; each stratum gives its share
    of the held out ones, to the example where no group is in the way. A group counts to the stratum of most of its examples."""
    groups: dict[tuple[str, object], list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        groups[("group", example.group) if example.group else ("row", i)].append(i)
    require(len(groups) > 1, _too_few(examples))
    strata: dict[str, list[list[int]]] = defaultdict(list)
    for members in groups.values():
        counts = Counter(examples[i].stratum for i in members)
        strata[max(sorted(counts), key=counts.__getitem__)].append(members)
    sizes = {name: sum(map(len, strata[name])) for name in sorted(strata)}
    quotas = shares(sizes, min(max(1, round(val_fraction * len(examples))), len(examples) - 1))
    generator = np.random.default_rng(seed)
    held: list[list[int]] = []
    for name, quota in quotas.items():
        units = [strata[name][k] for k in generator.permutation(len(strata[name]))]
        held += nearest_to(units, quota)
    if not held or len(held) == len(groups):  # groups too large for the share
        units = [members for name in quotas for members in strata[name]]
        smallest = min(units, key=len)
        held = [smallest] if not held else [members for members in units if members is not smallest]
    val = {i for members in held for i in members}
    return [e for i, e in enumerate(examples) if i not in val], [e for i, e in enumerate(examples) if i in val]


def shares(sizes: dict[str, int], total: int) -> dict[str, int]:
    """`total` parted in proportion to the sizes, by the largest remainder. shares({"a": 5, "b": 3, "c": 2}, 4) -> 2, 1, 1"""
    whole = sum(sizes.values())
    quotas = {name: total * size // whole for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(total * sizes[name] % whole), name))
    for name in by_remainder[: total - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def nearest_to(units: list[list[int]], quota: int) -> list[list[int]]:
    """Units in their order, each taken if it brings the number of members nearer to the quota."""
    taken: list[list[int]] = []
    left = quota
    for unit in units:
        if abs(left - len(unit)) < left:
            taken.append(unit)
            left -= len(unit)
    return taken


def _too_few(examples: Sequence[Example]) -> str:
    if len(examples) < 2:
        return f"{len(examples)} examples; one is held out, so at least 2 are needed"
    return f"all {len(examples):,} examples are of one group, {examples[0].group!r}; none can be held out: choose another --group"

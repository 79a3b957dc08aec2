"""How far one model's arithmetic is from another's, station by station, against the noise of the arithmetic itself.

The reference is run against itself in a finer number format: what that costs at a station is the floor there. A model equals the
reference where its error stays within a factor of the floor, at EVERY station, free-running and forced; a small error at the end
proves nothing, since errors cancel. The forced stretches are also run on inputs at which a switch shows that is silent on usual
ones: small streams (epsilons), large ones (soft caps), far positions (angles).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kobza.config import require
from kobza.doctor.models.stations import (
    Input,
    Place,
    Tap,
    Values,
    cast,
    distance,
    forced_gradients,
    gradients,
    in_dtype,
    kind,
    place,
    run,
)
from kobza.layers import Rope


@dataclass(frozen=True)
class Noise:
    """What is still noise: `unit`, the least error that counts as one, and the factors over the floor. `exact` holds where no
    matrix is multiplied (embedding, norms, sums): there two right codes differ by a rounding of few elements at most."""

    unit: float
    local: float
    running: float
    exact: float
    backward: float


# Set from 230 clean pairs in each dtype: ours and `transformers`, 5 families x 3 seeds, and ours and the other code of
# mutations/parity.py, 5 families x 20 seeds, each pair both ways. Most seen, in floors: local 1.4, running 3.2, backward 7 in
# fp32; 1.1, 1.1 and 1.4 in bf16, with or without autocast. `exact`: 1.5e-4 (a LayerNorm); a norm cast wrongly makes 3e-3.
NOISE = {
    "fp32": Noise(unit=2e-7, local=8.0, running=16.0, exact=math.inf, backward=32.0),
    "bf16": Noise(unit=1e-4, local=4.0, running=4.0, exact=6e-4, backward=8.0),
    "autocast-bf16": Noise(unit=1e-4, local=4.0, running=4.0, exact=6e-4, backward=8.0),
}


@dataclass(frozen=True)
class Probe:
    """An input of the forced stretches: its name, what is run, the values forced, what the reference makes of it, the limits."""

    name: str
    what: Input
    forced: Values
    values: Values
    limits: dict[str, float]


@dataclass(frozen=True)
class Row:
    """A station: relative L2 error of A, free-running and forced, forward and backward, and the limit of each (None: no such)."""

    station: str
    running: float
    running_limit: float
    local: float
    local_limit: float
    probe: str  # the input at which `local` was furthest over its limit
    back: float | None = None
    back_limit: float | None = None
    back_local: float | None = None
    back_local_limit: float | None = None

    @property
    def equal(self) -> bool:
        """Whether nothing here is above its limit."""
        pairs = [(self.running, self.running_limit), (self.local, self.local_limit)]
        pairs += [(self.back, self.back_limit), (self.back_local, self.back_local_limit)]
        return all(limit is None or error is None or error <= limit for error, limit in pairs)

    @property
    def diverges(self) -> bool:
        """Whether this stretch itself is wrong, whatever came in."""
        back = (
            self.back_local is not None
            and self.back_local_limit is not None
            and self.back_local > self.back_local_limit
        )
        return self.local > self.local_limit or back


@dataclass
class Reference:
    """The trusted model, measured once in a dtype: its values, its floor, its gradients, and the probes."""

    model: nn.Module
    where: Place
    what: Input
    probes: list[Probe]
    values: Values
    limits: dict[str, float]
    grads: Values
    grad_limits: dict[str, float]
    local_grads: Values
    local_grad_limits: dict[str, float]
    weight_grads: Values
    weight_limits: dict[str, float] = field(
        default_factory=dict
    )  # of the error over the norm of the largest of all gradients

    @property
    def stations(self) -> list[str]:
        """Names in order."""
        return self.where.stations


def finer(model: nn.Module, dtype: str) -> nn.Module:
    """The model in the format that tells the noise of `dtype`: float64 for fp32, float32 for the rest."""
    return cast(model, torch.float64 if dtype == "fp32" else torch.float32)


def limit(station: str, floor: float, dtype: str, factor: float, exact: bool) -> float:
    """The largest error at a station that is noise."""
    noise = NOISE[dtype]
    if exact and kind(station) in ("embed", "in", "stream", "norm"):
        return min(noise.exact, factor * max(floor, noise.unit))
    return factor * max(floor, noise.unit)


def measure(model: nn.Module, where: Place, what: Input, far: int = 0) -> Reference:
    """The reference at an input. `where` is the place in `model`, with the stations that are compared; `far`: a position from
    which a probe counts as well, 0: none."""
    model, wide = in_dtype(model, what.dtype), finer(model, what.dtype)
    here, there = like(model, where), like(wide, where)
    exact = replace(what, dtype="fp32")
    small = sum(p.numel() for p in model.parameters()) <= FEW_WEIGHTS
    values, grads, weight_grads = gradients(model, here, what, small)
    true, true_grads, true_weights = gradients(wide, there, exact, small)
    noise = NOISE[what.dtype]
    limits = {s: limit(s, distance(values[s], true[s]), what.dtype, noise.running, False) for s in values}
    back = {s: limit(s, distance(grads[s], true_grads[s]), what.dtype, noise.backward, False) for s in grads}
    scale = max((float(g.norm()) for g in true_weights.values()), default=1.0)
    noises = {n: float((g.double() - true_weights[n].double()).norm()) / scale for n, g in weight_grads.items()}
    weights = {n: noise.backward * max(floor, noise.unit) for n, floor in noises.items()}
    local = forced_gradients(model, here, what, values, grads)
    true_local = forced_gradients(wide, there, exact, values, grads)
    local_back = {s: limit(s, distance(local[s], true_local[s]), what.dtype, noise.backward, False) for s in local}
    reference = Reference(model, here, what, [], values, limits, grads, back, local, local_back, weight_grads, weights)
    for name, probe_what, forced in _inputs(model, here, what, values, far):
        computed = run(model, here, probe_what, Tap(forced))
        plain = replace(probe_what, dtype="fp32")
        truth = run(wide, there, plain, Tap(forced))
        floors = {s: distance(computed[s], truth[s]) for s in computed}
        if (
            what.dtype == "fp32"
        ):  # one run may be lucky: where scores are large, what rounding its input alone would cost
            with jittered_angles(wide):
                shaken = run(wide, there, plain, Tap(jittered(forced)))
            floors = {s: max(floor, distance(shaken[s], truth[s])) for s, floor in floors.items()}
        top = {s: limit(s, floors[s], what.dtype, noise.local, True) for s in floors}
        reference.probes.append(Probe(name, probe_what, forced, computed, top))
    return reference


def jittered(values: Values) -> Values:
    """In float64, each number off by about a rounding of float32."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: value.double() * (1 + 2.0**-24 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        for name, value in values.items()
    }


@contextmanager
def jittered_angles(model: nn.Module) -> Iterator[None]:
    """Within the context rotary frequencies are off by a rounding of float32: 1 / theta^x and theta^-x, both right, differ by
    that. Found by what they are called, inv_freq, or as our own tables."""
    generator, before = torch.Generator().manual_seed(0), []
    for name, buffer in model.named_buffers():
        if not buffer.is_floating_point() or buffer.numel() == 0:
            continue
        before.append((buffer, buffer.clone()))
        if name.rpartition(".")[2].endswith("inv_freq"):
            buffer.mul_(1 + 2.0**-23 * torch.randn(buffer.shape, generator=generator).sign())
    for rope in {id(m): m for m in model.modules() if isinstance(m, Rope)}.values():
        off = (
            2.0**-23
            * torch.randn(rope.cos.shape[1], generator=generator).sign()
            * torch.atan2(rope.sin[1], rope.cos[1])
        )
        angles = torch.arange(len(rope.cos))[:, None] * off
        cos, sin = rope.cos.clone(), rope.sin.clone()
        rope.cos.copy_(cos * angles.cos() - sin * angles.sin()), rope.sin.copy_(sin * angles.cos() + cos * angles.sin())
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def like(model: nn.Module, where: Place) -> Place:
    """The place in a copy of the model, of whatever depth, with the kinds of station of `where`."""
    found = place(model)
    bare = not any(where.parts)
    parts = ((),) * len(found.blocks) if bare else found.parts
    return Place(found.blocks, parts, found.head if where.head is not None else None)


FEW_WEIGHTS = 20_000_000  # up to so many, the gradient of each weight is compared as well
SMALL, LARGE, LOUD = (
    1e-3,
    4.5,
    20.0,
)  # of all; of what sub-layers read (scores grow by the square); of what the head reads


def _inputs(
    model: nn.Module, where: Place, what: Input, values: Values, far: int
) -> Iterable[tuple[str, Input, Values]]:
    """(name, what is run, values forced) of each probe."""
    yield "natural", what, values
    if far:
        there = replace(what, positions=torch.arange(far, far + what.ids.shape[1]))
        yield "far", there, values
    if what.dtype == "fp32":  # in bf16 the same switches show no better
        yield "small", what, {s: v * SMALL for s, v in values.items()}
        gain = {"in": LARGE, "norm": LOUD}
        yield "large", what, {s: v * gain.get(kind(s), 1.0) for s, v in values.items()}


def over(
    model: nn.Module, reference: Reference, stop: str = "", first_only: bool = False
) -> dict[str, tuple[float, float, str]]:
    """Local error of a model, already in the reference's dtype, at each station: (error, limit, probe) of the probe where it is
    furthest over the limit. `stop`: the last station wanted; `first_only`: stop at the first probe that is over there."""
    where, worst = like(model, reference.where), {}
    for probe in reference.probes:
        values = run(model, where, probe.what, Tap(probe.forced, stop))
        for station, value in values.items():
            if stop and station != stop:
                continue
            error, top = distance(value, probe.values[station]), probe.limits[station]
            if station not in worst or error / top > worst[station][0] / worst[station][1]:
                worst[station] = error, top, probe.name
        if first_only and any(error > top for error, top, _ in worst.values()):
            break
    return worst


def running(model: nn.Module, reference: Reference) -> dict[str, float]:
    """Free-running error at each station of a model in the reference's dtype."""
    values = run(model, like(model, reference.where), reference.what, Tap())
    for name, value in reference.values.items():
        sizes = f"{name} is {tuple(values[name].shape)} in one model and {tuple(value.shape)} in the other"
        require(values[name].shape == value.shape, f"{sizes}; compare models of equal sizes")
    return {s: distance(values[s], reference.values[s]) for s in reference.stations}


def compare(model: nn.Module, reference: Reference, backward: bool = True) -> list[Row]:
    """Every station of a model, already in the reference's dtype, against the reference."""
    where, what = like(model, reference.where), reference.what
    errors, local = running(model, reference), over(model, reference)
    back, back_local = {}, {}
    if backward:
        _, grads, _ = gradients(model, where, what)
        forced = forced_gradients(model, where, what, reference.values, reference.grads)
        back = {s: distance(grads[s], g) for s, g in reference.grads.items() if s in grads}
        back_local = {s: distance(forced[s], g) for s, g in reference.local_grads.items() if s in forced}
    return [
        Row(
            s,
            errors[s],
            reference.limits[s],
            *local[s],
            back.get(s),
            reference.grad_limits.get(s),
            back_local.get(s),
            reference.local_grad_limits.get(s),
        )
        for s in reference.stations
    ]


def weight_gradients(model: nn.Module, reference: Reference) -> Values:
    """The loss's gradient of each weight, by the model's own names; {} for a large model."""
    if not reference.weight_grads:
        return {}
    return gradients(model, like(model, reference.where), reference.what, True)[2]


def pick_ids(vocab_size: int, n_tokens: int, seed: int) -> Tensor:
    """Random tokens (2, T), the same for the same numbers."""
    return torch.randint(vocab_size, (2, n_tokens), generator=torch.Generator().manual_seed(seed))

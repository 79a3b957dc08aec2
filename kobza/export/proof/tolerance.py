"""What an export may differ by, derived from its format and its engine: never a number that was found to pass.

Weights. A block format rounds to steps that its blocks choose, so the error it may make is computed from the source itself: a
step of s costs s / sqrt(12) in the root mean square (`rounding`); a tensor may lie SLACK times as far off.

Function. What the weights' rounding does and what the engine's arithmetic does are told apart. The artifact is held against its
twin, our model with the weights that the artifact has, each of which is in its band. What is left is the engine's arithmetic, and
mostly that llama.cpp rounds what comes into a quantised matrix to 8 bits, into F16 to 11. `engine_rounding` makes the twin do the
same: what that does to its probabilities is the noise, and an engine that computes the same model is another draw of it, so it
may differ a few times as much (FACTOR, MEAN). What the format itself may cost is what random rounding of the same size costs
(`with_noise`). A Kullback-Leibler divergence grows with the square of such an amplitude.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kobza.config import require
from kobza.export.proof.stored import Stored
from kobza.model import GPT

SLACK = 3**0.5  # an error is half a step at most, and that is so many times its root mean square
ROW = 4.0  # times that for a single row, whose columns may count little by an importance matrix
FACTOR = 3.0  # of the largest difference that the noise makes: the largest of some hundred is another in every draw
MEAN = 2.0  # of the noise's amplitude on the mean: a mean over places is steadier
SHIFT = 2.0**-24  # Gemma's norms are stored with 1 added, in float32
FLOOR = 1e-5  # of a log-probability: float32's own where nothing else rounds; its square for a divergence
LLAMA_CPP = "llama.cpp"

# -- weights -----------------------------------------------------------------------------------------------------------

# type -> (values that share a scale, steps from the least to the most, whether the least is chosen too); ggml-common.h
STEPS = {"Q8_0": (32, 254, False), "Q4_0": (32, 16, False), "Q5_0": (32, 32, False), "Q4_1": (32, 15, True)}
STEPS |= {"Q5_1": (32, 31, True), "Q4_K": (32, 15, True), "Q5_K": (32, 31, True), "Q6_K": (16, 64, False)}
SCALE_STEPS = {"Q4_K": 63, "Q5_K": 63, "Q6_K": 127}  # of a scale within a block of 256: it is rounded itself
PLAIN = {"F64": 2.0**-24, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}  # half a step, relative to each value
SMALLEST = {"F16": 2.0**-25}  # half a step of the smallest numbers


def rounding(type: str, w: np.ndarray) -> np.ndarray:
    """The root mean square error of each value that storing `w` in a ggml type costs; one number for all that share a scale."""
    if type in PLAIN:
        return np.maximum(PLAIN[type] * np.abs(w), SMALLEST.get(type, 0.0)) / 3**0.5
    require(type in STEPS, f"no certificate for weights of type {type}; kobza writes {', '.join([*PLAIN, *STEPS])}")
    width, steps, ranged = STEPS[type]
    parts = w.reshape(-1, width)
    top, least = parts.max(-1), parts.min(-1)
    if type in SCALE_STEPS:  # the K types' least value is at most 0
        least = np.minimum(least, 0)
    scale = ((top - least) if ranged else 2 * np.maximum(top, -least)) / steps
    error = scale**2 / 12 + (2.0**-11 * np.maximum(top, -least)) ** 2 / 3  # scale and least are kept in float16
    reach = (steps if ranged else steps / 2) * SCALE_STEPS.get(type, 1)
    error += (SMALLEST["F16"] * reach) ** 2 / 3  # which has no scale between two of its smallest numbers
    if type in SCALE_STEPS:
        most = np.repeat(scale.reshape(-1, 256 // width).max(-1), 256 // width)
        lowest = np.repeat((-least).reshape(-1, 256 // width).max(-1), 256 // width) if ranged else 0
        error += (np.square(most * steps) / 3 + np.square(lowest)) / SCALE_STEPS[type] ** 2 / 12
    return np.broadcast_to(np.sqrt(error)[:, None], parts.shape).reshape(w.shape)


def rms(values: np.ndarray) -> float:
    """Root mean square."""
    return math.sqrt(float(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0


@dataclass(frozen=True)
class WeightError:
    """A tensor of the artifact beside the source's: its error and what it may be, both relative to the source's size."""

    name: str
    type: str
    error: float
    limit: float
    row: int
    """the worst"""
    row_share: float
    """of what that row's error may be"""

    @property
    def share(self) -> float:
        """Of what the tensor and its rows may be off; NaN counts as without bound."""
        found = max(self.error / self.limit, self.row_share)
        return found if found == found and self.error == self.error else math.inf


def weight_error(name: str, type: str, source: Tensor, artifact: Tensor) -> WeightError:
    """How far a tensor lies from its source, as a whole and row by row: one wrong row of a table is nothing in the whole."""
    w, got = source.detach().float().numpy(), artifact.detach().float().numpy()
    require(w.shape == got.shape, f"{name} is {list(got.shape)} in the artifact and {list(w.shape)} in the source")
    error, may = (np.atleast_2d(x) for x in (got - w, rounding(type, w)))
    by_row = rms_of_rows(error) / (ROW * (SLACK * rms_of_rows(may) + SHIFT))
    worst, size = int(by_row.argmax()), rms(w) or 1.0
    return WeightError(name, type, rms(error) / size, (SLACK * rms(may) + SHIFT) / size, worst, float(by_row[worst]))


def rms_of_rows(values: np.ndarray) -> np.ndarray:
    """(n, width) -> (n,)"""
    return np.sqrt(np.mean(np.square(values, dtype=np.float64), axis=-1))


# -- function ----------------------------------------------------------------------------------------------------------


def twin_of(model: GPT, stored: Stored) -> GPT:
    """A copy of the model with the weights that an artifact has, in float32."""
    return _rewritten(model, stored.weights(model.config))


def with_noise(model: GPT, types: Mapping[str, str], seed: int) -> GPT:
    """A copy of the model with its weights rounded at random, each by as much as its type rounds."""
    draw = torch.Generator().manual_seed(seed)

    def rough(name: str, weight: Tensor) -> Tensor:
        size = torch.from_numpy(np.ascontiguousarray(rounding(types.get(name, "F32"), weight.numpy())))
        return weight + size * (torch.rand(size.shape, generator=draw) * 2 - 1) * math.sqrt(3)

    return _rewritten(model, ((name, rough(name, p.detach())) for name, p in model.named_parameters()))


@torch.no_grad()
def _rewritten(model: GPT, weights: Iterable[tuple[str, Tensor]]) -> GPT:
    """A copy with other weights, one at a time; what the model has no place for is left out."""
    twin = copy.deepcopy(model)
    parameters = dict(twin.named_parameters())
    for name, weight in weights:
        if name in parameters:
            parameters[name][: len(weight)] = weight  # rows of padding are not stored
    return twin


# What ggml rounds to before it multiplies with a matrix of each type (vec_dot_type in ggml-cpu.c): the values that share a scale.
# Else the bits that are kept of each number. F32: llama.cpp's angles, a product of as many factors, lose the more the later.
BLOCKS_IN = dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), 32) | dict.fromkeys(("Q4_K", "Q5_K", "Q6_K"), 256)
BITS_IN = {"F16": 11, "BF16": 8, "F32": 16}
GELU_BITS = 10  # ggml looks GELU up in a table of float16
FLOAT_BITS = 24  # of float32, less those that a sum loses: its rounding errors grow with the root of its terms


@contextmanager
def engine_rounding(model: GPT, types: Mapping[str, str], engine: str) -> Iterator[None]:
    """Within the context the model rounds what comes into each matrix as an engine does. types: of each weight, by our names."""
    rough = engine.startswith(LLAMA_CPP)
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            type = types.get(f"{name}.weight", types.get("embed.weight", "F32"))
            gelu = name.endswith("down_proj") and "gelu" in model.config.mlp.replace("geglu", "gelu")
            kept = FLOAT_BITS - round(math.log2(module.in_features) / 2)
            how = _rounding(type, GELU_BITS if gelu else BITS_IN["F32"]) if rough else _to_bits(kept)
            hooks.append(module.register_forward_pre_hook(lambda _, args, f=how: (f(args[0]), *args[1:])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounding(type: str, most: int) -> Callable[[Tensor], Tensor]:
    """How ggml rounds the input of a matrix of a type; `most` bits of it were good before."""
    if type in BLOCKS_IN:
        return lambda x: _to_blocks(_to_bits(most)(x), BLOCKS_IN[type])
    return _to_bits(min(most, BITS_IN.get(type, most)))


def _to_bits(bits: int) -> Callable[[Tensor], Tensor]:
    """Round each number to so many significant bits."""

    def rounded(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**bits).round(), exponent - bits)

    return rounded


def _to_blocks(x: Tensor, width: int) -> Tensor:
    """Round to 127 steps either side of 0 of the largest value in each block of a row."""
    parts = x.unflatten(-1, (-1, math.gcd(width, x.shape[-1])))
    step = (parts.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((parts / step).round() * step).flatten(-2)


@dataclass(frozen=True)
class Limits:
    """What an engine may differ from the twin by."""

    max_logprob: float
    mean_kl: float
    nll: float


def limits(noise_max_logprob: float, noise_mean_kl: float, noise_nll: float) -> Limits:
    """From what the engine's rounding does to the twin."""
    return Limits(FACTOR * noise_max_logprob + FLOOR, MEAN**2 * noise_mean_kl + FLOOR**2, MEAN * noise_nll + FLOOR)


def added(kl: float, more: float) -> float:
    """A bound of the divergence of two steps: near 0 its root is a distance. added(0.01, 0.0001) -> 0.0121"""
    return (math.sqrt(max(kl, 0.0)) + math.sqrt(max(more, 0.0))) ** 2

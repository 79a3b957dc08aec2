"""What few bits cost a model, measured on tokens: overall, weight by weight, and the cheapest way to stay below a bound.

    Reference(model, batches).damage(other)   KL per token, bits per byte, flipped tokens
    sensitivities(model, types, ids)          the KL when one weight alone is rounded
    choose(ladders, damages, max_kl, measure) which weights to keep wider

KL is that of the rounded model's next-token distribution from the float one's, in nats. What single weights cost does not add up
to what all cost together, so it only orders them: how many are widened is decided by measuring the whole.

Shapes: B sequences, T tokens, N positions read, C n_embd, V vocab_size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kobza.config import require
from kobza.formats.ggml import BLOCKS
from kobza.model import GPT, View
from kobza.quant.forms import n_bytes, round_weight, set_weight, twin
from kobza.surgery import watch
from kobza.train import bits_per_byte

LOGIT_ENTRIES = 1 << 24  # computed at once, and read for each weight alone: 64 MB in float32, whatever the vocabulary
WIDER = {
    **{"nf4": "int8", "int8": "bf16", "bf16": "float32"},
    **{"Q4_0": "Q5_0", "Q4_1": "Q5_1", "Q5_0": "Q8_0", "Q5_1": "Q8_0", "Q4_K": "Q5_K", "Q5_K": "Q6_K", "Q6_K": "Q8_0"},
    **{"Q8_0": "F16", "F16": "F32", "BF16": "F32"},
}


@dataclass(frozen=True)
class Damage:
    """One model beside another, over n_tokens predicted tokens."""

    kl: float
    """nats a token, mean"""
    kl_99: float
    """nats, of the token that 99 in 100 lie below"""
    flips: float
    """share of tokens whose likeliest successor is another"""
    bits_per_byte: float
    """of the float model"""
    bits_per_byte_change: float
    n_tokens: int


class Reference:
    """A float model's outputs on sequences of ids, (B, T) each, kept as what its head reads."""

    @torch.inference_mode()
    def __init__(self, model: GPT, batches: Sequence[Tensor]):
        self.model, self.batches = model.eval(), list(batches)
        self.hidden = [before_last(model.hidden(ids)) for ids in self.batches]

    @torch.inference_mode()
    def damage(self, other: GPT, piece_bytes: np.ndarray) -> Damage:
        """What `other` does to these sequences. piece_bytes (V,): UTF-8 bytes of each token."""
        kls, flips, nats = [], [], torch.zeros(2, dtype=torch.float64)
        n = max(1, LOGIT_ENTRIES // self.model.config.vocab_size)
        targets = torch.cat([ids[:, 1:].reshape(-1) for ids in self.batches])
        for ids, ours in zip(self.batches, self.hidden, strict=True):
            theirs, wanted = before_last(other.hidden(ids)), ids[:, 1:].reshape(-1)
            for x, y, target in zip(ours.split(n), theirs.split(n), wanted.split(n), strict=True):
                p, q = logprobs(self.model, x), logprobs(other, y)
                kls.append(divergence(p, q))
                flips.append(p.argmax(-1) != q.argmax(-1))
                nats -= torch.stack([part.gather(1, target[:, None]).double().sum().cpu() for part in (p, q)])
        kl, n_tokens = torch.cat(kls).double(), len(targets)
        mean_bytes = float(piece_bytes[targets.cpu().numpy()].mean())
        before, after = (bits_per_byte(float(total) / n_tokens, mean_bytes) for total in nats)
        share = float(torch.cat(flips).double().mean())
        return Damage(float(kl.mean()), float(kl.quantile(0.99)), share, before, after - before, n_tokens)


def before_last(x: Tensor) -> Tensor:
    """The places that a token follows. x (B, T, C) -> (B (T - 1), C)."""
    return x[:, :-1].reshape(-1, x.shape[-1])


def logprobs(model: GPT, x: Tensor) -> Tensor:
    """x (N, C) -> (N, V), float32."""
    return model.logits(x[None])[0].float().log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of log-probabilities (N, V) -> (N,): the sum of p (q/p - 1 - ln q/p), no term of which is negative, so that
    nothing cancels: two models that differ by 1e-4 differ by 1e-8 here, and not by the rounding of a sum."""
    d = (q - p).clamp_(max=60)  # beyond it p is 0 in float32
    return (p.exp() * (torch.expm1(d) - d)).sum(-1)


class Rounded:
    """A twin of a model whose weights are rounded to types that may change; what does not change is not rounded again."""

    def __init__(self, model: GPT, importance: Mapping[str, Tensor] | None = None):
        self.model, self.importance, self.types = model, importance or {}, dict[str, str]()
        self.twin = twin(model)

    @torch.no_grad()
    def become(self, types: Mapping[str, str]) -> GPT:
        """The twin, its weights in the types named."""
        for name, type in types.items():
            if self.types.get(name) != type:
                weight = self.model.get_parameter(name).detach()
                set_weight(self.twin, name, round_weight(type, self.importance.get(name))(weight))
                self.types[name] = type
        return self.twin


# ---- weight by weight ----------------------------------------------------------------------------------------------


class Streams(NamedTuple):
    """What the float model has on its way: the input of each block and of the last norm, and what attention gets besides."""

    before: list[Tensor]
    """n_layer + 1 of (B, T, C)"""
    views: list[View]


@torch.inference_mode()
def sensitivities(
    model: GPT,
    types: Mapping[str, str],
    ids: Tensor,
    importance: Mapping[str, Tensor] | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, float]:
    """Mean KL with one weight alone in its type, for each. ids (B, T); progress(name, done, in all). The model is as it was
    afterwards.

    Only the blocks from the weight's own on are computed again. The head is read at evenly spaced places, as many as
    LOGIT_ENTRIES allows.
    """
    model.eval()
    streams = streams_of(model, ids)
    reads = places(ids.shape[0] * (ids.shape[1] - 1), model.config.vocab_size).to(ids.device)
    before = logprobs(model, before_last(model.norm(streams.before[-1]))[reads])
    found = {}
    for n_done, (name, type) in enumerate(types.items(), 1):
        parameter = model.get_parameter(name)
        kept = parameter.data
        try:
            parameter.data = round_weight(type, (importance or {}).get(name))(kept)
            after = logprobs(model, before_last(rerun(model, ids, streams, name))[reads])
            found[name] = float(divergence(before, after).double().mean())
        finally:
            parameter.data = kept
        progress(name, n_done, len(types))
    return found


def streams_of(model: GPT, ids: Tensor) -> Streams:
    """One pass of the float model."""
    seen: list[Tensor] = []
    with watch(model, lambda name, _: re.fullmatch(r"drop|blocks\.\d+", name) is not None, lambda _, x: seen.append(x)):
        model.hidden(ids)
    T = ids.shape[1]
    return Streams(seen, model.views(torch.arange(T, device=ids.device), None, 0, T))


def rerun(model: GPT, ids: Tensor, streams: Streams, name: str) -> Tensor:
    """What the head reads (B, T, C), computed from the block of a weight on; of a table from the start."""
    where = name.split(".")
    if where[0] not in ("blocks", "lm_head", "ahead"):
        return model.hidden(ids)
    first = int(where[1]) if where[0] == "blocks" else len(model.blocks)
    x = streams.before[first]
    for block in model.blocks[first:]:
        x = block(x, streams.views, None)
    return model.norm(x)


def places(n: int, vocab_size: int) -> Tensor:
    """At most LOGIT_ENTRIES // vocab_size of n places, evenly spaced."""
    most = max(1, LOGIT_ENTRIES // vocab_size)
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most).long()


# ---- which to keep wider -------------------------------------------------------------------------------------------


class Rung(NamedTuple):
    """A type that a weight can have, what it takes in it, and how the square of its rounding errors goes: by 4 for each bit."""

    type: str
    bytes: int
    noise: float


def ladder(type: str, shape: tuple[int, ...]) -> list[Rung]:
    """A type and the wider ones that rows of this length can have.

    ladder("nf4", (64, 64)) -> of nf4, int8, bf16, float32
    """
    types, at = [type], WIDER.get(type)
    while at is not None:
        if shape[-1] % BLOCKS.get(at, (1, 1))[0] == 0:
            types.append(at)
        at = WIDER.get(at)
    sizes = [n_bytes(type, shape) for type in types]
    return [Rung(type, size, 4.0 ** (-8 * size / math.prod(shape))) for type, size in zip(types, sizes, strict=True)]


def choose(
    ladders: Mapping[str, Sequence[Rung]],
    damages: Mapping[str, float],
    max_kl: float,
    measure: Callable[[dict[str, str]], float],
) -> dict[str, str]:
    """The type of each weight such that measure(types) is at most max_kl; refused, with the KL there is, if the widest are not.

    Weights go up their ladders step by step, first what takes most damage away for a byte: of a weight's own, measured alone on
    the first rung, and by the noise of the others. How many steps are needed is found by bisection on the whole, and what is
    returned has been measured.
    """
    steps = sorted(
        ((name, i) for name, rungs in ladders.items() for i in range(1, len(rungs))),
        key=lambda step: (-gain(ladders[step[0]], step[1], damages[step[0]]), step[1]),
    )

    def after(n: int) -> dict[str, str]:
        """The types when n steps have been taken."""
        rung = dict.fromkeys(ladders, 0)
        for name, i in steps[:n]:
            rung[name] = max(rung[name], i)
        return {name: ladders[name][i].type for name, i in rung.items()}

    if measure(after(0)) <= max_kl:
        return after(0)
    low, high = 0, len(steps)  # too few; enough
    least = measure(after(high))
    widest = " or ".join(sorted({rungs[-1].type for rungs in ladders.values()}))
    below = (
        f"--max-kl {max_kl:g} is below what these weights can have: {least:.3g} nats a token with every one in {widest}"
    )
    require(least <= max_kl, f"{below}; allow at least that")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if measure(after(middle)) <= max_kl else (middle, high)
    return after(high)


def gain(rungs: Sequence[Rung], i: int, damage: float) -> float:
    """Nats a token for each byte, by which the step up to rung i is expected to mend a weight."""
    before, after = rungs[i - 1], rungs[i]
    return damage * (before.noise - after.noise) / rungs[0].noise / max(1, after.bytes - before.bytes)

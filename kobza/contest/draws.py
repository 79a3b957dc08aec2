"""Whether a model with a seed wrote these tokens: every draw is made again after the tokens that are claimed to come before it.

If each draw on this machine is the token claimed, generating the text here gives it token for token. Another machine adds up in
another order, so that logits differ in their last digits and now and then a uniform falls on the other side of a boundary. Such
a draw is near: the seed's uniform lies within SLACK of the token's interval of the cumulative distribution (greedy: its logit
within SLACK_LOGIT of the highest). Near draws leave whoever forges a choice at the boundaries; hence at most NEAR_SHARE of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kobza.config import SampleConfig
from kobza.generate import decode, draw, prefill, processors
from kobza.model import GPT

SLACK = 1e-4  # of probability; float32 sums of other machines were seen to move it by less than 1e-5
SLACK_LOGIT = 1e-3
JITTERS, JITTER = (
    16,
    1e-5,
)  # where a token stands at the edge of top-k or top-p: tries with logits moved by so much of the largest
NEAR_SHARE, NEAR_LEAST = 0.03, 2


@dataclass(frozen=True)
class Replay:
    """How the claimed tokens compare with the draws made here. wrong: the place of the first that neither is nor is near."""

    same: int = 0
    near: int = 0
    wrong: int | None = None
    probability: float = 0.0
    """of the wrong one, after the knobs"""
    drawn: int = 0
    """what is drawn here instead"""

    @property
    def too_many_near(self) -> bool:
        """Whether there are more than rounding explains."""
        return self.near > max(NEAR_LEAST, NEAR_SHARE * (self.same + self.near))


@torch.inference_mode()
def logits_along(model: GPT, prompt: list[int], ids: Sequence[int]) -> Iterator[Tensor]:
    """The logits (1, V) before each of `ids`, as `generate` has them: the context forgets its oldest half when it is full."""
    view = prompt[-model.config.max_seq_len :]
    cache, logits = prefill(model, [view])
    for i in ids:
        yield logits
        view.append(i)
        if cache.length == cache.size:
            view = view[-max(1, cache.size // 2) :]
            cache, logits = prefill(model, [view])
        else:
            logits = decode(model, cache, [i])


@torch.inference_mode()
def replay(model: GPT, prompt: list[int], ids: Sequence[int], config: SampleConfig, ends: Sequence[int]) -> Replay:
    """Hold each of `ids` against the draw that the seed gives here, up to the first that is wrong."""
    generator = torch.Generator().manual_seed(config.seed)
    uniforms = torch.rand(config.tokens, generator=generator, dtype=torch.float64)  # as generate draws them
    chain, row, same, near = processors(config, ends, [len(prompt)]), list(prompt), 0, 0

    def scores_of(logits: Tensor) -> Tensor:  # (1, V) -> (1, V)
        for process in chain:
            logits = process(logits, [row])
        return logits

    for n, (i, logits) in enumerate(zip(ids, logits_along(model, prompt, ids), strict=True)):
        scores, uniform = scores_of(logits), uniforms[n : n + 1]
        greedy = config.temperature == 0
        drawn = int(scores.argmax() if greedy else draw(scores, uniform))
        if drawn == i:
            same += 1
        elif any(is_near(scores_of(moved)[0], i, float(uniform), greedy) for moved in jittered(logits, n)):
            near += 1
        else:
            probability = float(scores[0].double().softmax(-1)[i])
            return Replay(same, near, n, probability, drawn)
        row.append(i)
    return Replay(same, near)


def jittered(logits: Tensor, seed: int) -> Iterator[Tensor]:
    """The logits (1, V) themselves, then moved a little, as another machine might."""
    yield logits
    generator, size = torch.Generator().manual_seed(seed), JITTER * float(logits.abs().max())
    for _ in range(JITTERS):
        yield logits + size * (2 * torch.rand(logits.shape, generator=generator) - 1)


def is_near(scores: Tensor, i: int, uniform: float, greedy: bool) -> bool:
    """Whether rounding may have made token i of what `scores` (V,) and the uniform say."""
    if greedy:
        return float(scores.max() - scores[i]) <= SLACK_LOGIT
    p = scores.double().softmax(-1)
    high = float(p[: i + 1].sum())
    low, size = high - float(p[i]), float(p.sum())
    return float(p[i]) > 0 and low - SLACK <= uniform * size <= high + SLACK

"""The distribution of the next token, knob by knob: what each does to it, by the very processors that generate uses."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from kobza.config import SampleConfig, require
from kobza.generate import NEVER, draw, prefill, processors
from kobza.studio.app import Playable
from kobza.tokenizer import Tokenizer

OFF = SampleConfig(
    temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
)  # the model's own distribution
ORDER = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")  # in which processors applies them
SHOWN = 12  # tokens
VISIBLE = 0.004  # a share of the line of draws that can be seen
LEVELS = (0.01, 0.05, 0.2, 0.5, 0.9)  # where the six colours of a token's probability part


@dataclass(frozen=True)
class Stage:
    """Scores (V,) after a knob and their probabilities. `left`: tokens still possible; `removed`: what share it forbade."""

    name: str
    value: str
    scores: Tensor
    p: Tensor
    left: int
    removed: float
    bits: float  # entropy


class Kept:
    """The logits at places asked for lately, so that a knob that moves costs no forward."""

    def __init__(self, places: int = 64):
        self.places, self._lock = places, Lock()
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], tuple[Playable, Tensor]] = OrderedDict()

    def logits(self, name: str, playable: Playable, ids: list[int]) -> Tensor:
        """What the model says after ids -> (V,) float32."""
        key = (name, tuple(ids))
        with self._lock:
            owner, logits = self._kept.get(key, (None, None))
            if logits is not None and owner is playable:  # a run that was opened anew has other weights
                self._kept.move_to_end(key)
                return logits
        with torch.inference_mode():
            logits = prefill(playable.loaded.model, [ids])[1][0].cpu()
        check_finite(logits, name)
        with self._lock:
            self._kept[key] = (playable, logits)
            while len(self._kept) > self.places:
                self._kept.popitem(last=False)
        return logits


def check_finite(logits: Tensor, name: str) -> None:
    """Refuse what a diverged model says."""
    broken = f"{name} gives logits that are not finite: its training has diverged; choose an earlier checkpoint"
    require(bool(logits.isfinite().all()), broken)


def stages(logits: Tensor, ids: list[int], config: SampleConfig) -> list[Stage]:
    """The model's own distribution, then that after each knob. logits (V,). Temperature 0 is greedy: knobs after it are idle."""
    scores, shown = logits[None].float(), [_stage("the model's own", "", logits.float(), None)]
    for name in ORDER:
        value = getattr(config, name)
        if name == "repetition_penalty" and value == 1:
            continue
        if name == "temperature" and value == 0:
            only = torch.full_like(scores[0], NEVER).index_fill(0, scores[0].argmax(), 0.0)
            return [*shown, _stage("greedy", "the likeliest", only, shown[-1].p)]
        for process in processors(replace(OFF, **{name: value}), (), [len(ids)]):
            scores = process(scores, [ids])
        off = value == getattr(OFF, name) and name != "temperature"
        words = "off" if off else f"{value:g}"
        shown.append(_stage(name.replace("_", "-"), words, scores[0], shown[-1].p))
    return shown


def _stage(name: str, value: str, scores: Tensor, before: Tensor | None) -> Stage:
    p, gone = scores.softmax(-1), scores == NEVER
    bits = float(-(p * p.clamp(min=1e-30).log2()).sum())
    removed = 0.0 if before is None else float(before[gone].sum())
    return Stage(name, value, scores, p, int((~gone).sum()), removed, max(0.0, bits))


def rows(shown: list[Stage], tokenizer: Tokenizer, also: list[int | None]) -> list[dict[str, Any]]:
    """The likeliest tokens by the model's own words, and those asked for, each with its probability at every stage."""
    top = shown[0].p.topk(min(SHOWN, len(shown[0].p))).indices.tolist()
    ids = top + [i for i in dict.fromkeys(also) if i is not None and i not in top]
    return [{"id": i, "text": tokenizer.show(i), "p": [float(stage.p[i]) for stage in shown]} for i in ids]


def drawn(scores: Tensor, config: SampleConfig, index: int) -> tuple[float, int]:
    """The seed's draw of number `index` and the token it falls on, as generate draws."""
    generator = torch.Generator().manual_seed(config.seed)
    uniform = torch.rand(config.tokens, generator=generator, dtype=torch.float64)[index]
    return float(uniform), int(draw(scores[None], uniform[None])[0])


def line(p: Tensor, tokenizer: Tokenizer, hit: int) -> list[dict[str, Any]]:
    """The draws from 0 to 1 and whose they are: the tokens that can be seen, in the order of ids, with their places."""
    ends = p.double().cumsum(0)
    ids = sorted({*(p >= VISIBLE).nonzero().flatten().tolist(), hit})
    return [{"id": i, "text": tokenizer.show(i), "left": float(ends[i] - p[i]), "share": float(p[i])} for i in ids]


def level(p: float) -> int:
    """The colour of a token's probability: 0 a surprise, 5 nearly sure."""
    return sum(p >= bound for bound in LEVELS)

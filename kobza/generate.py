"""BLOCK 4: KVCache, samplers (logits -> logits), generate (yields token ids; knows no text).

Each knob of SampleConfig is a function of logits; `processors` composes those that have an effect. A row's draws come from
its own generator, so it writes the same text alone and in a batch.

Shapes: B rows, V vocab_size, S tokens the cache holds; L, K, D as in model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kobza.config import ModelConfig, SampleConfig, require
from kobza.model import GPT

Processor = Callable[[Tensor, list[list[int]]], Tensor]  # logits (B, V) and the ids of each row so far -> logits (B, V)
NEVER = float("-inf")


class KVCache:
    """Keys and values of the tokens seen, per layer (2, B, K, S, D), so that a new token attends without recomputing them.

    Rows of unequal length stand right-aligned; `pad` (B,) counts the empty places at their left.
    """

    def __init__(
        self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype, pad: Tensor | None = None
    ):
        heads = [config.heads(layer)[1] for layer in range(config.n_attention)]
        shapes = [(2, batch, n_kv_head, config.max_seq_len, config.head_dim) for n_kv_head in heads]
        self.layers = [tuple(torch.zeros(shape, device=device, dtype=dtype)) for shape in shapes]
        self.device = device
        self.length, self.size, self.pad = 0, config.max_seq_len, pad

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) after what is there -> all keys, all values (B, K, S, D)."""
        n_new = k.shape[2]
        keys, values = self.layers[layer]
        keys.narrow(2, self.length, n_new).copy_(k)
        values.narrow(2, self.length, n_new).copy_(v)
        return keys.narrow(2, 0, self.length + n_new), values.narrow(2, 0, self.length + n_new)

    def mask(self, n_new: int) -> Tensor | None:
        """(B or 1, 1, T, S), True = visible; None where all is visible or plain causality does."""
        end = self.length + n_new
        if self.pad is None and (n_new == 1 or self.length == 0):
            return None
        seen = torch.arange(end, device=self.device)
        new = torch.arange(self.length, end, device=self.device)
        visible = (seen <= new[:, None])[None, None]  # (1, 1, T, S)
        if self.pad is None:
            return visible
        # an empty place sees itself: a row without any visible key would be nan
        return visible & (seen >= self.pad[:, None])[:, None, None] | (seen == new[:, None])

    def advance(self, n_new: int) -> None:
        """Count n_new tokens as seen by all layers."""
        self.length += n_new


# ---- samplers: each a knob, logits -> logits -----------------------------------------------------------------------


def temperature(value: float) -> Processor:
    """logits / value: below 1 sharper, above 1 flatter."""
    return lambda logits, _: logits / value


def top_k(k: int) -> Processor:
    """Keep the k likeliest (and what ties with the last)."""

    def process(logits: Tensor, _: list[list[int]]) -> Tensor:
        kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
        return logits.masked_fill(logits < kth, NEVER)

    return process


def top_p(p: float) -> Processor:
    """Keep the likeliest tokens up to the one with which their probability reaches p. Holtzman et al. 2020.

    Probabilities 0.5 0.3 0.2 and p = 0.6 keep the first two: 0.5 is short of 0.6, 0.8 is not.
    """

    def process(logits: Tensor, _: list[list[int]]) -> Tensor:
        ordered, order = logits.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # probability of all likelier tokens
        drop = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= p)
        return logits.masked_fill(drop, NEVER)

    return process


def min_p(share: float) -> Processor:
    """Drop tokens less likely than `share` times the likeliest. Nguyen et al. 2024."""

    def process(logits: Tensor, _: list[list[int]]) -> Tensor:
        probabilities = logits.softmax(-1)
        return logits.masked_fill(probabilities < share * probabilities.amax(-1, keepdim=True), NEVER)

    return process


def repetition_penalty(penalty: float) -> Processor:
    """Make tokens that stand in the row already less likely. Keskar et al. 2019 (CTRL)."""

    def process(logits: Tensor, rows: list[list[int]]) -> Tensor:
        logits = logits.clone()
        for i, row in enumerate(rows):
            seen = torch.tensor(sorted(set(row)), device=logits.device)
            scores = logits[i, seen]
            logits[i, seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
        return logits

    return process


def no_repeat_ngram(n: int) -> Processor:
    """Forbid a token that would complete n tokens that stand in the row already, in this order."""

    def process(logits: Tensor, rows: list[list[int]]) -> Tensor:
        logits = logits.clone()
        for i, row in enumerate(rows):
            ending = row[len(row) - n + 1 :]
            repeats = {row[j + n - 1] for j in range(len(row) - n + 1) if row[j : j + n - 1] == ending}
            kept = logits[i].index_fill(0, torch.tensor(sorted(repeats), dtype=torch.long, device=logits.device), NEVER)
            if kept.isfinite().any():
                logits[i] = kept
        return logits

    return process


def forbid_until(tokens: int, ids: Sequence[int], prompt_lengths: list[int]) -> Processor:
    """Forbid `ids` (those that end a text) until a row has `tokens` new tokens."""

    def process(logits: Tensor, rows: list[list[int]]) -> Tensor:
        logits = logits.clone()
        for i, row in enumerate(rows):
            if len(row) - prompt_lengths[i] < tokens:
                logits[i, list(ids)] = NEVER
        return logits

    return process


def forbid(of_row: Callable[[list[int]], Tensor]) -> Processor:
    """Forbid what of_row(ids of a row) -> (V,) bool names; it must leave something."""

    def process(logits: Tensor, rows: list[list[int]]) -> Tensor:
        return logits.masked_fill(torch.stack([of_row(row) for row in rows]), NEVER)

    return process


def processors(config: SampleConfig, ends: Sequence[int], prompt_lengths: list[int]) -> list[Processor]:
    """The knobs of a SampleConfig that have an effect, in the order in which they apply."""
    chain: list[Processor] = []
    if config.min_tokens and ends:
        chain.append(forbid_until(config.min_tokens, ends, prompt_lengths))
    if config.repetition_penalty != 1:
        chain.append(repetition_penalty(config.repetition_penalty))
    if config.no_repeat_ngram:
        chain.append(no_repeat_ngram(config.no_repeat_ngram))
    if config.temperature == 0:
        return chain
    if config.temperature != 1:
        chain.append(temperature(config.temperature))
    if config.top_k:
        chain.append(top_k(config.top_k))
    if config.top_p < 1:
        chain.append(top_p(config.top_p))
    if config.min_p:
        chain.append(min_p(config.min_p))
    return chain


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One id a row by inverting its cumulative distribution. logits (B, V), uniform (B,) in [0, 1) -> (B,)

    Probabilities 0.2 0.5 0.3: a uniform of 0.1 draws 0, of 0.2 draws 1, of 0.9 draws 2.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)


# ---- the loop ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One step: the id each row takes (None: the row has ended) and the model's logits (B, V) before any knob."""

    ids: list[int | None]
    logits: Tensor


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: list[list[int]],
    config: SampleConfig,
    ends: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
    extra: Sequence[Processor] = (),
) -> Iterator[Choice]:
    """Continue each prompt by up to config.tokens ids, a Choice a step; a row ends after drawing one of `ends`.

    Row i draws from seeds[i] (default config.seed + i). A row that fills the context forgets the oldest half of it.
    `extra` are further processors, applied to the raw logits first.
    """
    require(bool(prompts) and all(prompts), "the prompt is empty; give at least one token")
    device = next(model.parameters()).device
    home = torch.device("cpu") if device.type == "mps" else device  # of the draws: MPS has no float64
    rows = [list(prompt) for prompt in prompts]
    seeds = seeds if seeds is not None else [config.seed + i for i in range(len(rows))]
    uniform = torch.stack([_uniform(seed, config.tokens) for seed in seeds]).to(home)  # (B, tokens)
    chain = [*extra, *processors(config, ends, [len(prompt) for prompt in prompts])]
    ended = [False] * len(rows)
    model.eval()
    seen = [row[-model.config.max_seq_len :] for row in rows]  # what the model sees of each row
    cache, logits = prefill(model, seen)
    for i in range(config.tokens):
        scores = logits
        for process in chain:
            scores = process(scores, rows)
        ids = (scores.argmax(-1) if config.temperature == 0 else draw(scores.to(home), uniform[:, i])).tolist()
        yield Choice([None if done else j for j, done in zip(ids, ended, strict=True)], logits)
        for row, view, j in zip(rows, seen, ids, strict=True):
            row.append(j)
            view.append(j)
        ended = [done or j in ends for j, done in zip(ids, ended, strict=True)]
        if all(ended) or i + 1 == config.tokens:
            return
        if cache.length == cache.size:
            # a row forgets only when it is full itself, so that it goes on as it would alone
            seen = [view if len(view) <= cache.size else view[-max(1, cache.size // 2) :] for view in seen]
            cache, logits = prefill(model, seen)
            continue
        logits = decode(model, cache, ids)


def _uniform(seed: int, n: int) -> Tensor:
    """A row's n draws from [0, 1), on the CPU so that every device draws the same."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prefill(model: GPT, rows: list[list[int]]) -> tuple[KVCache, Tensor]:
    """Run the prompts, each cut to its last max_seq_len tokens -> cache, logits (B, V) of what follows, float32."""
    device, size = next(model.parameters()).device, model.config.max_seq_len
    rows = [row[-size:] for row in rows]
    longest = max(len(row) for row in rows)
    pad = torch.tensor([longest - len(row) for row in rows], device=device)
    ragged = bool(pad.any())
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    # torch's CPU attention over bf16 keys takes four times as long as over float32 ones
    dtype = torch.float32 if device.type == "cpu" else model.embed.weight.dtype
    cache = KVCache(model.config, len(rows), device, dtype, pad if ragged else None)
    positions = (torch.arange(longest, device=device) - pad[:, None]).clamp(min=0) if ragged else None
    x = model.hidden(ids, positions, cache=cache)  # (B, T, C)
    return cache, model.logits(x[:, -1]).float()


def decode(model: GPT, cache: KVCache, ids: list[int]) -> Tensor:
    """Run one new token a row -> logits (B, V) of what follows, float32."""
    device = cache.device
    positions = None if cache.pad is None else (cache.length - cache.pad)[:, None]
    return model(torch.tensor(ids, device=device)[:, None], positions, cache=cache)[:, -1].float()

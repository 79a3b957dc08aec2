"""Token ids -> their log-probabilities under a model: the one function by which everything in this room scores.

A text longer than the context is read in windows that move on by `stride` tokens; each token is scored once, in the window that
shows the model the most before it. Windows of many texts go through the model together, padded at their ends, where causality
keeps the padding from being seen.

Shapes: B windows, T tokens of the longest, C n_embd, V vocab_size, N places scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kobza.config import require
from kobza.layers import widen
from kobza.model import GPT
from kobza.tokenizer import Tokenizer

BATCH_TOKENS = 8192  # of a forward pass
LOGIT_ENTRIES = 1 << 24  # computed at once: 64 MB in float32, whatever the vocabulary


@dataclass(frozen=True)
class Scored:
    """What the model makes of a sequence, each (n,): log-probability of a token in nats, whether it was the likeliest, and how
    many tokens the model saw before it."""

    logprob: np.ndarray
    greedy: np.ndarray
    seen: np.ndarray


@dataclass(frozen=True)
class Window:
    """The model reads ids[start:stop] and is scored on ids[first : stop + 1]."""

    start: int
    stop: int
    first: int


def score(
    model: GPT, tokenizer: Tokenizer, ids: Sequence[Sequence[int]], first: Sequence[int] | None = None, stride: int = 0
) -> list[Scored]:
    """Each sequence's log-probabilities of its tokens from first[i] on (default 0: all), what stands before being context.

    stride: tokens by which a window moves on, 1 (each token sees all that the model can) to max_seq_len (windows side by side);
    0 takes half of max_seq_len. A sequence scored from its first token stands after `opening(tokenizer)`.
    """
    size = model.config.max_seq_len
    stride = stride or max(1, size // 2)
    require(1 <= stride <= size, f"--stride is {stride}; it must be between 1 and max_seq_len {size}")
    firsts = [0] * len(ids) if first is None else list(first)
    whole, plan = [], []
    for i, (sequence, begin) in enumerate(zip(ids, firsts, strict=True)):
        before = opening(tokenizer, begin == 0)
        assert 0 <= begin and len(before) + begin > 0
        whole.append(np.concatenate([np.asarray(before, np.int64), np.asarray(sequence, np.int64)]))
        plan += [(i, window) for window in windows(len(whole[-1]), len(before) + begin, size, stride)]
    results = [
        Scored(np.zeros(len(s) - f), np.zeros(len(s) - f, bool), np.zeros(len(s) - f, np.int64))
        for s, f in zip(ids, firsts, strict=True)
    ]
    _fill(results, model, whole, plan)
    return results


def opening(tokenizer: Tokenizer, needed: bool = True) -> list[int]:
    """What stands before a text in training: the beginning token; without one, if `needed`, what ends a document or a line."""
    if tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    if not needed:
        return []
    return [tokenizer.eot_id] if tokenizer.eot_id is not None else tokenizer.encode(tokenizer.line_start()).tolist()[:1]


def windows(n: int, first: int, size: int, stride: int) -> list[Window]:
    """Windows of at most `size` tokens that score the tokens first .. n - 1 once each.

    windows(8, 1, 4, 2) -> [0:4 scores 1-4], [2:6 scores 5-6], [3:7 scores 7]: the last is as full as the others.
    """
    found, stop = [], min(n - 1, max(size, first - 1 + stride))
    while first < n:
        found.append(Window(max(0, stop - size), stop, first))
        first, stop = stop + 1, min(n - 1, stop + stride)
    return found


@torch.inference_mode()
def _fill(results: list[Scored], model: GPT, whole: list[np.ndarray], plan: list[tuple[int, Window]]) -> None:
    """Run the planned windows and write what comes out into the results."""
    model.eval()
    device = next(model.parameters()).device
    for batch in _batches(plan):
        longest = max(window.stop - window.start for _, window in batch)
        inputs = torch.zeros(len(batch), longest, dtype=torch.int64)
        rows, columns, targets = [], [], []
        for row, (i, window) in enumerate(batch):
            inputs[row, : window.stop - window.start] = torch.from_numpy(whole[i][window.start : window.stop])
            places = np.arange(window.first, window.stop + 1)
            rows.append(np.full(len(places), row))
            columns.append(places - 1 - window.start)
            targets.append(whole[i][places])
        x = model.hidden(inputs.to(device))  # (B, T, C)
        at = [torch.from_numpy(np.concatenate(parts)).to(device) for parts in (rows, columns, targets)]
        logprob, greedy = _read(model, x[at[0], at[1]], at[2])
        done = 0
        for (i, window), seen in zip(batch, columns, strict=True):
            result, n = results[i], len(seen)
            begin = window.first - (len(whole[i]) - len(result.logprob))
            result.logprob[begin : begin + n] = logprob[done : done + n]
            result.greedy[begin : begin + n] = greedy[done : done + n]
            result.seen[begin : begin + n] = seen + 1
            done += n


def _batches(plan: list[tuple[int, Window]]) -> Iterator[list[tuple[int, Window]]]:
    """Windows of like length together, so that little is padded."""
    plan = sorted(plan, key=lambda item: item[1].start - item[1].stop)
    while plan:
        n = max(1, BATCH_TOKENS // (plan[0][1].stop - plan[0][1].start))
        yield plan[:n]
        plan = plan[n:]


def _read(model: GPT, x: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """x (N, C), targets (N,) -> log-probabilities (N,) computed in float32, and whether each target is the likeliest."""
    logprobs, greedy = [], []
    n = max(1, LOGIT_ENTRIES // model.config.vocab_size)
    for part, wanted in zip(x.split(n), targets.split(n), strict=True):
        logits = widen(model.logits(part[None])[0])  # (n, V)
        logprobs.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].cpu())
        greedy.append((logits.argmax(-1) == wanted).cpu())
    return torch.cat(logprobs).numpy(), torch.cat(greedy).numpy()


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """Ids of context + continuation and where the continuation begins. Blanks that end the context go to the continuation, as
    tokenizers that join a blank to the word after it need, and as lm-evaluation-harness does."""
    kept = context.rstrip(" ")
    ids = tokenizer.encode(context + continuation).tolist()
    begin = min(len(tokenizer.encode(kept)) if kept else 0, len(ids))
    require(begin < len(ids), f"nothing to score in {continuation[:40]!r}; it must have a token of its own")
    return ids, begin

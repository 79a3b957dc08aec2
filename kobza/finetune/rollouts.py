"""GRPO: the model answers questions itself, a program measures the answers, and those above their group's mean become likelier.

`Rollouts` draws `group_size` answers to each question and yields batches of them; `grpo_loss` learns from these. The questions of
a draw are read once and their keys and values given to every answer. Draws come from (seed, epoch, question, answer) alone, so a
resumed run draws what the whole one would have, and a question's answers do not hang on who stands beside it.

Shao et al. 2024 (DeepSeekMath): an answer's advantage is its reward less the group's mean, over the group's standard deviation; 0
where all rewards of a group are equal. Of what came later, one thing: the loss is a mean over the tokens of the whole window (Yu
et al. 2025, DAPO), not of means over answers, so that a long answer's tokens count as much as a short one's.

With `ahead` = 1, or as many batches as an update takes, every answer is by the model that learns from it: the ratio is 1, and
clipping has nothing to do. With more, later updates learn from answers of an earlier model.

Shapes: Q questions, G answers to each, B = Q G rows, T tokens, n answer tokens at most, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kobza.config import require
from kobza.finetune.answers import Order, below_each_other
from kobza.finetune.encode import PromptRow
from kobza.finetune.example import Packed, Row
from kobza.finetune.reward import Reward
from kobza.finetune.sft import Hidden, hidden_of, token_logprobs
from kobza.generate import KVCache, draw
from kobza.layers import widen
from kobza.model import GPT
from kobza.train import IGNORE, LossFn


class Rollout(NamedTuple):
    """A Batch of answers beneath each other, those of a group together. The first four are a Packed, (B, T)."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor
    documents: Tensor
    advantages: Tensor
    """(B,)"""
    old: Tensor
    """(B, T) log-probability of each target under the model that drew it; 0 where there is none"""
    reference: Tensor
    """(B, T) and under the model as it was; nan where nobody asked for it"""


# ---- the loss ------------------------------------------------------------------------------------------------------


def grpo_loss(
    beta: float,
    clip: float = 0.2,
    dtype: torch.dtype | None = None,
    temperature: float = 1.0,
    hidden: Hidden = hidden_of,
) -> LossFn:
    """-min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A) + beta (e^gap - gap - 1), summed over answer tokens, with their number.
    A: the answer's advantage; ratio: the token's probability over what it was when drawn; gap: its log-probability as the model
    was, less the present one, of which the last term estimates the KL divergence (Schulman's k3). At the draws' temperature."""

    def loss_fn(model: GPT, batch: Rollout) -> tuple[Tensor, Tensor]:
        learned, gains = batch.targets != IGNORE, batch.advantages[:, None]
        now = token_logprobs(model, Packed(*batch[:4]), dtype, temperature, hidden)  # (B, T)
        ratio = torch.exp(now - batch.old)
        loss = -torch.minimum(ratio * gains, ratio.clamp(1 - clip, 1 + clip) * gains)
        if beta:
            gap = batch.reference - now
            loss = loss + beta * (torch.exp(gap) - gap - 1)
        return (loss * learned).sum(), learned.sum()

    return loss_fn


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """Rewards (Q, G) less their group's mean, over its standard deviation. [[0, 1], [2, 2]] -> [[-1, 1], [0, 0]]"""
    equal = np.ptp(rewards, axis=1, keepdims=True) == 0  # asked of the rewards: their deviation may be 1e-17
    spread = np.where(equal, 1, rewards.std(axis=1, keepdims=True))
    return np.where(equal, 0, (rewards - rewards.mean(axis=1, keepdims=True)) / spread)


# ---- drawing answers -----------------------------------------------------------------------------------------------


class AnswerCache(KVCache):
    """A KVCache with room for `size` tokens in place of the model's whole context."""

    def __init__(self, model: GPT, batch: int, size: int, dtype: torch.dtype, pad: Tensor | None):
        config, self.device = model.config, model.embed.weight.device
        heads = [config.heads(layer)[1] for layer in range(config.n_attention)]
        shapes = [(2, batch, n_kv_head, size, config.head_dim) for n_kv_head in heads]
        self.layers = [tuple(torch.zeros(shape, device=self.device, dtype=dtype)) for shape in shapes]
        self.length, self.size, self.pad = 0, size, pad

    def for_each(self, model: GPT, times: int, n_new: int) -> AnswerCache:
        """Every row `times` times, with room for n_new tokens more."""
        pad = None if self.pad is None else self.pad.repeat_interleave(times)
        batch, dtype = len(self.layers[0][0]) * times, self.layers[0][0].dtype
        wide = AnswerCache(model, batch, self.length + n_new, dtype, pad)
        for new, old in zip(wide.layers, self.layers, strict=True):
            for there, here in zip(new, old, strict=True):
                there[:, :, : self.length] = here.repeat_interleave(times, 0)
        wide.length = self.length
        return wide

    def keep(self, rows: Tensor) -> None:
        """Those rows alone, (B,) bool."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]
        self.pad = None if self.pad is None else self.pad[rows]


@torch.no_grad()
def draw_answers(
    model: GPT,
    prompts: list[list[int]],
    uniform: np.ndarray,
    ends: frozenset[int],
    temperature: float,
    dtype: torch.dtype | None = None,
) -> list[list[list[int]]]:
    """Answers to Q prompts, G each, up to the first of `ends` and with it. uniform (Q, G, n) in [0, 1), float64: what
    to draw by."""
    Q, G, n = uniform.shape
    cache, logits = read(model, prompts, dtype)
    cache, logits = cache.for_each(model, G, n - 1), logits.repeat_interleave(G, 0)  # (B, V)
    home = torch.device("cpu") if cache.device.type == "mps" else cache.device  # MPS has no float64
    numbers, last = torch.from_numpy(uniform).flatten(0, 1).to(home), torch.tensor(sorted(ends), device=home)
    drawn, whose = torch.zeros(Q * G, n, dtype=torch.int64, device=home), torch.arange(Q * G, device=home)
    going = torch.ones(Q * G, dtype=torch.bool, device=home)
    for i in range(n):
        ids = draw(logits.to(home) / temperature, numbers[whose, i])  # (rows of the cache,)
        drawn[whose, i] = ids
        going &= ~torch.isin(ids, last)
        n_going = int(going.sum())
        if i + 1 == n or not n_going:
            break
        if 2 * n_going <= len(whose):  # half of the rows have ended: go on without them
            cache.keep(going.to(cache.device))
            whose, ids, going = whose[going], ids[going], going[going]
        places = None if cache.pad is None else (cache.length - cache.pad)[:, None]
        logits = widen(model(ids.to(cache.device)[:, None], places, cache=cache, dtype=dtype)[:, -1])
    answers = [_up_to(row, ends) for row in drawn.tolist()]
    return [answers[q * G : (q + 1) * G] for q in range(Q)]


def read(model: GPT, prompts: list[list[int]], dtype: torch.dtype | None) -> tuple[AnswerCache, Tensor]:
    """Run the prompts, right-aligned -> their cache, and logits (Q, V) of what follows."""
    longest, device = max(len(prompt) for prompt in prompts), model.embed.weight.device
    pad = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    kept = dtype or model.embed.weight.dtype
    kept = torch.float32 if device.type == "cpu" and kept.itemsize == 2 else kept  # as in generate.prefill
    ragged = bool(pad.any())
    cache = AnswerCache(model, len(prompts), longest, kept, pad if ragged else None)
    places = (torch.arange(longest, device=device) - pad[:, None]).clamp(min=0) if ragged else None
    x = model.hidden(ids, places, cache=cache, dtype=dtype)
    return cache, widen(model.logits(x[:, -1]))


def _up_to(row: list[int], ends: frozenset[int]) -> list[int]:
    """A row as far as the first of `ends`, and with it."""
    return row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]


# ---- the batches ---------------------------------------------------------------------------------------------------


class Rollouts:
    """Endless Rollout batches of `groups` questions with group_size answers each, drawn from the model as it is at that moment.

    decode: ids of an answer -> its text. as_it_was() gives a context in which the model is as it was before the first step; None
    where beta is 0. `ahead`: batches whose answers are drawn at once; best as many as an update takes. `report` says of the last
    draw: mean reward and each of its parts, share of groups with equal rewards (they teach nothing), share of answers cut off at
    answer_tokens, mean tokens.
    """

    def __init__(
        self,
        model: GPT,
        questions: list[PromptRow],
        decode: Callable[[list[int]], str],
        reward: Reward,
        *,
        ends: list[int],
        group_size: int,
        answer_tokens: int,
        groups: int,
        seed: int,
        temperature: float = 1.0,
        dtype: torch.dtype | None = None,
        as_it_was: Callable[[], AbstractContextManager[Any]] | None = None,
        ahead: int = 1,
        hidden: Hidden = hidden_of,
    ):
        self.model, self.questions, self.decode, self.reward = model, questions, decode, reward
        self.ends, self.group_size, self.answer_tokens = frozenset(ends), group_size, answer_tokens
        self.seed, self.temperature, self.dtype = seed, temperature, dtype
        self.as_it_was, self.ahead, self.hidden = as_it_was, ahead, hidden
        self.order, self.held = Order(len(questions), groups, seed), list[Rollout]()
        self.report: dict[str, float] = {}
        require(bool(ends), "--objective grpo: the tokenizer has no end token, so no answer would ever end")
        self.check(questions)

    def check(self, questions: list[PromptRow]) -> None:
        """Refuse a question that leaves no room for its answer, or lacks what a reward needs."""
        context, tokens = self.model.config.max_seq_len, self.answer_tokens
        for question in questions:
            self.reward.check(question.expected, question.where)
            n = len(question.ids)
            require(n > 0, f"{question.where}: the question has no tokens; leave it out")
            require(
                n + tokens <= context,
                f"{question.where}: {n:,} tokens of question and --answer-tokens {tokens:,} are more than the model's "
                f"{context:,}; lower --answer-tokens or leave the question out",
            )

    def __iter__(self) -> Iterator[Rollout]:
        return self

    def __next__(self) -> Rollout:
        if not self.held:
            self.held = self._rollouts([self.order.take() for _ in range(self.ahead)])
        return self.held.pop(0)

    def _rollouts(self, taken: list[tuple[int, list[int]]]) -> list[Rollout]:
        """A batch for the places of each (epoch, places), all their answers drawn at once."""
        keys = [(0, epoch, place) for epoch, places in taken for place in places]
        questions = [self.questions[place] for *_, place in keys]
        answers = self._draw(questions, keys, self.group_size)
        self.report, advantages = self._judge(questions, answers)
        cuts = pairwise(accumulate((len(places) for _, places in taken), initial=0))
        return [self._batch(questions[a:b], answers[a:b], advantages[a:b]) for a, b in cuts]

    @property
    def n_batches_per_epoch(self) -> int:
        """The last of them may hold fewer questions."""
        return self.order.n_per_epoch

    def largest(self) -> Rollout:
        """A batch as large as any can be, of the longest questions with made-up answers: what memory must suffice for."""
        longest = sorted(self.questions, key=lambda question: len(question.ids))[-self.order.count :]
        answers = [[[0] * self.answer_tokens] * self.group_size] * len(longest)
        return self._batch(longest, answers, np.zeros((len(longest), self.group_size)))

    def measure(self, questions: list[PromptRow]) -> dict[str, float]:
        """The report of one answer to each of other questions, the same draws at every call."""
        at_once, answers = self.order.count * self.group_size, []
        for i in range(0, len(questions), at_once):
            part = questions[i : i + at_once]
            answers += self._draw(part, [(1, 0, i + j) for j in range(len(part))], 1)
        return self._judge(questions, answers)[0]

    def _draw(self, questions: list[PromptRow], keys: list[tuple[int, ...]], times: int) -> list[list[list[int]]]:
        """So many answers to each question, drawn by its key; the model is left as it was found."""
        shape, was_training = (times, self.answer_tokens), self.model.training
        uniform = np.stack([np.random.default_rng((self.seed, *key)).random(shape) for key in keys])
        prompts = [[int(i) for i in question.ids] for question in questions]
        self.model.eval()
        answers = draw_answers(self.model, prompts, uniform, self.ends, self.temperature, self.dtype)
        self.model.train(was_training)
        return answers

    def _judge(self, questions: list[PromptRow], answers: list[list[list[int]]]) -> tuple[dict[str, float], np.ndarray]:
        """What `report` says, and the advantages (Q, G)."""
        parts = [
            [self._parts(question, ids) for ids in group] for question, group in zip(questions, answers, strict=True)
        ]
        rewards = np.array([[self.reward.total(each) for each in group] for group in parts])
        every, ids = [each for group in parts for each in group], [ids for group in answers for ids in group]
        report = {"reward": float(rewards.mean())}
        report |= {f"reward.{name}": float(np.mean([each[name] for each in every])) for name in every[0]}
        report |= {"equal_groups": float((np.ptp(rewards, axis=1) == 0).mean())}
        report |= {"cut": float(np.mean([one[-1] not in self.ends for one in ids]))}
        return report | {"answer_tokens": float(np.mean([len(one) for one in ids]))}, group_advantages(rewards)

    def _parts(self, question: PromptRow, ids: list[int]) -> dict[str, float]:
        return self.reward.parts(self.decode(ids[:-1] if ids[-1] in self.ends else ids), question.expected)

    @torch.no_grad()
    def _batch(self, questions: list[PromptRow], answers: list[list[list[int]]], advantages: np.ndarray) -> Rollout:
        """Questions with their answers as rows, and the log-probabilities that the loss compares with."""
        rows = []
        for question, group in zip(questions, answers, strict=True):
            prompt = np.asarray(question.ids, np.int32)
            for ids in group:
                whole = np.concatenate((prompt, np.array(ids, np.int32)))
                rows.append(Row(whole, np.arange(len(whole)) >= len(prompt), question.where))
        packed, was_training = below_each_other(rows, self.model.embed.weight.device), self.model.training
        self.model.eval()
        old = token_logprobs(self.model, packed, self.dtype, self.temperature, self.hidden)
        reference = torch.full_like(old, torch.nan)
        if self.as_it_was is not None:
            with self.as_it_was():
                reference = token_logprobs(self.model, packed, self.dtype, self.temperature, self.hidden)
        self.model.train(was_training)
        return Rollout(*packed, torch.from_numpy(advantages.flatten()).to(old), old, reference)

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, and the answers that are drawn but not yet learned from."""
        held = [[part.tolist() for part in batch] for batch in self.held]
        return {"order": self.order.state_dict(), "held": held, "report": self.report}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where state_dict was taken."""
        self.order.load_state_dict(state["order"])
        self.report = state["report"]
        device, wide = self.model.embed.weight.device, self.model.embed.weight.dtype
        kinds = 4 * [torch.int64] + 3 * [torch.float64 if wide == torch.float64 else torch.float32]
        self.held = [
            Rollout(*(torch.tensor(part, dtype=kind, device=device) for part, kind in zip(batch, kinds, strict=True)))
            for batch in state["held"]
        ]

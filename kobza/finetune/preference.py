"""Better answers over worse: DPO, ORPO and KTO, each a LossFn over Pairs, and the batches they read.

Rows come two by two: a better and a worse answer to one question (DPO, ORPO), or an answer and one that belongs to another
question (KTO, from which it learns how far the model has moved at large). The model as it was is asked once, before the first
step (`reference_logprobs`); its log-probabilities then ride along in the batch, so training holds one model and runs it once.
A loss is a SUM over pairs with their number, as train.py asks: a window cut into micro-batches is one batch, but for KTO's
baseline, which is a mean over the micro-batch at hand (the model moves, so it cannot be had beforehand).

Shapes: B pairs, T tokens, N pairs of the whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kobza.config import require
from kobza.finetune.answers import Order, below_each_other
from kobza.finetune.example import Packed, Row
from kobza.finetune.sft import Hidden, hidden_of, token_logprobs
from kobza.model import GPT
from kobza.train import IGNORE, LossFn

CERTAIN = -1e-7  # log-probability nearest to 0 whose odds are still finite in float32


class Pairs(NamedTuple):
    """A Batch of B pairs as 2B rows: their first rows, then their second. The first four are a Packed, (2B, T)."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor
    documents: Tensor
    reference: Tensor
    """(2B,) log-probability of each answer under the model as it was; 0 where nobody asks (ORPO)"""
    desirable: Tensor
    """(B,) bool, whether the first row is a good answer (KTO; elsewhere it always is)"""


@dataclass(frozen=True)
class Pairing:
    """All pairs of a file with what is known of them: `reference` (N, 2) and `desirable` (N,), as in Pairs."""

    pairs: list[tuple[Row, Row]]
    reference: np.ndarray | None = None
    desirable: np.ndarray | None = None

    def batch(self, places: list[int], device: torch.device) -> Pairs:
        """The pairs at these places."""
        rows = [self.pairs[i][side] for side in (0, 1) for i in places]
        known = np.zeros((len(places), 2), np.float32) if self.reference is None else self.reference[places]
        good = np.ones(len(places), bool) if self.desirable is None else self.desirable[places]
        reference = torch.from_numpy(known.T.flatten()).to(device)
        return Pairs(*below_each_other(rows, device), reference, torch.from_numpy(good).to(device))


def useful(pairs: list[tuple[Row, Row]]) -> tuple[list[tuple[Row, Row]], list[tuple[str, str]]]:
    """The pairs that can teach something, and (where, why) of those that cannot."""
    kept, left = [], []
    for pair in pairs:
        if not all(row.learned.any() for row in pair):
            left.append((pair[0].where, "an answer was cut off wholly"))
        elif np.array_equal(pair[0].ids, pair[1].ids):
            left.append((pair[0].where, "both answers are the same"))
        else:
            kept.append(pair)
    require(
        bool(kept), f"none of the {len(pairs):,} pairs can teach anything: {left[0][1] if left else 'there are none'}"
    )
    return kept, left


def need_both_kinds(desirable: np.ndarray) -> None:
    """Refuse answers to learn from that are all good or all bad."""
    kinds = {True: "desirable", False: "undesirable"}
    same = len(set(desirable.tolist())) == 1
    kind = kinds[bool(desirable[0])] if same else ""
    require(
        not same, f"all {len(desirable):,} answers are {kind}; --objective kto compares good with bad ones: give both"
    )


class PairBatches:
    """Endless Pairs of `micro_batch` pairs: every epoch has each pair once, in an order of its own."""

    def __init__(self, pairing: Pairing, micro_batch: int, seed: int, device: torch.device | None = None):
        self.pairing, self.device = pairing, device or torch.device("cpu")
        self.order = Order(len(pairing.pairs), micro_batch, seed)

    def __iter__(self) -> Iterator[Pairs]:
        return self

    def __next__(self) -> Pairs:
        _, places = self.order.take()
        return self.pairing.batch(places, self.device)

    @property
    def n_batches_per_epoch(self) -> int:
        """The last of them may hold fewer pairs."""
        return self.order.n_per_epoch

    def largest(self) -> Pairs:
        """A batch of the longest pairs: what memory must suffice for."""
        longest = sorted(range(self.order.n), key=lambda i: max(len(row.ids) for row in self.pairing.pairs[i]))
        return self.pairing.batch(longest[-self.order.count :], self.device)

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where state_dict was taken."""
        self.order.load_state_dict(state)


def eval_pairs(pairing: Pairing, micro_batch: int, device: torch.device | None = None) -> list[Pairs]:
    """Every pair once, in the order of the file."""
    places = list(range(len(pairing.pairs)))
    home = device or torch.device("cpu")
    return [pairing.batch(places[i : i + micro_batch], home) for i in range(0, len(places), micro_batch)]


def mismatched(rows: list[Row], seed: int) -> list[tuple[Row, Row]]:
    """Each row beside its own question with the answer of another row, no answer twice (KTO's second rows).

    The partners are drawn once, so that the reference can be asked of them before the first step."""
    require(len(rows) > 1, "--objective kto compares an answer with another question's; one row is too few")
    circle = np.random.default_rng((seed, 0x6B746F)).permutation(len(rows))
    other = dict(zip(circle.tolist(), np.roll(circle, 1).tolist(), strict=True))
    return [(row, _with_answer(row, rows[other[i]])) for i, row in enumerate(rows)]


def _with_answer(question: Row, answer: Row) -> Row:
    """What stands before the first target of one row, then what stands from there on in the other; no longer than the longer
    of the two, so that it fits where they do."""
    n, start = int(question.learned.argmax()), int(answer.learned.argmax())
    longest = max(len(question.ids), len(answer.ids))
    ids = np.concatenate((question.ids[:n], answer.ids[start:]))[:longest]
    learned = np.concatenate((question.learned[:n], answer.learned[start:]))[:longest]
    return Row(ids, learned, f"{question.where} with the answer of {answer.where}")


@torch.no_grad()
def reference_logprobs(
    model: GPT,
    pairs: list[tuple[Row, Row]],
    micro_batch: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> np.ndarray:
    """Log-probability of every answer under the model as it is now, (N, 2); what `Pairing.reference` wants. Rows of like length
    run together; the model is left as it was found."""
    rows = [row for pair in pairs for row in pair]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    was_training, found = model.training, {}
    model.eval()
    for start in range(0, len(rows), micro_batch):
        places = by_length[start : start + micro_batch]
        sums = token_logprobs(model, below_each_other([rows[i] for i in places], device), dtype).sum(-1)
        found.update(zip(places, sums.tolist(), strict=True))
    model.train(was_training)
    wide = np.float64 if sums.dtype == torch.float64 else np.float32
    return np.array([found[i] for i in range(len(rows))], wide).reshape(-1, 2)


# ---- losses --------------------------------------------------------------------------------------------------------


def answer_gains(model: GPT, batch: Pairs, dtype: torch.dtype | None = None, hidden: Hidden = hidden_of) -> Tensor:
    """By how much the model has made each answer likelier than it was, nats, (2B,)."""
    return token_logprobs(model, Packed(*batch[:4]), dtype, hidden=hidden).sum(-1) - batch.reference


def answer_means(model: GPT, batch: Pairs, dtype: torch.dtype | None = None, hidden: Hidden = hidden_of) -> Tensor:
    """Mean log-probability of each answer's tokens, nats, (2B,)."""
    n = (batch.targets != IGNORE).sum(-1)
    return token_logprobs(model, Packed(*batch[:4]), dtype, hidden=hidden).sum(-1) / n


def dpo_loss(beta: float, dtype: torch.dtype | None = None, hidden: Hidden = hidden_of) -> LossFn:
    """-log sigmoid(beta (gain of the better - gain of the worse)), summed over pairs. Rafailov et al. 2023, eq. 7."""
    need_beta(beta, "dpo")

    def loss_fn(model: GPT, batch: Pairs) -> tuple[Tensor, Tensor]:
        better, worse = answer_gains(model, batch, dtype, hidden).chunk(2)
        return -F.logsigmoid(beta * (better - worse)).sum(), count(better)

    return loss_fn


def orpo_loss(beta: float, dtype: torch.dtype | None = None, hidden: Hidden = hidden_of) -> LossFn:
    """Mean nats a token of the better answer, less beta log sigmoid(log of its odds over the worse one's), summed over pairs; the
    odds are p / (1 - p) of the mean token. No reference model. Hong et al. 2024, eq. 6 and 7."""
    need_beta(beta, "orpo")

    def loss_fn(model: GPT, batch: Pairs) -> tuple[Tensor, Tensor]:
        means = answer_means(model, batch, dtype, hidden)
        certain = means.clamp(max=CERTAIN)  # an answer known by heart has infinite odds
        better, worse = (certain - torch.log(-torch.expm1(certain))).chunk(2)
        return -(means.chunk(2)[0] + beta * F.logsigmoid(better - worse)).sum(), count(better)

    return loss_fn


def kto_loss(beta: float, dtype: torch.dtype | None = None, hidden: Hidden = hidden_of) -> LossFn:
    """1 - sigmoid(beta (gain - baseline)) of a good answer, 1 - sigmoid(beta (baseline - gain)) of a bad one, summed. The
    baseline is how far the model has moved at large: the mean gain of the micro-batch's mismatched answers, at least 0, taken as
    a constant; these rows run without gradient. Ethayarajh et al. 2024, eq. 8, both kinds weighted alike."""
    need_beta(beta, "kto")

    def loss_fn(model: GPT, batch: Pairs) -> tuple[Tensor, Tensor]:
        own, other = halves(batch)
        with torch.no_grad():
            baseline = answer_gains(model, other, dtype, hidden).mean().clamp(min=0)
        above = answer_gains(model, own, dtype, hidden) - baseline  # (B,)
        sign = batch.desirable.to(above.dtype) * 2 - 1
        return torch.sigmoid(-beta * sign * above).sum(), count(above)

    return loss_fn


def halves(batch: Pairs) -> tuple[Pairs, Pairs]:
    """The first rows of each pair, and the second."""
    first, second = zip(*(part.chunk(2) for part in batch[:5]), strict=True)
    return Pairs(*first, batch.desirable), Pairs(*second, batch.desirable)


def count(values: Tensor) -> Tensor:
    """Their number, 0-d, where train.py adds it up."""
    return torch.tensor(len(values), device=values.device)


def need_beta(beta: float, objective: str) -> None:
    """Refuse a weight under which the pairs teach nothing."""
    require(
        beta > 0, f"--beta is {beta}: with --objective {objective} nothing would be learned from pairs; 0.1 is usual"
    )


# ---- what training has done to the preference ----------------------------------------------------------------------


@torch.no_grad()
def preference_metrics(
    model: GPT,
    batches: Iterable[Pairs],
    beta: float,
    measure: Callable[[GPT, Pairs, torch.dtype | None], Tensor] = answer_gains,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Rewards, beta times the measure, of better and worse answers: their means, their margin, and in how many pairs the better
    one has the higher (accuracy). measure: answer_gains for DPO, answer_means for ORPO."""
    better, worse = (torch.cat(side) for side in zip(*_scores(model, batches, measure, dtype), strict=True))
    return _compared(beta * better, beta * worse, (better > worse).double().mean())


@torch.no_grad()
def kto_metrics(
    model: GPT, batches: Iterable[Pairs], beta: float, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """As preference_metrics for answers that come unpaired: accuracy is over every good answer beside every bad one. {} where
    there are none of a kind."""
    batches = list(batches)
    gains = torch.cat([own for own, _ in _scores(model, batches, answer_gains, dtype)])
    good = torch.cat([batch.desirable for batch in batches])
    better, worse = gains[good], gains[~good]
    if not len(better) or not len(worse):
        return {}
    return _compared(beta * better, beta * worse, (better[:, None] > worse).double().mean())


def _scores(
    model: GPT, batches: Iterable[Pairs], measure: Callable[..., Tensor], dtype: torch.dtype | None
) -> list[tuple[Tensor, Tensor]]:
    """The measure of the first and the second rows of each batch, in eval mode."""
    was_training = model.training
    model.eval()
    scores = [measure(model, batch, dtype).chunk(2) for batch in batches]
    model.train(was_training)
    return scores


def _compared(better: Tensor, worse: Tensor, accuracy: Tensor) -> dict[str, float]:
    high, low = float(better.mean()), float(worse.mean())
    return {"accuracy": float(accuracy), "margin": high - low, "reward_better": high, "reward_worse": low}

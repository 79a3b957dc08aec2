"""What a tuned model knows of held-out answers: their loss, and how many it would give word for word.

An answer is right if each of its tokens is the model's likeliest after the question and the answer so far: what writing at
temperature 0 would give, without the writing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kobza.finetune.example import Packed
from kobza.finetune.sft import Hidden, hidden_of, learned_places
from kobza.layers import widen
from kobza.model import GPT

CHUNK_LOGITS = 1 << 24


@dataclass(frozen=True)
class HeldOut:
    """The measure over held-out rows."""

    loss: float
    """nats a learned token"""
    right: int
    """rows of which every learned token is the model's likeliest"""
    rows: int

    @property
    def share(self) -> float:
        """Of rows that are right."""
        return self.right / max(1, self.rows)


@torch.no_grad()
def held_out(
    model: GPT, batches: Iterable[Packed], dtype: torch.dtype | None = None, hidden: Hidden = hidden_of
) -> HeldOut:
    """Measure the rows of batches in eval mode; the model is left as it was found."""
    was_training = model.training
    model.eval()
    total, n_targets, right, rows = 0.0, 0, 0, 0
    for batch in batches:
        at = learned_places(batch)
        x, targets = hidden(model, batch, dtype).flatten(0, 1)[at], batch.targets.flatten()[at]  # (N, C), (N,)
        wrong = torch.zeros(len(at), dtype=torch.bool, device=at.device)
        chunk = max(1, CHUNK_LOGITS // model.config.vocab_size)
        for start in range(0, len(at), chunk):
            part = slice(start, start + chunk)
            logits = widen(model.logits(x[part]))  # (n, V)
            total += float(F.cross_entropy(logits, targets[part], reduction="sum"))
            wrong[part] = logits.argmax(-1) != targets[part]
        lines = at // batch.inputs.shape[1]
        answers = torch.stack((lines, batch.documents.flatten()[at]), 1)  # (N, 2): which row of the file
        n_answers = len(answers.unique(dim=0))
        rows, right = rows + n_answers, right + n_answers - len(answers[wrong].unique(dim=0))
        n_targets += len(at)
    model.train(was_training)
    return HeldOut(total / max(1, n_targets), right, rows)

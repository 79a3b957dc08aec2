"""What the documents of a batch begin with alike is computed once.

Rows made with one template share their system prompt and the question's opening, answers drawn to one question share all of it.
The batch is laid out anew as one line: the shared beginning, then what each document has of its own, which sees the beginning and
itself, at the places it had. The model computes that line like any other; what it finds is dealt out to the places of the batch
it stands for, and so the gradients add up by themselves. Padding is not computed either.

    B B B a a          B B B a a b c c c        b sees B B B b,  c sees B B B c c c
    B B B b .    ->
    B B B c c c

The numbers are those of the plain batch up to rounding (tests/test_finetune_prefix.py, float64). Where the line's attention costs
more than the tokens it saves, or the model's attention is windowed, the batch is computed as it is.

Shapes: B batch, T tokens, N places of the line, C n_embd.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kobza.finetune.example import Packed
from kobza.finetune.sft import hidden_of
from kobza.model import GPT

ROUND = 32  # a line's length is rounded up to it: few lengths, since libraries keep code and memory for each they meet


class Shared(NamedTuple):
    """A batch as one line, and where each of its places is there."""

    inputs: Tensor
    """(1, N)"""
    positions: Tensor
    """(1, N)"""
    mask: Tensor
    """(1, 1, N, N), True where a place sees another"""
    places: Tensor
    """(B, T): the place of the line that computes it; of padding, any"""


def shared_hidden(model: GPT, batch: Packed, dtype: torch.dtype | None = None, by_document: bool = False) -> Tensor:
    """What the head reads (B, T, C), as `hidden_of` gives it; only at padding it differs. by_document: the model's attention
    leaves out what the mask leaves out (kernels/tuned.py), so that a long line costs no more than its documents."""
    ends = documents_of(batch.documents.cpu().numpy())
    n_shared = shared_length(batch.inputs.cpu().numpy(), ends) if ends else 0
    if not ends or model.config.window or not pays(model, batch, ends, n_shared, by_document):
        return hidden_of(model, batch, dtype)
    line = lay_out(batch, ends, n_shared)
    return model.hidden(line.inputs, line.positions, line.mask, dtype=dtype)[0, line.places]


def documents_of(documents: np.ndarray) -> list[tuple[int, int, int]]:
    """(line, first, end) of each document of a batch (B, T), padding left out."""
    found = []
    for b, line in enumerate(documents):
        cuts = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]
        found += [(b, first, end) for first, end in zip(cuts, cuts[1:], strict=False) if line[first] >= 0]
    return found


def shared_length(ids: np.ndarray, documents: list[tuple[int, int, int]]) -> int:
    """How many ids all documents begin with alike. ids (B, T)."""
    shared = ids[documents[0][0], documents[0][1] : documents[0][2]]
    for b, first, end in documents[1:]:
        own = ids[b, first:end][: len(shared)]
        differ = np.flatnonzero(own != shared[: len(own)])
        shared = shared[: differ[0] if len(differ) else len(own)]
    return len(shared)


def pays(model: GPT, batch: Packed, documents: list[tuple[int, int, int]], n_shared: int, by_document: bool) -> bool:
    """Whether the line takes fewer multiplications than the batch: of each token with every weight of the blocks, and of each
    pair of places in each channel of the attentions."""
    lengths = [end - first for _, first, end in documents]
    n = n_shared + sum(lengths) - n_shared * len(lengths)
    B, T = batch.inputs.shape
    weights = sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks."))
    channels = (
        2 * sum(model.config.heads(layer)[0] for layer in range(model.config.n_attention)) * model.config.head_dim
    )
    pairs = sum((m - n_shared) * m for m in lengths) + n_shared**2 if by_document else n * n
    return n * weights + pairs * channels < B * T * weights + B * T * T * channels


def lay_out(batch: Packed, documents: list[tuple[int, int, int]], n_shared: int) -> Shared:
    """The batch as one line: document 0 is the shared beginning, 1, 2, ... what each has of its own."""
    b, first, _ = documents[0]
    parts = [(0, b, first, first + n_shared)]
    parts += [(i, b, first + n_shared, end) for i, (b, first, end) in enumerate(documents, 1)]
    T = batch.inputs.shape[1]
    source = np.concatenate([np.arange(b * T + first, b * T + end) for _, b, first, end in parts])  # (N,) in the batch
    owner = np.repeat([i for i, *_ in parts], [end - first for *_, first, end in parts])
    places = np.zeros(batch.inputs.numel(), np.int64)
    places[source] = np.arange(len(source))
    room = -len(source) % ROUND
    source, owner = np.pad(source, (0, room)), np.pad(owner, (0, room), constant_values=len(parts))
    for b, first, _ in documents:
        places[b * T + first : b * T + first + n_shared] = np.arange(n_shared)
    source, owner, places = (torch.from_numpy(a).to(batch.inputs.device) for a in (source, owner, places))
    seen = ((owner[:, None] == owner) | (owner == 0)).tril()  # (N, N)
    inputs, positions = (x.flatten()[source][None] for x in (batch.inputs, batch.positions))
    return Shared(inputs, positions, seen[None, None], places.view_as(batch.inputs))

"""Scored tokens -> bits per byte, nats per token and perplexity: of a whole text, by position in the context, by document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kobza.config import require
from kobza.evals.score import Scored, score
from kobza.evals.stats import Estimate, ratio
from kobza.evals.texts import Document
from kobza.model import GPT
from kobza.tokenizer import Tokenizer
from kobza.train import bits_per_byte

ENOUGH_DOCUMENTS = 20  # from here on documents are what is resampled; below, blocks of their tokens
BLOCKS = 200  # of a text, at most
BLOCK_TOKENS = 64  # at least: neighbours are alike, so a block must be longer than what they share


@dataclass(frozen=True)
class Loss:
    """The loss over some text with 95% intervals. unit: what the bootstrap draws, "document" or "block"."""

    bits_per_byte: Estimate
    nats_per_token: Estimate
    perplexity: Estimate
    accuracy: Estimate
    unit: str
    n_tokens: int
    n_bytes: int


def measure_loss(tokenizer: Tokenizer, documents: Sequence[np.ndarray], scored: Sequence[Scored]) -> Loss:
    """The loss over documents (ids each) that `score` has read from their first token on."""
    sizes = [tokenizer.piece_bytes[ids] for ids in documents]
    n_tokens, n_bytes = sum(map(len, documents)), int(sum(size.sum() for size in sizes))
    require(n_tokens >= 2 and n_bytes > 0, f"the text is too short: {n_tokens} token(s); give at least 2")
    by_document = len(documents) >= ENOUGH_DOCUMENTS
    length = n_tokens if by_document else max(BLOCK_TOKENS, -(-n_tokens // BLOCKS))
    nats = [part.sum() for s in scored for part in blocks(-s.logprob, length)]
    n_bytes_of = [part.sum() for size in sizes for part in blocks(size, length)]
    counts = [len(part) for size in sizes for part in blocks(size, length)]
    hits = [part.sum() for s in scored for part in blocks(s.greedy, length)]
    per_token = ratio(nats, counts)
    return Loss(
        bits_per_byte=ratio(nats, n_bytes_of).map(lambda nats_per_byte: bits_per_byte(nats_per_byte, 1.0)),
        nats_per_token=per_token,
        perplexity=per_token.map(lambda x: float(np.exp(min(x, 700.0)))),
        accuracy=ratio(hits, counts),
        unit="document" if by_document else "block",
        n_tokens=n_tokens,
        n_bytes=n_bytes,
    )


def blocks(values: np.ndarray, length: int) -> list[np.ndarray]:
    """Consecutive pieces of `length`; a last one shorter than half joins the one before."""
    n = max(1, round(len(values) / length))
    return [values[i * length : (i + 1) * length if i + 1 < n else len(values)] for i in range(n)]


@dataclass(frozen=True)
class Position:
    """The loss of tokens with first .. last tokens before them, nats per token."""

    first: int
    last: int
    nats_per_token: Estimate


def loss_by_position(scored: Sequence[Scored], size: int) -> list[Position]:
    """The loss by how many tokens the model saw, in classes 1, 2, 3-4, 5-8, ... up to the context. `scored` must come of windows
    side by side (stride = context), where every number is met equally often."""
    edges = [0, 1]
    while edges[-1] < size:
        edges.append(min(2 * edges[-1], size))
    rows = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        nats, counts = [], []
        for s in scored:
            inside = (s.seen > low) & (s.seen <= high)
            window = np.arange(len(s.seen)) // size
            nats.append(np.bincount(window[inside], -s.logprob[inside]))
            counts.append(np.bincount(window[inside]))
        estimate = ratio(np.concatenate(nats), np.concatenate(counts))
        if estimate.n:
            rows.append(Position(low + 1, high, estimate))
    return rows


def loss_by_document(
    tokenizer: Tokenizer, documents: Sequence[Document], scored: Sequence[Scored]
) -> list[dict[str, Any]]:
    """A row a document: source, tokens, bits per byte and nats per token, with intervals over its blocks."""
    rows = []
    for document, one in zip(documents, scored, strict=True):
        length = max(BLOCK_TOKENS, -(-len(document.ids) // BLOCKS))
        nats = [part.sum() for part in blocks(-one.logprob, length)]
        n_bytes = [part.sum() for part in blocks(tokenizer.piece_bytes[document.ids], length)]
        counts = [len(part) for part in blocks(one.logprob, length)]
        bpb = ratio(nats, n_bytes).map(lambda x: bits_per_byte(x, 1.0))
        row = {"source": document.source, "tokens": len(document.ids), "bits_per_byte": asdict(bpb)}
        rows.append(row | {"nats_per_token": asdict(ratio(nats, counts))})
    return rows


def side_by_side(model: GPT, tokenizer: Tokenizer, sequences: Sequence[np.ndarray]) -> list[Scored]:
    """`score` in windows without overlap: half the work, and every length of context is met equally often."""
    return score(model, tokenizer, sequences, stride=model.config.max_seq_len)

"""Attention of many sequences over one paged cache, a fixed number of operations a layer however many they are.

A sequence's keys and values lie in blocks of `block_size` tokens. The queries go to the blocks, not the blocks to the queries: a
pair is a block and the tile of queries that reads it; all pairs of a group make one batched product of one inner shape:

    scores (P, K, M, S) -> softmax over the tile's blocks -> (P, K, M, D) -> summed block by block, in the order of the text

so that a token's sums have the same terms in the same order whatever else is in the batch, in whatever chunks its text came, and
whichever blocks hold it. Keys lie transposed: a product of few rows reads them faster so. Where the blocks of a group lie close
together in the cache they are read in place, else gathered.

Shapes: N tokens of the step, H query heads, K key/value heads, G = H / K, D head_dim, T tokens of a tile, M = max(4, T G) rows
of a product, S block_size, P pairs, B tiles of a group, J blocks of its longest tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 8  # pieces of up to so many tokens are done side by side, grouped by length; longer ones tile by tile
TILE = 32  # tokens of a tile: its scores over a thousand keys stay in a core's cache
LEAST_ROWS = 4  # from here on a product's rows have the same bits whatever their number; below, MKL takes other kernels
HOLES = 1.25  # a run of the cache is read in place where it is at most so many times what is needed of it


class Span(NamedTuple):
    """Tokens of one sequence in a step."""

    start: int  # place in the sequence of the first
    n: int
    blocks: list[int]


class Store:
    """Keys and values of one attention, in blocks: keys (blocks, K, D, S), values (blocks, K, S, D)."""

    def __init__(
        self, n_blocks: int, n_kv_head: int, size: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ):
        options = {"dtype": dtype, "device": device}
        self.keys = torch.zeros(n_blocks, n_kv_head, head_dim, size, **options)
        self.values = torch.zeros(n_blocks, n_kv_head, size, head_dim, **options)

    def write(self, k: Tensor, v: Tensor, places: Places) -> None:
        """Put k, v (N, K, D) of new tokens into their places; a block begun is empty first: what another text left there,
        an inf perhaps, must not touch this one's sums."""
        if places.begun is not None:
            self.keys.index_fill_(0, places.begun, 0)
            self.values.index_fill_(0, places.begun, 0)
        self.keys[places.block, :, :, places.offset] = k.to(self.keys.dtype)
        self.values[places.block, :, places.offset] = v.to(self.values.dtype)

    def read(self, blocks: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks: in place, or gathered."""
        if isinstance(blocks, slice):
            return self.keys[blocks], self.values[blocks]
        return self.keys.index_select(0, blocks), self.values.index_select(0, blocks)


class Places(NamedTuple):
    """Where the new tokens of a step go."""

    block: Tensor  # (N,)
    offset: Tensor  # (N,)
    begun: Tensor | None  # blocks whose first token is among them


class Group(NamedTuple):
    """Tiles of equal length whose attention is one batched product; built once a step, used by every layer of its kind."""

    rows: slice  # of the step's tokens
    T: int
    queries: Tensor  # (P K M,) rows of (N (H + 2K), D)
    blocks: slice | Tensor  # (P,)
    mask: Tensor  # (B, 1, M, J, S) float, 0 or -inf
    slots: Tensor | None  # (B J,) pair of each slot; None: pairs are slots
    pairs: Tensor | None  # (P,) slot of each pair
    order: Tensor  # pairs, tile by tile, in the order of the text
    offsets: Tensor  # (B,) where a tile begins in `order`


def places_of(spans: list[Span], size: int, device: torch.device) -> Places:
    """Where the tokens of the spans go."""
    at = [(span.blocks[p // size], p % size) for span in spans for p in range(span.start, span.start + span.n)]
    block, offset = torch.tensor(at, device=device).unbind(1)
    begun = [b for b, o in at if o == 0]
    return Places(block, offset, torch.tensor(begun, device=device) if begun else None)


def groups_of(
    spans: list[Span], n_head: int, n_kv_head: int, window: int, size: int, device: torch.device
) -> list[Group]:
    """The groups of a step, for attentions of these heads. Short spans of equal length must be neighbours."""
    groups, first, i = [], 0, 0
    while i < len(spans):
        n, j = spans[i].n, i + 1
        if n <= FEW:
            while j < len(spans) and spans[j].n == n:
                j += 1
            tiles = [spans[i:j]]
        else:
            span = spans[i]
            cuts = range(0, n, TILE)
            tiles = [[Span(span.start + a, min(TILE, n - a), span.blocks)] for a in cuts]
        for tile in tiles:
            groups.append(group_of(tile, first, n_head, n_kv_head, window, size, device))
            first += sum(span.n for span in tile)
        i = j
    return groups


def group_of(
    spans: list[Span], first: int, n_head: int, n_kv_head: int, window: int, size: int, device: torch.device
) -> Group:
    """One group: spans of equal length whose tokens begin at row `first` of the step."""
    T, B, per = spans[0].n, len(spans), n_head // n_kv_head
    M = max(LEAST_ROWS, T * per)
    starts = torch.tensor([span.start for span in spans])
    lo = [max(0, span.start + 1 - window) // size if window else 0 for span in spans]  # the first block that is seen
    hi = [(span.start + T - 1) // size + 1 for span in spans]
    J = max(b - a for a, b in zip(lo, hi, strict=True))
    # pairs: (block, tile, j)
    pairs = [(span.blocks[j], b, j - lo[b]) for b, span in enumerate(spans) for j in range(lo[b], hi[b])]
    blocks, pairs = in_place(pairs)
    owner = torch.tensor([b for _, b, _ in pairs])
    # queries: row t G + g of a product is head k G + g of token t
    m = torch.arange(M).clamp(max=T * per - 1)
    token = first + torch.arange(B)[:, None, None] * T + (m // per)  # (B, 1, M)
    head = torch.arange(n_kv_head)[:, None] * per + m % per  # (K, M)
    queries = (token * (n_head + 2 * n_kv_head) + head)[owner].flatten()  # (P K M,)
    key = torch.tensor(lo)[:, None] * size + torch.arange(J * size)  # (B, J S)
    query = starts[:, None, None] + (m // per)[:, None]  # (B, M, 1)
    seen = key[:, None] <= query  # (B, M, J S)
    if window:
        seen &= key[:, None] > query - window
    mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).view(B, 1, M, J, size)
    slot = {(b, j): p for p, (_, b, j) in enumerate(pairs) if j >= 0}
    ordered = [slot[b, j] for b in range(B) for j in range(hi[b] - lo[b])]
    lengths = torch.tensor([0] + [b - a for a, b in zip(lo, hi, strict=True)])
    slots = [slot.get((b, j), 0) for b in range(B) for j in range(J)]
    plain = slots == list(range(len(pairs)))
    moved = None if plain else torch.tensor(slots).to(device)
    back = None if plain else torch.tensor([b * J + max(j, 0) for _, b, j in pairs]).to(device)
    return Group(
        slice(first, first + B * T),
        T,
        queries.to(device),
        blocks if isinstance(blocks, slice) else blocks.to(device),
        mask.to(device),
        moved,
        back,
        torch.tensor(ordered).to(device),
        lengths.cumsum(0)[:-1].to(device),
    )


def in_place(pairs: list[tuple[int, int, int]]) -> tuple[slice | Tensor, list[tuple[int, int, int]]]:
    """The blocks of pairs (block, tile, j) as a run of the cache where they nearly are one, with a pair of j = -1 in every
    hole; else as a list to be gathered."""
    found = {pair[0]: pair for pair in pairs}
    low, high = min(found), max(found) + 1
    if len(found) < len(pairs) or high - low > HOLES * len(pairs) + 1:
        return torch.tensor([block for block, _, _ in pairs]), pairs
    return slice(low, high), [found.get(block, (block, 0, -1)) for block in range(low, high)]


def attend(heads: Tensor, store: Store, group: Group, scale: float, cap: float, y: Tensor) -> None:
    """Attention of a group, into its rows of y (N, H D). heads (N, H + 2K, D): queries, keys and values of the step."""
    B, _, M, J, S = group.mask.shape
    K, D, T = store.keys.shape[1], heads.shape[-1], group.T
    keys, values = store.read(group.blocks)  # (P, K, D, S), (P, K, S, D)
    P = len(keys)
    q = heads.view(-1, D).index_select(0, group.queries).view(P * K, M, D)
    scores = torch.bmm(q.to(keys.dtype), keys.view(P * K, D, S)).view(P, K, M, S)
    if group.slots is not None:
        scores = scores.index_select(0, group.slots)
    scores = scores.view(B, J, K, M, S).permute(0, 2, 3, 1, 4)
    if cap:
        scores, scale = torch.tanh(scores.float() * (scale / cap)), cap
    masked = heads.new_empty(B, K, M, J, S)
    torch.add(group.mask, scores, alpha=scale, out=masked)
    weights = masked.view(B, K, M, J * S).softmax(-1).view(B, K, M, J, S)
    weights = weights.permute(0, 3, 1, 2, 4).contiguous().view(B * J, K, M, S)
    if group.pairs is not None:
        weights = weights.index_select(0, group.pairs)
    mixed = torch.bmm(weights.view(P * K, M, S).to(values.dtype), values.view(P * K, S, D)).view(P, K * M * D)
    summed = F.embedding_bag(group.order, mixed, group.offsets, mode="sum")  # adds a tile's blocks one by one
    G = y.shape[1] // (K * D)
    summed = summed.view(B, K, M, D)[:, :, : T * G].view(B, K, T, G, D)
    y[group.rows].view(B, T, K, G, D).copy_(summed.transpose(1, 2))

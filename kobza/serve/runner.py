"""The runner: one forward of a ragged batch over a paged cache.

A step's tokens, of however many sequences, are rows without padding; only attention knows whose they are. The runner keeps the
cache's blocks but does not say who owns them: pool.py does. blocks.py has the parts of the network, attention.py the cache.

Shapes: N tokens of a step, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kobza.config import ModelConfig, require
from kobza.device import cpu_multiplies_bf16, device_name, free_memory, keep_freed_memory
from kobza.model import GPT, n_parameters
from kobza.serve.attention import FEW, Span, Store, groups_of, places_of
from kobza.serve.blocks import Flat, Make, Step
from kobza.serve.lora import Adapter, LowRank, check_adapters

__all__ = ["Adapter", "FlatRunner", "LowRank", "Piece", "Runner", "make_runner"]

CACHE_BYTES = 32 << 20  # float32 weights up to here stay in a processor's cache, and packing them gains nothing
SHARE = 4  # the cache takes a quarter of what memory is free, and not more than max_seqs full contexts need
PRECISIONS = ("auto", "fp32", "bf16", "int8")


class Piece(NamedTuple):
    """New tokens of one sequence in one forward."""

    ids: list[int]
    start: int
    """tokens of the sequence that are in the cache already"""
    blocks: list[int]
    """the sequence's blocks in order, enough for start + len(ids) tokens"""
    wanted: int
    """logits of its last `wanted` tokens are returned; 0: a chunk of a prompt that is not the last"""
    adapter: str | None = None


class Runner(Protocol):
    """What the engine needs of a model."""

    block_size: int
    n_blocks: int
    vocab_size: int
    max_seq_len: int
    digest: str
    """of weights and number format: what is cached for one is not for another"""
    device_name: str
    exact: bool
    """a row has the same bits whatever else is in the batch, however its text came"""
    adapters: Mapping[str, str]
    """name -> digest"""

    def forward(self, pieces: list[Piece]) -> Tensor:
        """Run the pieces, storing their keys and values -> logits (sum of wanted, V) float32 on the CPU, in their order."""


class FlatRunner:
    """A Runner over a Flat model."""

    def __init__(
        self, model: GPT, make: Make, n_blocks: int, block_size: int, adapters: Mapping[str, Adapter], digest: str
    ):
        config, device = model.config, make.device
        self.block_size, self.n_blocks, self.device, self.config = block_size, n_blocks, device, config
        self.vocab_size, self.max_seq_len = config.vocab_size, config.max_seq_len
        self.precision, self.digest = make.precision, f"{digest}:{make.precision}"
        self.device_name = device_name(device)
        self.adapters = {name: adapter.digest for name, adapter in adapters.items()}
        kind = torch.float32 if device.type == "cpu" else make.dtype  # a CPU's products of bf16 keys are slower
        heads = [config.heads(layer)[1] for layer in range(config.n_attention)]
        stores = [Store(n_blocks, n_kv_head, block_size, config.head_dim, kind, device) for n_kv_head in heads]
        self.flat = Flat(model, make, stores)
        layers = range(config.n_attention)
        self.kinds = {(config.heads(i), config.is_windowed(i)) for i in layers}  # of attentions
        self.exact = make.fast and is_exact(self)

    @torch.inference_mode()
    def forward(self, pieces: list[Piece]) -> Tensor:
        """Run the pieces, storing their keys and values -> logits (sum of wanted, V) float32 on the CPU, in their order."""
        order = sorted(
            range(len(pieces)), key=lambda i: min(len(pieces[i].ids), FEW + 1)
        )  # short ones of a length together
        taken = [pieces[i] for i in order]
        firsts, n = [0] * len(pieces), 0
        for i in order:
            firsts[i], n = n, n + len(pieces[i].ids)
        ids = torch.tensor([j for piece in taken for j in piece.ids], device=self.device)
        positions = [p for piece in taken for p in range(piece.start, piece.start + len(piece.ids))]
        ends = [(first + len(piece.ids), piece) for first, piece in zip(firsts, pieces, strict=True)]
        wanted = [row for end, piece in ends for row in range(end - piece.wanted, end)]
        step = self.step(taken, [piece.adapter for piece in pieces for _ in range(piece.wanted)])
        x = self.flat(
            ids,
            torch.tensor(positions, device=self.device),
            step,
            torch.tensor(wanted, dtype=torch.long, device=self.device),
        )
        return x.cpu()

    def step(self, pieces: list[Piece], ends: list[str | None]) -> Step:
        """What the layers are told of pieces in the order of their rows; ends: whose are the rows that the head reads."""
        spans = [Span(piece.start, len(piece.ids), piece.blocks) for piece in pieces]
        size, device = self.block_size, self.device
        groups = {
            (n_kv_head, windowed): groups_of(spans, n_head, n_kv_head, self.config.window * windowed, size, device)
            for (n_head, n_kv_head), windowed in self.kinds
        }
        rows = [piece.adapter for piece in pieces for _ in piece.ids]
        return Step(places_of(spans, size, device), groups, [], self.rows_of(rows), self.rows_of(ends))

    def rows_of(self, names: list[str | None]) -> dict[str, Tensor]:
        """The rows of each adapter, where row i has names[i]."""
        used = sorted({name for name in names if name is not None})
        rows = {name: [i for i, other in enumerate(names) if other == name] for name in used}
        return {name: torch.tensor(found, device=self.device) for name, found in rows.items()}


def make_runner(
    model: GPT,
    *,
    precision: str = "auto",
    memory: int | None = None,
    block_size: int = 32,
    max_seqs: int = 16,
    adapters: Mapping[str, Adapter] | None = None,
    digest: str,
) -> FlatRunner:
    """A runner for a finished model, which may be let go afterwards. memory: bytes for the cache, None a share of what is free.
    Weights that are in codes already (a layer's `packed`) stay the codes they are with precision int8."""
    adapters, device = adapters or {}, next(model.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()
    chosen = pick_precision(model, precision, device)
    shapes = {name: (m.out_features, m.in_features) for name, m in model.named_modules() if hasattr(m, "out_features")}
    check_adapters(adapters, shapes)
    n_blocks = count_blocks(model.config, memory, block_size, max_seqs, device, chosen)
    make = Make(chosen, has_onednn(device, chosen), device, adapters)
    return FlatRunner(model, make, n_blocks, block_size, adapters, digest)


def pick_precision(model: GPT, wanted: str, device: torch.device) -> str:
    """The number format of the products: as wanted, or for "auto" the weights' own codes, else the fastest to generate in."""
    known = ", ".join(PRECISIONS)
    require(wanted in PRECISIONS, f"--precision is {wanted!r}; one of {known}")
    if wanted == "auto" and hasattr(model.lm_head, "packed"):
        wanted = "int8"
    if wanted == "auto" and device.type == "cpu":
        small = 4 * n_parameters(model) <= CACHE_BYTES
        wanted = "bf16" if cpu_multiplies_bf16() and not small else "fp32"
    if wanted == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        wanted = "bf16" if bf16 else "fp32"
    require(wanted != "int8" or device.type == "cpu", f"--precision int8 is for a CPU, not {device.type}; take bf16")
    return wanted


def has_onednn(device: torch.device, precision: str) -> bool:
    """Whether this torch and this machine have the products that give a row the same bits in any batch."""
    ops = [getattr(torch.ops.mkldnn, name, None) for name in ("_reorder_linear_weight", "_linear_pointwise")]
    there = device.type == "cpu" and torch.backends.mkldnn.is_available() and all(ops)
    return there and (precision != "bf16" or cpu_multiplies_bf16())


def count_blocks(
    config: ModelConfig, memory: int | None, block_size: int, max_seqs: int, device: torch.device, precision: str
) -> int:
    """Blocks of the cache: what `memory` holds, but not more than max_seqs full contexts take."""
    number = 4 if device.type == "cpu" or precision == "fp32" else 2
    heads = sum(config.heads(layer)[1] for layer in range(config.n_attention))
    each = max(1, 2 * heads * block_size * config.head_dim * number)
    most = max_seqs * -(-config.max_seq_len // block_size)
    free = free_memory(device)
    budget = memory if memory is not None else None if free is None else free // SHARE
    n_blocks = most if budget is None else min(most, budget // each)
    short = f"the cache has {budget or 0:,} bytes and a block of {block_size} tokens takes {each:,}; give it {2 * each:,} or more"
    require(n_blocks >= min(2, most), short)
    return n_blocks


def is_exact(runner: FlatRunner) -> bool:
    """Whether a text has the same bits whole, in pieces, and beside another: tried, for it is up to processor and libraries."""
    size = runner.block_size
    n = min(runner.max_seq_len, size * (runner.n_blocks // 2), size + FEW + 6)
    ids = [i * 7919 % runner.vocab_size for i in range(n)]
    blocks = list(range(-(-n // size)))
    others = [len(blocks) + block for block in blocks]
    whole = runner.forward([Piece(ids, 0, blocks, n)])
    cuts = sorted({0, *(cut for cut in (1, 3, FEW + 1, n - 2, n - 1) if 0 < cut < n), n})
    parts = []
    for a, b in zip(cuts, cuts[1:], strict=False):
        both = runner.forward([Piece(ids[a:b], a, others, b - a), Piece(ids[:b], 0, blocks, 1)])
        parts.append(both[:-1])
    single = runner.forward([Piece(ids[-1:], n - 1, blocks, 1)])
    return torch.equal(torch.cat(parts), whole) and torch.equal(single, whole[-1:])

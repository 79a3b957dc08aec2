"""What a run's best model does inside, on the run's own held-out text: units and heads that are dead, attention that sees one
token, scores and logits that grow, rows of the token table that were never learned. Read by run.py's checks.

All of it is measured in one pass over a few thousand tokens, by hooks and by attention's own `attend` with a recorder around it
(put back afterwards). Limits are from clean runs of mutations/run.py; each is beside the value seen there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kobza.checkpoint import find_checkpoint, load_checkpoint
from kobza.config import RunConfig
from kobza.data import Corpus, eval_batches, load_corpus
from kobza.doctor.finding import Finding, Skip
from kobza.layers import GATES
from kobza.model import GPT, Attention, build, n_parameters
from kobza.surgery import watch

TOKENS, FEWEST_TOKENS = 10_000, 500
WORK = 2e10  # weights times tokens: some ten seconds of one core; a large model reads fewer tokens, at least 1,000
INACTIVE = {
    "relu2": 0.0,
    "relu": 0.0,
    "gelu": -4.0,
    "gelu_tanh": -4.0,
    "silu": -12.0,
    "swiglu": -12.0,
    "geglu": -4.0,
    "geglu_tanh": -4.0,
}
ALIVE_SHARE = 0.001  # of the tokens; a unit that answers fewer is dead
# Beside each limit, the most (or least) of 30 clean tiny runs (5 flavours, seeds 0-2, fp32 and bf16), then of 23 real runs
# of 60 to 3,000 steps: these set the limits, since training a while makes sparse units and sharp heads without any harm.
DEAD_UNITS = 0.9  # of a layer's units; 0, then 0.56
DEAD_HEAD = 1e-3  # of its layer's median output; 0.56 of the largest
FLAT_ENTROPY = (
    0.02  # of ln(tokens seen), where no head of the layer has more; 0.80. One head that copies has 0 by right
)
MOST_SCORE = (
    1000.0  # of attention before its softmax; 4.0, then 124. Runs that diverge pass 10,000 (Wortsman et al. 2023)
)
MOST_LOG_Z = 100.0  # the log of the softmax's sum over the vocabulary; 4.0
MOST_GROWTH = 100.0  # residual rms, last block over first; 2.4


@dataclass
class Layer:
    """Figures of one block."""

    name: str
    dead_units: float = math.nan
    head_rms: Tensor = field(default_factory=lambda: torch.zeros(0))
    entropy: Tensor = field(default_factory=lambda: torch.zeros(0))
    score: float = 0.0
    sink: float = math.nan
    residual: float = math.nan


@dataclass(frozen=True)
class Internals:
    """What was measured of a checkpoint: layers in order, mean log Z, and the untouched rows that the held-out text reads."""

    folder: Path
    layers: list[Layer]
    log_z: float
    unread: list[tuple[int, str, int]] | None
    n_tokens: int
    n_held_out: int

    def findings(self) -> Iterator[Finding]:
        """R22, worst kinds first."""
        yield from self.dead()
        for layer in self.layers:
            if layer.entropy.numel() and float(layer.entropy.max()) < FLAT_ENTROPY:
                example = (
                    f"{layer.name}: mean entropy {', '.join(f'{e:.4f}' for e in layer.entropy.tolist())} of "
                    "ln(tokens seen), a head each"
                )
                yield inside(
                    layer.name,
                    "attention over several tokens",
                    "every head sees one token",
                    "gradients through the softmax vanish; losses diverge next",
                    "qk-norm, a lower rate, or z-loss",
                    example,
                )
            if layer.score > MOST_SCORE:
                example = f"{layer.name}: largest score {layer.score:.1f} on {self.n_tokens:,} tokens"
                yield inside(
                    layer.name,
                    f"attention scores below {MOST_SCORE:g}",
                    f"{layer.score:.0f}",
                    "scores that grow precede divergence, and overflow in fp16",
                    "qk-norm or a soft cap, a lower rate",
                    example,
                )
        if abs(self.log_z) > MOST_LOG_Z:
            yield inside(
                "lm_head",
                f"log Z within {MOST_LOG_Z:g} of 0",
                f"{self.log_z:.1f}",
                "logits drift, and bf16 rounds them more and more coarsely",
                "z-loss of 1e-4, or no decay on the head",
                f"mean log Z {self.log_z:.2f} on {self.n_tokens:,} tokens",
            )
        sizes = [layer.residual for layer in self.layers]
        if len(sizes) > 1 and sizes[-1] > MOST_GROWTH * sizes[0]:
            example = ", ".join(f"{layer.name} {layer.residual:.3g}" for layer in self.layers)
            yield inside(
                "blocks",
                "a residual stream that grows slowly",
                f"x {sizes[-1] / sizes[0]:.0f}",
                "early layers are drowned; fp16 overflows",
                "normalise outputs (norm_place=both), or draw projections smaller",
                f"rms after {example}",
            )

    def dead(self) -> Iterator[Finding]:
        """Units that never answer, heads that say nothing."""
        for layer in self.layers:
            if layer.dead_units > DEAD_UNITS:
                example = (
                    f"{layer.name}: {layer.dead_units:.1%} of the units answer fewer than {ALIVE_SHARE:.1%} of "
                    f"{self.n_tokens:,} tokens"
                )
                yield inside(
                    layer.name,
                    "units that answer some token",
                    f"{layer.dead_units:.0%} dead",
                    "the layer is as narrow as what is left",
                    "a lower rate, or an activation with a slope on both sides",
                    example,
                )
            median = float(layer.head_rms.median()) if layer.head_rms.numel() > 1 else 0.0
            if layer.head_rms.numel() == 2:
                median = float(layer.head_rms.max())  # of two the median is the smaller one
            silent = (
                [] if not median else [h for h, size in enumerate(layer.head_rms.tolist()) if size < DEAD_HEAD * median]
            )
            if silent:
                example = (
                    f"{layer.name} head {silent[0]}: output rms {float(layer.head_rms[silent[0]]):.3g}, the "
                    f"layer's median {median:.3g}"
                )
                yield inside(
                    f"{layer.name} head {silent[0]}",
                    "heads that add something",
                    f"{len(silent)} of {layer.head_rms.numel()} add nothing",
                    "the head costs time and memory for nothing",
                    "see whether it was pruned or zeroed; else a lower rate",
                    example,
                )

    def unread_rows(self) -> Iterator[Finding]:
        """L1."""
        if self.unread is None:
            raise Skip("the start of the token table is not known, it is tied, or it decays")
        if self.unread:
            row, shown, count = self.unread[0]
            example = (
                f"token {row} {shown}: its row is bit for bit the one drawn at the start, and the held-out text "
                f"reads it {count} times"
            )
            read = sum(count for _, _, count in self.unread)
            yield Finding(
                "L1",
                "warn" if read > 0.001 * self.n_held_out else "info",
                "proven",
                f"embed.weight[{row}]",
                "every token read was learned",
                f"{len(self.unread)} were never in the training text",
                "the model reads noise where these tokens stand",
                "more text, byte fallback, or the mean of the learned rows in their place",
                example,
                "https://github.com/meta-llama/llama3/issues/77",
            )

    def table(self) -> list[list[str]]:
        """Layer by layer, for people. Sink: the share of attention that the first token gets."""
        rows = [
            ["layer", "dead units", "head output rms", "attention entropy", "largest score", "sink", "residual rms"]
        ]
        for layer in self.layers:
            heads = " ".join(f"{x:.2g}" for x in layer.head_rms.tolist()[:8]) or "-"
            spread = " ".join(f"{x:.2f}" for x in layer.entropy.tolist()[:8]) or "-"
            figures = [
                f"{layer.dead_units:.1%}",
                heads,
                spread,
                f"{layer.score:.1f}",
                f"{layer.sink:.1%}",
                f"{layer.residual:.3g}",
            ]
            rows.append([layer.name, *figures])
        return [*rows, ["lm_head", f"log Z {self.log_z:.2f}", "", "", "", "", ""]]


def inside(where: str, expected: str, got: str, why: str, fix: str, example: str) -> Finding:
    """A finding of R22: measured, but what it does to this model is not proven."""
    return Finding("R22", "warn", "likely", where, expected, got, why, fix, example)


# ---- measuring -----------------------------------------------------------------------------------------------------


def measure(folder: Path) -> Internals:
    """The run's best checkpoint on its held-out text; the same checkpoint is measured once."""
    return measure_checkpoint(folder, find_checkpoint(folder))


@lru_cache(maxsize=4)
def measure_checkpoint(folder: Path, checkpoint: Path) -> Internals:
    """The figures of one checkpoint."""
    loaded = load_checkpoint(checkpoint)
    model, config = loaded.model, loaded.run
    corpus = load_corpus(folder / "tokens", config.model.max_seq_len)
    most = max(1000, config.model.max_seq_len, min(TOKENS, int(WORK / n_parameters(model))))
    batches = eval_batches(corpus.val, 8, config.model.max_seq_len, most, torch.device("cpu"))
    n_tokens = sum(inputs.numel() for inputs, _ in batches)
    if n_tokens < FEWEST_TOKENS:
        raise Skip(f"the held-out text has {n_tokens} tokens, and {FEWEST_TOKENS} are needed")
    layers, log_z = look_inside(model, [inputs for inputs, _ in batches])
    return Internals(
        folder,
        layers,
        log_z,
        untouched(model, config, corpus, loaded.tokenizer),
        n_tokens,
        min(len(corpus.val), 20 * TOKENS),
    )


@torch.no_grad()
def look_inside(model: GPT, batches: list[Tensor]) -> tuple[list[Layer], float]:
    """Token ids (B, T) in batches -> the figures of each block, and the mean log of the softmax's sum."""
    names = {id(module): name for name, module in model.named_modules()}
    seen = {name: Sums() for name in names.values()}
    log_z, n = 0.0, 0

    def see(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            seen[name].take(output)

    wanted = lambda name, module: name.rpartition(".")[2] in ("up_proj", "gate_proj") or module in list(model.blocks)  # noqa: E731
    for module in model.modules():
        if isinstance(module, nn.Module):
            seen[names[id(module)]].limit = INACTIVE[model.config.mlp]
    with watch(model, wanted, see), spies(model, lambda attention, *told: seen[names[id(attention)]].attention(*told)):
        for ids in batches:
            logits = model(ids).float()
            log_z, n = log_z + float(logits.logsumexp(-1).sum()), n + ids.numel()
    return [layer_of(f"blocks.{i}", block, model, seen) for i, block in enumerate(model.blocks)], log_z / n


class Sums:
    """What gathers of one module over the batches."""

    def __init__(self) -> None:
        self.limit, self.n, self.square, self.values = 0.0, 0, 0.0, 0
        self.active: Tensor | None = None
        self.head_square: Tensor | None = None
        self.entropy: Tensor | None = None
        self.score, self.sink, self.rows = 0.0, 0.0, 0

    def take(self, x: Tensor) -> None:
        """An output (B, T, width)."""
        flat = x.float().flatten(0, -2)
        on = (flat > self.limit).sum(0)
        self.active = on if self.active is None else self.active + on
        self.n += len(flat)
        self.square, self.values = self.square + float(flat.square().sum()), self.values + flat.numel()

    def attention(self, weights: Tensor, largest: float, heads: Tensor) -> None:
        """Shares (B, H, T, S), the largest score, and each head's part of the output (H,) as a sum of squares."""
        seen = torch.arange(1, weights.shape[2] + 1).float().clamp_max(weights.shape[3])
        late = seen >= 8  # the first tokens have little to choose from
        if bool(late.any()):
            entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1)[..., late] / seen[late].log()
            part = entropy.sum((0, 2))
            self.entropy = part if self.entropy is None else self.entropy + part
            self.sink += float(weights[..., late, 0].mean(1).sum())
            self.rows += weights.shape[0] * int(late.sum())
        self.score = max(self.score, largest)
        self.head_square = heads if self.head_square is None else self.head_square + heads
        self.n += weights.shape[0] * weights.shape[2]


@contextmanager
def spies(model: GPT, see: Callable[..., None]) -> Iterator[None]:
    """Within it see(attention, shares, largest score, squares of the heads' outputs) is called for each attention."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Attention):
                stack.callback(setattr, module, "attend", module.attend)
                module.attend = spying(module, module.attend, see)
        yield


def spying(module: Attention, attend: Callable[..., Tensor], see: Callable[..., None]) -> Callable[..., Tensor]:
    """attend, which also tells what it attends to."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float
    ) -> Tensor:
        y = attend(q, k, v, mask, causal, dropout, scale)  # (B, H, T, D)
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q @ keys.mT).float() * scale  # (B, H, T, S)
        cap = getattr(attend, "keywords", {}).get("cap")
        scores = cap * torch.tanh(scores / cap) if cap else scores
        T, S = scores.shape[-2:]
        visible = torch.ones(T, S, dtype=torch.bool).tril(S - T) if mask is None else mask
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        largest = float(scores.masked_fill(~visible, 0).abs().max())
        parts = module.o_proj.weight.float().view(module.o_proj.out_features, q.shape[1], -1)  # (C, H, D)
        gram = torch.einsum("chd,che->hde", parts, parts)  # |W y|^2 = y W'W y, head by head
        see(module, weights, largest, ((y.float() @ gram) * y.float()).sum((0, 2, 3)))
        return y

    return call


def layer_of(name: str, block: nn.Module, model: GPT, seen: dict[str, Sums]) -> Layer:
    """The figures of a block, of the first attention and feed-forward in it."""
    layer, sums = Layer(name), seen[name]
    layer.residual = math.sqrt(sums.square / max(1, sums.values))
    gate = "gate_proj" if model.config.mlp in GATES else "up_proj"
    active = seen[f"{name}.mlp.{gate}"].active if f"{name}.mlp.{gate}" in seen else None
    if active is not None:
        layer.dead_units = float((active < ALIVE_SHARE * seen[f"{name}.mlp.{gate}"].n).float().mean())
    attention = seen.get(f"{name}.attn")
    if attention and attention.head_square is not None:
        layer.head_rms = (attention.head_square / max(1, attention.n)).sqrt()
        layer.score, layer.sink = attention.score, attention.sink / max(1, attention.rows)
        layer.entropy = layer.entropy if attention.entropy is None else attention.entropy / attention.rows
    return layer


def untouched(model: GPT, config: RunConfig, corpus: Corpus, tokenizer: Any) -> list[tuple[int, str, int]] | None:
    """Rows of an untied table that are still those drawn at the start and that the held-out text reads, most read first."""
    train = config.train
    decays = train.weight_decay if train.embed_weight_decay == -1 else train.embed_weight_decay
    if config.model.tied or train.embeddings or decays or "embed" in train.freeze:
        return None
    start = build(config.model, config.seed).embed.weight
    same = (model.embed.weight == start).all(-1)
    counts = torch.bincount(torch.from_numpy(corpus.val.array(20 * TOKENS).astype("int64")), minlength=len(same))
    rows = ((counts > 0) & same).nonzero().flatten().tolist()
    return sorted(((row, repr(tokenizer.show(row)), int(counts[row])) for row in rows), key=lambda row: -row[2])

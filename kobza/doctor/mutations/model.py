"""Injected bugs and clean controls for the battery: tiny models of five families, broken by surgery the way released code was.

A mutation changes an instance: its class (a subclass with one method wrong), one part, or the wrapper that computes its loss. All
weights are drawn so that nothing is degenerate: a norm whose weights are all 1 would hide where it casts, a zero head everything.

Shapes: B batch, T tokens, S keys, H heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.config import ModelConfig
from kobza.doctor.models.subject import Subject, subject_of
from kobza.doctor.mutations.proof import Control, Make, Mutation
from kobza.layers import Embedding, Rope
from kobza.model import GPT, View, build

SIZES = dict(vocab_size=67, max_seq_len=160, n_layer=2, n_head=4, n_embd=48)
GLU = dict(n_kv_head=2, n_ff=64, mlp="swiglu", qk_norm=False)
# sqrt(48) = 6.928 is 6.9375 in bf16: a width at which rounding the embedding's scale can be seen
GEMMA = dict(
    n_kv_head=2, n_ff=64, head_dim=16, mlp="geglu_tanh", norm_place="both", norm_offset=True, norm_cast="after"
)
GEMMA |= dict(
    qk_norm=False, attn_softcap=20.0, softcap=30.0, window=7, window_pattern="LG", embed_scale=48**0.5, tied=True
)
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": dict(
        position="learned",
        norm="layernorm",
        qk_norm=False,
        mlp="gelu_tanh",
        bias=True,
        tied=True,
        dropout=0.1,
        norm_eps=1e-5,
    ),
    "llama": GLU,
    "gemma": GEMMA,
    "qwen": GLU | dict(qkv_bias=True, qk_norm=True, qk_norm_weight=True, head_dim=16),
    "phi": GLU | dict(window=9, window_pattern="L", rope_dim=8),
}


def model(family: str, seed: int = 0, **changes: Any) -> GPT:
    """A tiny model of a family with every weight drawn."""
    built = build(ModelConfig(**SIZES | FAMILIES[family] | changes), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise * (0.3 if name.startswith(("embed", "position")) else weight.shape[1] ** -0.5))
            else:
                weight.add_(0.15 * noise)
    return built


def clean(family: str) -> Make:
    """make of a control."""

    def make(_: Path, seed: int, dtype: str) -> Subject:
        subject = subject_of(model(family, seed), family)
        return subject.copy(torch.bfloat16) if dtype == "bf16" else subject

    return make


CONTROLS: tuple[Control, ...] = tuple(Control(family, clean(family)) for family in FAMILIES)

# ---- attention and its mask ----------------------------------------------------------------------------------------------


def attended(change: Callable[..., Tensor], layer: int = 1) -> Callable[[GPT], None]:
    """Give a layer's attention another `attend` (q, k, v, mask, causal, dropout, scale) -> (B, H, T, D)."""

    def apply(built: GPT) -> None:
        built.blocks[layer].attn.attend = change

    return apply


def softmaxed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, hidden: float = float("-inf")
) -> Tensor:
    """Attention written out, in the dtype of q; what mask (T, S) does not show scores `hidden`."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * scale
    scores = scores if mask is None else scores.masked_fill(~mask, hidden)
    return scores.softmax(-1).to(v.dtype) @ v


def causal_mask(q: Tensor, k: Tensor, diagonal: int = 0) -> Tensor:
    """(T, S), True up to each query's own place."""
    T, S = q.shape[2], k.shape[2]
    return torch.ones(T, S, dtype=torch.bool).tril(S - T + diagonal)


def one_ahead(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float
) -> Tensor:
    return softmaxed(q, k, v, causal_mask(q, k, diagonal=1) if causal else mask, scale)


def unmasked_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float
) -> Tensor:
    causal = causal and dropout == 0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale)


def weak_mask(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float
) -> Tensor:
    return softmaxed(q, k, v, causal_mask(q, k) if mask is None else mask, scale, hidden=-5.0)


def low_softmax(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float
) -> Tensor:
    return softmaxed(q, k, v, causal_mask(q, k) if mask is None else mask, scale)


def eighth_bits(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float
) -> Tensor:
    if v.dtype == torch.bfloat16:  # a fused path that keeps values in 8 bits, scaled badly
        v = (v / 448).to(torch.float8_e4m3fn).to(v.dtype) * 448
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


def stale_slot(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float
) -> Tensor:
    if q.shape[2] < k.shape[2]:  # the length is one too large: an empty slot is seen
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = F.pad(causal_mask(q, k[:, :, :-1]) if mask is None else mask, (0, 1), value=True)
    return softmaxed(q, k, v, causal_mask(q, k) if mask is None else mask, scale)


def forgets_first(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float
) -> Tensor:
    if q.shape[2] < k.shape[2]:  # one token is evicted that should have stayed
        k, v = k[:, :, 1:], v[:, :, 1:]
        mask = None if mask is None else mask[..., 1:]
    return softmaxed(q, k, v, causal_mask(q, k) if mask is None else mask, scale)


class MeanOfAll(nn.Module):
    """A block behind which the mean over all tokens is added, the future's included."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = self.block(x, *rest)
        return x + 0.1 * x.mean(1, keepdim=True)


class MeanOfBatch(MeanOfAll):
    """A block behind which rows are mixed, as a norm over the batch would."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = self.block(x, *rest)
        return x - 0.5 * x.mean((0, 1), keepdim=True).detach() * (x.shape[0] > 1)


def wrap_block(wrapper: Callable[[nn.Module], nn.Module], layer: int = 1) -> Callable[[GPT], None]:
    def apply(built: GPT) -> None:
        built.blocks[layer] = wrapper(built.blocks[layer])

    return apply


# ---- the whole forward: subclasses with one line wrong ----------------------------------------------------------------------


def becomes(kind: type[GPT]) -> Callable[[GPT], None]:
    def apply(built: GPT) -> None:
        built.__class__ = kind

    return apply


class ForgetsCausality(GPT):
    """Gemma 2 in transformers 4.42.0: the window's mask takes the place of the causal one."""

    def views(self, positions: Tensor, mask: Tensor | None, past: int, T: int) -> list[View]:
        views = super().views(positions, mask, past, T)
        places = torch.arange(past + T)
        return [views[0], View(views[1].rope, places[past:, None] - places < self.config.window)]


class WindowOff(GPT):
    """The window is `by` tokens wider than the config says."""

    by = 1

    def views(self, positions: Tensor, mask: Tensor | None, past: int, T: int) -> list[View]:
        views = super().views(positions, mask, past, T)
        places = torch.arange(past + T)
        distance = places[past:, None] - places
        near = (distance >= 0) & (distance < self.config.window + self.by)
        return [views[0], View(views[1].rope, near if mask is None else near & mask)]


class WindowNarrow(WindowOff):
    by = -1


class WindowHalf(WindowOff):
    by = -4


class WindowInPrefillOnly(GPT):
    """Decoding sees everything that the cache holds."""

    def views(self, positions: Tensor, mask: Tensor | None, past: int, T: int) -> list[View]:
        views = super().views(positions, mask, past, T)
        return views if past == 0 else [views[0], View(views[1].rope, torch.ones(T, past + T).tril(past).bool())]


class Positions(GPT):
    """A GPT whose positions go through `wrong` first."""

    def wrong(self, positions: Tensor, cached: int, low: bool) -> Tensor:
        raise NotImplementedError

    def hidden(
        self, ids: Tensor, positions: Tensor | None = None, mask: Any = None, cache: Any = None, dtype: Any = None
    ) -> Tensor:
        cached = 0 if cache is None else cache.length
        low = (dtype or self.embed.weight.dtype) == torch.bfloat16
        if positions is None:
            positions = torch.arange(cached, cached + ids.shape[1])
        positions = self.wrong(positions, cached, low).clamp(0, self.config.max_seq_len - 1)
        return super().hidden(ids, positions, mask, cache, dtype)


class OneTooFar(Positions):
    def wrong(self, positions: Tensor, cached: int, low: bool) -> Tensor:
        return positions + 1 if cached else positions


class AlwaysZero(Positions):
    def wrong(self, positions: Tensor, cached: int, low: bool) -> Tensor:
        return positions * 0 if cached else positions


class SharedByRows(Positions):
    """Left padding is counted: every row has the positions of the longest."""

    def wrong(self, positions: Tensor, cached: int, low: bool) -> Tensor:
        return (
            positions
            if positions.ndim == 1
            else torch.arange(cached, cached + positions.shape[1]).expand(positions.shape)
        )


class NeverReset(Positions):
    """Positions run on over packed documents."""

    def wrong(self, positions: Tensor, cached: int, low: bool) -> Tensor:
        return torch.arange(len(positions)) if positions.ndim == 1 and not cached else positions


class LowPositions(Positions):
    """transformers 4.38.0: positions in the dtype of the activations."""

    def wrong(self, positions: Tensor, cached: int, low: bool) -> Tensor:
        return positions.bfloat16().long() if low else positions


class LowPositionsAlways(Positions):
    def wrong(self, positions: Tensor, cached: int, low: bool) -> Tensor:
        return positions.bfloat16().long()


class Unpadded(GPT):
    """The mask of padding is dropped on the way."""

    def hidden(
        self, ids: Tensor, positions: Any = None, mask: Tensor | None = None, cache: Any = None, dtype: Any = None
    ) -> Tensor:
        return super().hidden(ids, positions, mask if mask is None or mask.shape[0] == 1 else None, cache, dtype)


class Unpacked(GPT):
    """The mask of packed documents is dropped, their positions are kept."""

    def hidden(
        self, ids: Tensor, positions: Any = None, mask: Tensor | None = None, cache: Any = None, dtype: Any = None
    ) -> Tensor:
        return super().hidden(ids, positions, None, cache, dtype)


def bumped_at_layer_0(built: GPT) -> None:
    """The first layer counts the new token, and the later ones read the count."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, views, cache = args
        if cache is None or cache.length == 0:
            return args
        positions = torch.arange(cache.length, cache.length + x.shape[1]) + 1
        return (
            x,
            [View(built.rope(positions.clamp(max=built.config.max_seq_len - 1)), view.mask) for view in views],
            cache,
        )

    for block in built.blocks[1:]:
        block.register_forward_pre_hook(hook)


# ---- tables, norms, scales, sizes --------------------------------------------------------------------------------------------


def rounded_frequencies(built: GPT) -> None:
    rope, config = built.rope, built.config
    inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    angles = torch.outer(torch.arange(config.max_seq_len).float(), inverse.bfloat16().float())
    assert isinstance(rope, Rope)
    rope.cos, rope.sin = angles.cos(), angles.sin()


def another_base(built: GPT) -> None:
    built.rope = built.local_rope = Rope(built.config, 500_000.0, False)


def each_norm(**values: Any) -> Callable[[GPT], None]:
    """Set attributes of every RMSNorm."""

    def apply(built: GPT) -> None:
        for name, part in built.named_modules():
            if name.rpartition(".")[2].endswith("norm") and hasattr(part, "cast_late"):
                for key, value in values.items():
                    setattr(part, key, value)

    return apply


def swapped_views(built: GPT) -> None:
    for block in built.blocks:
        block.attn.view = 1 - block.attn.view


def view_of(layer: int, view: int) -> Callable[[GPT], None]:
    def apply(built: GPT) -> None:
        built.blocks[layer].attn.view = view

    return apply


def huge(built: GPT) -> None:
    with torch.no_grad():
        built.blocks[0].mlp.down_proj.weight.mul_(1e6)


def no_scale(built: GPT) -> None:
    built.embed.scale = 1.0


def float_scale(built: GPT) -> None:
    built.embed.__class__ = FloatScale


def live_dropout(built: GPT) -> None:
    built.blocks[0].drop = Always(0.1)


def dead_dropout(built: GPT) -> None:
    built.drop = nn.Identity()
    for block in built.blocks:
        block.drop, block.attn.dropout = nn.Identity(), 0.0


class FloatScale(Embedding):
    """transformers 4.38.0: a Python float, which a product in bf16 does not round."""

    def forward(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        x = F.embedding(ids, self.weight)
        return (x if dtype is None else x.to(dtype)) * self.scale


class Always(nn.Dropout):
    """Dropout that eval() does not switch off."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, training=True)


# ---- losses: a wrapper in the field's convention -----------------------------------------------------------------


class WithLoss(nn.Module):
    """forward(input_ids, labels) -> .logits, .loss: the right one, for the wrong ones to inherit."""

    def __init__(self, inner: GPT):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, num_items_in_batch: Tensor | None = None
    ) -> SimpleNamespace:
        logits = self.inner(input_ids)
        return SimpleNamespace(
            logits=logits, loss=None if labels is None else self.loss(logits, labels, num_items_in_batch)
        )

    def loss(self, logits: Tensor, labels: Tensor, n: Tensor | None) -> Tensor:
        return self.mean(logits[:, :-1], labels[:, 1:], n)

    def mean(self, logits: Tensor, targets: Tensor, n: Tensor | None) -> Tensor:
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        return total / ((targets != -100).sum() if n is None else n)


class ShiftedTwice(WithLoss):
    def loss(self, logits: Tensor, labels: Tensor, n: Tensor | None) -> Tensor:
        return self.mean(logits[:, :-2], labels[:, 2:], n)


class NotShifted(WithLoss):
    def loss(self, logits: Tensor, labels: Tensor, n: Tensor | None) -> Tensor:
        return self.mean(logits, labels, n)


class FlattenedFirst(WithLoss):
    def loss(self, logits: Tensor, labels: Tensor, n: Tensor | None) -> Tensor:
        return self.mean(logits.flatten(0, 1)[None, :-1], labels.flatten()[None, 1:], n)


class PaddingTaught(WithLoss):
    def loss(self, logits: Tensor, labels: Tensor, n: Tensor | None) -> Tensor:
        return super().loss(logits, labels.masked_fill(labels == -100, 0), n)


class LastTargetLost(WithLoss):
    def loss(self, logits: Tensor, labels: Tensor, n: Tensor | None) -> Tensor:
        return self.mean(logits[:, :-4], labels[:, 1:-3], n)


class MeanOfMeans(WithLoss):
    """transformers before 4.46: each micro-batch divides by its own targets, the window by its micro-batches."""

    def mean(self, logits: Tensor, targets: Tensor, n: Tensor | None) -> Tensor:
        own = super().mean(logits, targets, None)
        return own if n is None or len(logits) > 1 else own / 4


class TimesMicroBatches(WithLoss):
    """transformers 4.46.0 where the model does not take the count: a mean that nobody divides by the micro-batches."""

    def mean(self, logits: Tensor, targets: Tensor, n: Tensor | None) -> Tensor:
        return super().mean(logits, targets, None)


class MeanOfRows(WithLoss):
    """Each row's mean, then the mean of rows."""

    def mean(self, logits: Tensor, targets: Tensor, n: Tensor | None) -> Tensor:
        rows = [super(MeanOfRows, self).mean(a[None], b[None], None) for a, b in zip(logits, targets, strict=True)]
        return torch.stack(rows).mean()


class LowLoss(WithLoss):
    def mean(self, logits: Tensor, targets: Tensor, n: Tensor | None) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---- the list ----------------------------------------------------------------------------------------------------------------


def broken(code: str, name: str, family: str, change: Callable[[GPT], Any], **config: Any) -> Mutation:
    """A mutation: change(model) breaks it in place, or returns a module around it."""

    def make(_: Path, seed: int, dtype: str) -> Subject:
        built = model(family, seed, **config)
        subject = subject_of(change(built) or built, f"{family}: {name}")
        return subject.copy(torch.bfloat16) if dtype == "bf16" else subject

    return Mutation(code, name, make)


MUTATIONS: tuple[Mutation, ...] = (
    broken("R1", "tril(diagonal=1) in one layer", "llama", attended(one_ahead)),
    broken("R1", "mask dropped when dropout is on", "gpt2", attended(unmasked_with_dropout, 0)),
    broken("R1", "masked scores are -5", "gpt2", attended(weak_mask)),
    broken("R1", "mean over all tokens added", "qwen", wrap_block(MeanOfAll)),
    broken("G11", "window's mask replaces the causal one", "gemma", becomes(ForgetsCausality)),
    broken("G11", "window in the other layers", "gemma", swapped_views),
    broken("I1", "new tokens one position too far", "llama", becomes(OneTooFar)),
    broken("I1", "new tokens one position too far, learned positions", "gpt2", becomes(OneTooFar)),
    broken("I1", "new tokens always at position 0", "qwen", becomes(AlwaysZero)),
    broken("I1", "count raised by the first layer", "llama", bumped_at_layer_0),
    broken("I2", "length one too large: an empty slot is seen", "llama", attended(stale_slot, 0)),
    broken("I2", "oldest token evicted too early", "llama", attended(forgets_first, 0)),
    broken("I2", "window forgotten while decoding", "phi", becomes(WindowInPrefillOnly)),
    broken("I3", "positions shared by rows", "gpt2", becomes(SharedByRows)),
    broken("I3", "rows mixed in a block", "llama", wrap_block(MeanOfBatch)),
    broken("I3", "mask of padding dropped", "llama", becomes(Unpadded)),
    broken("R7", "packed documents see each other", "llama", becomes(Unpacked)),
    broken("R8", "positions run on over packed documents", "gpt2", becomes(NeverReset)),
    broken("G5", "positions in bf16 under autocast", "llama", becomes(LowPositions), max_seq_len=1100),
    broken("G5", "positions always in bf16", "gemma", becomes(LowPositionsAlways), max_seq_len=1100),
    broken("G6", "frequencies rounded to bf16", "llama", rounded_frequencies),
    broken("G6", "tables of another base", "qwen", another_base),
    broken("P1", "window one wider", "phi", becomes(WindowOff)),
    broken("P1", "window one narrower", "gemma", becomes(WindowNarrow)),
    broken("P1", "window of half the size", "phi", becomes(WindowHalf)),
    broken("P2", "window dropped in one layer", "phi", view_of(1, 0)),
    broken("P2", "window in a global layer", "gemma", view_of(1, 1)),
    broken("R2", "labels shifted twice", "llama", ShiftedTwice),
    broken("R2", "labels not shifted", "gpt2", NotShifted),
    broken("R4", "padding in the loss", "llama", PaddingTaught),
    broken("R6", "flattened before the shift", "qwen", FlattenedFirst),
    broken("R6", "last targets of a row lost", "llama", LastTargetLost),
    broken("R9", "mean of the micro-batches' means", "llama", MeanOfMeans),
    broken("R9", "gradients times the number of micro-batches", "gpt2", TimesMicroBatches),
    broken("R17", "dropout live in eval()", "gpt2", live_dropout),
    broken("R17", "declared dropout does nothing", "gpt2", dead_dropout),
    broken("R17", "mean of rows' means", "llama", MeanOfRows),
    broken("G2", "scale not rounded to bf16", "gemma", float_scale),
    broken("G2", "scale left out", "gemma", no_scale),
    broken("G3", "cast before the offset factor", "gemma", each_norm(cast_late=False)),
    broken("G3", "offset forgotten", "gemma", each_norm(offset=0.0)),
    broken("G14", "one projection a million times too large", "llama", huge),
    broken("R24", "softmax in bf16", "llama", attended(low_softmax)),
    broken("R24", "cross-entropy in bf16", "llama", LowLoss),
    broken("G5", "attention in 8 bits where bf16 was meant", "llama", attended(eighth_bits)),
)

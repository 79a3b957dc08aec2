"""A prompt through a model -> attention weights, logit lens, the distribution of the next token; the model is as before.

The weights are computed beside the attention, not in its place: torch's kernels do not give them out. A test holds them to what
the attention does, weights @ values.

Shapes: T tokens, S keys, H heads, K key/value heads, D head_dim, L layers, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kobza.model import GPT, Attention
from kobza.surgery import watch


@dataclass(frozen=True)
class Trace:
    """What was seen. attention: module name -> (H, T, T), rows sum to 1. lens: layer name -> (T, V) logits that the head would
    give there. rms: layer name -> (T,) size of the residual stream. logits (V,): scores of the next token."""

    attention: dict[str, Tensor]
    lens: dict[str, Tensor]
    rms: dict[str, Tensor]
    logits: Tensor


@torch.no_grad()
def record(model: GPT, ids: list[int]) -> Trace:
    """Send ids (T,) through a model in eval mode and take down what happens."""
    streams: dict[str, Tensor] = {}

    def see(name: str, output: Any) -> None:
        streams[name] = output[0].float()  # (T, C)

    blocks = {f"blocks.{i}" for i in range(len(model.blocks))}
    with attention_weights(model) as attention, watch(model, lambda name, _: name in blocks | {"drop"}, see):
        logits = model(torch.tensor([ids], device=next(model.parameters()).device))[0, -1]  # (V,)
    streams = {"embedding" if name == "drop" else name: x for name, x in streams.items()}
    lens = {name: model.logits(model.norm(x.to(logits.dtype))).float().cpu() for name, x in streams.items()}
    rms = {name: x.square().mean(-1).sqrt().cpu() for name, x in streams.items()}
    return Trace(attention, lens, rms, logits.float().cpu())


@contextmanager
def attention_weights(model: GPT) -> Iterator[dict[str, Tensor]]:
    """Within the context every forward of one row leaves its attention weights, (H, T, S) a module, in the dict."""
    found: dict[str, Tensor] = {}
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    plain = {name: module.attend for name, module in modules.items()}
    for name, module in modules.items():
        module.attend = beside(plain[name], name, found, model.config.attn_softcap)
    try:
        yield found
    finally:
        for name, module in modules.items():
            module.attend = plain[name]


def beside(attend: Any, name: str, found: dict[str, Tensor], cap: float) -> Any:
    """`attend` that also leaves its weights."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, dropout: float, scale: float) -> Tensor:
        found[name] = weights(q, k, mask, causal, scale, cap)[0].cpu()
        return attend(q, k, v, mask, causal, dropout, scale)

    return call


def weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, cap: float) -> Tensor:
    """Whom each query looks at and how much. q (B, H, T, D), k (B, K, S, D) -> (B, H, T, S), float32, rows sum to 1."""
    T, S = q.shape[2], k.shape[2]
    scores = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * scale  # (B, H, T, S)
    scores = cap * torch.tanh(scores / cap) if cap else scores
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril() if causal else mask
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)

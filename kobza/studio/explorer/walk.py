"""A prompt on its way through a model: what each part put out, in the order in which it ran, with shapes and a few numbers.

`walk` sends the ids once and takes down what passes: the modules' outputs by `kobza.surgery.watch`, and what no module puts out
(rotary turning, scores, softmax, mixing) where attention calls its kernel. path.py shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kobza.model import GPT, Attention
from kobza.surgery import watch


@dataclass(frozen=True)
class Step:
    """One arrow: what was done, what came out (shape, dtype, figures of all its numbers), and the weights that did it.

    name: the module's, or its attention's with what happens in it: "blocks.0.attn.softmax". stream: this is the residual stream.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: float
    mean: float
    high: float
    rms: float
    first: tuple[float, ...]
    parameters: int
    stream: bool

    @property
    def block(self) -> int | None:
        """Which block it lies in: 2 for "blocks.2.attn"."""
        parts = self.name.split(".")
        return int(parts[1]) if parts[0] == "blocks" else None

    @property
    def leaf(self) -> str:
        """Its last word: "q_proj"."""
        return self.name.rpartition(".")[2]


@torch.no_grad()
def walk(model: GPT, ids: list[int]) -> tuple[list[Step], Tensor]:
    """ids (T,) through a model in eval mode -> every step, and the logits of the next token (V,)."""
    steps: list[Step] = []
    modules = dict(model.named_modules())

    def note(name: str, x: Tensor) -> None:
        module = modules.get(name, nn.Identity())
        steps.append(measured(name, x, sum(p.numel() for p in module.parameters(recurse=False))))

    def see(name: str, output: Any) -> None:
        if isinstance(output, Tensor):  # rope puts out a pair, and acts within the attention
            note(name, output)

    with ExitStack() as stack:
        for name, module in modules.items():
            if isinstance(module, Attention):
                stack.enter_context(kernel_seen(module, name, model.config.attn_softcap, note))
        stack.enter_context(watch(model, lambda name, module: is_step(name, module), see))
        logits = model(torch.tensor([ids], device=next(model.parameters()).device))[0]  # (T, V)
    note("logits", logits[None])
    p = logits[-1].float().softmax(-1)
    note("softmax", p)
    return steps, logits[-1].float().cpu()


def is_step(name: str, module: nn.Module) -> bool:
    """Whether a module's output is worth an arrow: leaves that do something, and the sums that are the residual stream."""
    if name.endswith("_sum_norm") or name == "drop":
        return True  # an identity, often; its output is x after the addition
    return not isinstance(module, nn.Identity) and not list(module.children()) and "ahead" not in name


@contextmanager
def kernel_seen(module: Attention, name: str, cap: float, note: Any) -> Iterator[None]:
    """Within the context what goes into the attention's kernel and comes out of it is noted."""
    plain = module.attend

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, dropout: float, scale: float) -> Tensor:
        note(f"{name}.q", q)  # (B, H, T, D)
        note(f"{name}.k", k)  # (B, K, S, D)
        note(f"{name}.v", v)
        scores = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * scale  # (B, H, T, S)
        scores = cap * torch.tanh(scores / cap) if cap else scores
        note(f"{name}.scores", scores)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril() if causal else mask
        note(f"{name}.softmax", (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1))
        y = plain(q, k, v, mask, causal, dropout, scale)
        note(f"{name}.mix", y)
        return y

    module.attend = call
    try:
        yield
    finally:
        module.attend = plain


def measured(name: str, x: Tensor, parameters: int) -> Step:
    """The figures of a tensor."""
    wide = x.float()
    low, high, mean, rms = torch.stack([wide.min(), wide.max(), wide.mean(), wide.square().mean().sqrt()]).tolist()
    first = tuple(wide.reshape(-1, wide.shape[-1])[-1, :4].tolist())  # of the last token
    stream = name == "drop" or name.endswith("_sum_norm")
    return Step(
        name, tuple(x.shape), str(x.dtype).removeprefix("torch."), low, mean, high, rms, first, parameters, stream
    )

"""Which kernels serve a model on a device: `use` puts them in place and says of each whether it was taken, and why not.

A kernel is taken where its part of the model is there, the device runs Triton, and a trial on that very device, outputs and
gradients against float64, finds it as near as the plain form. So a compiler that is missing or a GPU that computes otherwise
costs speed and not a run. What is not taken stays torch's own. `TRITON_INTERPRET=1`, Triton's switch, runs all of it on a CPU,
slowly: the tests do.

Swapping is surgery on a finished model: the new module is the plain one's subclass over the plain one's own weights, names and
hooks, so checkpoints, optimizers and adapters see no difference. Nothing here imports Triton before `missing` says it is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kobza.kernels.head_loss import model_head_loss
from kobza.kernels.lora import is_lora
from kobza.kernels.trial import errors
from kobza.layers import GatedMLP, RMSNorm
from kobza.model import GPT, Attention
from kobza.surgery import replace_modules

HeadLoss = Callable[[GPT, Tensor, Tensor], Tensor]  # model, x (N, C), targets (N,) -> summed cross-entropy, float32


class Choice(NamedTuple):
    """A kernel, whether it is in use, and why or why not."""

    name: str
    taken: bool
    why: str


class Kernel(NamedTuple):
    """A kernel, which modules it serves, and what is said where there are none."""

    name: str
    serves: Callable[[nn.Module], bool]
    nothing: str


KERNELS = (
    Kernel("rms_norm", lambda module: type(module) is RMSNorm, "no RMSNorm in this model"),
    Kernel("rope", lambda module: type(module) is Attention, "no attention in this model"),
    Kernel("glu", lambda module: type(module) is GatedMLP, "no gated feed-forward in this model"),
    Kernel("lora", is_lora, "no LoRA in this model"),
)


def use(model: GPT, device: torch.device, compute_dtype: torch.dtype) -> list[Choice]:
    """Put every kernel in place that serves this model on this device -> what was taken and why the rest was not.

    A model gets its adapter before. Of the head with its loss the Choice only tells; `head_loss_for` gives it."""
    choices = [choose(model, kernel, device, compute_dtype) for kernel in KERNELS]
    why = missing(device, compute_dtype) or failing("head_loss", device, compute_dtype)
    return [*choices, Choice("head_loss", not why, why or "the logits of a few rows at a time")]


def choose(model: GPT, kernel: Kernel, device: torch.device, dtype: torch.dtype) -> Choice:
    """Put one kernel in place, or say why not."""
    n_served = sum(map(kernel.serves, model.modules()))
    why = missing(device, dtype) or ("" if n_served else kernel.nothing) or failing(kernel.name, device, dtype)
    if not why:
        replace_modules(model, lambda _, module: kernel.serves(module), with_kernel)
    return Choice(kernel.name, not why, why or f"in {n_served} modules")


def with_kernel(plain: nn.Module) -> nn.Module:
    """The kernel's module over the very same weights, children, hooks and settings."""
    from kobza.kernels.triton.modules import kernel_kind

    kind = kernel_kind(type(plain))
    swapped = kind.__new__(kind)
    vars(swapped).update(vars(plain))
    return swapped


def head_loss_for(device: torch.device, model: GPT) -> HeadLoss:
    """The head with its loss: Triton's where it runs and is right, else the same in plain torch; neither holds all logits."""
    dtype = next(model.parameters()).dtype
    if missing(device, dtype) or failing("head_loss", device, dtype):
        return model_head_loss
    from kobza.kernels.triton.modules import kernel_head_loss

    return kernel_head_loss


def missing(device: torch.device, dtype: torch.dtype) -> str:
    """What Triton lacks here; "" if nothing."""
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if device.type != "cuda" and not interpreted:
        return f"{device.type}: torch's own"
    if find_spec("triton") is None:
        return 'no triton: pip install "kobza[kernels]"'
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    if dtype == torch.bfloat16 and capability < (8, 0):
        return (
            f"Triton's bf16 wants compute capability 8.0 and this device has {capability[0]}.{capability[1]}; take fp16"
        )
    return ""


@cache
def failing(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with a kernel on this device, found by trying it; "" if nothing."""
    try:
        from kobza.kernels.triton.trials import TRIALS

        plain, fast, inputs = TRIALS[name](dtype)
        found = errors(plain, fast, [x.detach().to(device).requires_grad_(x.requires_grad) for x in inputs])
    except Exception as error:  # a compiler's, a driver's, a launch's: whatever it is, the plain form is there
        return f"fails here: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    bad = [pair for pair in found if not pair[0] <= 4 * pair[1] + 1e-5]  # so that nan is bad
    return f"wrong here by {bad[0][0]:.1e}, the plain form by {bad[0][1]:.1e}" if bad else ""

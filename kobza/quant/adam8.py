"""AdamW whose two means are kept in 8 bits: 2.03 bytes a weight in place of 8. Dettmers et al. 2022.

    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
    w <- w (1 - rate decay) - rate m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

m and v are codes in blocks of 256 (blocks.py). A step takes a stretch of them into float32, updates, and puts it back, so what
is needed besides is a few megabytes; small weights, as an adapter's are, share a stretch. A weight of fewer than 4,096 numbers
keeps both in float32: there is little to save, and it is the biases and gains that coarse steps hurt.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kobza.quant.blocks import dequantize_blocks, dynamic, quantize_blocks

BLOCK = 256
SMALLEST = 4096  # numbers of a weight that is worth it; bitsandbytes' min_8bit_size
CHUNK = 1 << 16  # numbers at a time on a CPU: they stay in a core's own cache
SIGNED = {"exp_avg": True, "exp_avg_sq": False}

Stretch = list[tuple[nn.Parameter, slice]]


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with decoupled decay, as kobza's own, its state in 8 bits."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._state(parameter)
                    state["step"] += 1
                    kind = (state["step"].item(), state["exp_avg"].dtype, parameter.dtype, parameter.device)
                    alike.setdefault(kind, []).append(parameter)
            for (n_steps, *_, device), parameters in alike.items():
                for stretch in stretches(parameters, CHUNK if device.type == "cpu" else 64 * CHUNK):
                    self._update(stretch, n_steps, group)

    def _update(self, stretch: Stretch, n_steps: float, group: dict[str, Any]) -> None:
        """One step of one stretch."""
        beta1, beta2 = group["betas"]
        rate, root = group["lr"] / (1 - beta1**n_steps), math.sqrt(1 - beta2**n_steps)
        weights = [parameter.view(-1)[here] for parameter, here in stretch]
        w, g = joined(weights), joined([parameter.grad.reshape(-1)[here] for parameter, here in stretch]).float()
        m = self._read("exp_avg", stretch).lerp_(g, 1 - beta1)
        v = self._read("exp_avg_sq", stretch).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        self._write("exp_avg", stretch, m)
        self._write("exp_avg_sq", stretch, v)
        w.mul_(1 - group["lr"] * group["weight_decay"])
        w.addcdiv_(m, v.sqrt().div_(root).add_(group["eps"]), value=-rate)
        if len(weights) > 1:  # else w is the weight itself
            put(weights, w)

    def _read(self, name: str, stretch: Stretch) -> Tensor:
        """A stretch of a mean, in float32."""
        stored = joined([self.state[parameter][name][here] for parameter, here in stretch])
        if stored.dtype == torch.float32:
            return stored
        scales = joined([self.state[parameter][f"{name}_scale"][blocks(here)] for parameter, here in stretch])
        return dequantize_blocks(stored, scales, BLOCK, dynamic(SIGNED[name], stored.device))

    def _write(self, name: str, stretch: Stretch, mean: Tensor) -> None:
        """Put a stretch of a mean back."""
        stored = [self.state[parameter][name][here] for parameter, here in stretch]
        if stored[0].dtype == torch.float32:
            put(stored, mean)
            return
        codes, scales = quantize_blocks(mean, BLOCK, dynamic(SIGNED[name], mean.device))
        put(stored, codes)
        put([self.state[parameter][f"{name}_scale"][blocks(here)] for parameter, here in stretch], scales)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            small = parameter.numel() < SMALLEST
            state["step"] = torch.zeros(())  # stays on the CPU: read each step, without waiting for the device
            for name in SIGNED:
                kind = torch.float32 if small else torch.uint8
                state[name] = torch.zeros(parameter.numel(), dtype=kind, device=parameter.device)
                if not small:
                    n_blocks = -(-parameter.numel() // BLOCK)
                    state[f"{name}_scale"] = torch.zeros(n_blocks, device=parameter.device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; the base class would turn the codes into the weights' own number format."""
        super().load_state_dict(state_dict)
        indices = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for index, parameter in zip(indices, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][name] = value.to("cpu" if name == "step" else parameter.device)


def stretches(parameters: list[nn.Parameter], size: int) -> Iterator[Stretch]:
    """The weights in pieces, at most `size` numbers together; a block cut short ends its stretch, so that blocks stay blocks."""
    stretch: Stretch = []
    room = size
    for parameter in parameters:
        start, end = 0, parameter.numel()
        while start < end:
            here = slice(start, min(start + room, end))
            stretch.append((parameter, here))
            start, room = here.stop, room - (here.stop - here.start)
            if room % BLOCK or room == 0:
                yield stretch
                stretch, room = [], size
    if stretch:
        yield stretch


def blocks(here: slice) -> slice:
    """The scales of a piece, which starts with a block."""
    return slice(here.start // BLOCK, -(-here.stop // BLOCK))


def joined(pieces: list[Tensor]) -> Tensor:
    """One tensor; of a single piece the piece itself."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def put(pieces: list[Tensor], values: Tensor) -> None:
    """Hand the values out to the pieces, in order."""
    torch._foreach_copy_(pieces, list(values.split([len(piece) for piece in pieces])))

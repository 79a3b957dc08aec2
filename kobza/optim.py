"""Which weights learn, how fast and by what: parameter groups (checked to be a partition), optimizers, schedules.

Every optimizer goes through the same groups, so rates and decays of tables, head, matrices, vectors and layers mean the same
in each. Decay is decoupled everywhere: w <- w (1 - rate decay), then the update. A schedule is a function step -> multiplier.
The loop that calls them is train.py's; what is minimised is loss.py's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kobza.config import TrainConfig


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable weights as {"tables", "head", "vectors", "matrices"}: the token and position tables, an untied lm_head,
    everything of one axis, and what is inside the blocks and extra heads. Together every trainable weight exactly once."""
    groups: dict[str, list[nn.Parameter]] = {"tables": [], "head": [], "vectors": [], "matrices": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group(name, parameter)].append(parameter)
    check_partition(model, groups)
    return groups


def _group(name: str, parameter: nn.Parameter) -> str:
    if parameter.ndim < 2:
        return "vectors"
    inside = name.startswith(("blocks.", "ahead."))
    return "matrices" if inside else "head" if name.startswith("lm_head.") else "tables"


def check_partition(model: nn.Module, groups: dict[str, list[nn.Parameter]]) -> None:
    """Raise unless the groups hold every trainable weight of the model once."""
    grouped = [id(p) for parameters in groups.values() for p in parameters]
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    twice = [trainable.get(i, "?") for i in grouped if grouped.count(i) > 1]
    missing = [name for i, name in trainable.items() if i not in set(grouped)]
    assert not twice and not missing and len(grouped) == len(trainable), f"twice: {twice}; in no group: {missing}"


def spare_the_compiler() -> None:
    """Keep torch's optimizers from importing torch.compile's machinery (a second at start-up), which their set-up methods do on
    their first call only to hide from it. Each is marked as hidden already; where torch has no such mark, nothing changes."""
    for method in vars(torch.optim.Optimizer).values():
        inner = getattr(method, "__wrapped__", None)
        if inner is not None:
            inner.__dict__.setdefault("__dynamo_disable", inner)


def rated_groups(model: nn.Module, config: TrainConfig) -> dict[str, list[dict[str, Any]]]:
    """The groups with their rates and decays, each kind split where layer_lr_decay gives its blocks different rates."""
    table_decay = config.weight_decay if config.embed_weight_decay == -1 else config.embed_weight_decay
    matrix_lr = config.muon_lr if config.optimizer == "muon" else config.lr
    settings = {
        "tables": (config.embed_lr or config.lr, table_decay),
        "head": (config.head_lr or config.lr, table_decay),
        "vectors": (config.lr, 0.0),
        "matrices": (matrix_lr, config.weight_decay),
    }
    shares = layer_shares(model, config.layer_lr_decay)
    groups: dict[str, list[dict[str, Any]]] = {}
    for kind, parameters in parameter_groups(model).items():
        (rate, decay), by_share = settings[kind], {}
        for parameter in parameters:
            by_share.setdefault(shares[id(parameter)], []).append(parameter)
        groups[kind] = [{"params": p, "lr": rate * share, "weight_decay": decay} for share, p in by_share.items()]
    return groups


def layer_shares(model: nn.Module, decay: float) -> dict[int, float]:
    """id of each weight -> its share of the rate: decay to the power of the blocks above it; 1 outside the blocks.
    Howard & Ruder 2018 (discriminative fine-tuning); the tables have embed_lr."""
    names = {id(parameter): name.split(".") for name, parameter in model.named_parameters()}
    layers = {key: int(parts[1]) for key, parts in names.items() if parts[0] == "blocks"}
    top = max(layers.values(), default=0)
    return {key: decay ** (top - layers[key]) if key in layers else 1.0 for key in names}


def make_optimizers(
    model: nn.Module, config: TrainConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """One optimizer over all trainable weights, or AdamW and Muon (its products in `dtype`), Muon over the matrices. Vectors
    never decay. Each group keeps its peak rate as "peak_lr"; `set_lr` multiplies it."""
    spare_the_compiler()
    groups = rated_groups(model, config)
    matrices = groups.pop("matrices") if config.optimizer == "muon" else []
    rest = [group for kind in groups.values() for group in kind]
    optimizers: list[torch.optim.Optimizer] = []
    betas = (config.beta1, config.beta2)
    if rest and config.optimizer == "sgd":
        optimizers.append(SGD(rest, config.lr, config.momentum))
    elif rest:
        optimizers.append((Lion if config.optimizer == "lion" else AdamW)(rest, config.lr, betas))
    if matrices:  # not all frozen
        dtype = torch.float32 if dtype == torch.float16 else dtype  # fp16 overflows in the iteration
        optimizers.append(Muon(matrices, config.muon_lr, config.momentum, dtype=dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], multiplier: float) -> None:
    """Give every group its peak rate times `multiplier`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * multiplier


def schedule(config: TrainConfig) -> Callable[[int], float]:
    """step (0, 1, ...) -> share of the peak rate: a rise over warmup_steps, then the named shape down to lr_floor.
    inverse_sqrt: with n = step + 1 and w = warmup_steps + 1, min(n / w, sqrt(w / n)), at least lr_floor. Vaswani et al. 2017."""
    warmup, steps, floor = config.warmup_steps, config.steps, config.lr_floor

    def falling(progress: float) -> float:  # progress 0..1 after warm-up -> 1..0
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if config.schedule == "linear":
            return 1 - progress
        if config.schedule == "wsd":
            return min(1.0, (1 - progress) / config.decay_fraction)
        return 1.0

    def multiplier(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "inverse_sqrt":  # no end in it: a run may go on for ever
            return max(floor, ((warmup + 1) / (step + 1)) ** 0.5)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * falling(progress)

    return multiplier


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) by torch's fused kernel; equal to torch.optim.AdamW(fused=True) to the bit.

    Torch's own class imports torch.compile's machinery on its first step, a second that a short run does not have.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.0
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings | {"fused": True})  # so a resumed `step` goes to its weight's device

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state(p) for p in parameters]
            means, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
            if not parameters:
                continue
            torch._foreach_add_(steps, 1)
            settings = {"lr": group["lr"], "beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"]}
            settings |= {"weight_decay": group["weight_decay"], "amsgrad": False, "maximize": False}
            gradients = [p.grad for p in parameters]
            torch._fused_adamw_(parameters, gradients, means, squares, [], steps, **settings)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


class Lion(torch.optim.Optimizer):
    """The sign of a mean of gradients: u = sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g. Chen et al. 2023.

    Every weight moves by the rate at each step, so it wants a lower rate and a higher decay than AdamW; half AdamW's memory.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients, means = [p.grad for p in parameters], [buffer_of(self, p, "exp_avg") for p in parameters]
            updates = torch._foreach_lerp(means, gradients, 1 - group["betas"][0])
            torch._foreach_sign_(updates)
            shrink(parameters, group)
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
            torch._foreach_lerp_(means, gradients, 1 - group["betas"][1])


class SGD(torch.optim.Optimizer):
    """Gradient descent with Nesterov's momentum, torch.optim.SGD(nesterov=True) to the bit, but with decoupled decay.
    Sutskever et al. 2013; the decay is that of SGDW in Loshchilov & Hutter 2019."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients, buffers = (
                [p.grad for p in parameters],
                [buffer_of(self, p, "momentum_buffer") for p in parameters],
            )
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            updates = torch._foreach_add(gradients, buffers, alpha=group["momentum"])  # Nesterov: look one step ahead
            shrink(parameters, group)
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def shrink(parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
    """Decoupled decay, w <- w (1 - rate decay), in place. Loshchilov & Hutter 2019."""
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])


def buffer_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str) -> Tensor:
    """A state tensor of a weight, zeros at first."""
    state = optimizer.state[parameter]
    if key not in state:
        state[key] = torch.zeros_like(parameter)
    return state[key]


# Coefficients of the quintic that pulls singular values to about 1 in few steps. Jordan 2024, "Muon".
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(stack: Tensor, n_steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix of each in a stack, roughly: singular values move into about [0.7, 1.2].
    (N, rows, cols) -> the same shape, by the Newton-Schulz iteration x <- a x + (b s + c s^2) x with s = x x^T."""
    a, b, c = QUINTIC
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(n_steps):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised, for matrices. Jordan et al. 2024.

    Matrices of the same sides are stacked and orthogonalised together: a handful of large products instead of many small.
    The update has unit spectral norm times sqrt(max(1, rows / cols)), so one rate fits all widths.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        n_steps: int = 5,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "n_steps": n_steps})
        self.dtype = dtype  # of the orthogonalisation; bf16 is enough (Jordan 2024)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_sides: dict[tuple[int, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_sides.setdefault((min(parameter.shape), max(parameter.shape)), []).append(parameter)
            for parameters in by_sides.values():
                self._step_stack(parameters, group)

    def _step_stack(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update matrices of the same two sides together, the tall ones turned."""
        momentum = group["momentum"]
        gradients = [p.grad for p in parameters]
        buffers = [buffer_of(self, p, "momentum_buffer") for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        directions = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov: look one step ahead
        tall = [p.shape[0] > p.shape[1] for p in parameters]
        stack = torch.stack([d.mT if turn else d for d, turn in zip(directions, tall, strict=True)])  # (N, short, long)
        updates = orthogonalize(stack.to(self.dtype), group["n_steps"]).to(stack.dtype).unbind()
        shrink(parameters, group)
        for parameter, update, turn in zip(parameters, updates, tall, strict=True):
            rows, cols = parameter.shape
            parameter.add_(update.mT if turn else update, alpha=-group["lr"] * max(1.0, rows / cols) ** 0.5)

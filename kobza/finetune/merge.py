"""An adapter merged into its base, with a report of what that changed: W becomes W + s B A, of DoRA m (W + s B A) / |W + s B A|.

Sums are float32 and the result is rounded once, to the number format the model will be saved in. Onto a grid of 4 bits nothing is
merged: its steps are larger than the change (Q4_0: the rounding is 1.0 times the change, the fine-tune is gone).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kobza.config import require
from kobza.finetune.lora import LoraLinear, Projection, adapters, row_lengths
from kobza.layers import Linear, widen


class Merged(NamedTuple):
    """One module: |change| / |W|, and the share of the change that rounding to the target format took back or added."""

    name: str
    change: float
    lost: float


class MergeReport(NamedTuple):
    """What a merge did; largest and mean difference of the measured log-probabilities, None where none were measured."""

    modules: tuple[Merged, ...]
    largest: float | None
    mean: float | None


@torch.no_grad()
def merge(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    measure: Callable[[nn.Module], Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> MergeReport:
    """Fold the adapter into the model, whose modules are then those of its base; merged weights hold numbers of `dtype`, wide.

    measure(model) -> log-probabilities of some rows, called before and after in eval mode. weights: (out, in) of each quantised
    layer by name, 16 bits or more, to merge onto: the base's own, or `dequantised(model)`.
    """
    found, coarse = adapters(model), quantised(model)
    require(bool(found), "the model has no adapter: it was merged already, or never had one")
    check_weights(coarse, weights)
    for name, module in found.items():
        whole = all(bool(p.isfinite().all()) for p in module.parameters(recurse=False))
        require(whole, f"{name}: its adapter holds what is not a finite number; take an earlier checkpoint")
    before = None if measure is None else in_eval(model, measure)
    report = []
    for name in found.keys() | coarse.keys():
        kept = plain(model.get_submodule(name), None if name not in coarse else weights[name])
        if name in found:
            made, old = merged_weight(found[name], kept.weight), widen(kept.weight)
            rounded = made.to(dtype).to(made.dtype)
            fits = bool(rounded.isfinite().all())
            require(
                fits, f"{name}: a merged weight of {float(made.abs().max()):.3g} is beyond {dtype}; take torch.bfloat16"
            )
            change, size = float((made - old).norm()), float(old.norm())
            lost = float((rounded - made).norm()) / change if change else 0.0
            report.append(Merged(name, change / size if size else float("inf"), lost))
            kept.weight = nn.Parameter(rounded)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, kept)
    model.requires_grad_(True)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    modules = tuple(sorted(report, key=lambda module: order[module.name]))
    if measure is None:
        return MergeReport(modules, None, None)
    apart = (in_eval(model, measure) - before).abs()
    return MergeReport(modules, float(apart.max()), float(apart.mean()))


def merged_weight(module: LoraLinear, weight: Tensor) -> Tensor:
    """What the adapter makes of W, (out, in), float32 or wider."""
    made = module.adapted(weight)
    return made if module.magnitude is None else made * (module.magnitude / row_lengths(made))[:, None]


def plain(module: nn.Module, weight: Tensor | None) -> nn.Linear:
    """The base of an adapter, or the layer itself: a float one as it is, of a quantised one a Linear with `weight`."""
    base = module.base if isinstance(module, LoraLinear) else module
    if weight is None:
        return base
    made = Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    made.weight, made.bias = nn.Parameter(weight), None if base.bias is None else nn.Parameter(base.bias)
    return made.train(module.training)


def quantised(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers, wrapped or not, by the name they have without an adapter, whose weight is made when asked for."""
    found = {name: m.base if isinstance(m, LoraLinear) else m for name, m in model.named_modules()}
    within = {id(module.base) for module in adapters(model).values()}
    return {
        name: module
        for name, module in found.items()
        if isinstance(module, Projection) and "weight" not in module._parameters
        if isinstance(model.get_submodule(name), LoraLinear) or id(module) not in within
    }


def dequantised(model: nn.Module) -> dict[str, Tensor]:
    """The weights of quantised layers as they are used, which is what the adapter was trained beside."""
    return {name: module.weight.detach() for name, module in quantised(model).items()}


def check_weights(coarse: Mapping[str, nn.Module], weights: Mapping[str, Tensor] | None) -> None:
    """Refuse a merge onto few bits, and weights that are not the layers'."""
    first = next(iter(coarse), "")
    remedy = "merge onto the 16-bit base, or onto these weights dequantised, and quantise the result"
    require(
        not coarse or weights is not None, f"{first} is kept in 4 bits, whose steps would erase the change; {remedy}"
    )
    for name, module in coarse.items():
        require(
            name in weights, f"no weight for {name}, which is kept in 4 bits; name the base the adapter was trained on"
        )
        shape, wanted = tuple(weights[name].shape), (module.out_features, module.in_features)
        require(
            shape == wanted, f"the base's {name} is {shape} and the adapter's {wanted}; name the base it was trained on"
        )


def in_eval(model: nn.Module, measure: Callable[[nn.Module], Tensor]) -> Tensor:
    """measure(model) with the model in eval mode, then as it was."""
    was_training = model.training
    model.eval()
    measured = measure(model)
    model.train(was_training)
    return measured

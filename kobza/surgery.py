"""The one way to change or observe a built model: replace_modules, freeze, compute_in_float32, watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from kobza.config import nearest, require

Match = Callable[[str, nn.Module], bool]


def replace_modules(model: nn.Module, match: Match, make: Callable[[nn.Module], nn.Module]) -> list[str]:
    """Put make(module) where match(name, module) holds -> the names replaced. No match at all is an error.

    replace_modules(model, lambda name, m: name.endswith("q_proj"), with_lora) -> ["blocks.0.attn.q_proj", ...]
    """
    found = _matching(model, lambda name, module: bool(name) and match(name, module))
    for name, module in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make(module))
    return [name for name, _ in found]


def find_modules(model: nn.Module, patterns: str, setting: str) -> dict[str, nn.Module]:
    """Modules by name, for patterns with commas between them; one without a match is refused under the setting's name.

    find_modules(model, "lm_head,blocks.*.attn", "train.freeze") -> {"blocks.0.attn": ..., "blocks.1.attn": ..., "lm_head": ...}
    """
    modules, wanted = {name: module for name, module in model.named_modules() if name}, set()
    for pattern in (word.strip() for word in patterns.split(",")):
        matching = [name for name in modules if fnmatchcase(name, pattern)]
        alike = [name for name in modules if name.count(".") == pattern.count(".")]
        require(bool(matching), f"{setting}: the model has no module {pattern!r}{nearest(pattern, alike)}")
        wanted.update(matching)
    return {name: module for name, module in modules.items() if name in wanted}


def freeze(model: nn.Module, patterns: str) -> list[str]:
    """Keep the weights of the named modules as they are -> the names. freeze(model, "embed,blocks.0") -> [those two]"""
    found = find_modules(model, patterns, "train.freeze")
    for name, module in found.items():
        require(any(True for _ in module.parameters()), f"train.freeze: {name} has no weights; leave it out")
        module.requires_grad_(False)
    learning = any(parameter.requires_grad for parameter in model.parameters())
    require(learning, f"train.freeze {patterns!r} freezes every weight, so nothing can learn; leave one module out")
    return list(found)


def compute_in_float32(model: nn.Module, patterns: str) -> list[str]:
    """Let the modules of the patterns compute in float32 whatever flows in -> their names. Their output returns to the number
    format that came in, except of lm_head, whose logits the loss reads in float32 anyway. Names of weights stay."""
    found = find_modules(model, patterns, "train.fp32_parts")
    for name, module in found.items():
        wide = name.split(".")[0] in ("embed", "position", "rope", "local_rope")
        require(not wide, f"train.fp32_parts: {name} is a table, float32 in every precision; leave it out")
        for part in module if isinstance(module, nn.ModuleList) else [module]:  # nobody calls the list itself
            hooks = Float32(returns=name != "lm_head")
            part.register_forward_pre_hook(hooks.enter, with_kwargs=True)
            part.register_forward_hook(hooks.leave)
    return list(found)


class Float32:
    """The two hooks of a module that computes in float32."""

    def __init__(self, returns: bool):
        self.returns, self.dtype = returns, torch.float32

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Widen what comes in and note what the first of it, the activations, came as."""
        self.dtype = args[0].dtype
        return tuple(self.widen(value) for value in args), kwargs

    def leave(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Give the output the number format that came in."""
        return output.to(self.dtype) if self.returns else output

    def widen(self, value: Any) -> Any:
        """A bf16 or fp16 tensor in float32, anything else as it is."""
        half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if half else value


@contextmanager
def watch(model: nn.Module, match: Match, see: Callable[[str, Any], None]) -> Iterator[None]:
    """Within the context see(name, output) is called after the forward of each matching module; gone afterwards."""
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: see(name, output))
        for name, module in _matching(model, match)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _matching(model: nn.Module, match: Match) -> list[tuple[str, nn.Module]]:
    """The modules where match(name, module) holds; none at all is refused."""
    modules = list(model.named_modules())
    found = [(name, module) for name, module in modules if match(name, module)]
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name, _ in modules if name}))
    require(bool(found), f"no module of {type(model).__name__} matches; its modules: {leaves}")
    return found

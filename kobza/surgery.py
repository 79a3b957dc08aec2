"""replace_modules(model, match, make) and watch(model, match, see): the one way to change or observe a built model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from kobza.config import InputError

Match = Callable[[str, nn.Module], bool]


def replace_modules(model: nn.Module, match: Match, make: Callable[[nn.Module], nn.Module]) -> list[str]:
    """Put make(module) where match(name, module) holds -> the names replaced. No match at all is an error.

    replace_modules(model, lambda name, m: name.endswith("q_proj"), with_lora) -> ["blocks.0.attn.q_proj", ...]
    """
    found = [(name, module) for name, module in model.named_modules() if name and match(name, module)]
    if not found:
        raise InputError(f"no module of {type(model).__name__} matches; its modules: {_some_names(model)}")
    for name, module in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make(module))
    return [name for name, _ in found]


@contextmanager
def watch(model: nn.Module, match: Match, see: Callable[[str, Any], None]) -> Iterator[None]:
    """Within the context see(name, output) is called after the forward of each matching module; gone afterwards."""
    found = [(name, module) for name, module in model.named_modules() if match(name, module)]
    if not found:
        raise InputError(f"no module of {type(model).__name__} matches; its modules: {_some_names(model)}")
    hooks = [m.register_forward_hook(lambda _m, _i, output, name=name: see(name, output)) for name, m in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _some_names(model: nn.Module) -> str:
    """The distinct leaf names of a model, for an error message."""
    return ", ".join(sorted({name.rpartition(".")[2] for name, _ in model.named_modules() if name}))

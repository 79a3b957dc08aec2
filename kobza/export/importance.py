"""How strongly each column of a matrix is used: the mean square of what flows into it on a text. Quantisers weigh errors by it.

An error e in column i of a matrix changes what comes out by e * x_i; over a text the squares of that are e^2 times the mean of
x_i^2. llama.cpp calls a file of these an importance matrix.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kobza.checkpoint import load_tensors
from kobza.config import InputError, require
from kobza.formats.headers import read_header


@torch.no_grad()
def importance(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Batches of ids (B, T) -> the mean square of each linear layer's inputs, (in,) float32, by its weight's name."""
    linears = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linears = {name: module for name, module in linears.items() if not name.startswith("ahead.")}  # heads of training
    sums = {name: torch.zeros(module.in_features, dtype=torch.float64) for name, module in linears.items()}
    counts = dict.fromkeys(linears, 0)

    def see(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        sums[name] += rows.float().square().sum(0).double().cpu()
        counts[name] += len(rows)

    hooks = [
        module.register_forward_pre_hook(lambda _module, inputs, name=name: see(name, inputs[0]))
        for name, module in linears.items()
    ]
    device = next(model.parameters()).device
    try:
        for ids in batches:
            model(ids.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    idle = [name for name, count in counts.items() if not count]
    require(
        not idle,
        f"importance: no token flowed through {', '.join(idle[:3])}; give a calibration text that is not empty",
    )
    found = {name: (sums[name] / counts[name]).float() for name in linears}
    wild = [name for name, tensor in found.items() if not tensor.isfinite().all()]
    require(
        not wild, f"importance: what flows into {', '.join(wild[:3])} is infinite or no number; doctor the model first"
    )
    return found


def save_importance(path: Path, found: Mapping[str, Tensor], sha256: str, n_tokens: int) -> None:
    """A safetensors file, whole or absent, that says of which model's weights it is."""
    partial = path.with_name(f"{path.name}.part")
    try:
        save_file(dict(found), partial, {"importance_of": sha256, "n_tokens": str(n_tokens)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error}") from None


def load_importance(path: Path, sha256: str) -> dict[str, Tensor]:
    """What `save_importance` wrote of this model; another model's is refused."""
    infos = read_header(path)
    odd = [name for name, info in infos.items() if info.dtype != "F32" or len(info.shape) != 1]
    require(not odd, f"{path}: {', '.join(odd[:3])} is no row of float32; take a file that kobza wrote")
    with safe_open(path, "pt") as file:
        of = (file.metadata() or {}).get("importance_of")
    require(of is not None, f"{path} is no importance; take a file that kobza wrote")
    require(of == sha256, f"{path} was measured on other weights ({of[:12]}, not {sha256[:12]}); measure it again")
    found = load_tensors(path)
    bad = [name for name, tensor in found.items() if not bool((tensor.isfinite() & (tensor >= 0)).all())]
    require(not bad, f"{path}: {', '.join(bad[:3])} holds what is no mean of squares; measure it again")
    return found

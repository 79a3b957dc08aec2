"""A bundle of what a non-finite step needs to happen again, and its replay, which names the first bad tensor.

blackbox/00000137/  model.safetensors  config.json  step.safetensors (batches, generator states)  failure.json
"""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kobza.checkpoint import (
    FORMAT,
    checkpoint_path,
    fill_model,
    list_checkpoints,
    load_tensors,
    model_tensors,
    read_config,
    verify,
    write_folder,
)
from kobza.config import InputError, RunConfig, require, to_dict
from kobza.device import Runtime, set_rng_state
from kobza.loss import make_loss
from kobza.model import GPT, build
from kobza.run import Run
from kobza.surgery import compute_in_float32, freeze, watch
from kobza.train import LossFn, NonFinite


@dataclass(frozen=True)
class Finding:
    """The first bad tensor of a replayed step: kind (weight, output, loss, gradient), its name, and what it holds."""

    kind: str
    name: str
    text: str
    reproduced: bool = True


def write_bundle(folder: Path, model: GPT, run: RunConfig, failure: NonFinite, precision: str) -> None:
    """Write the step's weights, micro-batches and generator states."""

    def fill(aside: Path) -> None:
        save_file(model_tensors(model), aside / "model.safetensors")
        tensors = dict(failure.rng)
        for i, (inputs, targets, *_) in enumerate(failure.window):
            tensors[f"inputs.{i}"] = inputs.cpu().contiguous()
            tensors[f"targets.{i}"] = targets.cpu().contiguous()
        save_file(tensors, aside / "step.safetensors")
        (aside / "config.json").write_text(json.dumps({"format": FORMAT, **to_dict(run)}, indent=1))
        told = {"step": failure.step, "what": failure.what, "value": str(failure.value), "precision": precision}
        (aside / "failure.json").write_text(json.dumps(told, indent=1))

    folder.parent.mkdir(exist_ok=True)
    write_folder(folder, fill)


def refuse_spoiled(model: GPT, step: int, rng: dict[str, Tensor]) -> None:
    """Raise NonFinite if an update has made a weight inf or nan: such a model is neither judged nor saved."""
    for name, parameter in model.named_parameters():
        bad = parameter[~parameter.isfinite()]
        if len(bad):
            raise NonFinite(step, f"weight {name}", bad[0].item(), [], rng)


def record_failure(failure: NonFinite, run: Run, model: GPT, precision: str) -> str:
    """Write the black box of a non-finite step -> a line on what failed, what is kept, and how to look into it."""
    bundle = run.out / "blackbox" / f"{failure.step:08d}"
    shutil.rmtree(bundle, ignore_errors=True)
    hint = f"name the first bad tensor with: kobza replay {shlex.quote(str(bundle))}"
    try:
        write_bundle(bundle, model, run.config, failure, precision)
    except InputError as error:
        hint = f"there is no black box, since {error}"
    steps = list_checkpoints(run.out)
    good = f"the last good checkpoint is {checkpoint_path(run.out, steps[-1])}" if steps else "none was saved before"
    what = f"{failure.what} is {failure.value} at step {failure.step}"
    return f"{what}; {good}; {hint}"


def find_bundle(path: Path) -> Path:
    """The bundle that a path means: itself, or of a run its last."""
    require(path.exists(), f"{path}: no such bundle or run")
    if (path / "failure.json").exists():
        return path
    bundles = sorted((path / "blackbox").glob("[0-9]*"))
    require(bool(bundles), f"{path}: no black box here; a run writes one when it meets an inf or nan")
    return bundles[-1]


def replay(path: Path) -> tuple[dict[str, Any], Finding]:
    """What was told of the failure, and the first bad tensor on doing the step again on the CPU."""
    folder = find_bundle(path)
    verify(folder)
    told = json.loads((folder / "failure.json").read_text())
    run, _ = read_config(folder / "config.json")
    tensors = load_tensors(folder / "step.safetensors")
    model = build(run.model)
    fill_model(model, load_tensors(folder / "model.safetensors"), str(folder))
    runtime = Runtime(torch.device("cpu"), "bf16" if told["precision"] == "fp16" else told["precision"])
    if run.train.freeze:
        freeze(model, run.train.freeze)
    if run.train.fp32_parts and runtime.compute_dtype != torch.float32:
        compute_in_float32(model, run.train.fp32_parts)
    loss_fn = make_loss(run.train, run.model.n_ahead, runtime.compute_dtype)
    return told, first_bad_tensor(model, tensors, runtime, loss_fn)


def first_bad_tensor(model: GPT, tensors: dict[str, Tensor], runtime: Runtime, loss_fn: LossFn) -> Finding:
    """Weights first, then outputs in the order of the forward pass, then the loss, then gradients from the head down."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return Finding("weight", name, describe(parameter))
    set_rng_state(tensors, runtime.device)
    model.train()
    seen: list[tuple[str, Any]] = []
    for i in range(sum(name.startswith("inputs.") for name in tensors)):
        with watch(model, is_leaf, lambda name, output: seen.append((name, output))):
            loss, _ = loss_fn(model, (tensors[f"inputs.{i}"], tensors[f"targets.{i}"]))
        outputs = [
            (name, output) for name, output in seen if isinstance(output, Tensor)
        ]  # rope's are two, of no weights
        bad = next(((name, output) for name, output in outputs if not output.isfinite().all()), None)
        if bad:
            return Finding("output", bad[0], f"micro-batch {i}: {describe(bad[1])}")
        if not loss.isfinite():
            return Finding("loss", "cross-entropy", f"micro-batch {i}: {describe(loss)}; every output is finite")
        loss.backward()
        seen.clear()
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return Finding("gradient", name, describe(parameter.grad))
    text = "every weight, output and gradient is finite here: the failure belongs to the device or its precision"
    return Finding("none", "-", text, reproduced=False)


def is_leaf(name: str, module: nn.Module) -> bool:
    """Modules without modules inside: the finest places that hooks see."""
    return bool(name) and not any(True for _ in module.children())


def describe(tensor: Tensor) -> str:
    """Shape, how many values are not finite, and where the first stands."""
    bad = (~tensor.isfinite()).flatten().nonzero().flatten()
    where = [int(i) for i in torch.unravel_index(bad[0], tensor.shape)] if tensor.ndim else []
    return (
        f"shape {tuple(tensor.shape)}, {len(bad):,} of {tensor.numel():,} values are inf or nan, the first at {where}"
    )

"""Runs and checkpoints on disk: safetensors + json, whole or absent, checksummed, nothing executed on loading.

    DIR/                       a run
      config.toml              its RunConfig
      metrics.jsonl            one record a step (log.py)
      tokens/                  the text as shards (data.py)
      checkpoints/00000100/    model.safetensors  config.json  tokenizer.json   what generate, export, serve need
                               training.safetensors  training.json              what exact resuming needs besides
                               manifest.json                                    sha256 and size of each file
      best.json                {"step", "val_loss"} of the best checkpoint

A checkpoint is written under another name, synced, then renamed: under its final name it is complete. The manifest shows
damage that came later. A change of format bumps FORMAT and brings a migration with a test.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kobza.config import InputError, RunConfig, require, run_from_dict, to_dict
from kobza.model import GPT, build
from kobza.tokenizer import Tokenizer, load_tokenizer

FORMAT = 2  # 2: model.init in place of model.zero_init
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KEPT = "nothing half-written is left and earlier checkpoints are whole; free space and call again with --resume"


# ---- whole or absent -----------------------------------------------------------------------------------------------


def write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `final` with what fill(folder) writes plus a manifest; on any failure there is no such folder."""
    aside = final.with_name(f".{final.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        fill(aside)
        files = {path.name: _digest(path) for path in sorted(aside.iterdir())}
        (aside / "manifest.json").write_text(json.dumps(files, indent=1))
        for path in aside.iterdir():
            sync(path)
        sync(aside)
        os.rename(aside, final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise disk_error(final, error) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Delete a folder; one half deleted does not keep its name."""
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def write_file(final: Path, content: str) -> None:
    """Replace a small file whole."""
    aside = final.with_name(f".{final.name}.part")
    try:
        aside.write_text(content, encoding="utf-8")
        sync(aside)
        os.replace(aside, final)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise disk_error(final, error) from error


def disk_error(final: Path, error: Exception, state: str = KEPT) -> Exception:
    """The one-line error for a full disk, which says what is left; any other error as it is."""
    full = getattr(error, "errno", None) in FULL or any(f"os error {number}" in str(error) for number in FULL)
    if not full:
        return error
    free = shutil.disk_usage(final.parent).free
    return InputError(f"{final}: the disk is full ({free / 1e6:.1f} MB free); {state}")


def sync(path: Path) -> None:
    """What a file or a folder holds is on the disk when this returns."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def verify(folder: Path, holds: str = "model.safetensors") -> None:
    """Raise InputError unless every file of a checkpoint, `holds` among them, is as long as written with the same sha256."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        items = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest.items()]
        manifest[holds], manifest["config.json"]  # never without
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder}: not a checkpoint: manifest.json is missing or damaged; name another") from None
    for name, n_bytes, sha256 in items:
        path = folder / name
        remedy = "take another checkpoint of the run (checkpoints/*)"
        require(path.is_file() and Path(name).name == name, f"{path}: a file of the checkpoint is missing; {remedy}")
        size = path.stat().st_size
        require(size == n_bytes, f"{path}: {size:,} bytes where {n_bytes:,} were written: truncated; {remedy}")
        require(_digest(path)["sha256"] == sha256, f"{path}: its sha256 is not that of the manifest: damaged; {remedy}")


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: the model in eval mode, how it was made, its tokenizer, and provenance (step, losses, ...)."""

    model: GPT
    run: RunConfig
    tokenizer: Tokenizer
    provenance: dict[str, Any]
    folder: Path


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, contiguous on the CPU; of tied ones only the first."""
    seen: set[int] = set()
    tensors = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            tensors[name] = parameter.detach().cpu().contiguous()
    return tensors


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from None


def fill_model(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy tensors into a model of the same names and shapes; every difference is named, both ways."""
    wanted = model_tensors(model)
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {tuple(tensors[name].shape)} where the config wants {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    require(not problems, f"{where}: weights and config differ: {'; '.join(problems[:8])} ({len(problems)} in all)")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    run: RunConfig,
    tokenizer: Tokenizer,
    provenance: dict[str, Any],
    training: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> None:
    """Write a checkpoint folder. `training` is what resuming needs: tensors, and a state that json holds."""

    def fill(aside: Path) -> None:
        save_file(model_tensors(model), aside / "model.safetensors")
        config = {"format": FORMAT, **to_dict(run), "provenance": provenance}
        (aside / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        tokenizer.save(aside / "tokenizer.json")
        if training is not None:
            tensors, state = training
            save_file(tensors, aside / "training.safetensors")
            (aside / "training.json").write_text(json.dumps(state, indent=1), encoding="utf-8")

    write_folder(folder, fill)


def read_config(path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """RunConfig and provenance of a config.json; a newer format is refused."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("format")
    except OSError:
        raise InputError(f"{path}: no such file; is this a run or a checkpoint of kobza?") from None
    except (ValueError, KeyError, AttributeError):
        raise InputError(f"{path}: not a kobza config (json with a format number)") from None
    require(
        found in (1, FORMAT),  # config.upgraded knows the older names
        f"{path}: format {found} and this kobza reads format {FORMAT}; "
        + "install a newer kobza: pip install -U kobza",
    )
    provenance = content.pop("provenance", {})
    return run_from_dict(content, str(path)), provenance


def load_checkpoint(path: Path, device: torch.device | str = "cpu", unknown: str | None = None) -> Loaded:
    """The model behind a run folder (its best checkpoint, else its last) or a checkpoint folder."""
    folder = find_checkpoint(path)
    verify(folder)
    run, provenance = read_config(folder / "config.json")
    tokenizer = load_tokenizer(folder / "tokenizer.json", unknown or run.data.unknown)
    model = build(run.model)
    fill_model(model, load_tensors(folder / "model.safetensors"), str(folder))
    return Loaded(model.to(device).eval(), run, tokenizer, provenance, folder)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or of a run its best, else its last."""
    require(path.exists(), f"{path}: no such run; train one with: kobza train --out {path}")
    if (path / "manifest.json").exists():
        return path
    steps = list_checkpoints(path)
    require(bool(steps), f"{path}: no checkpoint here; a run has them under checkpoints/")
    best = read_best(path)
    return checkpoint_path(path, best["step"] if best and best["step"] in steps else steps[-1])


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run_dir / "checkpoints" / f"{step:08d}"


def list_checkpoints(run_dir: Path) -> list[int]:
    """Steps of a run's complete checkpoints, ascending."""
    return sorted(int(p.name) for p in (run_dir / "checkpoints").glob("*") if p.name.isdecimal())


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """{"step", "val_loss"} of the best checkpoint so far."""
    path = run_dir / "best.json"
    if not path.exists():
        return None
    try:
        best = json.loads(path.read_text())
        return {"step": int(best["step"]), "val_loss": float(best["val_loss"])}
    except (ValueError, KeyError, TypeError):
        raise InputError(f'{path}: not {{"step", "val_loss"}} in json; delete it to use the last checkpoint') from None


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints and the best."""
    best = read_best(run_dir)
    for step in list_checkpoints(run_dir)[:-keep]:
        if best is None or step != best["step"]:
            remove_folder(checkpoint_path(run_dir, step))


# ---- state of a training run ---------------------------------------------------------------------------------------


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every state tensor by name: "0.3.exp_avg" is that of optimizer 0, parameter 3."""
    return {
        f"{i}.{index}.{key}": value.detach().cpu().contiguous()
        for i, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def fill_optimizers(optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    for i, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        content["state"] = {}
        for name, value in tensors.items():
            owner, index, key = name.split(".", 2)
            if owner == str(i):
                content["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(content)

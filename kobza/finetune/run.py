"""A tuning's folder: its settings, its rows, and the state from which a stopped one goes on bit by bit.

DIR/
  config.toml            a TuneConfig
  rows/train, rows/val   what is learned and what is held out, as ids (rows.py)
  xray.html              what a person should see before the first step
  metrics.jsonl          one record a step
  checkpoints/00000100/  config.json, tokenizer.json, manifest.json as in every checkpoint of kobza, and either
                         model.safetensors (every weight, where those may have changed), or
                         adapter_model.safetensors and adapter_config.json in PEFT's format;
                         training.safetensors and training.json: what going on needs besides
  best.json              {"step", "val_loss"} of the best checkpoint
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kobza import __version__
from kobza.checkpoint import (
    FORMAT,
    Loaded,
    checkpoint_path,
    fill_model,
    fill_optimizers,
    list_checkpoints,
    load_tensors,
    optimizer_tensors,
    prune,
    save_checkpoint,
    verify,
    write_file,
    write_folder,
)
from kobza.config import InputError, load_toml, require, to_dict
from kobza.device import rng_state, set_rng_state
from kobza.finetune.config import SECTIONS, TuneConfig, tune_from_dict
from kobza.finetune.lora import adapter_tensors, fill_adapter
from kobza.run import MAY_CHANGE, Training, write_best

ADAPTER = "adapter_model.safetensors"
WEIGHT = "weight."  # before the name of a learning weight in training.safetensors


def read_tuning(out: Path) -> TuneConfig:
    """The settings of the tuning in a folder."""
    path = out / "config.toml"
    require(path.exists(), f"{out}: no tuning here to go on with (no config.toml); start one without --resume")
    values = load_toml(path)
    require("source" in values, f"{out}: a run of `kobza train`; go on with: kobza train --resume --out {out}")
    return tune_from_dict(values, str(path))


def write_tuning(out: Path, config: TuneConfig) -> None:
    """Keep the settings in the folder."""
    write_file(out / "config.toml", tomli_w.dumps(to_dict(config)))


def same_tuning(saved: TuneConfig, asked: TuneConfig, out: Path) -> None:
    """Refuse to go on under settings that differ from the tuning's own by more than where it stops and what it keeps."""
    for section in SECTIONS:
        old, new = to_dict(getattr(saved, section)), to_dict(getattr(asked, section))
        for key in old:
            same = old[key] == new[key] or (section == "train" and key in MAY_CHANGE)
            require(
                same, f"{key} is {new[key]} but {out} has {old[key]}; resume without it, or start anew in another --out"
            )
    require(asked.seed == saved.seed, f"--seed is {asked.seed} but {out} has {saved.seed}; resume without it")
    stands, last = max([0, *list_checkpoints(out)]), asked.train.steps
    require(last >= stands, f"train.steps is {last} but {out} stands at step {stands}; give more steps")


# ---- the state of a tuning -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """An opened tuning: its folder, settings, and the model it began from as that was loaded."""

    out: Path
    config: TuneConfig
    base: Loaded
    provenance: dict[str, Any]
    """what the tuned model's config.json says of it"""


# How an adapter is written into a folder; finetune/peft.py has it
SaveAdapter = Callable[[Path, nn.Module], None]


def save_tuning(tuning: Tuning, state: Training, save_adapter: SaveAdapter | None) -> None:
    """Write the checkpoint of the step where the tuning stands, unless it is there; then name the best, drop the old.
    save_adapter: how an adapter is written; None: all weights are."""
    standing = state.standing
    folder = checkpoint_path(tuning.out, standing.step)
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        tensors = optimizer_tensors(state.optimizers) | rng_state(state.device)
        facts = {"standing": vars(standing), "batches": state.batches.state_dict()}
        facts["scaler"] = state.scaler.state_dict() if state.scaler else None
        about = tuning.provenance | {"kobza": __version__, "torch": torch.__version__, "step": standing.step}
        run = replace(tuning.base.run, train=tuning.config.train, seed=tuning.config.seed)
        if save_adapter is None:
            save_checkpoint(folder, state.model, run, tuning.base.tokenizer, about, (tensors, facts))
        else:
            tensors |= {
                WEIGHT + name: p.detach().cpu().contiguous() for name, p in adapter_tensors(state.model).items()
            }
            write_folder(folder, lambda aside: fill(aside, tuning, state, run, about, tensors, facts, save_adapter))
    write_best(tuning.out, standing)
    prune(tuning.out, tuning.config.train.keep)


def fill(
    aside: Path,
    tuning: Tuning,
    state: Training,
    run: Any,
    about: dict[str, Any],
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    save_adapter: SaveAdapter,
) -> None:
    """The files of a checkpoint that holds an adapter and no base."""
    save_adapter(aside, state.model)
    config = {"format": FORMAT, **to_dict(run), "provenance": about}
    (aside / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tuning.base.tokenizer.save(aside / "tokenizer.json")
    save_file(tensors, aside / "training.safetensors")
    (aside / "training.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def restore_tuning(tuning: Tuning, state: Training) -> None:
    """Put the last checkpoint of the folder into a tuning that was just made; nothing where there is none."""
    for left in (tuning.out / "checkpoints").glob(".*.part"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    steps = list_checkpoints(tuning.out)
    if not steps:
        return
    folder = checkpoint_path(tuning.out, steps[-1])
    whole = not (folder / ADAPTER).exists()
    try:
        verify(folder, "model.safetensors" if whole else ADAPTER)
    except InputError as error:
        raise InputError(f"{error}; or delete {folder} to go on from the one before") from None
    tensors = load_tensors(folder / "training.safetensors")
    if whole:
        fill_model(state.model, load_tensors(folder / "model.safetensors"), str(folder))
    else:
        saved = {name.removeprefix(WEIGHT): value for name, value in tensors.items() if name.startswith(WEIGHT)}
        fill_adapter(state.model, saved, str(folder))
    set_rng_state(tensors, state.device)
    fill_optimizers(state.optimizers, {k: v for k, v in tensors.items() if not k.startswith(("rng.", WEIGHT))})
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    state.batches.load_state_dict(facts["batches"])
    if state.scaler:
        state.scaler.load_state_dict(facts["scaler"])
    vars(state.standing).update(facts["standing"])
    write_best(tuning.out, state.standing)

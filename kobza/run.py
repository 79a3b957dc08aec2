"""A run's folder: one process writes it, its text lies there as tokens, and a stopped run goes on from it bit by bit.

checkpoint.py says what lies where. This file opens a run (new or resumed), and takes and puts back the state of its training.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import numpy as np
import tomli_w
import torch
from torch import Tensor, nn

from kobza import __version__
from kobza.checkpoint import (
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
)
from kobza.config import InputError, ModelConfig, RunConfig, load_toml, nearest, require, run_from_dict, to_dict
from kobza.data import Batches, Corpus, Documents, load_corpus, prepare
from kobza.device import rng_state, set_rng_state
from kobza.tokenizer import Tokenizer, load_tokenizer

# settings that a resumed run may change: they move where it stops and what it keeps, not what a step computes (steps
# stretches the schedule, which is what one resumes for)
MAY_CHANGE = {"steps", "eval_interval", "eval_tokens", "checkpoint_interval", "keep", "patience", "stop_at"}


def free_folder(path: Path) -> Path:
    """The path itself, or path-2, path-3, ... where one is there already."""
    candidates = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in range(1, 10_000))
    return next(p for p in candidates if not p.exists())


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold the run's folder, made if need be; refused while another process does. A folder left empty goes again."""
    fresh = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(out / ".lock")
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"{out}: a live run is writing here; wait for it or take another --out") from None
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}; take another --out") from None
    try:
        yield
    finally:
        if fresh and [path.name for path in out.iterdir()] == [".lock"]:
            shutil.rmtree(out, ignore_errors=True)
        held.release()


# ---- open ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """An opened run: its folder, its config with the vocabulary filled in, its tokenizer and its text."""

    out: Path
    config: RunConfig
    tokenizer: Tokenizer
    corpus: Corpus


def new_run(out: Path, config: RunConfig, text: Sequence[str], tokenizer: Tokenizer | None = None) -> Run:
    """Tokenise the text into a fresh run folder and open it. `tokenizer`: unless it is learned from the text."""
    require(not (out / "config.toml").exists(), f"{out}: holds a run; go on with --resume or take another --out")
    write_tokens(out, config, text, tokenizer)
    try:
        return open_run(out, config)
    except InputError:  # refused before it stands there: the folder is as it was
        shutil.rmtree(out / "tokens", ignore_errors=True)
        (out / "tokenizer.json").unlink(missing_ok=True)
        raise


def resumed_run(out: Path, config: RunConfig) -> Run:
    """Open a run again, under a config that differs from its own at most in MAY_CHANGE."""
    path = out / "config.toml"
    saved = run_from_dict(load_toml(path), str(path))
    for section in ("model", "data", "train"):
        old, new = to_dict(getattr(saved, section)), to_dict(getattr(config, section))
        for key in old:
            same = old[key] == new[key] or (section == "train" and key in MAY_CHANGE)
            require(
                same,
                f"{section}.{key} is {new[key]} but the run has {old[key]}; resume without it, or start anew in another --out",
            )
    stands, last = max([0, *list_checkpoints(out)]), config.train.steps
    require(
        last >= stands,
        f"train.steps is {last} but the run stands at step {stands}; give more steps, or start anew in another --out",
    )
    require(config.seed in (0, saved.seed), f"--seed {config.seed} but the run has {saved.seed}; resume without it")
    return open_run(out, replace(config, seed=saved.seed))


def open_run(out: Path, config: RunConfig | None = None) -> Run:
    """The run in a folder; its saved config unless one is given, which is then saved."""
    path = out / "config.toml"
    saved = config or run_from_dict(load_toml(path), str(path))
    tokenizer = load_tokenizer(out / "tokenizer.json", saved.data.unknown)
    asked = saved.model.vocab_size
    require(
        asked in (0, tokenizer.vocab_size),
        f"model.vocab_size is {asked} but the tokenizer has {tokenizer.vocab_size}; leave model.vocab_size out",
    )
    full = replace(saved, model=replace(saved.model, vocab_size=tokenizer.vocab_size))
    corpus = load_corpus(out / "tokens", full.model.max_seq_len)
    if full.train.embeddings and not path.exists():  # a new run: refused before it stands there
        given_embeddings(full.train.embeddings, full.model)
    if config is not None:
        write_file(path, tomli_w.dumps(to_dict(full)))
    return Run(out, full, tokenizer, corpus)


def write_tokens(out: Path, config: RunConfig, text: Sequence[str], tokenizer: Tokenizer | None = None) -> None:
    """Text -> out/tokens and out/tokenizer.json, whole or absent."""
    aside = out / ".tokens.part"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        tokenizer = prepare(Documents(text, config.data.text_field), config.data, aside, tokenizer)
        load_corpus(aside, config.model.max_seq_len)  # too short is said before anything is kept
        kinds = tokenizer.vocab_size
        require(kinds > 1, f"the text has {kinds} kind of character, so there is nothing to learn; give another text")
        write_file(out / "tokenizer.json", tokenizer.to_json())
        shutil.rmtree(out / "tokens", ignore_errors=True)
        aside.rename(out / "tokens")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ---- the state of its training -------------------------------------------------------------------------------------


def given_embeddings(source: str, config: ModelConfig) -> Tensor:
    """The token table that train.embeddings names, (vocab_size, n_embd), float32."""
    table = read_table(source)
    wanted, what = (config.vocab_size, config.n_embd), f"train.embeddings {source}"
    remedy = "set model.n_embd and the tokenizer to match, or give another table"
    require(table.shape == wanted, f"{what}: {tuple(table.shape)} where (vocab_size, n_embd) are {wanted}; {remedy}")
    require(table.is_floating_point(), f"{what}: numbers of type {table.dtype}; give floats")
    require(bool(table.isfinite().all()), f"{what}: holds an inf or nan; mend the file")
    return table.float()


def read_table(source: str) -> Tensor:
    """The tensor of FILE.npy, FILE.safetensors (embed.weight, or its only one of two axes) or FILE.safetensors:KEY."""
    file, found, key = source.partition(".safetensors")
    require(found or file.endswith(".npy"), f"train.embeddings {source}: give a .npy or .safetensors file")
    path = Path(file + found)
    require(path.is_file(), f"train.embeddings {path}: no such file")
    if not found:
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise InputError(f"{path}: cannot be read as an array of numbers: {error}") from None
    tensors = load_tensors(path)
    flat = [name for name, tensor in tensors.items() if tensor.ndim == 2]
    only = flat[0] if len(flat) == 1 else "embed.weight"
    name = key.removeprefix(":") or only
    require(name in tensors, f"train.embeddings {path}: it has no {name!r}{nearest(name, flat)}; name one as FILE:KEY")
    return tensors[name]


@dataclass
class Standing:
    """Where a training stands: counts, seconds spent, the best validation loss, its step and the evaluations since."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    worse: int = 0

    def note(self, loss: float) -> bool:
        """Take in a validation loss -> whether it is the best so far."""
        improved = math.isfinite(loss) and (self.best is None or loss < self.best)
        if improved:
            self.best, self.best_step, self.worse = loss, self.step, 0
        else:
            self.worse += 1
        return improved


@dataclass(frozen=True)
class Training:
    """Everything that changes while a run trains, and that a checkpoint holds."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    batches: Batches  # or what else gives batches and has its state_dict
    scaler: torch.amp.GradScaler | None
    standing: Standing
    device: torch.device


def save_training(run: Run, training: Training) -> None:
    """Write the checkpoint of the step where the training stands, unless it is there; then name the best, drop the old."""
    standing = training.standing
    folder = checkpoint_path(run.out, standing.step)
    if not folder.exists():
        write_training(run, training, folder)
    write_best(run.out, standing)
    prune(run.out, run.config.train.keep)


def write_training(run: Run, training: Training, folder: Path) -> None:
    """Write a checkpoint with all that exact resuming needs."""
    standing = training.standing
    tensors = optimizer_tensors(training.optimizers) | rng_state(training.device)
    state = {"standing": vars(standing), "batches": training.batches.state_dict()}
    state["scaler"] = training.scaler.state_dict() if training.scaler else None
    provenance = {"kobza": __version__, "torch": torch.__version__, "step": standing.step, "tokens": standing.tokens}
    provenance |= {"best_val_loss": standing.best, "text_sha256": run.corpus.index["sha256"]}
    folder.parent.mkdir(exist_ok=True)
    save_checkpoint(folder, training.model, run.config, run.tokenizer, provenance, (tensors, state))


def restore_training(run: Run, training: Training) -> None:
    """Put the last checkpoint of the run into a training that was just made; nothing where there is none."""
    for left in (run.out / "checkpoints").glob(".*.part"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    steps = list_checkpoints(run.out)
    if not steps:
        return
    folder = checkpoint_path(run.out, steps[-1])
    try:
        verify(folder)
    except InputError as error:
        raise InputError(f"{error}; or delete {folder} to go on from the one before") from None
    fill_model(training.model, load_tensors(folder / "model.safetensors"), str(folder))
    tensors = load_tensors(folder / "training.safetensors")
    set_rng_state(tensors, training.device)
    fill_optimizers(training.optimizers, {k: v for k, v in tensors.items() if not k.startswith("rng.")})
    state = json.loads((folder / "training.json").read_text())
    training.batches.load_state_dict(state["batches"])
    if training.scaler:
        training.scaler.load_state_dict(state["scaler"])
    vars(training.standing).update(state["standing"])
    write_best(run.out, training.standing)  # a kill may have come between the checkpoint and this


def write_best(out: Path, standing: Standing) -> None:
    """Name the best checkpoint in best.json."""
    if standing.best is not None:
        write_file(out / "best.json", json.dumps({"step": standing.best_step, "val_loss": standing.best}))


def is_finished(out: Path, steps: int) -> bool:
    """Whether the run in `out` has a checkpoint of its last step."""
    return steps in list_checkpoints(out)

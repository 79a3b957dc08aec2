"""Two processes against one (M13): the same step, its tokens shared unevenly between two gloo ranks on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kobza.config import InputError
from kobza.doctor.finding import Skip
from kobza.doctor.training.steps import Step, Subject, first_line, open_, without_dropout

SECONDS = 60  # two processes start torch, make one update and stop: 5 s on an idle machine
CHILD = "from kobza.doctor.training.world import child; child()"


@dataclass(frozen=True)
class Rank:
    """What one process had after its update."""

    loss: float
    grad_norm: float | None
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def groups_of(step: Step) -> list[list[list[int]]]:
    """Lengths of the rows, by micro-batch, by rank: uneven on purpose, where the collator allows it."""
    n = step.row_tokens
    return [[[n, n], [n]], [[4], [5]]] if step.takes_uneven else [[[n], [n]], [[n], [n]]]


def window_of(step: Step, rank: int) -> list:
    """The micro-batches of one rank, cut from the rows that all ranks share."""
    groups = groups_of(step)
    rows = step.rows([n for mine in groups for group in mine for n in group])
    at = sum(len(group) for mine in groups[:rank] for group in mine)
    made = []
    for group in groups[rank]:
        made.append(step.collate(rows[at : at + len(group)], uneven=False))
        at += len(group)
    return made


def two_ranks(subject: Subject) -> list[Rank]:
    """One update in each of two processes; Skip where they do not end in time."""
    if not subject.spec:
        raise Skip("the step function has no name that another process could import")
    with tempfile.TemporaryDirectory(prefix="kobza-ranks-") as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
        commands = [[sys.executable, "-c", CHILD, subject.spec, folder, str(rank)] for rank in (0, 1)]
        processes = [
            subprocess.Popen(c, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in commands
        ]
        try:
            end = time.monotonic() + SECONDS
            for process in processes:
                process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Skip(f"two processes did not make one update in {SECONDS} s") from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [read_rank(Path(folder), rank) for rank in (0, 1)]


def read_rank(folder: Path, rank: int) -> Rank:
    """What a process left."""
    failed = folder / f"{rank}.failed"
    if failed.exists():
        raise InputError(f"rank {rank} of 2 failed: {failed.read_text()}")
    if not (folder / f"{rank}.json").exists():
        raise InputError(f"rank {rank} of 2 stopped without a result")
    told = json.loads((folder / f"{rank}.json").read_text())
    gradients = load_file(folder / f"{rank}.gradients")
    return Rank(told["loss"], told["grad_norm"], gradients, load_file(folder / f"{rank}.weights"))


def child() -> None:
    """The body of a rank: argv holds the spec, the folder and the rank."""
    spec, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        step = without_dropout(open_(spec).fresh(rank=rank, world=2))
        record = step.update(window_of(step, rank), unclip=True)
        save_file({k: v.contiguous() for k, v in record.gradients.items()}, folder / f"{rank}.gradients")
        save_file({k: v.contiguous() for k, v in step.values().items()}, folder / f"{rank}.weights")
        norm = record.told.get("grad_norm")
        told = {"loss": record.loss, "grad_norm": None if norm is None else float(norm)}
        aside = folder / f"{rank}.part"
        aside.write_text(json.dumps(told))
        aside.rename(folder / f"{rank}.json")
        torch.distributed.barrier()
    except Exception as error:
        (folder / f"{rank}.failed").write_text(f"{type(error).__name__}: {first_line(error)}")
    finally:
        os._exit(0)  # a process group that hangs in its end must not hold the doctor

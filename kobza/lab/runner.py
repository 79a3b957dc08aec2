"""Trials -> results on disk, in worker processes that live as long as the lab: torch is imported once in each.

A worker gets cores // jobs threads, fixed, so that runs do not fight for cores. Each result is written by the worker that made
it; when the lab is killed its workers see that and end, and what was written stays. The work itself is a function given by
the recipe: this file knows processes, not training.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from kobza.lab.report import read_result
from kobza.lab.store import Trial, write_result

Work = Callable[[Trial], dict[str, Any]]  # a trial -> its result; importable by name, for it travels to the workers


class WorkerLost(RuntimeError):
    """A worker process ended by force: most often the system was out of memory."""


def n_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_trials(out: Path, trials: list[Trial], work: Work, jobs: int) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """Do the trials that have no result yet, yielding each as it is done. One job runs in this process, alone."""
    open_trials = [trial for trial in trials if read_result(out, trial.hash) is None]
    threads = max(1, n_cores() // jobs)
    if jobs == 1:
        yield from run_alone(out, open_trials, work, threads)
    elif open_trials:
        yield from run_pool(out, open_trials, work, min(jobs, len(open_trials)), threads)


def run_alone(out: Path, trials: list[Trial], work: Work, threads: int) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """One after the other in this process, whose number of threads is put back."""
    before = torch.get_num_threads()
    try:
        for trial in trials:
            torch.set_num_threads(threads)
            yield trial, do(out, trial, work, 1)
    finally:
        torch.set_num_threads(before)


def run_pool(
    out: Path, trials: list[Trial], work: Work, jobs: int, threads: int
) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """Side by side in processes of their own; leaving early ends them."""
    context = multiprocessing.get_context("spawn")  # a forked torch has threads that are not there
    pool = ProcessPoolExecutor(jobs, context, start_worker, (threads,))
    finished = False
    try:
        futures = {pool.submit(do, out, trial, work, jobs): trial for trial in trials}
        for future in as_completed(futures):
            yield futures[future], future.result()
        finished = True
    except BrokenProcessPool:
        raise WorkerLost("a worker process was ended by the system, most often for want of memory") from None
    finally:
        if not finished:
            for process in list((pool._processes or {}).values()):  # the executor has no public way to end one at work
                process.terminate()
        pool.shutdown(wait=finished, cancel_futures=True)


def do(out: Path, trial: Trial, work: Work, jobs: int) -> dict[str, Any]:
    """Do a trial and keep its result."""
    result = work(trial) | {"jobs": jobs, "threads": torch.get_num_threads()}
    write_result(out, trial.hash, result)
    return result


def start_worker(threads: int) -> None:
    """Set up a worker: its threads, deaf to Ctrl-C (the lab ends it), and gone when the lab is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    threading.Thread(target=follow_parent, daemon=True).start()


def follow_parent() -> None:
    """End this process when its parent does: a killed lab must leave no one computing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)

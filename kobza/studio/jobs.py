"""Commands of kobza as processes of their own: started, found again after the studio was, stopped.

A job is a child in a session of its own, so it outlives the studio. Beside its log lies job.json, which says who it is: the
process id, when that process began (ids are used again) and what was called. Nothing else is remembered: a studio that is
started anew finds its jobs where they are. A run that a terminal started has no job.json: its lock says who holds it, and is
asked without being taken: a run that starts at this moment must not be refused because of us.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kobza.checkpoint import write_file
from kobza.config import InputError, require
from kobza.studio.runs_files import read_some, written

FILE = "job.json"
MOST_BYTES = 1 << 16
FRESH_SECONDS = 30.0  # where locks cannot be listed, a folder written to so lately is live
STARTED_WITHIN = 2.0  # seconds between a process's birth and what job.json says of it: clocks are read twice


@dataclass(frozen=True)
class Job:
    """A command that was started."""

    pid: int
    began: float
    argv: list[str]
    exit_code: int | None = None
    """None: it runs, or the studio was not there when it ended"""
    asked: float = 0.0
    """when it was asked to stop; 0: it was not"""

    @property
    def said(self) -> str:
        """What to type in a terminal to do the same."""
        return shlex.join(["kobza", *self.argv])


def psutil() -> Any:
    """The package, which the extra brings."""
    try:
        import psutil as package
    except ImportError:
        raise InputError('the studio needs the psutil package: pip install "kobza[studio]"') from None
    return package


def start(argv: list[str], folder: Path, log: str) -> Job:
    """Call kobza with these arguments, in a session of its own, its output in folder/log -> the job, noted in folder/job.json."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / log, "ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "kobza", *argv],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        )
    job = note(folder, Job(process.pid, began(process.pid) or time.time(), argv))
    threading.Thread(target=reap, args=(process, folder), daemon=True).start()
    return job


def reap(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for a child, so that no zombie stays, and note how it ended."""
    code = process.wait()
    job = read_job(folder)
    if job and job.pid == process.pid:
        with contextlib.suppress(OSError, InputError):  # the folder may have been taken away
            note(folder, replace(job, exit_code=code))


def note(folder: Path, job: Job) -> Job:
    """Write job.json."""
    write_file(folder / FILE, json.dumps(asdict(job)))
    return job


def read_job(folder: Path) -> Job | None:
    """The job of a folder, None where there is none or its file is spoiled."""
    try:
        found = json.loads(read_some(folder / FILE, MOST_BYTES))
        argv, code = found["argv"], found["exit_code"]
        good = isinstance(argv, list) and all(isinstance(word, str) for word in argv)
        job = Job(
            int(found["pid"]), float(found["began"]), argv, None if code is None else int(code), float(found["asked"])
        )
        return job if good and job.pid > 1 else None  # 0 and below are groups of processes, 1 is the system's own
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def began(pid: int) -> float | None:
    """When a process began; None where there is none. A zombie has ended."""
    try:
        process = psutil().Process(pid)
        return None if process.status() == psutil().STATUS_ZOMBIE else process.create_time()
    except (psutil().Error, OverflowError, ValueError):
        return None


def is_alive(job: Job) -> bool:
    """Whether a job's process still runs: that very one, not another that was given its number."""
    born = began(job.pid) if job.exit_code is None else None
    return born is not None and abs(born - job.began) < STARTED_WITHIN


# ---- who works in a folder ----------------------------------------------------------------------------------------------------


def holders() -> dict[tuple[int, int], int] | None:
    """(device, inode) of each locked file -> the process that holds it; None where the system does not list its locks."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    held = {}
    for words in map(str.split, lines):
        if len(words) >= 6 and words[1] in ("FLOCK", "POSIX"):  # 1: FLOCK ADVISORY WRITE 5412 fe:00:3572931 0 EOF
            major, minor, inode = words[5].split(":")
            held[os.makedev(int(major, 16), int(minor, 16)), int(inode)] = int(words[4])
    return held


def holder(folder: Path) -> int | None:
    """The process that holds a run's lock; 0 where one does and the system does not say which; None: nobody."""
    try:
        file = (folder / ".lock").stat()
    except OSError:
        return None
    held = holders()
    if held is not None:
        return held.get((file.st_dev, file.st_ino))
    if time.time() - written(folder / "metrics.jsonl") < FRESH_SECONDS:
        return 0
    return None if sys.platform == "win32" else probe(folder / ".lock")


def probe(lock: Path) -> int | None:
    """Ask a lock that has long been quiet by taking it for a microsecond: 0 where somebody has it."""
    import fcntl

    with open(lock, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return 0
        fcntl.flock(file, fcntl.LOCK_UN)
    return None


def worker(folder: Path) -> int | None:
    """The process that works in a folder: its live job, which may not have come to its lock yet, else who holds the lock."""
    job = read_job(folder)
    return job.pid if job and is_alive(job) else holder(folder)


# ---- stopping --------------------------------------------------------------------------------------------------------


def stop(folder: Path) -> None:
    """Ask a run to save and stop, as Ctrl-C does. A second Ctrl-C would make it leave at once, so it is asked but once."""
    pid, job = worker(folder), read_job(folder)
    require(bool(pid), nobody(folder))
    if job and job.pid == pid:
        if job.asked:
            return
        note(folder, replace(job, asked=time.time()))
    send(pid, signal.SIGINT, folder)


def kill(folder: Path) -> None:
    """End a run that does not stop; what it did since its last checkpoint is lost."""
    pid = worker(folder)
    require(bool(pid), nobody(folder))
    send(pid, getattr(signal, "SIGKILL", signal.SIGTERM), folder)


def nobody(folder: Path) -> str:
    """Why there is nothing to stop."""
    found = holder(folder) == 0
    return (
        f"{folder.name}: its process cannot be found from here; stop it where it was started"
        if found
        else (f"{folder.name}: nothing runs there; the list of runs says which are running")
    )


def send(pid: int | None, number: int, folder: Path) -> None:
    """Send a signal to the process of a run."""
    try:
        os.kill(pid or 0, number) if pid else None
    except ProcessLookupError:
        return
    except OSError as error:
        raise InputError(
            f"{folder.name}: process {pid} cannot be stopped: {error.strerror}; stop it where it was started"
        ) from None

"""What the machine has and what a process takes of it: cores, memory, disk, and a GPU where nvidia-smi sees one."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from kobza.studio.jobs import psutil

SHARE_SECONDS = 1.0
MOST_PROCESSES = 32
GPU_SECONDS = 5.0  # nvidia-smi takes a tenth of a second: asked this often at most


@dataclass(frozen=True)
class Use:
    """A thing of which there is only so much."""

    name: str
    used: float
    total: float
    text: str

    @property
    def share(self) -> float:
        """Of it that is in use, in [0, 1]."""
        return min(1.0, max(0.0, self.used / self.total)) if self.total > 0 else 0.0


class Resources:
    """Measures use. It remembers processes, since the share of the cores is that since the last look."""

    def __init__(self) -> None:
        self.lock, self.processes = Lock(), {}
        self.shares: dict[Any, tuple[float, float]] = {}
        self.gpu_seen, self.gpu = -GPU_SECONDS, []
        self.smi = shutil.which("nvidia-smi")
        psutil().cpu_percent(None)  # the first look of all has nothing to compare with

    def machine(self, folder: Path) -> list[Use]:
        """Cores, memory, GPUs, and the disk that a folder lies on."""
        cores, memory = psutil().cpu_count() or 1, psutil().virtual_memory()
        percent = self.share("machine", lambda: psutil().cpu_percent(None))
        found = [
            Use("Processor", percent, 100, f"{percent:.0f}% of {cores} cores"),
            Use(
                "Memory",
                memory.total - memory.available,
                memory.total,
                of(memory.total - memory.available, memory.total),
            ),
        ]
        found += self.gpus()
        place = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("."))
        disk = shutil.disk_usage(place)
        return [
            *found,
            Use("Disk", disk.total - disk.free, disk.total, f"{size(disk.free)} free of {size(disk.total)}"),
        ]

    def process(self, pid: int) -> list[Use]:
        """Cores and memory of a process and its children; [] where it has ended."""
        try:
            with self.lock:
                known = self.processes.get(pid)
                own = known if known and known.is_running() else psutil().Process(pid)
                kept = {pid: own} | {
                    child.pid: self.processes.get(child.pid, child) for child in own.children(recursive=True)
                }
                self.processes = {p: process for p, process in self.processes.items() if process.is_running()} | kept
            percent = self.share(pid, lambda: sum(process.cpu_percent(None) for process in kept.values()))
            resident = sum(process.memory_info().rss for process in kept.values())
        except (psutil().Error, ValueError, OverflowError):
            return []
        cores, total = psutil().cpu_count() or 1, psutil().virtual_memory().total
        return [
            Use("Processor", percent, 100 * cores, f"{percent / 100:.1f} of {cores} cores"),
            Use("Memory", resident, total, of(resident, total)),
        ]

    def share(self, key: Any, measure: Callable[[], float]) -> float:
        """A percentage of the cores, which is one since the last look: two pages that look at once must get the same."""
        when, value = self.shares.get(key, (-1.0, 0.0))
        if time.monotonic() - when > SHARE_SECONDS:
            value = measure()
            self.shares = dict(list(self.shares.items())[-MOST_PROCESSES:]) | {key: (time.monotonic(), value)}
        return value

    def gpus(self) -> list[Use]:
        """Memory of each NVIDIA GPU; [] where there is none, or nothing to ask."""
        if self.smi and time.monotonic() - self.gpu_seen > GPU_SECONDS:
            self.gpu_seen, self.gpu = time.monotonic(), ask(self.smi)
        return self.gpu


def ask(smi: str) -> list[Use]:
    """What nvidia-smi says, a line a GPU: NVIDIA H200, 1024, 143771, 37 -> memory in use; the share of time it computed."""
    query = [smi, "--query-gpu=name,memory.used,memory.total,utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [use for use in map(read_line, lines) if use]


def read_line(line: str) -> Use | None:
    """A line of nvidia-smi; "[N/A]" stands where a card does not say."""
    name, *numbers = [part.strip() for part in line.split(",")]
    try:
        used, total, busy = (float(number) for number in numbers)
    except ValueError:
        return None
    return Use(name, used, total, f"{of(used * 2**20, total * 2**20)}, computing {busy:.0f}% of the time")


def of(used: float, total: float) -> str:
    """of(1e9, 4e9) -> "1.0 of 4.0 GB"."""
    return f"{used / 1e9:.1f} of {total / 1e9:.1f} GB"


def size(n: float) -> str:
    """size(1.5e9) -> "1.5 GB"; size(2e5) -> "0.2 MB"."""
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def as_dict(uses: list[Use]) -> list[dict[str, Any]]:
    """For a page."""
    return [{"name": use.name, "share": use.share, "text": use.text} for use in uses]

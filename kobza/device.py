"""Where a run computes: Runtime(device, precision, rank, world), made once by a recipe and passed on."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kobza.config import InputError, require

# Dense bf16 peak in FLOP/s by a part of the device's name, from the makers' data sheets; MFU is not shown elsewhere.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "L40S": 362e12, "4090": 165e12, "T4": 65e12}


@dataclass(frozen=True)
class Runtime:
    """A device, the number format of its matrix products, and this process' place among `world` equals."""

    device: torch.device
    precision: str = "fp32"  # fp32 tf32 bf16 fp16
    rank: int = 0
    world: int = 1

    @property
    def compute_dtype(self) -> torch.dtype:
        """Number format of activations and matrix products."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)


def pick_device(name: str = "auto") -> torch.device:
    """The device by name; auto takes CUDA, then MPS, then the CPU."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r} is unknown; take auto, cpu, cuda, cuda:1 or mps") from None
    require(device.type != "cuda" or torch.cuda.is_available(), f"--device {name}: torch sees no CUDA here; take cpu")
    require(device.type != "mps" or has_mps, f"--device {name}: torch sees no MPS here; take cpu")
    require(device.type in ("cpu", "cuda", "mps"), f"--device {name}: kobza knows cpu, cuda and mps")
    return device


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products (AVX512-BF16, AMX, or Arm's): there bf16 is 2 to 5 times
    faster than float32; elsewhere it is emulated and slower."""
    cpu = torch.cpu
    checks = [getattr(cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(check() for check in checks if check is not None)


def pick_precision(wanted: str, device: torch.device) -> str:
    """The number format to use: `wanted`, or for "auto" the fastest that trains as well as float32 there."""
    if wanted == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if device.type == "cpu" and cpu_multiplies_bf16() else "fp32"
    require(wanted != "tf32" or device.type == "cuda", f"train.precision tf32 needs CUDA, not {device.type}; take fp32")
    require(wanted != "fp16" or device.type != "cpu", "train.precision fp16 overflows on a CPU; take bf16 or fp32")
    return wanted


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc to keep big freed blocks instead of returning them to the system: each step takes the same blocks again, and
    the page faults of fresh ones cost a small model on a CPU a fifth of its time. Without effect on other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold, one_gigabyte = -1, -3, 1 << 30  # names and values of malloc.h
        mallopt(m_trim_threshold, one_gigabyte)
        mallopt(m_mmap_threshold, one_gigabyte)


def make_runtime(device: str, precision: str) -> Runtime:
    """The Runtime for a device name and a precision of TrainConfig; sets torch's float32 product mode to match."""
    chosen = pick_device(device)
    picked = pick_precision(precision, chosen)
    if chosen.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("highest" if picked == "fp32" else "high")
    return Runtime(chosen, picked)


def device_name(device: torch.device) -> str:
    """A name a person knows: the GPU's, or the CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()} {device.type}, {threads} thread{'s' * (threads > 1)}"


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of an accelerator in the table, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Every generator state that training draws from, as byte tensors (dropout is the only draw)."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["rng.mps"] = torch.mps.get_rng_state()
    return states


def set_rng_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned, as far as this device has it."""
    torch.set_rng_state(states["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in states:
        torch.cuda.set_rng_state(states["rng.cuda"], device)
    if device.type == "mps" and "rng.mps" in states:
        torch.mps.set_rng_state(states["rng.mps"])


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated there; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


@contextlib.contextmanager
def memory_error(micro_batch: int, seq_len: int, length: str = "model.max_seq_len") -> Iterator[None]:
    """Turn torch's out-of-memory errors into one line with the numbers and what to lower; `length`: the setting that gives it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        words = str(error)
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in words:
            raise
        wanted = re.search(r"tried to allocate ([\d.]+ ?\w+)", words)
        raise InputError(
            f"out of memory{f' (asked for {wanted[1]})' if wanted else ''} at train.micro_batch {micro_batch} of "
            f"{seq_len} tokens; halve train.micro_batch and double train.accumulate, or lower {length}; "
            "what was saved is whole"
        ) from error

"""Peak memory and time of a tuning before it starts: steps of the very method on slices of the model, drawn out to its depth.

Counting bytes by formula misses what a kernel or a number format adds. So slices of 2, 4 and 6 blocks are built as the run will
be built, take some steps on its largest batch, and are measured. Every block does the same, so time and bytes are straight lines
in the number of blocks; peaks are kept apart by moment (making the model, forward and backward, the update), each a line of its
own, since another one may be the highest at full depth.

On a GPU torch tells the peak. On a CPU what counts is the memory of the process, and that is no straight line: malloc holds 1.1
to 1.8 times what the tensors need at most, by how their sizes fit into the holes. So there the tensors are counted one by one
(Live), to 1% of what the process takes where malloc leaves no holes, and the holes are a share that the slices show. The process
that plans has loaded what the one that tunes will, so its own memory counts as it stands. Nothing here prints.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SLICES = (2, 4, 6)  # blocks; odd in number, for their median
COUNTED, TIMED = 2, 2  # steps: the first allocates the optimizer's state, so the second may stand higher

Step = Callable[[], object]  # one update, as the run makes it
Make = Callable[[int], tuple[nn.Module, Step]]  # blocks -> a model of so many, and its step on the largest batch


@dataclass(frozen=True)
class Measured:
    """A few steps as they were; bytes."""

    peak: int
    """the highest that the process had on a CPU, the tensors on a GPU"""
    base: int
    """the same before the model was made"""
    moments: dict[str, int]
    """the tensors' peak in each: making, gradients, update"""
    weights: int
    """the model's tensors"""
    state: int
    """the optimizers' tensors"""
    seconds: float
    """of a step"""

    @property
    def overhead(self) -> float:
        """What is taken for each byte that the tensors need at their peak."""
        return max(1.0, (self.peak - self.base) / max(self.moments.values()))


@dataclass(frozen=True)
class Estimate:
    """What a tuning will take."""

    peak_bytes: int
    parts: dict[str, int]
    """what the peak is made of"""
    seconds_per_step: float
    seconds: float


def estimate(
    make: Make, n_layer: int, n_steps: int, device: torch.device | None = None, share: float = 1.0
) -> Estimate:
    """Measure slices, answer for n_layer blocks and n_steps steps. share: tokens of a step on average beside the largest one's.
    A model with no more blocks than the slices is measured whole."""
    device = device or torch.device("cpu")
    slices = SLICES if n_layer > SLICES[-1] else (n_layer,)
    measure(partial(make, 1), device)  # warms up: imports, and what libraries allocate once
    found = [measure(partial(make, n), device) for n in slices]

    def at_depth(read: Callable[[Measured], float]) -> float:
        low, high = read(found[0]), read(found[-1])
        a_block = (high - low) / max(1, slices[-1] - slices[0])
        return high + a_block * (n_layer - slices[-1])

    moments = {name: int(at_depth(lambda m, name=name: m.moments[name])) for name in found[0].moments}
    highest = max(moments, key=moments.__getitem__)
    tensors = moments[highest]
    holes = 0 if device.type == "cuda" else int(tensors * (median(m.overhead for m in found) - 1))
    parts = {"process": found[-1].base, "weights": int(at_depth(lambda m: m.weights))}
    parts["optimizer state"] = 0 if highest == "making" else int(at_depth(lambda m: m.state))
    parts[highest] = tensors - parts["weights"] - parts["optimizer state"]
    parts["allocator"] = holes
    a_step = share * at_depth(lambda m: m.seconds)
    return Estimate(sum(parts.values()), parts, a_step, a_step * n_steps)


def measure(make: Callable[[], tuple[nn.Module, Step]], device: torch.device | None = None) -> Measured:
    """Make a model and let it take some steps. A moment ends where the optimizers say that they begin or end."""
    device = device or torch.device("cpu")
    base = resting(device)
    count, moments, optimizers = tensor_counter(device), {}, {}

    def note(moment: str) -> None:
        moments[moment] = max(moments.get(moment, 0), count.since())

    def begins(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        optimizers[id(optimizer)] = optimizer
        note("gradients")

    hooks = [
        register_optimizer_step_pre_hook(begins),
        register_optimizer_step_post_hook(lambda *_: note("update")),
    ]
    try:
        with count:
            model, step = make()
            count.see([*model.parameters(), *model.buffers()])  # a file's tensors come from no operation
            note("making")
            for _ in range(COUNTED):
                step()
    finally:
        for hook in hooks:
            hook.remove()
    seconds = min(timed(step, device) for _ in range(TIMED))
    state = [t for o in optimizers.values() for entry in o.state.values() for t in entry.values()]
    sizes = n_bytes([*model.parameters(), *model.buffers()]), n_bytes(state)
    peak = max(held(device), base + max(moments.values()))  # a GPU's was begun anew with each moment
    return Measured(peak, base, moments, *sizes, seconds)


def timed(step: Step, device: torch.device) -> float:
    """Seconds of a step, until the device is done with it."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started


def n_bytes(values: Iterable[Any]) -> int:
    """Bytes of the tensors among the values, one that stands there twice counted once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in values if isinstance(t, Tensor)}.values())


# ---- the tensors ---------------------------------------------------------------------------------------------------


# What these make takes no memory before something is written there, which is an operation of its own
UNWRITTEN = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty)


class Live(TorchDispatchMode):
    """Within the context counts the bytes of all tensors that operations make, from their making to their end, the backward's
    too. What an operation needs within itself is not seen."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler for it, and 150 MB more would be counted as the process'

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, int] = {}  # bytes by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in UNWRITTEN:
            given = [] if func._schema.is_mutable else tensors_of((args, kwargs))
            shown = {value.untyped_storage().data_ptr() for value in given}  # a view of it writes nothing
            self.see([value for value in tensors_of(out) if value.untyped_storage().data_ptr() not in shown])
        return out

    def see(self, values: list[Any]) -> None:
        """Count what is new among the values."""
        for value in tensors_of(values):
            storage = value.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            if size and address not in self.known:
                self.known[address] = size
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, address).atexit = False

    def _gone(self, address: int) -> None:
        self.now -= self.known.pop(address)

    def since(self) -> int:
        """The most bytes at once since the last call."""
        most, self.most = self.most, self.now
        return most


def tensors_of(values: Any) -> list[Tensor]:
    """The strided tensors in whatever holds them."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.layout == torch.strided]


class CudaPeak:
    """In Live's place where torch counts itself, down to what an operation needs within."""

    def __init__(self, device: torch.device):
        self.device, self.base = device, 0

    def __enter__(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
        self.base = torch.cuda.memory_allocated(self.device)

    def __exit__(self, *_: Any) -> None:
        pass

    def see(self, values: list[Any]) -> None:
        """Nothing: all are counted."""

    def since(self) -> int:
        """The most bytes at once since the last call."""
        most = torch.cuda.max_memory_allocated(self.device) - self.base
        torch.cuda.reset_peak_memory_stats(self.device)
        return most


def tensor_counter(device: torch.device) -> Live | CudaPeak:
    """What counts tensors there."""
    return CudaPeak(device) if device.type == "cuda" else Live()


# ---- memory, as each system tells it -------------------------------------------------------------------------------


def held(device: torch.device) -> int:
    """The most bytes held there since `resting`: of the process on a CPU, of torch's tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # the pool does not shrink by itself: it is as large as the peak was
    return process_peak()


def let_go(device: torch.device) -> None:
    """Give back what is no longer in use."""
    gc.collect()
    if device.type == "cpu":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        if trim is not None:
            trim(0)  # else what comes next would stand on the freed memory of what went
    else:
        getattr(torch, device.type).empty_cache()


def resting(device: torch.device) -> int:
    """Let go of what is not in use and begin a new peak -> the bytes that are left. Only to measure: the system forgets the old
    peak, in what it tells others of this process too."""
    let_go(device)
    if device.type == "cpu":
        process_reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return held(device)


def process_peak() -> int:
    """The most memory that this process held: on Linux since `process_reset`, elsewhere since its beginning."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource  # not on Windows, where nothing of this is

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def process_reset() -> None:
    """Begin a new peak. Where the system knows none the peak only rises, and the overhead is what the largest slice adds."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass

"""Activation checkpointing: keep a block's input alone, and compute the block again when its backward comes. Chen et al. 2016.

Memory for activations falls from all that a block computes to one (B, T, C) a block plus all of a single block, for one forward
more: 16 small blocks of 2,048 tokens train in a sixth of the memory and 1.34 times the time, 1.39 with adapters. With `offload`
the inputs wait in the host's memory: copied out beside the forward of the blocks above, back beside the backward of the next.

While a block computes, a pair of autograd's hooks puts an empty Slot in the place of each tensor that autograd would save. The
first Slot that is asked for runs the block again, from the same input and the same random state, and so fills them all in their
order; no operation after the last of them is run. The same operations on the same numbers: gradients are the plain block's to the
bit. torch.utils.checkpoint works alike, but imports torch.compile's machinery, a second, and has no say in where the input waits.
What a kernel keeps past autograd (on its ctx, not by save_for_backward) is kept here too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kobza.config import require
from kobza.device import rng_state, set_rng_state
from kobza.model import GPT, Cache, View
from kobza.surgery import replace_modules


class Mover(Protocol):
    """Takes tensors out of a device's memory and back, without waiting for either."""

    def out(self, x: Tensor) -> Any:
        """Start to copy x out -> what `back` takes."""

    def back(self, away: Any) -> Any:
        """Start to copy it back -> what `ready` takes."""

    def ready(self, coming: Any) -> Tensor:
        """x, for whatever computes with it next."""


class HostMemory:
    """A Mover from a GPU to pinned host memory. One stream for both ways: a copy back cannot overtake the copy out."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def out(self, x: Tensor) -> Tensor:
        """x on the host, once the stream gets there."""
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # x may still be computing
        with torch.cuda.stream(self.stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self.stream)  # its memory is not given away before it is copied
        return host

    def back(self, away: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """x on the device, and the event after which it is whole."""
        with torch.cuda.stream(self.stream):
            return away.to(self.device, non_blocking=True), self.stream.record_event()

    def ready(self, coming: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        """x for the stream that computes, which waits for it; the host does not."""
        x, whole = coming
        current = torch.cuda.current_stream(self.device)
        current.wait_event(whole)
        x.record_stream(current)  # it was allocated on the other stream
        return x


class Stay:
    """A Mover that leaves x where it is."""

    def out(self, x: Tensor) -> Tensor:
        """x"""
        return x

    back = ready = out


class Slot:
    """Stands in autograd's graph for a tensor that is computed again; freed with the node that holds it."""

    __slots__ = ("__weakref__", "shape", "tensor")

    def __init__(self, shape: torch.Size):
        self.shape, self.tensor = shape, None


class Enough(Exception):
    """All slots are filled: what is left of the block need not be computed."""


class Segment:
    """One forward of a block: its input, wherever that waits, and the slots of what autograd wanted to save."""

    def __init__(self, run: Callable[[Tensor], Tensor], x: Tensor, mover: Mover, below: Segment | None):
        self.run, self.mover, self.below = run, mover, below
        self.learns, self.device, self.rng = x.requires_grad, x.device, rng_state(x.device)
        self.away, self.coming = mover.out(x.detach()), None
        self.slots: list[weakref.ref[Slot]] = []

    def pack(self, tensor: Tensor) -> Slot:
        """Forget the tensor."""
        slot = Slot(tensor.shape)
        self.slots.append(weakref.ref(slot))
        return slot

    def unpack(self, slot: Slot) -> Tensor:
        """The tensor, computed again with all others of the block when the first is asked for."""
        if slot.tensor is None:
            self.fill()
        check(slot.tensor is not None)
        return slot.tensor

    def fetch(self) -> None:
        """Have the input copied back."""
        if self.coming is None:
            self.coming = self.mover.back(self.away)

    def fill(self) -> None:
        """Run the block again, up to the last tensor that is wanted."""
        self.fetch()
        x, self.coming = self.mover.ready(self.coming), None
        if self.below is not None:
            self.below.fetch()  # its backward is next: copied while this one computes
        wanted = iter(self.slots)
        n_left = len(self.slots)

        def keep(tensor: Tensor) -> None:
            nonlocal n_left
            slot, n_left = next(wanted)(), n_left - 1
            if slot is not None:  # else the node that held it is done
                check(slot.shape == tensor.shape)
                slot.tensor = tensor.detach()
            if n_left == 0:
                raise Enough

        random = rng_state(self.device)
        set_rng_state(self.rng, self.device)
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, no_backward):
                self.run(x.requires_grad_(self.learns))
        except Enough:
            pass
        finally:
            set_rng_state(random, self.device)


def check(same: bool) -> None:
    """Stop where gradients would be wrong."""
    if not same:
        raise RuntimeError("a checkpointed block did otherwise the second time: was its mode or a part of it changed?")


def no_backward(_nothing: None) -> Tensor:
    """The second run of a block has no backward of its own."""
    raise AssertionError("backward through a block that runs for its saved tensors only")


class Checkpointed(nn.Module):
    """A block that keeps its input alone while it learns; else the block. It shows the block's own children under their own
    names, so weights, checkpoints and further surgery within it see no difference."""

    def __init__(self, block: nn.Module, mover: Mover, below: Checkpointed | None):
        super().__init__()
        self._modules, self._parameters, self._buffers = block._modules, block._parameters, block._buffers
        self.training = block.training
        self.mover, self.latest = mover, None  # of the latest forward, a weak reference to its Segment
        self.outside = (block, below)  # in a tuple, for they are no children

    def forward(self, x: Tensor, views: list[View], cache: Cache | None) -> Tensor:
        block, below = self.outside
        block.training = self.training
        if cache is not None or not torch.is_grad_enabled():
            return block(x, views, cache)
        under = below.latest() if below is not None and below.latest is not None else None
        segment = Segment(lambda x: block(x, views, None), x, self.mover, under)
        self.latest = weakref.ref(segment)
        with torch.autograd.graph.saved_tensors_hooks(segment.pack, segment.unpack):
            return block(x, views, None)


def use(model: GPT, offload: bool = False) -> list[str]:
    """Put a Checkpointed in place of each block -> their names. After whatever else replaces blocks; what replaces modules
    within them may come before or after."""
    device = next(model.parameters()).device
    require(
        not offload or device.type == "cuda",
        f"--checkpointing offload moves activations from a GPU's memory into the host's; on {device.type} there is no other, "
        "so it has no effect: take --checkpointing on",
    )
    return checkpoint_blocks(model, HostMemory(device) if offload else Stay())


def checkpoint_blocks(model: GPT, mover: Mover) -> list[str]:
    """`use` with any Mover. The last block's input stays: it is wanted back at once."""
    last, below = model.blocks[-1], None

    def make(block: nn.Module) -> Checkpointed:
        nonlocal below
        below = Checkpointed(block, Stay() if block is last else mover, below)
        return below

    return replace_modules(model, lambda name, _: name.rpartition(".")[0] == "blocks", make)

"""What the kernels share: how wide they compute, how they are started, in which order rows lie, and tanh.

Every kernel computes in float32, or in float64 where its input is (proofs run in it), and rounds once, as it stores.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def wide(x: Tensor) -> tl.dtype:
    """The number format to compute in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, tile: int, **constants: Any) -> None:
    """Run kernel(x, *args) on x's device, which need not be the current one, with warps enough for a tile."""
    n_warps = min(max(triton.next_power_of_2(tile) // 512, 1), 16)
    with torch.cuda.device_of(x):
        kernel[grid](x, *args, **constants, num_warps=n_warps)


def n_programs(x: Tensor) -> int:
    """How many programs a kernel that loops over rows starts: two for each of a GPU's multiprocessors."""
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def side_by_side(x: Tensor) -> Tensor:
    """x (..., C), copied if its elements do not lie without gaps, each row of C in one piece."""
    return x if in_memory_order(x).is_contiguous() else x.contiguous()


def in_memory_order(x: Tensor) -> Tensor:
    """A view of x (..., C), its leading axes sorted as they lie. Heads are a transposed view: for what acts on each row alone
    their order does not matter, and a copy would cost as much as the kernel."""
    return x.permute(*sorted(range(x.ndim - 1), key=x.stride, reverse=True), x.ndim - 1)


def laid_as(g: Tensor, x: Tensor) -> Tensor:
    """A gradient in the memory layout of x."""
    return g if g.stride() == x.stride() else torch.empty_like(x, dtype=g.dtype).copy_(g)


@triton.jit
def tanh(z):
    """tanh(z) to the last digits: Lambert's continued fraction where 1 - exp would cancel. Triton's language has no tanh."""
    s = tl.minimum(z * z, 0.25)
    fraction = z * (135135.0 + s * (17325.0 + s * (378.0 + s))) / (135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0)))
    e = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(z) < 0.5, fraction, tl.where(z < 0, -far, far))

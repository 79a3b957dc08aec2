"""ggml's block formats: bytes of a GGUF tensor -> float32, vectorised, bit for bit as gguf-py has it.

A block is a run of `values` numbers of one row in `bytes` bytes: a scale or two in float16, then small integers. The struct of
each block stands below as a numpy dtype, in the order of ggml-common.h; what its integers mean stands in the function that undoes
it. Q2_K and Q3_K are only read. Which integers are best is the search in kquants.py; what they are packed into stands here.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kobza.config import InputError, nearest, require
from kobza.formats.kquants import fit_ranged, fit_signed, fit_super, halved, inverse, total, weights

if TYPE_CHECKING:
    from kobza.formats.gguf import Gguf

TYPES = {  # ggml.h, enum ggml_type; the numbers left out were types once and are gone
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
BLOCKS: dict[str, tuple[int, int]] = {  # type -> (values, bytes) of a block
    **{
        "F64": (1, 8),
        "F32": (1, 4),
        "F16": (1, 2),
        "BF16": (1, 2),
        "I8": (1, 1),
        "I16": (1, 2),
        "I32": (1, 4),
        "I64": (1, 8),
    },
    **{"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q8_1": (32, 40)},
    **{
        "Q2_K": (256, 84),
        "Q3_K": (256, 110),
        "Q4_K": (256, 144),
        "Q5_K": (256, 176),
        "Q6_K": (256, 210),
        "Q8_K": (256, 292),
    },
    **{"IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ3_XXS": (256, 98), "IQ1_S": (256, 50), "IQ4_NL": (32, 18)},
    **{"IQ3_S": (256, 110), "IQ2_S": (256, 82), "IQ4_XS": (256, 136), "IQ1_M": (256, 56), "TQ1_0": (256, 54)},
    **{"TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18)},
}
PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
STRUCTS = {
    "Q4_0": np.dtype([("d", "<f2"), ("qs", "u1", 16)]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)]),
    "Q5_0": np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    "Q5_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    "Q8_0": np.dtype([("d", "<f2"), ("qs", "i1", 32)]),
    "Q2_K": np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("m", "<f2")]),
    "Q3_K": np.dtype([("qh", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")]),
    "Q4_K": np.dtype([("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)]),
    "Q5_K": np.dtype([("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)]),
    "Q6_K": np.dtype([("qs", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]),
}
READABLE = (*PLAIN, "BF16", *STRUCTS)
AT_ONCE = 1 << 18  # values; what a piece needs besides stays in the cache


def dequantize(data: np.ndarray, type: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 numbers of a tensor. data: its bytes, uint8, flat; shape: rows first, as in numpy."""
    if type not in READABLE:
        raise InputError(f"cannot read ggml type {type}{nearest(type, list(READABLE))}")
    values, size = BLOCKS[type]
    require(
        not shape or shape[-1] % values == 0,
        f"a row of {shape[-1:]} values is no multiple of {type}'s block of {values}; requantise in another type",
    )
    data = np.ascontiguousarray(data, np.uint8).reshape(-1)
    count = math.prod(shape)
    require(
        data.size * values == count * size,
        f"{type} of shape {shape} takes {count // values * size:,} bytes, not {data.size:,}",
    )
    with np.errstate(invalid="ignore", over="ignore"):  # infinite scales are the doctor's to report
        if type in PLAIN:
            return data.view(PLAIN[type]).astype(np.float32).reshape(shape)
        if type == "BF16":
            return (data.view("<u2").astype("<u4") << 16).view("<f4").reshape(shape)
        blocks = data.view(STRUCTS[type])
        out = np.empty((len(blocks), values), np.float32)
        step = AT_ONCE // values
        for at in range(0, len(blocks), step):
            out[at : at + step] = DEQUANTIZE[type](blocks[at : at + step]).reshape(-1, values)
    return out.reshape(shape)


def bytes_of(type: str, shape: tuple[int, ...]) -> int:
    """What a tensor takes in a file."""
    values, size = BLOCKS[type]
    return math.prod(shape) // values * size


def tensor_bytes(gguf: Gguf, name: str) -> np.ndarray:
    """A tensor's bytes as they lie in the file, uint8, flat; read when they are looked at."""
    if name not in gguf.tensors:
        raise InputError(f"{gguf.path} has no tensor {name!r}{nearest(name, list(gguf.tensors)[:5000])}")
    tensor = gguf.tensors[name]
    try:
        return np.memmap(gguf.path, np.uint8, "r", offset=tensor.start, shape=(tensor.n_bytes,))
    except (OSError, ValueError) as error:
        raise InputError(f"{gguf.path}: cannot read tensor {name!r} ({error}); the file changed, try again") from None


def load_tensor(gguf: Gguf, name: str) -> np.ndarray:
    """The float32 numbers of one tensor of a GGUF file, rows first."""
    data = tensor_bytes(gguf, name)
    tensor = gguf.tensors[name]
    try:
        return dequantize(data, tensor.type, tensor.shape)
    except InputError as error:
        raise InputError(f"{gguf.path}: tensor {name!r}: {error}") from None


# -- bytes -> numbers. b: blocks (n,) of a STRUCTS type; n stands for their count --------------------------------------


def _column(half: np.ndarray) -> np.ndarray:
    return half.astype(np.float32)[:, None]  # (n,) -> (n, 1)


def _split(packed: np.ndarray, run: int, bits: int, count: int) -> np.ndarray:
    """Unpack `count` numbers of `bits` bits a byte: of each run of bytes first all lowest bits, then all next ones.

    packed (n, m) uint8 -> (n, m * count); the order of every ggml block: [a0|b0, a1|b1] -> a0 a1 b0 b1.
    """
    shifts = np.arange(0, bits * count, bits, dtype=np.uint8)[:, None]
    parts = packed.reshape(len(packed), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)  # (n, m / run, count, run)
    return parts.reshape(len(packed), -1)


def _fifth(b: np.ndarray) -> np.ndarray:
    """(n, 32): four bits from qs, the fifth from the 32 bits of qh, lowest first."""
    high = np.unpackbits(b["qh"], axis=-1, bitorder="little")
    return _split(b["qs"], 16, 4, 2) | high << np.uint8(4)


def _scales_and_mins(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and eight 6-bit minima from 12 bytes: (n, 12) -> two of (n, 8), float32.

    Bytes 0-3 and 4-7 hold scales and minima 0-3, and in their upper two bits those of scales and minima 4-7, whose lower four
    bits are the nibbles of bytes 8-11.
    """
    first, second, third = (part.reshape(-1, 4) for part in np.hsplit(scales, 3))
    low = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=-1)
    high = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    return low.astype(np.float32), high.astype(np.float32)


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _column(b["d"]) * b["qs"].astype(np.float32)


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _column(b["d"]) * (_split(b["qs"], 16, 4, 2).astype(np.int8) - np.int8(8)).astype(np.float32)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _column(b["d"]) * _split(b["qs"], 16, 4, 2).astype(np.float32) + _column(b["m"])


def _q5_0(b: np.ndarray) -> np.ndarray:
    return _column(b["d"]) * (_fifth(b).astype(np.int8) - np.int8(16)).astype(np.float32)


def _q5_1(b: np.ndarray) -> np.ndarray:
    return _column(b["d"]) * _fifth(b).astype(np.float32) + _column(b["m"])


def _q2_k(b: np.ndarray) -> np.ndarray:
    scale = _column(b["d"]) * (b["scales"] & 15).astype(np.float32)  # (n, 16)
    least = _column(b["m"]) * (b["scales"] >> 4).astype(np.float32)
    q = _split(b["qs"], 32, 2, 4).reshape(-1, 16, 16).astype(np.float32)
    return scale[..., None] * q - least[..., None]


def _q3_k(b: np.ndarray) -> np.ndarray:
    low = _split(b["scales"][:, :8], 8, 4, 2)  # (n, 16)
    high = _split(b["scales"][:, 8:], 4, 2, 4)
    scale = _column(b["d"]) * ((low | high << np.uint8(4)).astype(np.int8) - np.int8(32)).astype(np.float32)
    q = _split(b["qs"], 32, 2, 4).astype(np.int8)  # (n, 256)
    q -= (_split(b["qh"], 32, 1, 8) ^ 1).astype(np.int8) << np.int8(2)  # a bit that is 0 takes four away
    return scale[..., None] * q.reshape(-1, 16, 16).astype(np.float32)


def _q4_k(b: np.ndarray, q: np.ndarray | None = None) -> np.ndarray:
    scale, least = _scales_and_mins(b["scales"])
    q = _split(b["qs"], 32, 4, 2) if q is None else q
    scale, least = _column(b["d"]) * scale, _column(b["m"]) * least  # (n, 8)
    return scale[..., None] * q.reshape(-1, 8, 32).astype(np.float32) - least[..., None]


def _q5_k(b: np.ndarray) -> np.ndarray:
    return _q4_k(b, _split(b["qs"], 32, 4, 2) | _split(b["qh"], 32, 1, 8) << np.uint8(4))


def _q6_k(b: np.ndarray) -> np.ndarray:
    q = _split(b["qs"], 64, 4, 2) | _split(b["qh"], 32, 2, 4) << np.uint8(4)
    scale = _column(b["d"]) * b["scales"].astype(np.float32)  # (n, 16)
    return scale[..., None] * (q.astype(np.int8) - np.int8(32)).reshape(-1, 16, 16).astype(np.float32)


DEQUANTIZE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **{"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1},
    **{"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k},
}
assert set(DEQUANTIZE) == set(STRUCTS) and all(BLOCKS[name][1] == s.itemsize for name, s in STRUCTS.items())


# -- numbers -> bytes --------------------------------------------------------------------------------------------------

LARGEST = 65504  # of a float16


def quantize(numbers: np.ndarray, type: str, importance: np.ndarray | None = None) -> np.ndarray:
    """The bytes of a float32 tensor in a ggml type, uint8, flat; the same whatever the machine and its threads.

    importance (columns,): what a squared error in each column counts; only the types that search look at it (not Q8_0). Without
    it the plain types are rounded as in gguf-py.
    """
    if type not in MADE:
        raise InputError(f"cannot write ggml type {type}{nearest(type, list(MADE))}")
    numbers = np.ascontiguousarray(numbers, np.float32)
    values, size = BLOCKS[type]
    require(
        numbers.size > 0 and numbers.shape[-1] % values == 0 if numbers.ndim else values == 1,
        f"a row of {numbers.shape[-1:]} values is no multiple of {type}'s block of {values}; take F16",
    )
    blocks = np.empty(numbers.size // values, STRUCTS.get(type, f"V{size}"))
    rows = numbers.reshape(-1, values)
    columns = None if importance is None else _columns(importance, numbers.shape[-1], values)
    per_row = 1 if columns is None else len(columns)
    at_once = AT_ONCE_MADE << (values == 256 or columns is not None)  # a search has fewer short operations that way
    make, step = MAKE[type], max(1, at_once // (values * per_row)) * per_row  # whole rows, where columns differ

    def piece(at: int) -> None:
        part = rows[at : at + step]
        require(
            type in ANY or bool((np.abs(part) <= LARGEST).all()),
            f"{type} holds numbers up to 65,504, and this tensor has {_worst(part)}; take BF16, or a checkpoint that is whole",
        )
        if values == 1:
            blocks[at : at + step] = make(part[:, 0]).view(blocks.dtype)
            return
        x = part.T.copy()
        make(x, None if columns is None else _counts(x, columns), blocks[at : at + step])

    _shared(piece, range(0, len(rows), step))
    return blocks.view(np.uint8)


def _shared(work: Callable[[int], None], starts: range) -> None:
    """work(start) of each, by as many threads as there are cores: numpy lets go of the interpreter."""
    threads = min(os.cpu_count() or 1, len(starts))

    def share(first: int) -> None:
        for start in starts[first::threads]:
            work(start)

    if threads == 1:
        return share(0)
    with ThreadPoolExecutor(threads) as pool:
        deque(pool.map(share, range(threads)), maxlen=0)


def _worst(part: np.ndarray) -> str:
    """The number that cannot be held: a NaN first."""
    return f"{part.flat[np.abs(part).argmax()]:g}"


def _columns(importance: np.ndarray, n_columns: int, values: int) -> np.ndarray:
    """The importance of a row's blocks (n_columns / values, values), 1 on average; no column counts nothing."""
    counts = np.asarray(importance, np.float32)
    whole = counts.shape == (n_columns,) and bool((np.isfinite(counts) & (counts >= 0)).all())
    require(
        whole,
        f"the importance of a tensor with {n_columns:,} columns is as many finite numbers from 0, not {counts.shape}; "
        "measure it again with this model",
    )
    mean = counts.astype(np.float64).mean()
    counts = counts / np.float32(mean) if mean > 0 else np.ones_like(counts)
    return np.maximum(counts, np.float32(LEAST_IMPORTANCE)).reshape(-1, values)


def _counts(x: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """What an error in each number of whole rows counts, (values, n); in the plain types as in ggml more in large ones."""
    counts = np.tile(columns.T, x.shape[1] // len(columns))
    if len(x) == 32:
        square = x * x
        mean = total(square).reshape(-1, len(columns)).mean(-1, dtype=np.float64) / 32  # of each row
        counts *= np.sqrt(np.repeat(mean.astype(np.float32), len(columns)) + square)
    return counts


# x (values, n) float32: the blocks side by side; counts likewise, or None


def _to_half(numbers: np.ndarray, type: str) -> np.ndarray:
    import torch  # rounds as numpy and gguf-py do, many times as fast

    return torch.tensor(numbers).to(getattr(torch, type)).view(torch.uint16).numpy()


def _make_q8_0(x: np.ndarray, counts: np.ndarray | None, blocks: np.ndarray) -> None:
    d = np.abs(x).max(0) / 127
    x *= inverse(d)
    whole = np.trunc(x)
    x -= whole
    whole += np.trunc(x + x)  # half away from zero, as C's roundf
    blocks["qs"] = whole.astype(np.int8).T
    blocks["d"] = d


def _make_signed(x: np.ndarray, counts: np.ndarray | None, blocks: np.ndarray) -> None:
    """Q4_0 and Q5_0: the value furthest from zero, sign and all, becomes the lowest integer."""
    half = 16 if "qh" in blocks.dtype.names else 8
    if counts is None:
        d = _furthest(x) / -half
    else:
        d = halved(fit_signed(x, counts, half)[0])
    x *= inverse(d)
    x += np.float32(half + 0.5)
    blocks["d"] = d
    _pack(x.clip(0, 2 * half - 1, out=x).astype(np.uint8), blocks)


def _furthest(x: np.ndarray) -> np.ndarray:
    """(values, n) -> (n,): of two equally far from zero the first."""
    top, bottom = x.max(0), x.min(0)
    tie = np.flatnonzero(top == -bottom)
    far = np.where(top > -bottom, top, bottom)
    far[tie] = x[np.abs(x[:, tie]).argmax(0), tie]
    return far


def _make_ranged(x: np.ndarray, counts: np.ndarray | None, blocks: np.ndarray) -> None:
    """Q4_1 and Q5_1: the range of the block in 15 or 31 steps."""
    steps = 31 if "qh" in blocks.dtype.names else 15
    if counts is None:
        least = x.min(0)
        d = (x.max(0) - least) / steps
    else:
        d, least = (halved(a[0]) for a in fit_ranged(x, counts, steps))
    x -= least
    x *= inverse(d)
    x += np.float32(0.5)
    blocks["d"], blocks["m"] = d, least
    _pack(x.clip(0, steps, out=x).astype(np.uint8), blocks)


def _make_ranged_k(x: np.ndarray, counts: np.ndarray | None, blocks: np.ndarray) -> None:
    """Q4_K and Q5_K: eight runs of 32, each with a 6-bit scale and minimum."""
    steps = 31 if "qh" in blocks.dtype.names else 15
    x = x.reshape(8, 32, -1)
    w = weights(x, counts if counts is None else counts.reshape(x.shape))
    d, m, scales, mins, q = fit_super(x, w, *fit_ranged(x, w, steps), (0, 63), (0, steps))
    blocks["d"], blocks["m"] = d.ravel(), m.ravel()
    scales, mins = scales[:, 0].astype(np.uint8), mins[:, 0].astype(np.uint8)  # (8, n)
    blocks["scales"] = np.concatenate(
        [
            scales[:4] | scales[4:] >> 4 << 6,
            mins[:4] | mins[4:] >> 4 << 6,
            scales[4:] & 15 | mins[4:] << 4,
        ]
    ).T
    _pack(q.astype(np.uint8).reshape(256, -1), blocks)


def _make_q6_k(x: np.ndarray, counts: np.ndarray | None, blocks: np.ndarray) -> None:
    """Sixteen runs of 16, each with an 8-bit scale."""
    x = x.reshape(16, 16, -1)
    w = weights(x, None) if counts is None else counts.reshape(x.shape)  # ggml takes x^2: 4% more error, all told
    scale = fit_signed(x, w, 32)
    d, _, scales, _, q = fit_super(x, w, scale, np.zeros_like(scale), (-128, 127), (-32, 31))
    blocks["d"], blocks["scales"] = d.ravel(), scales[:, 0].T
    q += 32
    q = q.astype(np.uint8).reshape(256, -1)
    blocks["qs"], blocks["qh"] = _joined(q & 15, 64, 4, 2).T, _joined(q >> 4, 32, 2, 4).T


def _pack(q: np.ndarray, blocks: np.ndarray) -> None:
    """q (values, n) of 4 or 5 bits -> nibbles, and the fifth bits."""
    blocks["qs"] = _joined(q & 15, 16 if len(q) == 32 else 32, 4, 2).T
    if "qh" in blocks.dtype.names:
        blocks["qh"] = _joined(q >> 4, 1 if len(q) == 32 else 32, 1, 8).T


def _joined(q: np.ndarray, run: int, bits: int, count: int) -> np.ndarray:
    """The way back from `_split`: (values, n) uint8 -> (values / count, n)."""
    parts = q.reshape(-1, count, run, q.shape[-1])
    out = parts[:, 0].copy()
    for i in range(1, count):
        out |= parts[:, i] << np.uint8(bits * i)
    return out.reshape(-1, q.shape[-1])


MAKE: dict[str, Callable[..., Any]] = {
    **{"F32": np.asarray, "F16": partial(_to_half, type="float16"), "BF16": partial(_to_half, type="bfloat16")},
    **{"Q8_0": _make_q8_0, "Q4_0": _make_signed, "Q5_0": _make_signed, "Q4_1": _make_ranged, "Q5_1": _make_ranged},
    **{"Q4_K": _make_ranged_k, "Q5_K": _make_ranged_k, "Q6_K": _make_q6_k},
}
MADE = tuple(MAKE)
ANY = ("F32", "BF16")  # hold what is infinite and what is no number as well
AT_ONCE_MADE = 1 << 16  # values: what is needed besides stays in the cache
LEAST_IMPORTANCE = 1e-4  # of the average

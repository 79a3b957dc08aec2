"""ggml's block formats: bytes of a GGUF tensor -> float32, vectorised, bit for bit as gguf-py has it.

A block is a run of `values` numbers of one row in `bytes` bytes: a scale or two in float16, then small integers. The struct of
each block stands below as a numpy dtype, in the order of ggml-common.h; what its integers mean stands in the function that undoes
it. The older types (Q4_0 ... Q8_0) can be made here too; the K types are only read, for making them well is a search.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kobza.config import InputError, nearest, require

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


# -- numbers -> bytes, as ggml's reference quantisers round ------------------------------------------------------------

MADE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def quantize(numbers: np.ndarray, type: str) -> np.ndarray:
    """The bytes of a float32 tensor in a ggml type, uint8, flat; equal to gguf-py's."""
    if type not in MADE:
        raise InputError(f"cannot write ggml type {type}{nearest(type, list(MADE))}")
    numbers = np.ascontiguousarray(numbers, np.float32)
    values, _ = BLOCKS[type]
    require(
        numbers.size > 0 and numbers.shape[-1] % values == 0 if numbers.ndim else values == 1,
        f"a row of {numbers.shape[-1:]} values is no multiple of {type}'s block of {values}; take F16",
    )
    if type in PLAIN:
        return numbers.astype(PLAIN[type]).reshape(-1).view(np.uint8)
    if type == "BF16":
        return _to_bfloat16(numbers.reshape(-1)).view(np.uint8)
    rows = numbers.reshape(-1, values)
    blocks = np.empty(len(rows), STRUCTS[type])
    {"Q8_0": _make_q8_0, "Q4_0": _make_signed, "Q5_0": _make_signed}.get(type, _make_ranged)(rows, blocks)
    return blocks.view(np.uint8)


def _to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even; a NaN stays one."""
    bits = numbers.view("<u4")
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, bits >> 16 | 64, rounded).astype("<u2")


def _inverse(d: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(d == 0, np.float32(0), 1 / d)


def _make_q8_0(rows: np.ndarray, blocks: np.ndarray) -> None:
    d = np.abs(rows).max(-1, keepdims=True) / 127
    scaled = rows * _inverse(d)
    whole = np.floor(np.abs(scaled))
    blocks["qs"] = np.sign(scaled) * (
        whole + np.floor(2 * (np.abs(scaled) - whole))
    )  # half away from zero, as C's roundf
    blocks["d"] = d[:, 0]


def _make_signed(rows: np.ndarray, blocks: np.ndarray) -> None:
    """Q4_0 and Q5_0: the value furthest from zero, sign and all, becomes the lowest integer."""
    half = 16 if "qh" in blocks.dtype.names else 8
    furthest = np.take_along_axis(rows, np.abs(rows).argmax(-1, keepdims=True), -1)
    d = furthest / -half
    q = np.trunc(rows * _inverse(d) + np.float32(half + 0.5)).astype(np.uint8).clip(0, 2 * half - 1)
    blocks["d"] = d[:, 0]
    _pack(q, blocks)


def _make_ranged(rows: np.ndarray, blocks: np.ndarray) -> None:
    """Q4_1 and Q5_1: the range of the block in 15 or 31 steps."""
    steps = 31 if "qh" in blocks.dtype.names else 15
    least = rows.min(-1, keepdims=True)
    d = (rows.max(-1, keepdims=True) - least) / steps
    q = np.trunc((rows - least) * _inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, steps)
    blocks["d"], blocks["m"] = d[:, 0], least[:, 0]
    _pack(q, blocks)


def _pack(q: np.ndarray, blocks: np.ndarray) -> None:
    """q (n, 32) of 4 or 5 bits -> nibbles, values 0-15 low and 16-31 high, and the fifth bits."""
    blocks["qs"] = q[:, :16] & 15 | q[:, 16:] << np.uint8(4)
    if "qh" in blocks.dtype.names:
        blocks["qh"] = np.packbits(q >> np.uint8(4), axis=-1, bitorder="little")

"""Safetensors files as the ecosystem ships them: what they hold and where, without loading and without trusting.

`read_header` gives name -> TensorInfo of one file, `find_tensors` the same over a folder, sharded or not, `read_numpy` the
numbers of one tensor straight from the disk. A header is a claim by a stranger: each length is held against the size of the file
before anything is allocated, the JSON is walked entry by entry (it can neither nest nor blow up), tensors must lie end to end as
the format says. A name never leads out of its folder; see `inside`. No torch here: the doctor reads headers in milliseconds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kobza.config import InputError, nearest, require

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_JSON = 32_000_000  # the index of a model with 140,000 tensors takes 13 MB
MAX_DIMS = 16
MAX_ENTRY = 1000  # characters of a tensor's entry, less its name: dtype, two offsets, up to 16 dimensions
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
NUMPY = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "C64": "<c8"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"},
    **{"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"},
}
_SPACE = re.compile(r"[ \t\n\r]*")
_ENTRY = re.compile(rf"\{{[^{{}}]{{0,{MAX_ENTRY}}}\}}")
_JSON = json.JSONDecoder()


class TensorInfo(NamedTuple):
    """A tensor of a safetensors file: bytes start..end of the file, counted from its beginning."""

    dtype: str
    """the format's own name: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    end: int


# -- one file ----------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, TensorInfo]:
    """name -> TensorInfo of one .safetensors file, in the order of the bytes; InputError for whatever does not add up."""
    path = Path(path)
    text, first, size = _header_text(path)
    found: dict[str, TensorInfo] = {}
    try:
        for name, at in _members(text, path):
            require(name not in found, f"{path}: tensor {name[:100]!r} is listed twice; the file is damaged or forged")
            found[name] = _tensor(text, at, name, first, path)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: its header is no JSON object of tensors ({error}); download it again") from None
    found = dict(sorted(found.items(), key=lambda item: item[1][2:]))
    at = first
    for name, info in found.items():
        where = "overlaps the one before it" if info.start < at else "leaves a gap before it"
        require(
            info.start == at, f"{path}: tensor {name[:100]!r} {where} (byte {info.start}, expected {at}); forged header"
        )
        at = info.end
    require(at <= size, f"{path}: its tensors end at byte {at:,}, the file at {size:,}; truncated, download it again")
    require(at == size, f"{path}: {size - at:,} bytes lie behind its last tensor; damaged or forged")
    return found


def _header_text(path: Path) -> tuple[str, int, int]:
    """(the header, the first byte of the data, the file's size)."""
    require(path.is_file(), f"{path} is not a file; give a .safetensors file")
    with path.open("rb") as file:
        size = path.stat().st_size
        require(size >= 10, f"{path} has {size} bytes, less than the smallest safetensors file; download it again")
        length = int.from_bytes(file.read(8), "little")
        require(
            2 <= length <= MAX_HEADER,
            f"{path}: it claims a header of {length:,} bytes, the limit is {MAX_HEADER:,}; not safetensors, or forged",
        )
        require(
            8 + length <= size,
            f"{path}: it claims a header of {length:,} bytes and has {size:,} in all; truncated, download it again",
        )
        raw = file.read(length)
    require(len(raw) == length, f"{path} changed while it was read; try again")
    try:
        return raw.decode(), 8 + length, size
    except UnicodeDecodeError:
        raise InputError(f"{path}: its header is not UTF-8; not safetensors, or damaged") from None


def _members(text: str, path: Path) -> Iterator[tuple[str, int]]:
    """(name, place of its value) for the members of the header's object, __metadata__ checked and left out.

    A walk and not json.loads: what a value may be is known, so nothing is built that a tensor's entry does not need.
    """
    at = _SPACE.match(text).end()  # type: ignore[union-attr]
    at = _expect(text, at, "{", path)
    if text.startswith("}", at):
        at += 1
    else:
        while True:
            name, at = _string(text, at, path)
            at = _expect(text, at, ":", path)
            if name == "__metadata__":
                at = _metadata(text, at, path)
            else:
                yield name, at
                entry = _ENTRY.match(text, at)
                at = entry.end() if entry else at
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
            if text.startswith("}", at):
                at += 1
                break
            at = _expect(text, at, ",", path)
    require(not text[at:].strip(" \t\n\r"), f"{path}: text follows its header's object; damaged or forged")


def _expect(text: str, at: int, sign: str, path: Path) -> int:
    """The place after `sign` and the space around it."""
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    require(
        text.startswith(sign, at),
        f"{path}: its header is no JSON object of tensors: character {at} is {text[at : at + 1]!r}, expected {sign!r}",
    )
    return _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]


def _string(text: str, at: int, path: Path) -> tuple[str, int]:
    require(text.startswith('"', at), f"{path}: its header has no name in quotes at character {at}; damaged or forged")
    value, at = _JSON.raw_decode(text, at)
    return value, at


def _metadata(text: str, at: int, path: Path) -> int:
    """The place behind __metadata__, a flat object of strings."""
    at = _expect(text, at, "{", path)
    if text.startswith("}", at):
        return at + 1
    while True:
        key, at = _string(text, at, path)
        at = _expect(text, at, ":", path)
        require(text.startswith('"', at), f"{path}: __metadata__ {key[:60]!r} is not a string; damaged or forged")
        _, at = _JSON.raw_decode(text, at)
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("}", at):
            return at + 1
        at = _expect(text, at, ",", path)


def _tensor(text: str, at: int, name: str, first: int, path: Path) -> TensorInfo:
    """The tensor whose entry is at `at`: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}."""
    entry = _ENTRY.match(text, at)
    what = f"{path}: tensor {name[:100]!r}"
    require(entry is not None, f"{what}: its entry is no object of dtype, shape and data_offsets; damaged or forged")
    pairs = json.loads(entry[0], object_pairs_hook=list)  # type: ignore[index]
    require(
        sorted(key for key, _ in pairs) == ["data_offsets", "dtype", "shape"],
        f"{what}: its entry has the keys {[key for key, _ in pairs][:9]}; it must be dtype, shape and data_offsets",
    )
    values: dict[str, Any] = dict(pairs)
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{what}: dtype {dtype!r} is unknown{nearest(str(dtype), list(BITS))}")
    require(_counts(shape) and len(shape) <= MAX_DIMS, f"{what}: shape {shape!r} is not a list of counts")
    require(_counts(offsets) and len(offsets) == 2, f"{what}: data_offsets {offsets!r} are not two byte offsets")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    require(
        8 * (end - begin) == bits,
        f"{what}: {dtype} {tuple(shape)} takes {bits // 8:,} bytes and data_offsets give {end - begin:,}; forged header",
    )
    return TensorInfo(dtype, tuple(shape), first + begin, first + end)


def _counts(values: Any) -> bool:
    """Whether it is a list of ints >= 0 that fit 63 bits. True is an int to Python, and none here."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def read_numpy(path: Path, info: TensorInfo, rows: tuple[int, int] | None = None) -> np.ndarray:
    """A tensor's numbers, or those of rows[0]..rows[1] of its first axis, read-only and read when they are looked at.

    BF16, which numpy lacks, is widened to float32: its bits are the upper half of theirs. Other types stay as they are.
    """
    require(info.dtype in NUMPY, f"{path}: numpy cannot read {info.dtype}; known: {', '.join(NUMPY)}")
    dtype = np.dtype(NUMPY[info.dtype])
    start, shape = info.start, info.shape
    if rows is not None:
        first, last = rows
        assert shape and 0 <= first <= last <= shape[0], f"rows {rows} of {shape}"
        start += first * (math.prod(shape[1:]) * dtype.itemsize)
        shape = (last - first, *shape[1:])
    if math.prod(shape) == 0:  # nothing to map
        return np.empty(shape, "<f4" if info.dtype == "BF16" else dtype)
    try:
        numbers = np.memmap(path, dtype, "r", offset=start, shape=shape)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read bytes {start:,} on ({error}); the file changed, try again") from None
    return (numbers.astype("<u4") << 16).view("<f4").view(np.ndarray) if info.dtype == "BF16" else numbers


# -- a folder ----------------------------------------------------------------------------------------------------------


def find_tensors(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """name -> (file, TensorInfo) of the model in a folder: model.safetensors, or the shards of its index."""
    folder = Path(folder)
    require(folder.is_dir(), f"{folder} is not a folder; give the one that holds {SINGLE}")
    if _exists(folder / SINGLE):
        path = inside(folder, SINGLE)
        return {name: (path, info) for name, info in read_header(path).items()}
    if _exists(folder / INDEX):
        return _sharded(folder)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))[:1]
    require(
        not pickles,
        f"{folder} holds {''.join(pickles)} and no {SINGLE}: a pickle can run code when it is read; "
        "convert it to safetensors where you trust it",
    )
    raise InputError(f"{folder} holds no {SINGLE} and no {INDEX}; download the model's weights")


def _sharded(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    places = read_json(inside(folder, INDEX)).get("weight_map")
    require(
        isinstance(places, dict) and bool(places) and all(isinstance(shard, str) for shard in places.values()),
        f"{folder / INDEX}: weight_map is no object of tensor -> file; download it again",
    )
    shards: dict[str, tuple[Path, dict[str, TensorInfo]]] = {}
    for shard in dict.fromkeys(places.values()):
        require(shard.endswith(".safetensors"), f"{folder / INDEX}: {shard[:100]!r} is no .safetensors file")
        path = inside(folder, shard)
        shards[shard] = path, read_header(path)
    found = {}
    for name, shard in places.items():
        path, header = shards[shard]
        require(name in header, f"{folder / INDEX} puts tensor {name[:100]!r} in {shard}, which lacks it")
        found[name] = path, header[name]
    return found


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a link to nowhere is there, and is refused by name


def inside(folder: Path, name: str) -> Path:
    """folder/name, an existing regular file that lies in the folder; InputError for a name or a link that leads out.

    The one link allowed out is that of the Hugging Face cache: models--*/snapshots/REVISION/NAME -> models--*/blobs/HASH.
    """
    shown = name[:100]
    plain = name not in ("", ".", "..") and not set(name) & set("/\\:\0") and len(name) < 256
    require(plain, f"{folder}: {shown!r} is not the plain name of a file in the folder; refused")
    path = Path(folder) / name
    try:
        target, home = path.resolve(), Path(folder).resolve()
        there = target.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name the system cannot hold
        raise InputError(f"{folder}: cannot open {shown!r} ({error})") from None
    allowed = [home]
    for snapshots in home.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            allowed.append(snapshots.parent / "blobs")
    require(
        any(target.is_relative_to(place) for place in allowed),
        f"{path} is a link out of its folder, to {target}; refused: copy the file there if you trust it",
    )
    require(there, f"{path} is missing or no regular file; download it again")
    return path


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes; InputError for anything else, deep nesting and twice-given keys too."""
    path = Path(path)
    require(path.is_file(), f"{path} is missing or no regular file")
    size = path.stat().st_size
    require(size <= limit, f"{path} has {size:,} bytes, the limit is {limit:,}; this is not what the field ships")
    raw = path.read_bytes()
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=lambda pairs: _object(pairs, path))
    except RecursionError:
        raise InputError(f"{path} nests too deep; forged") from None
    except InputError:
        raise
    except ValueError as error:  # JSON, UTF-8, or an integer of thousands of digits
        raise InputError(f"{path} is no JSON ({error}); download it again") from None
    require(isinstance(value, dict), f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def _object(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InputError(f"{path}: key {twice[:100]!r} is given twice; which one counts differs between readers")
    return made

"""GGUF files: metadata, tensor table and writer. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

`read_gguf` reads versions 2 and 3, little endian, and believes nothing: each count is held against the bytes that are left before
anything is made of it, names must be unique, tensors aligned, inside the file and apart from each other. What the numbers of a
tensor are is ggml.py's; what the metadata means families.py's. `write_gguf` writes what `read_gguf` reads, byte for byte as the
`gguf` package does; `gguf_writer` does so piece by piece, for models that are larger than memory.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kobza.config import InputError, require
from kobza.formats.ggml import TYPES, bytes_of

MAGIC = b"GGUF"
MAX_HEADER = 64 << 20  # bytes; Gemma 3, with 262,144 tokens, has 15 MB
MAX_NAME = 63  # bytes of a tensor's name, ggml.h: GGML_MAX_NAME less the zero
MAX_KEY = 65_535  # bytes, by the specification
MAX_DIMS = 4  # ggml.h: GGML_MAX_DIMS
MAX_DEPTH = 3  # arrays in arrays; nobody has been seen to use even two
MAX_SIZE = 1 << 62
SCALARS = {  # type number -> (name, numpy's)
    **{0: ("uint8", "u1"), 1: ("int8", "i1"), 2: ("uint16", "<u2"), 3: ("int16", "<i2"), 4: ("uint32", "<u4")},
    **{5: ("int32", "<i4"), 6: ("float32", "<f4"), 7: ("bool", "u1"), 10: ("uint64", "<u8"), 11: ("int64", "<i8")},
    **{12: ("float64", "<f8")},
}
STRING, ARRAY = 8, 9
NUMBERS = {name: number for number, (name, _) in SCALARS.items()} | {"string": STRING, "array": ARRAY}
_Q, _I = struct.Struct("<Q"), struct.Struct("<I")
_SMALLEST_TENSOR = 8 + 4 + 4 + 8  # bytes: name length, dimensions, type, offset
_SMALLEST_ENTRY = 8 + 4 + 1  # key length, type, value


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file."""

    type: str
    """ggml's name: F32, Q4_K, ...; its layout is in ggml.py"""
    shape: tuple[int, ...]
    """rows first, as in numpy: the file has it the other way round"""
    start: int
    """from the file's beginning"""
    n_bytes: int


@dataclass(frozen=True)
class Gguf:
    """What a GGUF file says of itself. Arrays of numbers are numpy arrays, arrays of strings lists."""

    path: Path
    version: int
    metadata: dict[str, Any]
    types: dict[str, str]
    """of each entry of the metadata: uint32, string, array:string, ..."""
    tensors: dict[str, GgufTensor]
    """in the file's order"""
    alignment: int


# -- reading -----------------------------------------------------------------------------------------------------------


def read_gguf(path: Path) -> Gguf:
    """Metadata and tensor table of a GGUF file; InputError for whatever does not add up."""
    path = Path(path)
    require(path.is_file(), f"{path} is not a file; give a .gguf file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        require(size >= 24, f"{path} has {size} bytes, less than the smallest GGUF file; download it again")
        with mmap.mmap(file.fileno(), min(size, MAX_HEADER), access=mmap.ACCESS_READ) as data:
            return _Reader(path, data, size).read()


class _Reader:
    """A place in the header, and what can be read at it. Everything goes through `take`, which never passes the end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0
        self.end = len(data)

    def refuse(self, why: str) -> InputError:
        return InputError(f"{self.path}: {why}")

    def check(self, ok: bool, why: str) -> None:
        if not ok:
            raise self.refuse(why)

    def take(self, n: int, what: str) -> int:
        """The place of the next n bytes, passed over."""
        at, after = self.at, self.at + n
        if after > self.end:
            short = "truncated, download it again" if self.end == self.size else f"the limit is {MAX_HEADER:,} bytes"
            raise self.refuse(f"{what} at byte {at:,} wants {n:,} bytes and the header ends at {self.end:,}; {short}")
        self.at = after
        return at

    def u32(self, what: str) -> int:
        return _I.unpack_from(self.data, self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _Q.unpack_from(self.data, self.take(8, what))[0]

    def string(self, what: str, limit: int = MAX_HEADER) -> bytes:
        n = self.u64(what)
        self.check(n <= limit, f"{what} at byte {self.at:,} claims {n:,} bytes, the limit is {limit:,}; forged")
        at = self.take(n, what)
        return self.data[at : at + n]

    def name(self, what: str, limit: int) -> str:
        raw = self.string(what, limit)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.refuse(f"{what} {raw[:60]!r} is not UTF-8; forged") from None

    def read(self) -> Gguf:
        magic = self.data[self.take(4, "the magic") : 4]
        self.check(magic == MAGIC, f"it begins with {magic!r}, not {MAGIC!r}; this is not a GGUF file")
        version = self.u32("the version")
        self.check(
            version & 0xFFFF != 0 or version == 0,
            "it is big endian, and kobza reads little endian; convert it with gguf-py's gguf-convert-endian",
        )
        self.check(version in (2, 3), f"GGUF version {version}; kobza reads 2 and 3: convert the model again")
        n_tensors, n_entries = self.u64("the number of tensors"), self.u64("the number of metadata entries")
        for n, least, what in ((n_tensors, _SMALLEST_TENSOR, "tensors"), (n_entries, _SMALLEST_ENTRY, "entries")):
            room = (self.end - self.at) // least
            self.check(n <= room, f"it claims {n:,} {what} of metadata and has room for {room:,}; truncated or forged")
        metadata, types = self.entries(n_entries)
        alignment = self.alignment(metadata, types)
        infos = self.infos(n_tensors)
        first = -(-self.at // alignment) * alignment
        return Gguf(self.path, version, metadata, types, self.place(infos, first, alignment), alignment)

    def alignment(self, metadata: dict[str, Any], types: dict[str, str]) -> int:
        value = metadata.get("general.alignment", 32)
        good = (
            types.get("general.alignment", "uint32") == "uint32" and 1 <= value <= 1 << 20 and value & (value - 1) == 0
        )
        self.check(good, f"general.alignment is {value!r}; it must be a uint32 power of two of at most 1,048,576")
        return value

    def entries(self, count: int) -> tuple[dict[str, Any], dict[str, str]]:
        metadata: dict[str, Any] = {}
        types: dict[str, str] = {}
        for _ in range(count):
            key = self.name("a metadata key", MAX_KEY)
            self.check(key not in metadata, f"metadata key {key[:100]!r} is given twice; forged")
            shown = repr(key[:100])  # quoted: it may hold line ends and terminal codes
            metadata[key], types[key] = self.value(self.u32(f"the type of {shown}"), shown, MAX_DEPTH)
        return metadata, types

    def value(self, number: int, key: str, depth: int) -> tuple[Any, str]:
        """(a value of that type, the type's name)."""
        if number == STRING:
            return _text(self.string(key)), "string"
        if number == ARRAY:
            self.check(depth > 0, f"{key} has arrays in arrays more than {MAX_DEPTH} deep; forged")
            return self.array(key, depth - 1)
        known = {n: name for n, (name, _) in SCALARS.items()}
        self.check(number in known, f"{key} has the unknown value type {number}; known: 0 to 12")
        value = self.numbers(number, 1, key)[0]
        return value.item(), known[number]

    def numbers(self, number: int, count: int, key: str) -> np.ndarray:
        name, dtype = SCALARS[number]
        at = self.take(count * np.dtype(dtype).itemsize, key)
        values = np.frombuffer(self.data, dtype, count, at).copy()  # a copy: the file is closed behind it
        if name == "bool":
            self.check(bool((values <= 1).all()), f"{key}: a bool is neither 0 nor 1; forged")
            values = values.astype(bool)
        return values

    def array(self, key: str, depth: int) -> tuple[Any, str]:
        number, count = self.u32(f"the type of {key}"), self.u64(f"the length of {key}")
        least = {STRING: 8, ARRAY: 12}.get(number, 1)
        room = (self.end - self.at) // least
        self.check(count <= room, f"{key} claims {count:,} values and has room for {room:,}; truncated or forged")
        if number == STRING:
            return self.strings(count, key), "array:string"
        if number == ARRAY:
            self.check(depth > 0, f"{key} has arrays in arrays more than {MAX_DEPTH} deep; forged")
            made = [self.array(key, depth - 1) for _ in range(count)]
            return [value for value, _ in made], f"array:{made[0][1] if made else 'array'}"
        self.check(number in SCALARS, f"{key} is an array of the unknown value type {number}; known: 0 to 12")
        return self.numbers(number, count, key), f"array:{SCALARS[number][0]}"

    def strings(self, count: int, key: str) -> list[str]:
        """`count` strings. Tight: a vocabulary has hundreds of thousands."""
        data, at, end, length_at = self.data, self.at, self.end, _Q.unpack_from
        made: list[str] = []
        for _ in range(count):
            stop = at + 8
            if stop <= end:
                (n,) = length_at(data, at)
                at, stop = stop, stop + n
            if stop > end:
                self.at = at
                self.take(stop - at, f"a string of {key}")  # says how it is short
            made.append(_text(data[at:stop]))
            at = stop
        self.at = at
        return made

    def infos(self, count: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """name -> (type, shape, offset in the data)."""
        infos: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for _ in range(count):
            name = self.name("a tensor's name", MAX_NAME)
            what = f"tensor {name!r}"
            self.check(name not in infos, f"{what} is listed twice; forged")
            n_dims = self.u32(f"the dimensions of {what}")
            self.check(n_dims <= MAX_DIMS, f"{what} claims {n_dims:,} dimensions, the limit is {MAX_DIMS}; forged")
            shape = tuple(self.u64(f"the shape of {what}") for _ in range(n_dims))[::-1]
            size = math.prod(shape)
            self.check(0 < size < MAX_SIZE, f"{what} has the shape {shape}; it must have 1 to 2^62 values")
            number = self.u32(f"the type of {what}")
            self.check(
                number in TYPES, f"{what} has the unknown ggml type {number}; known: 0 to {max(TYPES)}, less a few"
            )
            infos[name] = TYPES[number], shape, self.u64(f"the offset of {what}")
        return infos

    def place(
        self, infos: dict[str, tuple[str, tuple[int, ...], int]], first: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """The tensors, each inside the file and none on another."""
        tensors = {}
        for name, (type, shape, offset) in infos.items():
            n_bytes = bytes_of(type, shape)
            what = f"tensor {name!r} ({type} {shape})"
            self.check(
                offset % alignment == 0, f"{what} begins at offset {offset:,}, no multiple of {alignment}; forged"
            )
            self.check(
                first + offset + n_bytes <= self.size,
                f"{what} ends at byte {first + offset + n_bytes:,}, the file at {self.size:,}; truncated, download it again",
            )
            tensors[name] = GgufTensor(type, shape, first + offset, n_bytes)
        after, before = first, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            self.check(
                tensor.start >= after, f"tensors {before!r} and {name!r} overlap at byte {tensor.start:,}; forged"
            )
            after, before = tensor.start + tensor.n_bytes, name
        return tensors


def _text(raw: bytes) -> str:
    """A value's text. Files in circulation hold tokens that are no UTF-8: what cannot be read is shown as U+FFFD."""
    return raw.decode(errors="replace")


# -- writing -----------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path,
    metadata: Mapping[str, tuple[str, Any]],
    tensors: Mapping[str, tuple[str, tuple[int, ...], np.ndarray | bytes]],
    version: int = 3,
) -> None:
    """Write a GGUF file of tensors in memory, whole or not at all.

    metadata: key -> (type, value): {"general.architecture": ("string", "llama"), "llama.block_count": ("uint32", 30),
        "tokenizer.ggml.tokens": ("array:string", [...])}; general.alignment, if given, is kept to
    tensors: name -> (ggml type, shape with rows first, its bytes)
    """
    infos = {name: (type, shape) for name, (type, shape, _) in tensors.items()}
    write_gguf_stream(path, metadata, infos, ((name, data) for name, (_, _, data) in tensors.items()), version)


def write_gguf_stream(
    path: Path,
    metadata: Mapping[str, tuple[str, Any]],
    infos: Mapping[str, tuple[str, tuple[int, ...]]],
    parts: Iterable[tuple[str, np.ndarray | bytes]],
    version: int = 3,
) -> None:
    """`write_gguf` of tensors that are made as they are written.

    infos: name -> (ggml type, shape); parts: (name, next bytes of that tensor), in the order of infos
    """
    with gguf_writer(path, metadata, infos, version) as write:
        for name, data in parts:
            write(name, data)


@contextmanager
def gguf_writer(
    path: Path,
    metadata: Mapping[str, tuple[str, Any]],
    infos: Mapping[str, tuple[str, tuple[int, ...]]],
    version: int = 3,
) -> Iterator[Callable[[str, np.ndarray | bytes], None]]:
    """write(name, next bytes of that tensor) for a file that is there once the block ends well, and else is not.

    The header says all sizes before the first number is known, so nothing is kept: several files can be written side by side.
    A process that is killed leaves `.NAME.part`, which the next one writes over.
    """
    path = Path(path)
    head, left, alignment = _head(metadata, infos, version)
    total = len(head) + sum(left.values())
    part = path.with_name(f".{path.name}.part")

    def write(name: str, data: np.ndarray | bytes) -> None:
        raw = memoryview(data).cast("B")
        turn = next(iter(left), "the end")
        assert name == turn and len(raw) <= left[name], f"{len(raw)} bytes of {name}; {left.get(turn)} of {turn} follow"
        file.write(raw)
        left[name] -= len(raw)
        if not left[name]:
            del left[name]
            file.write(bytes(-file.tell() % alignment))

    try:
        with part.open("wb") as file:
            file.write(head)
            yield write
            assert not left, f"never written: {list(left)[:3]}"
            file.flush()
            os.fsync(file.fileno())  # or after a power cut the name might stand for nothing
        part.replace(path)
    except OSError as error:
        raise _not_written(path, total, error) from error
    finally:
        if part.exists():
            part.unlink()


def _head(
    metadata: Mapping[str, tuple[str, Any]], infos: Mapping[str, tuple[str, tuple[int, ...]]], version: int
) -> tuple[bytes, dict[str, int], int]:
    """All that stands before the tensors, padded; the bytes of each tensor; the alignment."""
    alignment = metadata.get("general.alignment", ("uint32", 32))[1]
    head = [MAGIC, _I.pack(version), _Q.pack(len(infos)), _Q.pack(len(metadata))]
    head += [_packed("string", key) + _entry(key, type, value) for key, (type, value) in metadata.items()]
    numbers = {name: number for number, name in TYPES.items()}
    sizes, offset = {}, 0
    for name, (type, shape) in infos.items():
        assert len(name.encode()) <= MAX_NAME and len(shape) <= MAX_DIMS, f"{name!r} {shape}"
        sizes[name] = bytes_of(type, shape)
        assert sizes[name] > 0, f"{name!r} {type} {shape} has no block"
        dims = struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += [_packed("string", name), _I.pack(len(shape)), dims, _I.pack(numbers[type]), _Q.pack(offset)]
        offset += -(-sizes[name] // alignment) * alignment
    whole = b"".join(head)
    return whole + bytes(-len(whole) % alignment), sizes, alignment


def _not_written(path: Path, total: int, error: OSError) -> InputError:
    """The one line for a full disk, a folder that is not there or may not be written to."""
    folder = path.parent
    room = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free" if folder.is_dir() else f"{folder} is no folder"
    what = f"{path}: cannot be written ({error.strerror or error}): it takes {total / 1e6:,.1f} MB and {room}"
    return InputError(f"{what}; nothing half-written is left; make room or name another place")


def typed(gguf: Gguf) -> dict[str, tuple[str, Any]]:
    """The metadata as write_gguf takes it."""
    return {key: (gguf.types[key], value) for key, value in gguf.metadata.items()}


def _entry(key: str, type: str, value: Any) -> bytes:
    """A value behind the number of its type."""
    kind = type.split(":")[0]
    require(kind in NUMBERS, f"{key}: GGUF has no value type {kind!r}; known: {', '.join(NUMBERS)}")
    try:
        return _I.pack(NUMBERS[kind]) + _packed(type, value)
    except (OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{key}: {value!r:.80} is no {type} ({error})") from None


def _packed(type: str, value: Any) -> bytes:
    if type == "string":
        raw = value.encode()
        return _Q.pack(len(raw)) + raw
    if type.startswith("array:"):
        kind = type.removeprefix("array:")
        number = NUMBERS[kind.split(":")[0]]
        body = _numbers(kind, value) if number in SCALARS else b"".join(_packed(kind, item) for item in value)
        return _I.pack(number) + _Q.pack(len(value)) + body
    return _numbers(type, [value])


def _numbers(kind: str, values: Any) -> bytes:
    dtype = np.dtype(SCALARS[NUMBERS[kind]][1])
    if kind.startswith("float"):
        return np.asarray(values, dtype).tobytes()
    made = np.asarray(values, None if len(values) else dtype)
    if made.dtype.kind not in "iub":
        raise TypeError(f"{made.dtype} values")
    least, most = (0, 1) if kind == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if len(made) and not least <= int(made.min()) <= int(made.max()) <= most:
        raise OverflowError(f"its range is {least} to {most}")
    return made.astype(dtype).tobytes()

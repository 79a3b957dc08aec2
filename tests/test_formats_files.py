"""Safetensors headers and GGUF files: what good ones give, equal to the field's own readers, and that no bad one does harm."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kobza.config import InputError
from kobza.formats import ggml
from kobza.formats.ggml import BLOCKS, load_tensor
from kobza.formats.gguf import read_gguf, typed, write_gguf
from kobza.formats.headers import find_tensors, inside, read_header, read_json, read_numpy

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MEGABYTE = 1 << 20


def safetensors(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def refused(read, path: Path) -> str:
    """The one line with which `read(path)` refuses; and little memory is taken to say so."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as error:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * MEGABYTE
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
    return str(error.value)


def harmless(read, path: Path) -> bool:
    """Whether it was read; anything but InputError is a bug, and so is much memory."""
    before = set(path.parent.iterdir())
    tracemalloc.start()
    try:
        read(path)
        return True
    except InputError as error:
        assert "\n" not in str(error)
        return False
    finally:
        assert tracemalloc.get_traced_memory()[1] < 20 * MEGABYTE
        tracemalloc.stop()
        assert set(path.parent.iterdir()) == before


# -- safetensors -------------------------------------------------------------------------------------------------------


def test_header_agrees_with_the_library(tmp_path):
    save = pytest.importorskip("safetensors.numpy").save_file
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.int64),
        "half": np.float16([1.5, -2]),
        "none": np.empty((0, 4), np.float32),
        "one": np.array(7, np.uint8),
        "truth": np.array([True, False]),
    }
    save(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "note": "{[,\\\u0456"})
    header = read_header(tmp_path / "x.safetensors")
    assert set(header) == set(tensors)
    for name, numbers in tensors.items():
        got = read_numpy(tmp_path / "x.safetensors", header[name])
        assert got.dtype == numbers.dtype and got.shape == numbers.shape and (got == numbers).all(), name
    rows = read_numpy(tmp_path / "x.safetensors", header["a"], (1, 2))
    assert rows.tolist() == [[3, 4, 5]]


def test_bfloat16_is_widened_as_torch_does(tmp_path):
    import torch
    from safetensors.torch import save_file

    numbers = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"x": numbers}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["x"]
    assert (read_numpy(tmp_path / "x.safetensors", info) == numbers.float().numpy()).all()
    assert (read_numpy(tmp_path / "x.safetensors", info, (2, 4)) == numbers[2:4].float().numpy()).all()


GOOD = {"x": entry(), "y": entry("U8", [2], (24, 26))}


@pytest.mark.parametrize(
    "raw, says",
    [
        (b"", "0 bytes"),
        (b"\xff" * 40, "claims a header"),
        (safetensors(GOOD, bytes(26))[:30], "truncated"),
        (safetensors(GOOD, bytes(25)), "truncated"),
        (safetensors(GOOD, bytes(27)), "behind its last tensor"),
        (safetensors(b"[" * 1000), "no JSON object"),
        (safetensors(b'{"x":' + b"[" * 100_000), "no object"),
        (safetensors(b"\xff\xfe{}"), "UTF-8"),
        (safetensors(b"{}x"), "follows"),
        (safetensors(b'{"x":1,}'), "no object"),
        (safetensors({"x": entry("F31")}, bytes(24)), "did you mean"),
        (safetensors({"x": entry(["F32"])}, bytes(24)), "unknown"),
        (safetensors({"x": entry(shape=[2, -3])}, bytes(24)), "counts"),
        (safetensors({"x": entry(shape=[2, 3.0])}, bytes(24)), "counts"),
        (safetensors({"x": entry(shape=[True, 6])}, bytes(24)), "counts"),
        (safetensors({"x": entry(shape=[1 << 40, 1 << 40])}, bytes(24)), "takes"),
        (safetensors({"x": entry(shape=[1] * 40)}, bytes(24)), "counts"),
        (safetensors({"x": entry(shape=[2, 4])}, bytes(24)), "takes 32 bytes"),
        (safetensors({"x": entry(offsets=[24, 0])}, bytes(24)), "takes"),
        (safetensors({"x": entry(offsets=[0, 24, 48])}, bytes(24)), "two byte offsets"),
        (safetensors({"x": entry(offsets=[4, 28])}, bytes(28)), "gap"),
        (safetensors({"x": entry(), "y": entry(offsets=[12, 36])}, bytes(36)), "overlaps"),
        (safetensors({"x": {"dtype": "F32", "shape": [2, 3]}}, bytes(24)), "keys"),
        (safetensors({"x": {**entry(), "more": 1}}, bytes(24)), "keys"),
        (safetensors({"__metadata__": {"a": 1}, "x": entry()}, bytes(24)), "not a string"),
        (safetensors({"__metadata__": [], "x": entry()}, bytes(24)), "expected '{'"),
        (safetensors(b'{"x":%s,"x":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(24)), "twice"),
        (safetensors(b'{"x":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)), "keys"),
    ],
)
def test_a_lying_header_is_refused(tmp_path, raw, says):
    assert says in refused(read_header, write(tmp_path / "x.safetensors", raw))


def test_what_is_no_file_is_refused(tmp_path):
    assert "not a file" in refused(read_header, tmp_path)
    assert "not a file" in refused(read_gguf, Path("/dev/zero"))
    assert "not a file" in refused(read_gguf, tmp_path / "nothing.gguf")


def test_every_truncation_of_a_header_is_refused(tmp_path):
    whole = safetensors(GOOD, bytes(26))
    assert read_header(write(tmp_path / "x.safetensors", whole))
    for n in range(len(whole)):
        refused(read_header, write(tmp_path / "x.safetensors", whole[:n]))


@FEW
@given(st.data())
def test_fuzz_safetensors(tmp_path, data):
    whole = bytearray(safetensors(GOOD, bytes(26)))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    harmless(read_header, write(tmp_path / "x.safetensors", bytes(whole)))
    harmless(read_header, write(tmp_path / "x.safetensors", safetensors(data.draw(st.binary(max_size=60)))))
    known = st.sampled_from(["dtype", "shape", "data_offsets", "F32", 0, 1, 4, 24, 2**64, None, "__metadata__"])
    value = st.recursive(known, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3))
    header = {"x": entry(data.draw(value), data.draw(value), data.draw(value)), "y": data.draw(value)}
    harmless(read_header, write(tmp_path / "x.safetensors", safetensors(header, bytes(24))))


def sharded(folder: Path, places: object, shards: tuple[str, ...] = ("a.safetensors", "b.safetensors")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        write(folder / shard, safetensors({shard[0]: entry()}, bytes(24)))
    write(folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": places}).encode())
    return folder


def test_shards_are_found(tmp_path):
    found = find_tensors(sharded(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}))
    assert {name: path.name for name, (path, _) in found.items()} == {"a": "a.safetensors", "b": "b.safetensors"}
    write(tmp_path / "model.safetensors", safetensors({"z": entry()}, bytes(24)))
    assert list(find_tensors(tmp_path)) == ["z"]  # the single file wins, as with transformers


@pytest.mark.parametrize(
    "places, says",
    [
        ({"a": "../a.safetensors"}, "plain name"),
        ({"a": "/etc/a.safetensors"}, "plain name"),
        ({"a": "..\\a.safetensors"}, "plain name"),
        ({"a": "C:a.safetensors"}, "plain name"),
        ({"a": "a\0.safetensors"}, "plain name"),
        ({"a": "x" * 5000 + ".safetensors"}, "plain name"),
        ({"a": "pytorch_model.bin"}, "no .safetensors"),
        ({"a": "c.safetensors"}, "missing"),
        ({"b": "a.safetensors"}, "lacks it"),
        ({"a": 3}, "no object"),
        ([], "no object"),
        ({}, "no object"),
    ],
)
def test_an_index_leads_nowhere_else(tmp_path, places, says):
    write(tmp_path / "a.safetensors", safetensors({"a": entry()}, bytes(24)))
    assert says in refused(find_tensors, sharded(tmp_path / "model", places))


def test_links_out_of_the_folder_are_refused_but_for_the_cache(tmp_path):
    real = sharded(tmp_path / "models--a--b" / "blobs", {})
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/a.safetensors")
    assert list(find_tensors(snapshot)) == ["a"]
    alike = sharded(tmp_path / "repo" / "blobs", {})  # no cache: its folder is not models--*
    others = {tmp_path / "models--x--y" / "snapshots" / "abc": real, tmp_path / "plain": real}
    for other, place in (others | {tmp_path / "repo" / "snapshots" / "abc": alike}).items():
        other.mkdir(parents=True)
        (other / "model.safetensors").symlink_to(place / "a.safetensors")
        assert "link out" in refused(find_tensors, other)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "model.safetensors").symlink_to("model.safetensors")
    refused(find_tensors, tmp_path / "loop")
    (real / "c.safetensors").symlink_to("a.safetensors")
    assert inside(real, "c.safetensors") == real / "c.safetensors"  # a link that stays inside


def test_a_pickle_is_refused_with_the_safe_way(tmp_path):
    write(tmp_path / "pytorch_model.bin", b"")
    assert "can run code" in refused(find_tensors, tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    assert "holds no model.safetensors" in refused(find_tensors, tmp_path)


@pytest.mark.parametrize(
    "raw, says",
    [
        (b"[" * 100_000, "too deep"),
        (b"{" * 9, "no JSON"),
        (b"[]", "list"),
        (b'{"a":' + b"9" * 5000 + b"}", "no JSON"),
        (b"\xff", "no JSON"),
        (b'{"a":1,"a":2}', "twice"),
        (b" " * 101, "limit"),
    ],
)
def test_json_is_bounded(tmp_path, raw, says):
    limit = 100 if says == "limit" else 1 << 20
    assert says in refused(lambda path: read_json(path, limit), write(tmp_path / "x.json", raw))


# -- GGUF --------------------------------------------------------------------------------------------------------------

METADATA = {
    "general.architecture": ("string", "llama"),
    "n.u8": ("uint8", 255),
    "n.i8": ("int8", -128),
    "n.u16": ("uint16", 65535),
    "n.i16": ("int16", -32768),
    "n.u32": ("uint32", 4_294_967_295),
    "n.i32": ("int32", -2_147_483_648),
    "n.u64": ("uint64", 2**64 - 1),
    "n.i64": ("int64", -(2**63)),
    "n.f32": ("float32", 0.5),
    "n.f64": ("float64", 1e-300),
    "n.bool": ("bool", True),
    "text": ("string", "ґанок \U0001f3fa\n"),
    "words": ("array:string", ["", "a", "\u0120t", "їжак"]),
    "empty": ("array:string", []),
    "scores": ("array:float32", [0.5, -1.0]),
    "kinds": ("array:int32", [1, -3, 6]),
    "flags": ("array:bool", [True, False]),
}


def tensors(rng: np.random.Generator) -> dict:
    made = {}
    for type in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q6_K"):
        values, size = BLOCKS[type]
        shape = (3, 2 * values) if values > 1 else (3, 5)
        raw = rng.integers(0, 256, 3 * shape[1] // values * size, dtype=np.uint8)
        made[f"t.{type}"] = type, shape, raw
    return made | {"vector": ("F32", (7,), np.ones(7, "<f4").tobytes())}


@pytest.fixture
def sample(tmp_path) -> Path:
    write_gguf(tmp_path / "x.gguf", METADATA, tensors(np.random.default_rng(0)))
    return tmp_path / "x.gguf"


def plain(metadata: dict) -> dict:
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()}


@pytest.mark.parametrize("version", [2, 3])
def test_what_is_written_is_read(tmp_path, version):
    made = tensors(np.random.default_rng(0))
    extra = {"nested": ("array:array:uint16", [[1, 2], [], [3]]), "general.alignment": ("uint32", 64)}
    write_gguf(tmp_path / "x.gguf", METADATA | extra, made, version)
    read = read_gguf(tmp_path / "x.gguf")
    assert (read.version, read.alignment) == (version, 64)
    nested = read.metadata.pop("nested")
    assert [part.tolist() for part in nested] == [[1, 2], [], [3]] and read.types.pop("nested") == "array:array:uint16"
    values = {key: value for key, (_, value) in (METADATA | extra).items() if key != "nested"}
    assert plain(read.metadata) == values
    assert {name: (t.type, t.shape) for name, t in read.tensors.items()} == {n: t[:2] for n, t in made.items()}
    for name, (_, _, raw) in made.items():
        assert ggml.tensor_bytes(read, name).tobytes() == bytes(raw) and read.tensors[name].start % 64 == 0
    assert not list(tmp_path.glob("*.part"))
    again = tmp_path / "again.gguf"
    write_gguf(again, {**typed(read), "nested": extra["nested"]}, made, version)
    assert plain(read_gguf(again).metadata) | {"nested": 0} == values | {"nested": 0}


@pytest.mark.parametrize("version", [2, 3])
def test_gguf_py_reads_the_same(tmp_path, version):
    gguf = pytest.importorskip("gguf")
    made = tensors(np.random.default_rng(1))
    write_gguf(tmp_path / "x.gguf", METADATA, made, version)
    ours, theirs = read_gguf(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: field.contents() for key, field in fields.items()} == plain(ours.metadata)
    assert len(theirs.tensors) == len(made)
    for tensor in theirs.tensors:
        got = ours.tensors[tensor.name]
        shape = tuple(int(n) for n in tensor.shape[::-1])
        assert (got.type, got.shape) == (tensor.tensor_type.name, shape)
        assert (got.start, got.n_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert bytes(made[tensor.name][2]) == tensor.data.tobytes()


def test_gguf_py_writes_what_we_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "б"])
    writer.add_token_scores([0.5, 1.0])
    writer.add_bool("flag", False)
    numbers = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("w", numbers)
    writer.add_tensor("q", gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_gguf(tmp_path / "x.gguf")
    assert read.metadata["llama.block_count"] == 3 and read.metadata["tokenizer.ggml.tokens"] == ["a", "б"]
    assert (load_tensor(read, "w") == numbers).all()
    assert read.tensors["q"].shape == (2, 32) and np.abs(load_tensor(read, "q") - numbers).max() < 0.3


def test_what_cannot_be_written_is_refused(tmp_path):
    for type, value in (
        ("uint8", 256),
        ("uint32", -1),
        ("bool", 2),
        ("uint32", 0.5),
        ("array:int8", [1, 200]),
        ("u", 1),
    ):
        with pytest.raises(InputError):
            write_gguf(tmp_path / "x.gguf", {"k": (type, value)}, {})
    assert not list(tmp_path.iterdir())


def field(raw: bytes, key: str) -> int:
    """The place of a metadata value's type in a file."""
    name = key.encode()
    return raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


def spoil(raw: bytes, at: int, value: bytes) -> bytes:
    return raw[:at] + value + raw[at + len(value) :]


BIG = struct.pack("<Q", 1 << 61)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda raw: b"GGML" + raw[4:], "not b'GGUF'"),
        (lambda raw: spoil(raw, 4, struct.pack("<I", 1)), "version 1"),
        (lambda raw: spoil(raw, 4, struct.pack(">I", 3)), "big endian"),
        (lambda raw: spoil(raw, 8, BIG), "room for"),
        (lambda raw: spoil(raw, 16, BIG), "room for"),
        (lambda raw: spoil(raw, 16, struct.pack("<Q", 17)), ""),
        (lambda raw: spoil(raw, 24, BIG), "forged"),
        (lambda raw: spoil(raw, field(raw, "text") + 4, BIG), "forged"),
        (lambda raw: spoil(raw, field(raw, "words") + 8, BIG), "room for"),
        (lambda raw: spoil(raw, field(raw, "scores") + 8, BIG), "room for"),
        (lambda raw: spoil(raw, field(raw, "scores") + 4, struct.pack("<I", 13)), "unknown value type"),
        (lambda raw: spoil(raw, field(raw, "n.u8"), struct.pack("<I", 99)), "unknown value type"),
        (lambda raw: spoil(raw, field(raw, "n.bool") + 4, b"\x02"), "neither 0 nor 1"),
        (lambda raw: spoil(raw, field(raw, "n.u8") - 4, b"n.i8"), "twice"),
        (lambda raw: spoil(raw, field(raw, "n.u8") - 4, b"\xff\xff\xff\xff"), "UTF-8"),
        (lambda raw: spoil(raw, field(raw, "t.F16"), struct.pack("<I", 5)), "dimensions"),
        (lambda raw: spoil(raw, field(raw, "t.F16") + 4, BIG), "values"),
        (lambda raw: spoil(raw, field(raw, "t.F16") + 4, bytes(8)), "values"),
        (lambda raw: spoil(raw, field(raw, "t.F16") + 4, struct.pack("<Q", 1 << 30)), "truncated"),
        (lambda raw: spoil(raw, field(raw, "t.F16") + 20, struct.pack("<I", 4)), "unknown ggml type"),
        (lambda raw: spoil(raw, field(raw, "t.F16") + 24, struct.pack("<Q", 8)), "multiple of 32"),
        (lambda raw: spoil(raw, field(raw, "t.F16") + 24, bytes(8)), "overlap"),
        (lambda raw: spoil(raw, field(raw, "t.F16") + 24, struct.pack("<Q", 1 << 63)), "truncated"),
        (lambda raw: spoil(raw, field(raw, "t.F16") - 5, b"t.F32"), "twice"),
        (lambda raw: spoil(raw, field(raw, "t.F16") - 13, struct.pack("<Q", 64)), "limit is 63"),
    ],
)
def test_a_lying_gguf_is_refused(sample, change, says):
    assert says in refused(read_gguf, write(sample, change(sample.read_bytes())))


def test_alignment_and_nesting_are_bounded(tmp_path):
    path = tmp_path / "x.gguf"
    for value in (0, 3, 1 << 30):
        raw = write_gguf(path, {"general.alignment": ("uint32", 32)}, {}) or path.read_bytes()
        assert "power of two" in refused(read_gguf, write(path, raw[:-8].rstrip(b"\0")[:-1] + struct.pack("<I", value)))
    write_gguf(path, {"general.alignment": ("uint64", 32)}, {})
    assert "uint32" in refused(read_gguf, path)
    deep: tuple[str, list] = ("array:" * 6 + "uint8", [[[[[[1]]]]]])
    write_gguf(path, {"deep": deep}, {})
    assert "deep" in refused(read_gguf, path)
    raw = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 9)
    assert "deep" in refused(read_gguf, write(path, raw + struct.pack("<IQ", 9, 1) * 50_000))


def test_every_truncation_of_a_gguf_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf(path, METADATA, {"w": ("F32", (3, 8), np.zeros(24, "<f4"))})
    whole = path.read_bytes()
    assert read_gguf(path).tensors["w"].n_bytes == 96
    for n in range(len(whole)):
        refused(read_gguf, write(path, whole[:n]))


def test_every_truncation_of_the_last_entry_is_refused(tmp_path):
    """No tensor follows that would be missed."""
    path = tmp_path / "x.gguf"
    write_gguf(path, {"words": ("array:string", ["one", "two", "three"])}, {})
    whole = path.read_bytes()
    whole = whole[: whole.index(b"three") + 5]
    assert read_gguf(write(path, whole)).metadata["words"][-1] == "three"
    for n in range(len(whole)):
        refused(read_gguf, write(path, whole[:n]))


@FEW
@given(st.data())
def test_fuzz_gguf(tmp_path, data):
    path = tmp_path / "x.gguf"
    write_gguf(path, METADATA, tensors(np.random.default_rng(0)))
    whole = path.read_bytes()
    head = len(whole) - 8
    at = data.draw(st.integers(0, head))
    byte = data.draw(st.integers(0, 255))
    number = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1) | st.sampled_from([2**31, 2**32 - 1, 2**63, 10**7])))
    for raw in (spoil(whole, at, bytes([byte])), spoil(whole, at, number), whole[:at] + whole[at + 1 :]):
        harmless(read_gguf, write(path, raw))
    harmless(read_gguf, write(path, b"GGUF\3\0\0\0" + data.draw(st.binary(max_size=80))))
    harmless(read_gguf, write(path, data.draw(st.binary(max_size=80))))


def test_a_vocabulary_is_read_fast(tmp_path):
    words = [f"word{i}" for i in range(50_000)]
    entries = {
        "tokens": ("array:string", words),
        "merges": ("array:string", words),
        "n": ("array:int32", range(50_000)),
    }
    write_gguf(tmp_path / "x.gguf", entries, {})
    start = time.process_time()
    assert read_gguf(tmp_path / "x.gguf").metadata["merges"] == words
    assert time.process_time() - start < 1  # 0.04 s on an idle core

"""GGUF files of ours: which tensor gets which type, the writer beside gguf-py's, round trips, and that llama.cpp runs them."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from kobza.config import InputError, ModelConfig
from kobza.export import gguf as export
from kobza.export.gguf import size_label, write_ggufs
from kobza.export.source import Source
from kobza.export.types import FILE_TYPES, GGML_TYPES, Types, fitted, types_of
from kobza.formats.ggml import BLOCKS, quantize, tensor_bytes
from kobza.formats.gguf import gguf_writer, read_gguf, write_gguf, write_gguf_stream
from kobza.formats.layouts import shapes as shapes_of
from kobza.formats.load import load_model
from kobza.formats.weights import gguf_pieces
from kobza.tokenizer import ByteTokenizer

# -- types -------------------------------------------------------------------------------------------------------------


def layers(n: int, width: int = 256, tied: bool = False, joined: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of a model of n layers by GGUF name."""
    block = {"attn_norm.weight": (width,), "attn_output.weight": (width, width), "attn_q_norm.weight": (64,)}
    block |= {f"ffn_{x}.weight": (2 * width, width) for x in ("gate", "up")} | {"ffn_down.weight": (width, 2 * width)}
    values = ("qkv",) if joined else ("q", "k", "v")
    block |= {f"attn_{x}.weight": (width, width) for x in values} | {f"attn_{x}.bias": (width,) for x in values}
    found = {"token_embd.weight": (512, width), "position_embd.weight": (32, width), "output_norm.weight": (width,)}
    found |= {f"blk.{i}.{name}": shape for i in range(n) for name, shape in block.items()}
    return found | ({} if tied else {"output.weight": (512, width)})


def in_layers(types: dict[str, str], part: str, type: str) -> list[int]:
    return [int(n.split(".")[1]) for n, t in types.items() if n.endswith(f"{part}.weight") and t == type]


# Of 30 layers llama-quant.cpp's use_more_bits takes 0-2 and 26-29, and every third after the first eighth.
MORE_OF_30 = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, *range(26, 30)]


def test_the_mixtures_are_llama_cpps():
    for name, better in (("Q4_K_M", "Q6_K"), ("Q5_K_M", "Q6_K")):
        types, notes = types_of(name).plan(layers(30))
        assert not notes and in_layers(types, "attn_v", better) == MORE_OF_30 == in_layers(types, "ffn_down", better)
        base = name[:4]
        assert in_layers(types, "attn_q", base) == list(range(30)) == in_layers(types, "ffn_gate", base)
        assert (types["output.weight"], types["token_embd.weight"]) == ("Q6_K", base)
    small = types_of("Q4_K_S").plan(layers(30))[0]
    assert in_layers(small, "attn_v", "Q5_K") == [0, 1, 2, 3] and in_layers(small, "ffn_down", "Q5_K") == [0, 1, 2]
    assert in_layers(types_of("Q4_K_M").plan(layers(30, joined=True))[0], "attn_qkv", "Q6_K") == MORE_OF_30
    for name, better in (("Q4_0", "Q4_1"), ("Q5_0", "Q5_1")):
        assert in_layers(types_of(name).plan(layers(30))[0], "ffn_down", better) == []
        weighted = types_of(name).plan(layers(30), with_importance=True)[0]
        assert in_layers(weighted, "ffn_down", better) == [0, 1, 2] and in_layers(weighted, "ffn_down", name)


@pytest.mark.parametrize("name", FILE_TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_vectors_norms_and_positions_stay_wide_and_the_head_is_kept(name, tied):
    shapes = layers(3, tied=tied)
    types, notes = Types(name).plan(shapes)
    assert set(types) == set(shapes) and not notes
    narrow = {n for n, t in types.items() if t != "F32"}
    matrices = {n for n, s in shapes.items() if len(s) == 2 and n != "position_embd.weight"}
    assert narrow == (set() if name == "F32" else matrices)
    head = "token_embd.weight" if tied else "output.weight"
    wide = name if name in ("F32", "F16", "BF16", "Q8_0") else "Q6_K"
    assert types[head] == wide
    assert tied or types["token_embd.weight"] == Types(name).base


def test_rows_that_are_no_blocks_fall_back_and_it_is_said():
    types, notes = types_of("q4_k").plan(layers(30, width=576))  # SmolLM2's
    assert types["blk.3.attn_q.weight"] == "Q5_0" and types["blk.3.attn_v.weight"] == "Q5_0"
    assert types["blk.0.attn_v.weight"] == "Q8_0" == types["output.weight"]
    assert types["blk.3.ffn_down.weight"] == "Q5_0"  # 1,152 is no multiple of 256 either
    first, second = notes
    assert first.startswith(
        "183 tensors (token_embd.weight, ...): rows of 576, 1,152 values are no multiple of Q4_K's 256"
    )
    assert second.startswith("28 tensors (blk.0.") and second.endswith("so Q8_0 in its place")
    odd, said = types_of("Q8_0").plan({"token_embd.weight": (64, 48), "output.weight": (64, 48)})
    assert set(odd.values()) == {"F16"} and len(said) == 1 and "so F16 in its place" in said[0]
    for type in GGML_TYPES:
        for width in (1, 31, 32, 48, 256, 576):
            assert width % BLOCKS[fitted(type, (4, width))][0] == 0


def test_named_tensors_are_kept_in_another_type():
    shapes, ours = (
        layers(3, joined=True),
        {"blk.1.attn_qkv.weight": ("q", "k", "v"), "output.weight": ("lm_head.weight",)},
    )
    kept = {"q": "Q5_K", "v": "F16", "lm_head.weight": "BF16"}
    plain, mixed = (Types("Q4_K_S", o).plan(shapes, ours)[0] for o in ({}, kept))
    changed = {n: t for n, t in mixed.items() if t != plain[n]}
    assert changed == {"blk.1.attn_qkv.weight": "F16", "output.weight": "BF16"}  # joined: the widest that is asked for


def test_names_in_any_case_and_no_others():
    assert types_of("q4_k") == Types("Q4_K_M") and types_of("bf16") == Types("BF16")
    for call, says in ((lambda: types_of("Q4_K_L"), "Q4_K_M"), (lambda: Types("F32", {"x": "Q4_K_M"}), "Q4_K")):
        with pytest.raises(InputError, match=says) as error:
            call()
        assert "\n" not in str(error.value)


# -- the file ----------------------------------------------------------------------------------------------------------

METADATA = {
    "general.architecture": ("string", "llama"),
    "llama.block_count": ("uint32", 2),
    "a.long": ("uint64", 2**63),
    "a.float": ("float32", 1e-5),
    "a.bool": ("bool", True),
    "text": ("string", "ґанок \U0001f3fa\n"),
    "tokenizer.ggml.tokens": ("array:string", ["<s>", "\u0120t", "їжак"]),
    "tokenizer.ggml.scores": ("array:float32", [0.5, -1.0, 0.0]),
    "tokenizer.ggml.token_type": ("array:int32", [3, 1, -1]),
}


def random_tensors(alignment_breaking: int = 3) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """One of each type, of sizes that are no multiple of the alignment where the type allows it."""
    rng, made = np.random.default_rng(0), {}
    for type in GGML_TYPES:
        values, size = BLOCKS[type]
        shape = (alignment_breaking, values if values > 1 else 5)
        made[f"t.{type}"] = type, shape, rng.bytes(alignment_breaking * shape[1] // values * size)
    return made | {"vector": ("F32", (7,), rng.bytes(28))}


def by_gguf_py(path: Path, metadata: dict, tensors: dict) -> Path:
    """The same content through the `gguf` package."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, metadata["general.architecture"][1])
    for key, (type, value) in list(metadata.items())[1:]:
        kind, _, inner = type.partition(":")
        inner = gguf.GGUFValueType[inner.upper()] if inner else None
        writer.add_key_value(key, value, gguf.GGUFValueType[kind.upper()], inner)
    for name, (type, shape, raw) in tensors.items():
        values, size = BLOCKS[type]
        rows = np.frombuffer(raw, np.uint8).reshape(*shape[:-1], shape[-1] // values * size)
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_our_bytes_are_gguf_pys(tmp_path):
    tensors = random_tensors()
    write_gguf(tmp_path / "ours.gguf", METADATA, tensors)
    assert (tmp_path / "ours.gguf").read_bytes() == by_gguf_py(tmp_path / "gguf.gguf", METADATA, tensors).read_bytes()


def test_pieces_of_any_size_make_the_same_file(tmp_path):
    tensors = random_tensors()
    write_gguf(tmp_path / "whole.gguf", METADATA, tensors)
    infos = {name: (type, shape) for name, (type, shape, _) in tensors.items()}
    for n in (1, 7, 64):
        cut = ((name, raw[at : at + n]) for name, (*_, raw) in tensors.items() for at in range(0, len(raw), n))
        write_gguf_stream(tmp_path / f"{n}.gguf", METADATA, infos, cut)
        assert (tmp_path / f"{n}.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_bytes_that_are_too_few_too_many_or_out_of_turn_make_no_file(tmp_path):
    infos = {"a": ("F32", (2,)), "b": ("F32", (2,))}
    for parts in (
        [("a", bytes(8))],
        [("a", bytes(9))],
        [("b", bytes(8))],
        [("a", bytes(8)), ("b", bytes(8)), ("b", b"1")],
    ):
        with pytest.raises(AssertionError):
            write_gguf_stream(tmp_path / "x.gguf", METADATA, infos, parts)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_an_older_file_whole(tmp_path):
    write_gguf(tmp_path / "x.gguf", METADATA, {})
    before = (tmp_path / "x.gguf").read_bytes()
    with pytest.raises(KeyboardInterrupt), gguf_writer(tmp_path / "x.gguf", METADATA, {"a": ("F32", (2,))}) as write:
        write("a", bytes(4))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"] and (tmp_path / "x.gguf").read_bytes() == before


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        write_gguf(tmp_path / "none" / "x.gguf", METADATA, {})


@pytest.fixture
def small_disk():
    """Files end at 300,000 bytes, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, small_disk):
    infos = {str(i): ("F32", (50_000,)) for i in range(3)}
    with pytest.raises(InputError, match="cannot be written .*0.6 MB.* nothing half-written") as error:
        write_gguf_stream(tmp_path / "x.gguf", METADATA, infos, ((name, bytes(200_000)) for name in infos))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


KILLED = """
import sys, time
from pathlib import Path
from kobza.formats.gguf import gguf_writer
with gguf_writer(Path(sys.argv[1]), {}, {"a": ("F32", (100_000,))}) as write:
    write("a", bytes(200_000))
    print("half", flush=True)
    time.sleep(60)
"""


def test_a_process_killed_half_way_leaves_no_file_and_the_next_one_writes_it(tmp_path):
    path = tmp_path / "x.gguf"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "half\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert [found.name for found in tmp_path.iterdir()] == [".x.gguf.part"]
    write_gguf(path, METADATA, random_tensors())
    assert [found.name for found in tmp_path.iterdir()] == ["x.gguf"] and "t.Q6_K" in read_gguf(path).tensors


# -- a model as files --------------------------------------------------------------------------------------------------

TOKENIZER = ByteTokenizer(["<|endoftext|>"])
V = TOKENIZER.vocab_size
TINY = dict(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_ff=96, vocab_size=V, max_seq_len=64, mlp="swiglu", qk_norm=False
)
GEMMA = dict(norm_offset=True, norm_cast="after", mlp="geglu_tanh", embed_scale=8.0, tied=True)
WINDOWS = GEMMA | dict(norm_place="both", window=16, attn_scale=0.0)
OLD = dict(position="learned", norm="layernorm", bias=True, n_kv_head=4, tied=True)
NEMOTRON = dict(norm="layernorm", norm_weight=False, mlp="relu2", bias=False)
FAMILIES = {
    "llama": TINY,
    "llama, tied": TINY | {"tied": True},
    "llama, 3.1": TINY | dict(rope_scaling="llama3", rope_factor=8.0, rope_original_len=32),
    "arcee": TINY | {"mlp": "relu2"},
    "qwen2": TINY | {"qkv_bias": True, "tied": True},
    "qwen3": TINY | dict(qk_norm=True, qk_norm_weight=True, head_dim=32),
    "phi3": TINY | dict(n_kv_head=4, rope_dim=8),
    "gemma": TINY | GEMMA,
    "gemma2": TINY | WINDOWS | dict(window_pattern="LG", softcap=30.0, attn_softcap=50.0),
    "gemma3": TINY
    | WINDOWS
    | dict(n_layer=6, window_pattern="LLLLLG", qk_norm=True, qk_norm_weight=True, rope_theta=1e6, rope_local_theta=1e4),
    "gpt2": TINY | OLD | {"mlp": "gelu_tanh"},
    "nemotron": TINY | NEMOTRON,
    "nemotron, tied": TINY | NEMOTRON | {"tied": True},
}


def source_of(config: ModelConfig, dtype: torch.dtype = torch.float32, **about) -> Source:
    """A model of random weights; its norms are not all ones."""
    draw, weights = torch.Generator().manual_seed(0), {}
    for name, shape in shapes_of(config).items():
        numbers = torch.randn(shape, generator=draw) * 0.05 + (name.endswith("norm.weight") and not config.norm_offset)
        weights[name] = numbers.to(dtype)
    dtypes = dict.fromkeys(weights, dtype)
    facts = dict(name="tiny", sha256="0" * 64, ends=(256,), read=weights.__getitem__) | about
    return Source(config=config, tokenizer=TOKENIZER, shapes=shapes_of(config), dtypes=dtypes, **facts)


def same_weights(source: Source, path: Path) -> None:
    found = dict(load_model(path).model.named_parameters())
    for name in source.shapes:
        shifted = source.config.norm_offset and name.endswith(
            "norm.weight"
        )  # 1 is added and taken away: half a float32 of it
        wrong = (found[name] - source.read(name).float()).abs().max()
        assert wrong <= (2**-24 if shifted else 0), name


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_to_gguf_to_ours(tmp_path, family):
    source = source_of(ModelConfig(**FAMILIES[family]))
    halves = source_of(source.config, torch.bfloat16)
    write_ggufs(source, {tmp_path / "f32.gguf": types_of("f32")})
    write_ggufs(halves, {tmp_path / "bf16.gguf": types_of("bf16")})
    arch = read_gguf(tmp_path / "f32.gguf").metadata["general.architecture"]
    assert arch == family.split(",")[0]
    if arch not in ("nemotron", "arcee"):
        same_weights(source, tmp_path / "f32.gguf")
        same_weights(halves, tmp_path / "bf16.gguf")
    x = torch.randint(0, V, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path / "f32.gguf").model(x), source.model()(x), atol=1e-5)


WIDE = ModelConfig(**TINY | dict(n_embd=256, n_ff=256, n_layer=1))  # every K type fits


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "Q4_K_S", "Q5_K_M"])
def test_the_bytes_are_the_quantisers_of_the_whole_tensor(tmp_path, type, monkeypatch):
    monkeypatch.setattr(export, "AT_ONCE", 7 * 256)  # slices of 7 rows
    source, path = source_of(WIDE), tmp_path / "x.gguf"
    assert write_ggufs(source, {path: types_of(type)}) == {path: []}
    file = read_gguf(path)
    for piece in gguf_pieces(WIDE, "llama", source.read, source.shapes):
        numbers, kind = piece.make().numpy(), file.tensors[piece.name].type
        assert tensor_bytes(file, piece.name).tobytes() == quantize(numbers, kind).tobytes(), piece.name
    assert file.metadata["general.file_type"] == FILE_TYPES[type]


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_blocks_are_gguf_pys_bytes(tmp_path, type):
    gguf = pytest.importorskip("gguf")
    source, path = source_of(WIDE), tmp_path / "x.gguf"
    write_ggufs(source, {path: types_of(type)})
    pieces = {piece.name: piece for piece in gguf_pieces(WIDE, "llama", source.read, source.shapes)}
    compared = 0
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type.name == type:
            theirs = gguf.quants.quantize(pieces[tensor.name].make().numpy(), tensor.tensor_type)
            assert theirs.tobytes() == tensor.data.tobytes(), tensor.name
            compared += 1
    assert compared >= 8


def test_gguf_py_reads_the_same_metadata(tmp_path):
    gguf = pytest.importorskip("gguf")
    write_ggufs(source_of(WIDE), {tmp_path / "x.gguf": types_of("Q8_0")})
    ours, theirs = read_gguf(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    found = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in ours.metadata.items()}
    assert found == plain and len(found) > 20


# The error of normal numbers in each type, relative to their size; half a step either way of what ggml's own has.
BANDS = {"F16": 3e-4, "BF16": 3e-3, "Q8_0": 0.006, "Q6_K": 0.02, "Q5_K_M": 0.04, "Q5_1": 0.04, "Q5_0": 0.045}
BANDS |= {"Q4_K_M": 0.08, "Q4_1": 0.08, "Q4_0": 0.09}


@pytest.mark.parametrize("type", BANDS)
def test_what_is_read_back_is_within_the_band_of_its_type(tmp_path, type):
    source = source_of(WIDE)
    write_ggufs(source, {tmp_path / "x.gguf": types_of(type)})
    found = load_model(tmp_path / "x.gguf").model.state_dict()
    errors = {n: float((found[n] - source.read(n)).norm() / source.read(n).norm()) for n in source.shapes}
    assert 0 < max(errors.values()) < BANDS[type], errors


def test_several_types_in_one_pass_are_the_files_of_several_passes(tmp_path):
    read, asked = source_of(WIDE).read, []
    source = source_of(WIDE, read=lambda name: asked.append(name) or read(name))
    outputs = {tmp_path / f"{type}.gguf": types_of(type) for type in ("F32", "F16", "Q8_0", "Q4_K_M", "Q4_K_S")}
    write_ggufs(source, outputs)
    assert sorted(asked) == sorted(source.shapes)  # each read once
    for path, types in outputs.items():
        write_ggufs(source, {tmp_path / "alone.gguf": types})
        assert path.read_bytes() == (tmp_path / "alone.gguf").read_bytes()
        (tmp_path / "alone.gguf").unlink()


def test_progress_counts_the_bytes_of_all_files(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "AT_ONCE", 64 * 256)
    seen: list[tuple[str, int, int]] = []
    paths = {tmp_path / "a.gguf": types_of("F16"), tmp_path / "b.gguf": types_of("Q8_0")}
    write_ggufs(source_of(WIDE), paths, progress=lambda *step: seen.append(step))
    done = [step[1] for step in seen]
    assert done == sorted(done) and done[-1] == seen[-1][2] and len({step[2] for step in seen}) == 1
    assert done[-1] == sum(t.n_bytes for path in paths for t in read_gguf(path).tensors.values())
    assert len(done) > len({step[0] for step in seen}) == len(read_gguf(tmp_path / "a.gguf").tensors)


def test_one_weight_at_a_time_is_in_memory(tmp_path):
    """Counted where they are handed out: three at most, q, k and v on their way into one."""
    weights, alive, most = source_of(ModelConfig(**FAMILIES["gpt2"])), [0], [0]

    def gone() -> None:
        alive[0] -= 1

    def read(name: str) -> torch.Tensor:
        fresh = weights.read(name).clone()
        weakref.finalize(fresh, gone)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return fresh

    source = source_of(weights.config, read=read)
    write_ggufs(source, {tmp_path / "a.gguf": types_of("F16"), tmp_path / "b.gguf": types_of("Q8_0")})
    assert most[0] == 3 and alive[0] == 0


def test_the_file_says_what_it_is(tmp_path):
    about = {
        "provenance": {"license": "apache-2.0", "step": 7},
        "sampling": {"temperature": 0.6, "top_k": 40, "seed": 1},
    }
    source = source_of(WIDE, name="my-story-135M-Instruct", **about)
    write_ggufs(source, {tmp_path / "x.gguf": types_of("q5_k")})
    file = read_gguf(tmp_path / "x.gguf")
    said, types = file.metadata, file.types
    assert next(iter(said)) == "general.architecture" and said["general.type"] == "model"
    assert (said["general.name"], said["general.basename"]) == ("my-story-135M-Instruct", "my-story")
    assert said["general.license"] == "apache-2.0" and said["general.size_label"] == size_label(
        sum(int(np.prod(tensor.shape)) for tensor in file.tensors.values())
    )
    assert (said["general.file_type"], types["general.file_type"]) == (17, "uint32")
    assert (said["general.quantization_version"], types["general.quantization_version"]) == (2, "uint32")
    assert said["kobza.source.sha256"] == source.sha256 and said["kobza.version"]
    assert (said["general.sampling.top_k"], types["general.sampling.top_k"]) == (40, "int32")
    assert types["general.sampling.temp"] == "float32" and not any("seed" in key for key in said)


@pytest.mark.parametrize(
    "n", [30, 999, 50_000, 1_000_000, 1_234_567, 9_400_000, 134_515_008, 999_600_000, 1_235_814_400]
)
def test_size_labels_are_gguf_pys(n):
    assert size_label(n) == pytest.importorskip("gguf").size_label(n, 0, 0, 0)


# -- importance and kept tensors ---------------------------------------------------------------------------------------


def test_each_tensor_gets_its_columns_importance(tmp_path, monkeypatch):
    given: dict[str, list[float | None]] = {}

    def spy(numbers: np.ndarray, type: str, importance: np.ndarray | None = None) -> np.ndarray:
        given.setdefault(type, []).append(None if importance is None else float(importance[0]))
        return quantize(numbers, type)

    monkeypatch.setattr(export, "quantize", spy)
    source = source_of(ModelConfig(**FAMILIES["gpt2"] | {"n_layer": 1}))
    matrices = [n for n, shape in source.shapes.items() if n.startswith("blocks") and len(shape) == 2]
    importance = {n: torch.full((source.shapes[n][1],), 1.0 + ("o_proj" in n)) for n in matrices}
    write_ggufs(
        source, {tmp_path / "x.gguf": types_of("q5_1")}, importance | {"lm_head.weight": torch.full((64,), 3.0)}
    )
    assert given["Q8_0"] == [3.0]  # the embedding, as the head that it is
    assert sorted(given["Q5_1"]) == [1.0, 1.0, 1.0, 2.0] and set(given["F32"]) == {None}


def test_a_table_that_is_only_looked_up_has_no_importance(tmp_path):
    """Nemotron's head stands apart in the file also where ours is the embedding."""
    for family in ("llama", "nemotron, tied"):
        source = source_of(ModelConfig(**FAMILIES[family]))
        name = "embed.weight" if source.config.tied else "lm_head.weight"
        importance = {name: torch.linspace(0.01, 9, 64)}
        paths = [tmp_path / f"{family}-{i}.gguf" for i in range(2)]
        write_ggufs(source, {paths[0]: Types("Q4_0", {name: "Q4_0"})})
        write_ggufs(source, {paths[1]: Types("Q4_0", {name: "Q4_0"})}, importance)
        table, head = (
            [tensor_bytes(read_gguf(path), name).tobytes() for path in paths]
            for name in ("token_embd.weight", "output.weight")
        )
        assert table[0] == table[1] and head[0] != head[1]


def test_kept_tensors_are_named_as_ours(tmp_path):
    source = source_of(WIDE)
    kept = {"blocks.0.mlp.down_proj.weight": "F16", "lm_head.weight": "Q8_0"}
    write_ggufs(source, {tmp_path / "x.gguf": Types("Q4_K_S", kept)})
    types = {name: tensor.type for name, tensor in read_gguf(tmp_path / "x.gguf").tensors.items()}
    assert (types["blk.0.ffn_down.weight"], types["output.weight"], types["blk.0.ffn_up.weight"]) == (
        "F16",
        "Q8_0",
        "Q4_K",
    )


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(call, *says: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in says), error.value


def test_bad_requests_are_one_line_and_leave_nothing(tmp_path):
    source, q8, path = source_of(WIDE), types_of("q8_0"), tmp_path / "x.gguf"
    refused(lambda: write_ggufs(source, {}), "no GGUF file")
    refused(
        lambda: write_ggufs(source, {path: q8, tmp_path / "." / "a" / ".." / "x.gguf": q8}), "two types for one file"
    )
    refused(lambda: write_ggufs(source, {tmp_path / "none" / "x.gguf": q8}), "no such folder")
    refused(
        lambda: write_ggufs(source, {path: Types("Q8_0", {"lm_head.weights": "F16"})}), "did you mean lm_head.weight"
    )
    refused(lambda: write_ggufs(source, {path: q8}, {"lm_head.weight": torch.ones(3)}), "[3]", "[256]")
    refused(lambda: write_ggufs(source, {path: q8}, {"head": torch.ones(3)}), "importance of head")
    refused(
        lambda: write_ggufs(source, {path: types_of("f16")}, {"lm_head.weight": torch.ones(256)}), "no effect on F16"
    )
    refused(lambda: write_ggufs(source, {path: q8}, {"lm_head.weight": torch.ones(256)}), "no effect on Q8_0")
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"precious")
    refused(lambda: write_ggufs(source, {path: q8}), "exists")
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize(
    "bad, types", [(float("nan"), "F32"), (float("-inf"), "BF16"), (float("nan"), "Q4_K"), (7e4, "F16")]
)
def test_a_weight_that_no_file_can_hold_is_named(tmp_path, bad, types):
    plain = source_of(WIDE)
    spoiled = plain.read("blocks.0.attn.v_proj.weight").clone()
    spoiled[3, 4] = bad
    source = source_of(WIDE, read=lambda name: spoiled if name == "blocks.0.attn.v_proj.weight" else plain.read(name))
    outputs = {tmp_path / "a.gguf": types_of("F32"), tmp_path / "b.gguf": types_of(types)}
    refused(
        lambda: write_ggufs(source, outputs if types != "F32" else {tmp_path / "b.gguf": types_of(types)}), "attn_v"
    )
    assert not list(tmp_path.iterdir())
    if bad == 7e4:
        write_ggufs(source, {tmp_path / "c.gguf": types_of("BF16")})


def test_a_full_disk_leaves_none_of_the_files(tmp_path, small_disk):
    outputs = {tmp_path / "small.gguf": types_of("Q4_0"), tmp_path / "large.gguf": types_of("F32")}
    refused(
        lambda: write_ggufs(source_of(WIDE), outputs), "large.gguf: cannot be written", "nothing half-written is left"
    )
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_said_before_the_work(tmp_path, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    refused(
        lambda: write_ggufs(source_of(WIDE, read=None), {tmp_path / "x.gguf": types_of("F32")}), "are free", "make room"
    )


def test_files_that_are_whole_already_go_when_a_later_one_fails(tmp_path, monkeypatch):
    replace, done = Path.replace, []

    def fail_second(path: Path, target: Path) -> Path:
        if done:
            raise OSError(errno.EIO, "Input/output error")
        done.append(target)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail_second)
    outputs = {tmp_path / f"{i}.gguf": types_of("Q8_0") for i in range(2)}
    refused(lambda: write_ggufs(source_of(WIDE), outputs), "Input/output error")
    assert done and not list(tmp_path.iterdir())


# -- the other engine --------------------------------------------------------------------------------------------------

IDS = [(37 * i + 11) % 256 for i in range(24)]
AT = [0, 5, 23]
ROUNDED = {"F32": 1e-3, "F16": 4e-3, "BF16": 0.03}
"""how far llama.cpp's log-probabilities may lie from ours on the same file: it rounds what is multiplied to the weights' own type
or to 8 bits, and looks GELU up in a table of halves"""


def farthest(path: Path) -> float:
    """The largest difference of log-probabilities, llama.cpp's against our own reader's, on one file."""
    from kobza.export.proof.llama_cpp import open_llama_cpp

    with open_llama_cpp(path, 64) as engine:
        theirs = engine.logprobs(IDS, AT)
    with torch.no_grad():
        ours = load_model(path).model(torch.tensor([IDS]))[0, AT].double().log_softmax(-1)
    return float((theirs - ours).abs().max())


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama", "gpt2", "nemotron, tied"])
def test_llama_cpp_runs_every_type_as_we_read_it(tmp_path, family):
    pytest.importorskip("xllamacpp")
    source = source_of(ModelConfig(**FAMILIES[family] | dict(n_embd=256, n_ff=256, n_layer=1)))
    outputs = {tmp_path / f"{type}.gguf": types_of(type) for type in FILE_TYPES}
    write_ggufs(source, outputs)
    far = {types.name: farthest(path) for path, types in outputs.items()}
    assert all(value < ROUNDED.get(name, 0.15) for name, value in far.items()), far


@pytest.mark.parity
def test_llama_cpp_runs_what_fell_back(tmp_path):
    """Rows of 64, no multiple of 256, and of 48, no multiple of 32 either."""
    pytest.importorskip("xllamacpp")
    for width, n_ff, types in ((64, 128, {"F32", "Q5_0", "Q8_0"}), (48, 80, {"F32", "F16"})):
        path = tmp_path / f"{width}.gguf"
        config = ModelConfig(**FAMILIES["qwen2"] | {"n_embd": width, "n_ff": n_ff})
        notes = write_ggufs(source_of(config), {path: types_of("Q4_K_M")})[path]
        assert notes and {tensor.type for tensor in read_gguf(path).tensors.values()} == types
        assert farthest(path) < 0.15


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2"])
def test_hf_to_ours_to_gguf(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=V, tie_word_embeddings=kind != "Llama")
    if kind == "GPT2":
        sizes |= dict(n_embd=64, n_layer=2, n_head=4, n_positions=64)
    else:
        sizes |= dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        sizes |= dict(intermediate_size=96, max_position_embeddings=64)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    loaded = load_model(tmp_path / "hf")
    weights = {n: p.detach() for n, p in loaded.model.named_parameters()}
    write_ggufs(source_of(loaded.config, read=weights.__getitem__), {tmp_path / "x.gguf": types_of("F32")})
    again = load_model(tmp_path / "x.gguf").model
    assert all(torch.equal(weights[name], p) for name, p in again.named_parameters())
    with torch.no_grad():
        x = torch.tensor([IDS])
        assert torch.allclose(again(x), theirs(x).logits, atol=1e-5)

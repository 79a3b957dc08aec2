"""ggml's blocks: bytes and numbers equal to gguf-py's where it has them, little error where it has none, and the importance."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kobza.config import InputError, ModelConfig
from kobza.export.importance import importance, load_importance, save_importance
from kobza.formats import ggml
from kobza.formats.ggml import BLOCKS, MADE, READABLE, TYPES, dequantize, load_tensor, quantize
from kobza.formats.gguf import read_gguf, write_gguf
from kobza.model import build

SEARCHED = ("Q4_K", "Q5_K", "Q6_K")
PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")


def back(numbers: np.ndarray, type: str, counts: np.ndarray | None = None) -> np.ndarray:
    return dequantize(quantize(numbers, type, counts), type, numbers.shape)


def error(numbers: np.ndarray, type: str, counts: np.ndarray | None = None, at: np.ndarray | float = 1.0) -> float:
    """The relative error, columns weighed with `at`."""
    lost = back(numbers, type, counts) - numbers
    return float(np.sqrt((at * lost**2).sum() / (at * numbers**2).sum()))


def normal(rows: int = 16, columns: int = 512, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, (rows, columns)).astype(np.float32)


def heavy(columns: int, seed: int = 1) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0, 1.5, columns)).astype(np.float32)


# ---- equal to gguf-py -----------------------------------------------------------------------------------------------


def test_types_and_block_sizes_are_gguf_pys():
    gguf = pytest.importorskip("gguf")
    for number, name in TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == BLOCKS[name]


@pytest.mark.parametrize("type", [name for name in READABLE if name[0] not in "I" and name != "F64"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_random_bytes_dequantise_as_in_gguf_py(type):
    gguf = pytest.importorskip("gguf")
    values, size = BLOCKS[type]
    raw = np.random.default_rng(0).integers(0, 256, (40, 3 * size), dtype=np.uint8)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type])
    ours = dequantize(raw, type, (40, 3 * values))
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    good = ~np.isnan(theirs)  # which NaN it is may differ
    assert good.mean() > 0.8 and (np.isnan(ours) == ~good).all()
    assert (ours.view("<u4")[good] == theirs.view("<u4")[good]).all()


@pytest.mark.parametrize("type", [type for type in MADE if type not in SEARCHED])
def test_made_blocks_are_gguf_pys_bytes(type):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    few = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float().numpy()  # ties abound
    for numbers in (
        rng.normal(0, 0.02, (64, 64)),
        rng.normal(0, 0.02, (1100, 96)),
        rng.standard_t(2, (64, 64)),
        np.zeros((2, 32)),
        rng.integers(-3, 4, (64, 64)),
        few,
        [np.linspace(0, 9, 32)],
        np.full((1, 32), -3.5),
        rng.normal(0, 1e-6, (8, 32)),
        rng.normal(0, 9e3, (8, 32)),
        rng.normal(0, 0.02, (3, 4, 32)),
    ):
        numbers = np.asarray(numbers, np.float32)
        theirs = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[type])
        assert quantize(numbers, type).tobytes() == theirs.tobytes()


def test_whole_numbers_and_doubles_are_read():
    for type, dtype in (("I8", "i1"), ("I16", "<i2"), ("I32", "<i4"), ("I64", "<i8"), ("F64", "<f8")):
        raw = np.array([[-3, 7]], dtype).view(np.uint8)
        assert dequantize(raw, type, (1, 2)).tolist() == [[-3, 7]]


# ---- little error ---------------------------------------------------------------------------------------------------

BANDS = {
    "F32": 0,
    "BF16": 0.002,
    "F16": 0.00023,
    "Q8_0": 0.006,
    "Q5_1": 0.04,
    "Q5_0": 0.045,
    "Q4_1": 0.08,
    "Q4_0": 0.09,
}
BANDS |= {"Q4_K": 0.0707, "Q5_K": 0.0348, "Q6_K": 0.0174}  # 0.1% above: each part of the search tells


@pytest.mark.parametrize("type, band", BANDS.items())
def test_blocks_come_back_within_their_step(type, band):
    assert band / 2 <= error(normal(64), type) <= band


HARD = {  # rows that a search can trip over, from normal ones
    "normal": lambda x, rng: x,
    "heavy tails": lambda x, rng: rng.standard_t(2, x.shape) * 0.02,
    "one outlier": lambda x, rng: np.where(np.arange(512) == 77, 3, x),
    "negative": lambda x, rng: -np.abs(x) - 0.01,
    "positive": lambda x, rng: np.abs(x) + 0.01,
    "tiny": lambda x, rng: x * 1e-4,
    "huge": lambda x, rng: x * 1e5,
    "two values": lambda x, rng: np.where(x > 0, 0.5, -0.25),
    "few": lambda x, rng: np.where(rng.random(x.shape) < 0.02, x, 0),
    "runs of many sizes": lambda x, rng: x * np.repeat(np.logspace(0, -4, 16), 32),
}


def hard(name: str) -> np.ndarray:
    return HARD[name](normal(8, seed=3), np.random.default_rng(3)).astype(np.float32)


def objective(x: np.ndarray, type: str, counts: np.ndarray | None) -> np.ndarray:
    """What an error in each number counts: ggml's own weights, but for Q6_K without importance, where ours are those of Q4_K."""
    if type == "Q6_K" and counts is not None:
        return np.broadcast_to(counts, x.shape)
    if counts is None:
        runs = x.reshape(-1, 16 if type == "Q6_K" else 32)
        return (np.sqrt((runs**2).mean(-1, keepdims=True)) + np.abs(runs)).reshape(x.shape)
    parts = x.reshape(len(x), -1, 256 if type in SEARCHED else 512)
    return counts * np.sqrt((2 if type in SEARCHED else 1) * (parts**2).mean(-1, keepdims=True) + parts**2).reshape(
        x.shape
    )


# What the search of ggml_quantize_chunk (ggml 0.25.3) leaves of these, in the order of HARD: relative, weighed by `objective`.
GGML = {  # (type, with the importance of `heavy`)
    ("Q4_K", False): [0.05893, 0.03985, 0.01558, 0.02588, 0.0317, 2.114, 0.05893, 0.0002441, 0.01414, 0.05503],
    ("Q4_K", True): [0.04603, 0.04815, 0.05095, 0.02077, 0.02502, 2.016, 0.0462, 0.0002441, 0.01051, 0.04494],
    ("Q5_K", False): [0.0305, 0.02218, 0.01644, 0.01351, 0.01566, 1.99, 0.03049, 0.0003691, 0.009627, 0.02829],
    ("Q5_K", True): [0.02434, 0.02723, 0.05644, 0.01159, 0.01212, 2.099, 0.02433, 0.0004426, 0.007109, 0.02238],
    ("Q6_K", False): [0.01405, 0.01533, 0.01189, 0.01323, 0.01323, 1.0, 0.01406, 0.0, 0.003662, 0.01278],
    ("Q6_K", True): [0.01364, 0.04801, 0.0796, 0.01129, 0.01129, 1.0, 0.0136, 0.0, 0.003604, 0.01348],
    ("Q4_0", True): [0.05522, 0.06551, 0.03355, 0.04858, 0.04858, 0.06153, 0.05522, 0.0, 0.007164, 0.04652],
    ("Q4_1", True): [0.04226, 0.03663, 0.03269, 0.01877, 0.02389, 0.07167, 0.04226, 0.0003388, 0.007317, 0.04027],
    ("Q5_0", True): [0.02701, 0.03688, 0.03214, 0.02394, 0.02394, 0.06331, 0.02701, 0.0, 0.004724, 0.02508],
    ("Q5_1", True): [0.02134, 0.02014, 0.03766, 0.008887, 0.01115, 0.1211, 0.02134, 0.0003889, 0.00257, 0.01945],
}


@pytest.mark.parametrize("type, counted", GGML)
def test_the_search_leaves_no_more_error_than_ggmls(type, counted):
    counts = heavy(512) if counted else None
    ratios = []
    for name, theirs in zip(HARD, GGML[type, counted], strict=True):
        numbers = hard(name)
        ours = error(numbers, type, counts, objective(numbers.astype(np.float64), type, counts))
        assert ours <= theirs * 1.005 + 1e-5, name
        ratios.append(ours / theirs if theirs else 1)
    assert np.mean(ratios) < 0.998


@pytest.mark.parametrize("type", SEARCHED)
def test_what_a_block_can_hold_exactly_comes_back(type):
    steps = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 32}[type]
    whole = np.random.default_rng(0).integers(0, steps, (4, 256)).astype(np.float32)
    whole[:, ::16] = steps if type != "Q6_K" else -32
    whole[:, 1::16] = 0
    for numbers in (np.zeros((2, 512), np.float32), whole * 63 / 64, whole - (8 if type != "Q6_K" else 0)):
        assert np.abs(back(numbers, type) - numbers).max() <= 6e-4 * max(1, np.abs(numbers).max())
    for constant, band in ((0.7, 6e-4), (-0.7, 6e-4), (-2e4, 6e-4), (1e-3, 3e-3)):  # small float16 have few digits
        numbers = np.full((1, 256), constant, np.float32)
        assert np.abs(back(numbers, type) / constant - 1).max() < band


# ---- the same bytes however they are made ---------------------------------------------------------------------------


@pytest.mark.parametrize("type", [*SEARCHED, *PLAIN, "Q8_0", "F16", "BF16"])
@pytest.mark.parametrize("counted", [False, True])
def test_neither_pieces_nor_neighbours_nor_threads_show(monkeypatch, type, counted):
    numbers, counts = normal(67), heavy(512) if counted else None
    whole = quantize(numbers, type, counts).tobytes()
    assert b"".join(quantize(row, type, counts).tobytes() for row in numbers) == whole
    if BLOCKS[type][0] > 1 and not counted:
        blocks = numbers.reshape(-1, BLOCKS[type][0])
        assert b"".join(quantize(block, type).tobytes() for block in blocks[:40]) == whole[: 40 * BLOCKS[type][1]]
    for cores, values in ((1, 1 << 15), (3, 2048)):
        monkeypatch.setattr(ggml.os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(ggml, "AT_ONCE_MADE", values)
        assert quantize(numbers.reshape(67, 1, 512), type, counts).tobytes() == whole


GOLDEN = {"Q4_K": "69f624f2c140d977", "Q5_K": "394af5b26e6736b7", "Q6_K": "6e86790dad003fa6"}


@pytest.mark.parametrize("type", SEARCHED)
def test_golden_bytes(type):
    numbers = (np.random.default_rng(0).integers(-999, 1000, (4, 512)) ** 3 / 2**30).astype(np.float32)
    made = b"".join(quantize(numbers, type, counts).tobytes() for counts in (None, np.arange(512, dtype=np.float32)))
    assert hashlib.sha256(made).hexdigest()[:16] == GOLDEN[type]


def test_pieces_of_what_is_read_do_not_show(monkeypatch):
    raw = np.random.default_rng(0).integers(0, 256, 100 * 144, dtype=np.uint8)
    whole = dequantize(raw, "Q4_K", (100, 256))
    monkeypatch.setattr(ggml, "AT_ONCE", 7 * 256)
    monkeypatch.setattr(np, "empty", np.zeros)  # or memory of the first time would hold the right numbers
    assert dequantize(raw, "Q4_K", (100, 256)).tobytes() == whole.tobytes()


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", [type for type in MADE if type not in ("F32", "BF16")])
def test_what_no_float16_scale_can_hold_is_refused(type):
    for bad, says in ((np.nan, "nan"), (np.inf, "inf"), (-1e30, "-1e\\+30"), (65_536, "65536")):
        numbers = normal(70)
        numbers[69, 511] = bad
        with pytest.raises(
            InputError, match=f"{type} holds numbers up to 65,504, and this tensor has {says}; "
        ) as caught:
            quantize(numbers, type)
        assert "\n" not in str(caught.value)
    numbers[69, 511] = 65_504
    assert np.isfinite(back(numbers, type)).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("type", MADE)
def test_what_is_mapped_for_reading_is_only_read(type):
    numbers = normal()
    before = numbers.copy()
    numbers.flags.writeable = False
    quantize(numbers, type, heavy(512))
    assert (numbers == before).all()


def test_wide_types_hold_what_is_no_number():
    for type in ("F32", "BF16"):
        assert np.isnan(back(np.array([np.nan, 1], np.float32), type)).tolist() == [True, False]


def test_bad_shapes_types_and_importance_are_refused():
    numbers = normal(2, 96)
    for type, counts, says in (
        ("Q4_K", None, "no multiple of Q4_K's block of 256; take F16"),
        ("Q4_k", None, "did you mean Q4_K?"),
        ("Q2_K", None, "cannot write ggml type Q2_K"),
        ("Q4_0", np.ones(95, np.float32), "96 columns is as many finite numbers from 0, not \\(95,\\)"),
        ("Q4_0", np.full(96, np.nan), "finite"),
        ("Q4_0", np.full(96, -1.0), "from 0"),
        ("Q4_0", np.full((1, 96), 1.0), "finite"),
    ):
        with pytest.raises(InputError, match=says):
            quantize(numbers, type, counts)


@settings(max_examples=60)
@given(st.sampled_from([*SEARCHED, *PLAIN]), st.booleans(), st.integers(0, 2**32), st.integers(-46, 4))
def test_any_numbers_come_back_finite_and_no_worse_than_nothing(type, counted, seed, scale):
    rng = np.random.default_rng(seed)
    numbers = np.clip(rng.standard_t(rng.integers(1, 9), (2, 256)) * 10.0**scale, -65504, 65504).astype(np.float32)
    numbers[rng.random((2, 256)) < rng.choice([0, 0.5, 0.99])] = rng.choice([0, 10.0**scale])
    counts = rng.choice([0, 1, 1e-30, 1e30], 256).astype(np.float32) if counted else None
    with np.errstate(all="raise", under="ignore"):
        found = back(numbers, type, counts)
    assert np.isfinite(found).all()
    if counts is None:
        assert np.linalg.norm(found.astype(float) - numbers) <= 1.01 * np.linalg.norm(numbers.astype(float)) + 1e-7


def test_what_cannot_be_dequantised_says_so(tmp_path):
    raw = np.zeros(66, np.uint8)
    write_gguf(
        tmp_path / "x.gguf", {}, {"w": ("IQ2_XXS", (1, 256), raw), "odd": ("Q8_0", (2, 16), np.zeros(34, np.uint8))}
    )
    gguf = read_gguf(tmp_path / "x.gguf")
    for name, says in (("w", "IQ2_XXS"), ("odd", "block of 32"), ("ww", "did you mean w?")):
        with pytest.raises(InputError, match=says):
            load_tensor(gguf, name)
    with pytest.raises(InputError, match="takes 34 bytes, not 66"):
        dequantize(raw, "Q8_0", (1, 32))


# ---- importance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", [*SEARCHED, *PLAIN])
def test_importance_lessens_the_error_where_it_counts(type):
    numbers, counts = normal(32), heavy(512)
    plain, weighed = error(numbers, type, None, counts), error(numbers, type, counts, counts)
    assert weighed < 0.95 * plain
    assert quantize(numbers, type, counts).tobytes() == quantize(numbers, type, counts * 2**20).tobytes()
    counts[:256] = 0  # unused on the text of the calibration, not for ever
    assert error(numbers, type, counts, np.arange(512) < 256) < 1.3 * error(numbers, type)
    none = np.zeros(512, np.float32)
    assert quantize(numbers, type, none).tobytes() == quantize(numbers, type, none + 1).tobytes()


def tiny(**settings):
    return build(ModelConfig(vocab_size=32, n_layer=2, n_embd=32, n_head=2, max_seq_len=16, **settings)).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_importance_is_the_mean_square_of_what_flows_in(tied):
    model, ids = tiny(tied=tied), torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(0))
    found = importance(model, [ids[:2], ids[2:]])
    weights = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.ndim == 2}
    assert set(found) == {name for name in weights if "embed" not in name and "position" not in name}
    assert "lm_head.weight" in found
    with torch.no_grad():
        flows = {
            "lm_head.weight": model.hidden(ids),
            "blocks.0.attn.k_proj.weight": model.blocks[0].attn_norm(model.embed(ids)),
        }
    for name, x in flows.items():
        assert torch.allclose(found[name], x.reshape(48, -1).square().mean(0), rtol=1e-5)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and tensor.shape == (model.get_parameter(name).shape[1],)
        assert (tensor >= 0).all() and tensor.sum() > 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_importance_of_nothing_and_of_a_broken_model_is_refused():
    model = tiny()
    with pytest.raises(InputError, match="no token flowed through blocks.0.attn.q_proj.weight.*not empty"):
        importance(model, [])
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="flows into lm_head.weight is infinite or no number"):
        importance(model, [torch.zeros(1, 4, dtype=torch.long)])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_importance_is_saved_for_one_model(tmp_path):
    path, found = tmp_path / "importance.safetensors", {"lm_head.weight": torch.rand(8), "a.weight": torch.rand(3)}
    save_importance(path, found, "ab" * 32, 4096)
    again = load_importance(path, "ab" * 32)
    assert set(again) == set(found) and all(torch.equal(again[name], found[name]) for name in found)
    assert [file.name for file in tmp_path.iterdir()] == ["importance.safetensors"]
    with pytest.raises(
        InputError, match="measured on other weights \\(abababababab, not cdcdcdcdcdcd\\); measure it again"
    ):
        load_importance(path, "cd" * 32)
    with pytest.raises(InputError, match="cannot be written"):
        save_importance(tmp_path / "no" / "importance.safetensors", found, "ab" * 32, 4096)


def test_a_file_that_is_no_importance_is_refused(tmp_path):
    path, about = tmp_path / "x.safetensors", {"importance_of": "ab"}
    for tensors, metadata, says in (
        ({"w": torch.rand(3)}, None, "is no importance"),
        ({"w": torch.rand(3, 3)}, about, "w is no row of float32"),
        ({"w": torch.rand(3).half()}, about, "w is no row of float32"),
        ({"w": torch.tensor([1.0, -1.0])}, about, "w holds what is no mean of squares"),
        ({"w": torch.tensor([1.0, torch.nan])}, about, "w holds what is no mean of squares"),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(InputError, match=says):
            load_importance(path, "ab")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="truncated"):
        load_importance(path, "ab")

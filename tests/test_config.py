"""The nouns: presets load, the derived fields are right, and whatever is wrong is refused with the remedy."""

import ast
import dataclasses
import inspect
import json
import math
import tomllib

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

import kobza.config
from kobza.config import (
    DataConfig,
    InputError,
    ModelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    flatten,
    from_dict,
    load_toml,
    nearest,
    preset,
    preset_names,
    run_from_dict,
    to_dict,
)

NOUNS = (ModelConfig, DataConfig, TrainConfig, SampleConfig)


# ---- what is refused ----


@pytest.mark.parametrize(
    "section, typo, right",
    [
        ("model", "n_heed", "n_head"),
        ("model", "nembd", "n_embd"),
        ("model", "max_seqlen", "max_seq_len"),
        ("data", "val_frac", "val_fraction"),
        ("data", "tokeniser", "tokenizer"),
        ("train", "stepz", "steps"),
        ("train", "warmup_step", "warmup_steps"),
    ],
)
def test_unknown_key_names_the_nearest(section, typo, right):
    with pytest.raises(InputError, match=rf"my\.toml \[{section}\]: unknown key '{typo}'; did you mean {right}\?"):
        run_from_dict({section: {typo: 1}}, "my.toml")


def test_unknown_section_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown section 'modle'; did you mean model\?"):
        run_from_dict({"modle": {}}, "my.toml")


def test_a_key_near_nothing_lists_what_is_known():
    assert nearest("zzz", ["steps", "lr"]) == "; known: steps, lr"


@pytest.mark.parametrize(
    "section, key, value, wanted",
    [
        ("model", "n_layer", "4", "int"),
        ("model", "n_layer", 4.0, "int"),
        ("model", "n_layer", True, "int"),
        ("model", "n_layer", [4], "int"),
        ("model", "dropout", "0.1", "float"),
        ("model", "dropout", False, "float"),
        ("model", "bias", 1, "bool"),
        ("model", "bias", "true", "bool"),
        ("data", "text_field", 3, "str"),
        ("model", "position", "absolute", "one of rope, learned, sinusoidal, none"),
        ("model", "mlp", "reglu", "one of relu2, relu, gelu, gelu_tanh, silu, swiglu, geglu, geglu_tanh"),
        ("data", "unknown", "drop", "one of error, skip, bytes"),
        ("train", "optimizer", "adam", "one of muon, adamw, lion, sgd"),
        ("train", "precision", "fp8", "one of auto, fp32, tf32, bf16, fp16"),
    ],
)
def test_wrong_type_is_refused(section, key, value, wanted):
    with pytest.raises(InputError, match=f"{key} is .*{wanted}"):
        run_from_dict({section: {key: value}}, "my.toml")


@pytest.mark.parametrize("value", [3, "model", [1], None])
def test_a_section_that_is_no_table_is_refused(value):
    with pytest.raises(InputError, match=r"my\.toml.*model"):
        run_from_dict({"model": value}, "my.toml")


@pytest.mark.parametrize("seed", ["7", 1.5, True, None])
def test_a_seed_that_is_no_number_is_refused(seed):
    with pytest.raises(InputError, match="seed"):
        run_from_dict({"seed": seed}, "my.toml")


@pytest.mark.parametrize(
    "cls, values, words",
    [
        (ModelConfig, {"n_layer": 0}, "model.n_layer is 0; it must be at least 1"),
        (ModelConfig, {"n_head": -1}, "model.n_head is -1"),
        (ModelConfig, {"n_embd": 0}, "model.n_embd is 0"),
        (ModelConfig, {"max_seq_len": 0}, "model.max_seq_len is 0"),
        (ModelConfig, {"vocab_size": -1}, "model.vocab_size is -1; it must not be negative"),
        (ModelConfig, {"n_kv_head": -2}, "model.n_kv_head is -2"),
        (ModelConfig, {"head_dim": -2}, "model.head_dim is -2"),
        (ModelConfig, {"n_ff": -2}, "model.n_ff is -2"),
        (ModelConfig, {"softcap": -1.0}, "model.softcap is -1"),
        (ModelConfig, {"n_embd": 100, "n_head": 3}, "n_embd is 100, not divisible by model.n_head 3; take n_embd 99"),
        (ModelConfig, {"n_embd": 1, "n_head": 4}, "take n_embd 4"),
        (ModelConfig, {"n_kv_head": 3}, "model.n_head is 4, not divisible by model.n_kv_head 3"),
        (ModelConfig, {"n_kv_head": 8}, "not divisible by model.n_kv_head 8"),
        (ModelConfig, {"head_dim": 5}, "head_dim is 5; rope turns pairs"),
        (ModelConfig, {"dropout": 1.0}, "model.dropout is 1.0; it must be in [0, 1)"),
        (ModelConfig, {"dropout": -0.1}, "model.dropout is -0.1"),
        (ModelConfig, {"norm_eps": 0.0}, "model.norm_eps is 0.0"),
        (ModelConfig, {"rope_theta": 0.0}, "model.rope_theta is 0.0"),
        (DataConfig, {"val_fraction": 0.0}, "data.val_fraction is 0.0; it must be between 0 and 1"),
        (DataConfig, {"val_fraction": 1.0}, "data.val_fraction is 1.0"),
        (DataConfig, {"vocab_size": 300}, "data.vocab_size 300 has no effect with tokenizer=char"),
        (DataConfig, {"tokenizer": "bpe", "vocab_size": 256}, "data.vocab_size is 256; bytes and end-of-text need 257"),
        (DataConfig, {"tokenizer": "bpe", "unknown": "skip"}, "data.unknown has no effect with tokenizer=bpe"),
        (TrainConfig, {"steps": 0}, "train.steps is 0; it must be at least 1"),
        (TrainConfig, {"micro_batch": 0}, "train.micro_batch is 0"),
        (TrainConfig, {"accumulate": 0}, "train.accumulate is 0"),
        (TrainConfig, {"eval_interval": 0}, "train.eval_interval is 0"),
        (TrainConfig, {"keep": 0}, "train.keep is 0"),
        (TrainConfig, {"lr": 0.0}, "train.lr is 0.0; it must be above 0"),
        (TrainConfig, {"muon_lr": -1.0}, "train.muon_lr is -1.0"),
        (TrainConfig, {"weight_decay": -0.1}, "train.weight_decay is -0.1; it must not be negative"),
        (TrainConfig, {"grad_clip": -1.0}, "train.grad_clip is -1.0"),
        (TrainConfig, {"warmup_steps": -1}, "train.warmup_steps is -1"),
        (TrainConfig, {"eval_tokens": -1}, "train.eval_tokens is -1"),
        (TrainConfig, {"checkpoint_interval": -1}, "train.checkpoint_interval is -1"),
        (TrainConfig, {"patience": -1}, "train.patience is -1"),
        (TrainConfig, {"embed_lr": -1.0}, "train.embed_lr is -1.0"),
        (TrainConfig, {"stop_at": -1.0}, "train.stop_at is -1.0"),
        (TrainConfig, {"beta1": 1.0}, "train.beta1 is 1.0; it must be in [0, 1)"),
        (TrainConfig, {"beta2": -0.1}, "train.beta2 is -0.1"),
        (TrainConfig, {"lr_floor": 1.1}, "train.lr_floor is 1.1"),
        (TrainConfig, {"decay_fraction": 0.0}, "train.decay_fraction is 0.0"),
        (SampleConfig, {"tokens": 0}, "--tokens is 0"),
        (SampleConfig, {"temperature": -0.1}, "--temperature is -0.1"),
        (SampleConfig, {"seed": -1}, "--seed is -1"),
        (SampleConfig, {"seed": 2**63}, "it must be in [0, 2**63)"),
        (SampleConfig, {"top_k": -1}, "--top-k is -1"),
        (SampleConfig, {"top_p": 0.0}, "--top-p is 0.0; it must be in (0, 1]"),
        (SampleConfig, {"top_p": 1.1}, "--top-p is 1.1"),
        (SampleConfig, {"min_p": 1.1}, "--min-p is 1.1"),
        (SampleConfig, {"repetition_penalty": 0.0}, "--repetition-penalty is 0.0"),
        (SampleConfig, {"no_repeat_ngram": -1}, "--no-repeat-ngram is -1"),
        (SampleConfig, {"min_tokens": 9, "tokens": 8}, "--min-tokens is 9; it must be between 0 and --tokens 8"),
        (RunConfig, {"seed": -1}, "--seed is -1"),
        (RunConfig, {"seed": 2**63}, "it must be in [0, 2**63)"),
    ],
)
def test_validation(cls, values, words):
    with pytest.raises(InputError) as error:
        cls(**values)
    assert words in str(error.value) and "\n" not in str(error.value)


FLOATS = [(cls, f.name) for cls in NOUNS for f in dataclasses.fields(cls) if f.type == "float"]


@pytest.mark.parametrize("cls, name", FLOATS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_nan_and_infinity_are_no_value_of_any_field(cls, name):
    for value in (math.nan, math.inf):
        with pytest.raises(InputError, match=f"{name.replace('_', '.')} is {value}"):
            cls(**{name: value})


@pytest.mark.parametrize(
    "values", [{"position": "absolute"}, {"norm": "batchnorm"}, {"mlp": "reglu"}, {"n_layer": 2.0}]
)
def test_values_are_checked_when_the_object_is_made(values):
    """Not only when they come from a file: position="absolute" once made a model with learned positions."""
    with pytest.raises(InputError):
        ModelConfig(**values)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().n_layer = 3


# ---- derived fields ----


def test_derived_fields():
    config = ModelConfig(n_embd=96, n_head=6)
    assert (config.head_dim, config.n_kv_head, config.n_ff) == (16, 6, 384)
    given_ = ModelConfig(n_embd=96, n_head=6, head_dim=32, n_kv_head=2, n_ff=100)
    assert (given_.head_dim, given_.n_kv_head, given_.n_ff) == (32, 2, 100)
    assert ModelConfig(n_embd=100, n_head=3, head_dim=32).head_dim == 32  # a given width frees n_embd
    assert DataConfig().vocab_size == 0 and DataConfig(tokenizer="bpe").vocab_size == 4096


# ---- there and back ----

positive = st.integers(1, 1000)
shares = st.floats(0.01, 0.99)
models = st.builds(
    lambda heads, groups, pairs, **rest: ModelConfig(
        n_head=heads * groups, n_kv_head=heads, n_embd=2 * pairs * heads * groups, **rest
    ),
    heads=st.integers(1, 4),
    groups=st.integers(1, 4),
    pairs=st.integers(1, 16),
    vocab_size=st.integers(0, 10**6),
    n_layer=positive,
    max_seq_len=positive,
    n_ff=st.integers(0, 999),
    position=st.sampled_from(["rope", "learned"]),
    norm=st.sampled_from(["rmsnorm", "layernorm"]),
    mlp=st.sampled_from(["relu2", "swiglu", "gelu", "gelu_tanh"]),
    qk_norm=st.booleans(),
    bias=st.booleans(),
    tied=st.booleans(),
    init=st.sampled_from(["zero", "gpt2", "xavier"]),
    softcap=st.floats(0, 50),
    dropout=st.floats(0, 0.9),
)
datas = st.one_of(
    st.builds(DataConfig, unknown=st.sampled_from(["error", "skip", "bytes"]), val_fraction=shares, bos=st.booleans()),
    st.builds(DataConfig, tokenizer=st.just("bpe"), vocab_size=st.sampled_from([0, 257, 5000]), text_field=st.text()),
)
trains = st.builds(
    lambda schedule, lr_floor, **rest: TrainConfig(
        schedule=schedule, **({} if schedule == "constant" else {"lr_floor": lr_floor}), **rest
    ),
    schedule=st.sampled_from(["cosine", "linear", "wsd", "inverse_sqrt", "constant"]),
    lr_floor=shares,
    steps=positive,
    lr=shares,
    optimizer=st.sampled_from(["muon", "adamw", "lion", "sgd"]),
)
runs = st.builds(RunConfig, models, datas, trains, st.integers(0, 2**63 - 1))


@given(runs)
def test_round_trip(run):
    content = to_dict(run)
    assert run_from_dict(content, "memory") == run
    assert run_from_dict(json.loads(json.dumps(content)), "json") == run
    assert run_from_dict(tomllib.loads(tomli_w.dumps(content)), "toml") == run


def test_round_trip_of_samples():
    config = SampleConfig(tokens=3, top_p=0.5)
    assert from_dict(SampleConfig, to_dict(config), "memory") == config


def test_missing_parts_take_defaults():
    assert run_from_dict({}, "nothing") == RunConfig()
    assert run_from_dict({"train": {"steps": 7}}, "x") == RunConfig(train=TrainConfig(steps=7))


def test_a_whole_number_is_good_for_a_float():
    assert run_from_dict({"train": {"lr": 1}}, "x").train.lr == 1


# ---- files ----


@pytest.mark.parametrize("name", preset_names())
def test_presets_load(name):
    assert run_from_dict(preset(name), name).model.n_layer > 0


def test_the_promised_presets_are_there():
    assert {"workshop", "tiny", "laptop", "medium", "gpt2", "speedrun", "demo"} <= set(preset_names())


def test_tables_become_dotted_names():
    assert flatten({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": 1, "d": None}


def test_an_update_reads_all_its_micro_batches():
    run = RunConfig(ModelConfig(max_seq_len=16), train=TrainConfig(micro_batch=3, accumulate=5))
    assert run.batch_tokens == 3 * 5 * 16


def test_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match="unknown preset 'workshp'; did you mean workshop.*tiny"):
        preset("workshp")


def test_files_that_are_no_toml(tmp_path):
    (tmp_path / "bad.toml").write_text("[model\n")
    (tmp_path / "latin.toml").write_bytes(b'x = "\xe9"')
    for name, words in [("bad.toml", "not a TOML file"), ("latin.toml", "not a TOML file"), ("no.toml", "no such")]:
        with pytest.raises(InputError, match=words):
            load_toml(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        load_toml(tmp_path)  # a folder


def test_every_field_has_its_help():
    """The string under a field is what the command line prints for it."""
    tree = ast.parse(inspect.getsource(kobza.config))
    for node in [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in {c.__name__ for c in NOUNS}]:
        for field, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                good = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert good and isinstance(after.value.value, str), f"{node.name}.{field.target.id} has no help"

"""The counts by equation are those of the built model, and the table says what it should."""

import dataclasses
import json
from dataclasses import replace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_switches import SECOND, configs

from kobza.cli import main
from kobza.config import InputError, TrainConfig, preset, preset_names, run_from_dict, without_idle
from kobza.describe.equations import equations
from kobza.describe.parts import parts, total_parameters, training_bytes
from kobza.model import ModelConfig, build, n_parameters

SIZES = {"max_seq_len": 8, "n_layer": 2, "n_head": 4, "n_embd": 16, "vocab_size": 30}


@pytest.mark.parametrize(
    "differs",
    [
        {},
        {"n_kv_head": 2, "mlp": "swiglu", "n_ff": 40},
        {"position": "learned", "norm": "layernorm", "bias": True, "tied": True, "mlp": "gelu", "qk_norm": False},
        {"norm": "layernorm", "head_dim": 6},
    ],
)
def test_the_counts_are_those_of_the_built_model(differs):
    config = ModelConfig(**SIZES, **differs)
    assert total_parameters(config) == n_parameters(build(config))


@pytest.mark.parametrize("name", [name for name in preset_names() if name not in ("gpt2", "medium")])
def test_the_counts_of_a_preset_are_those_of_its_model(name):
    config = replace(run_from_dict(preset(name), name).model, vocab_size=65)
    assert total_parameters(config) == n_parameters(build(config))


def preset_model(name):
    return replace(run_from_dict(preset(name), name).model, vocab_size=65)


def test_workshop_has_the_layers_of_the_task_and_ten_million_parameters():
    config = replace(run_from_dict(preset("workshop"), "workshop").model, vocab_size=65)
    rows = {row.name: row for row in parts(config)}
    assert rows["embedding"].weights == 24_960
    assert rows["positions"].weights == 98_304
    assert rows["attention"].weights == 589_824
    assert rows["MLP"].weights == 1_179_648
    assert 10.6e6 < total_parameters(config) < 10.8e6


def test_describe_prints_the_table_and_the_tree(capsys):
    assert main(["describe", "tiny"]) == 0
    said = capsys.readouterr().out
    for word in (
        "embedding",
        "positions",
        "attention",
        "MLP",
        "norm",
        "head",
        "FLOPs",
        "E[t]",
        "softmax",
        "training",
        "inference",
        "GPT(",
    ):
        assert word in said, word


def test_describe_prints_the_equations_beside_the_shapes_or_above_them(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    assert main(["describe", "demo"]) == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["embedding", "x = E[t]", "E 65 × 160, i < 128"] in rows
    assert ["x ← x + mlp(LN(x))"] in rows and ["f = 1000^(−2m/32), m < 16"] in rows
    assert ["feed-forward", "mlp(x) = Wdown relu²(Wup x)", "Wup 480 × 160, Wdown 160 × 480"] in rows
    monkeypatch.setenv("COLUMNS", "72")
    assert main(["describe", "demo"]) == 0
    rows = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert all(len(row) <= 72 for row in rows[rows.index("") : rows.index("", rows.index("") + 1)])
    place = next(i for i, row in enumerate(rows) if "Wdown relu²(Wup x)" in row)
    assert rows[place + 1].strip() == "Wup 480 × 160, Wdown 160 × 480"


def test_only_what_a_model_has_is_written():
    plain = " ".join(" ".join(line) for line in equations(ModelConfig(**SIZES, pattern="F", norm="none", mlp="relu")))
    assert "mlp(x) = Wdown relu(Wup x)" in plain and "x ← x + mlp(x)" in plain
    for word in ("attn", "rot", "softmax(s", "RMS", "LN", "tanh", "drop", "+ b", "silu", "Wo", "Wq"):
        assert word not in plain, word
    lines = [line.equation for line in equations(preset_model("gpt2"))]
    for line in ("x = E[t] + P[i]", "LN(x) = (x − mean(x)) / √(var(x) + 1e-05) ⊙ g + b", "z = E x", "s = (q·k) / √64"):
        assert line in lines


@pytest.mark.parametrize("name", preset_names())
def test_a_line_of_every_preset_fits_the_terminal(name):
    config = run_from_dict(preset(name), name)
    assert all(len(line.equation) <= 100 for line in equations(config.model, config.train))


@given(configs(), st.data())
@settings(max_examples=200)
def test_every_switch_changes_the_equations(config, data):
    """The same model but for one field says something else, wherever the other is accepted."""
    field = data.draw(st.sampled_from([f.name for f in dataclasses.fields(ModelConfig)]))
    start = {name: value for name, value in dataclasses.asdict(config).items() if value != derived(config).get(name)}
    value = data.draw(st.sampled_from([SECOND[field][0], *OTHERS.get(field, [])]))
    weak = without_idle("model", {n: v for n, v in start.items() if n != field}, {field: value})
    try:
        other = ModelConfig(**weak | {field: value})
    except InputError:
        return
    same_windows = [config.span(i) for i in range(config.n_attention)] == [
        other.span(i) for i in range(other.n_attention)
    ]
    if other == config or (field == "window_pattern" and same_windows):
        return
    assert equations(other) != equations(config), (field, getattr(config, field), value)


OTHERS = {
    "position": ["rope", "learned", "sinusoidal"], "norm": ["rmsnorm", "none"], "tied": [False], "bias": [False],
    "norm_place": ["before", "after", "both", "everywhere"], "rope_scaling": ["none", "linear", "yarn", "llama3"],
    "mlp": ["relu", "relu2", "gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh"], "pattern": ["AF", "A", "F", "FA", "AFAF"],
    "init": ["zero", "gpt2", "xavier"], "n_kv_head": [2], "qk_norm": [True], "norm_weight": [True], "omit_heads": [""],
}  # fmt: skip


CHOICES = {name: get_args(kind) for name, kind in get_type_hints(ModelConfig).items() if get_origin(kind) is Literal}


@pytest.mark.parametrize("field", CHOICES)
def test_every_choice_has_its_own_equations(field):
    needs = {"rope_scaling": {"rope_factor": 2.0}}.get(field, {})
    written = []
    for choice in CHOICES[field]:
        values = SIZES | needs | ({"rope_original_len": 4} if choice in ("yarn", "llama3") else {}) | {field: choice}
        written.append(
            equations(ModelConfig(**{k: v for k, v in values.items() if choice != "none" or k != "rope_factor"}))
        )
    assert all(one != other for i, one in enumerate(written) for other in written[:i])


def derived(config):
    """What the zeros of a config stand for: to be found anew where another field changes."""
    return {"head_dim": config.n_embd // config.n_head, "n_kv_head": config.n_head, "n_ff": 4 * config.n_embd}


@pytest.mark.parametrize(
    "settings_", [{"label_smoothing": 0.1}, {"z_loss": 1e-4}, {"min_context": 3}, {"ahead_weight": 0.5}], ids=str
)
def test_the_objective_is_the_runs(settings_):
    config = ModelConfig(**SIZES, n_ahead=2)
    assert equations(config, TrainConfig(**settings_)) != equations(config, TrainConfig()) == equations(config)


def test_describe_as_json_is_one_object(capsys):
    assert main(["describe", "workshop", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(part["parameters"] for part in found["parts"])
    assert {"what": "head", "equation": "x ← LN(x)", "shapes": ""} in found["equations"]
    assert found["training_bytes"] > found["inference_bytes"] > 4 * found["parameters"]


def test_describe_reads_a_toml_file(tmp_path, capsys):
    (tmp_path / "my.toml").write_text("[model]\nn_layer = 3\n")
    assert main(["describe", str(tmp_path / "my.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["n_layer"] == 3


def test_more_sequences_take_more_memory():
    config = ModelConfig(**SIZES)
    assert training_bytes(config, 8) > training_bytes(config, 4) > training_bytes(config, 0)


def test_presets_lists_them_all(capsys):
    assert main(["presets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["presets"]
    assert [row["name"] for row in rows] == preset_names()
    assert main(["presets"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in preset_names())


def test_a_preset_is_shown_with_the_vocabulary_of_its_tokenizer(capsys):
    for name, rows in {"kobzar": 200_019, "kobzar_better": 1024, "gpt2": 50_257, "demo": 65}.items():
        assert main(["describe", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"]["vocab_size"] == rows

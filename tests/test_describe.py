"""The counts by equation are those of the built model, and the table says what it should."""

import json
from dataclasses import replace

import pytest

from kobza.cli import main
from kobza.config import preset, preset_names, run_from_dict
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
        "training",
        "inference",
        "GPT(",
    ):
        assert word in said, word


def test_describe_as_json_is_one_object(capsys):
    assert main(["describe", "workshop", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(part["parameters"] for part in found["parts"])
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

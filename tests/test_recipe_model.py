"""kobza model: the tree from the files alone, tied weights, activations for a prompt."""

import json

import pytest
import torch
from test_pull import CONFIG, SPECIALS, VERSE, write_release, write_tiny_gguf

from kobza.checkpoint import save_checkpoint
from kobza.cli import main
from kobza.config import InputError, ModelConfig, RunConfig
from kobza.describe import tree
from kobza.model import build, n_parameters
from kobza.recipes import model as recipe
from kobza.tokenizer import ByteTokenizer, LibraryTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return LibraryTokenizer.train([VERSE], 300, SPECIALS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    model = build(CONFIG, seed=1)
    model.blocks[1].mlp.down_proj.weight.data = model.blocks[1].mlp.down_proj.weight.data.bfloat16()
    save_checkpoint(folder, model, RunConfig(CONFIG), tokenizer, {"step": 3})
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr("kobza.hub.cache.platformdirs.user_cache_path", lambda *_, **__: tmp_path / "cache")


def printed(capsys, *words):
    assert main(["model", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_tree_has_every_tensor_once_and_says_what_is_tied(checkpoint, capsys):
    found = json.loads(printed(capsys, checkpoint, "--json"))
    rows = {row["name"]: row for row in found["tensors"]}
    model = build(CONFIG)
    assert set(rows) == {n for n, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    assert found["parameters"] == n_parameters(model) == sum(row["parameters"] for row in rows.values())
    assert rows["lm_head.weight"]["note"] == "= embed.weight" and rows["lm_head.weight"]["parameters"] == 0
    assert rows["rope.cos"]["note"] == "buffer"
    assert rows["blocks.1.mlp.down_proj.weight"]["dtype"] == "bfloat16"
    assert rows["lm_head.weight"]["dtype"] == rows["blocks.0.mlp.down_proj.weight"]["dtype"] == "float32"
    assert all(rows[n]["shape"] == list(p.shape) for n, p in model.named_parameters())


def test_the_tree_reads_no_weights(checkpoint, tmp_path, capsys):
    """All but the header of the weights may be gone."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    data = bytearray((copy / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = b"\xff" * (len(data) - start)
    (copy / "model.safetensors").write_bytes(data)
    assert printed(capsys, copy, "--json").replace(str(copy), "") == printed(capsys, checkpoint, "--json").replace(
        str(checkpoint), ""
    )


def test_blocks_that_are_alike_are_one_line_and_others_are_not(checkpoint, capsys):
    said = printed(capsys, checkpoint)
    assert "blocks.0.mlp.down_proj.weight" in said and "blocks.1.mlp.down_proj.weight" in said
    rows = tree.rows_of(build(CONFIG), {}, "float32")
    folded = tree.folded(rows)
    assert [row.name for row in folded if "q_proj" in row.name] == ["blocks.0-1.attn.q_proj.weight"]
    assert sum(row.parameters for row in folded) == sum(row.parameters for row in rows)


def test_a_layer_is_a_part_of_the_tree(checkpoint, capsys):
    found = json.loads(printed(capsys, checkpoint, "--layer", "blocks.1.attn", "--json"))
    assert {row["name"].rpartition(".")[0] for row in found["tensors"]} == {
        f"blocks.1.attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")
    }


def test_activations_are_what_the_module_puts_out(checkpoint, tokenizer, capsys):
    found = json.loads(printed(capsys, checkpoint, "--layer", "blocks.1.attn", "--prompt", "the cat", "--json"))
    ids = tokenizer.encode("the cat").tolist()
    assert found["ids"] == ids
    model = recipe.opened(checkpoint)[0]
    seen = []
    model.blocks[1].attn.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    (one,), x = found["activations"], seen[0]
    assert one["shape"] == list(x.shape) and one["values"] == x[0, -1, :4].tolist()
    figures = (x.mean(), x.std(correction=0), x.square().mean().sqrt(), x.abs().max())
    assert [one[key] for key in ("mean", "std", "rms", "max")] == pytest.approx([f.item() for f in figures], rel=1e-6)
    assert "blocks.1.attn" in printed(capsys, checkpoint, "--layer", "blocks.1.attn", "--prompt", "the cat")


def test_hidden_is_a_line_a_block(checkpoint, capsys):
    found = json.loads(printed(capsys, checkpoint, "--hidden", "--prompt", "the cat", "--json"))
    assert [one["name"] for one in found["activations"]] == ["embed", "blocks.0", "blocks.1"]
    assert all(one["rms"] > 0 for one in found["activations"])


def test_models_of_others_need_no_pull(tmp_path, tokenizer, capsys):
    write_release(tmp_path, tokenizer, torch.bfloat16)
    write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer)
    for path, dtype in ((tmp_path, "bfloat16"), (tmp_path / "tiny.gguf", "float32")):
        found = json.loads(printed(capsys, path, "--json"))
        rows = {row["name"]: row for row in found["tensors"]}
        assert rows["embed.weight"]["shape"] == [300, 32] and rows["lm_head.weight"]["note"] == "= embed.weight"
        assert {row["dtype"] for row in rows.values() if row["parameters"]} == {dtype}
        assert "blocks.1" in printed(capsys, path, "--hidden", "--prompt", "the cat")


@pytest.mark.parametrize(
    "words, says",
    [
        (["--layer", "blocks.1.atn"], "did you mean blocks.1.attn?"),
        (["--layer", "blocks.7", "--prompt", "a"], "the model has no module 'blocks.7'"),
        (["--hidden"], "--hidden needs a --prompt"),
        (["--prompt", "a"], "--prompt has no effect"),
        (["--hidden", "--layer", "embed", "--prompt", "a"], "leave --layer out"),
        (["--hidden", "--prompt", "the cat " * 200], "the context is 96"),
        (["--hidden", "--prompt", ""], "the prompt is empty"),
        (["--layer", "rope", "--prompt", "a"], "put out no tensor"),
    ],
)
def test_bad_requests_are_one_line(checkpoint, words, says, capsys):
    assert main(["model", str(checkpoint), *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_name_that_is_nowhere_is_one_line(capsys):
    assert main(["model", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_norm_that_is_absent_has_no_activation():
    model = build(ModelConfig(vocab_size=256, n_layer=1, n_head=2, n_embd=16, norm="none", qk_norm=False))
    with pytest.raises(InputError):
        tree.activations(model, [1, 2], "norm")
    assert ByteTokenizer().encode_prompt("a") == [97]

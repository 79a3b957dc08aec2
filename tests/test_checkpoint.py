"""A checkpoint holds everything, is whole or absent, and damage is named before it is used."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kobza import checkpoint
from kobza.checkpoint import (
    fill_model,
    fill_optimizers,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_tensors,
    model_tensors,
    optimizer_tensors,
    prune,
    read_best,
    save_checkpoint,
    verify,
    write_file,
    write_folder,
)
from kobza.config import InputError, ModelConfig, RunConfig, TrainConfig
from kobza.model import build
from kobza.optim import make_optimizers
from kobza.tokenizer import CharTokenizer
from kobza.train import next_token_loss, train_step

TEXT = "abcdefgh"
MODEL = ModelConfig(vocab_size=8, max_seq_len=8, n_layer=1, n_head=2, n_embd=16, init="gpt2")


def save(folder, model=MODEL, training=None):
    built = build(model, 1)
    save_checkpoint(folder, built, RunConfig(model), CharTokenizer.train([TEXT]), {"step": 3}, training)
    return built


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "checkpoints" / "00000003")
    return tmp_path / "checkpoints" / "00000003"


# ---- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_gives_the_same_logits(tied, tmp_path):
    config = ModelConfig(vocab_size=8, max_seq_len=8, n_layer=1, n_head=2, n_embd=16, init="gpt2", tied=tied)
    model = save(tmp_path / "c", config)
    loaded = load_checkpoint(tmp_path / "c")
    ids = torch.arange(8)[None]
    assert torch.equal(loaded.model(ids), model.eval()(ids))
    assert loaded.run.model == config and loaded.provenance == {"step": 3}
    assert loaded.tokenizer.encode("hga").tolist() == [7, 6, 0]
    assert ("lm_head.weight" in load_file(tmp_path / "c" / "model.safetensors")) is not tied


def test_the_state_of_every_optimizer_comes_back():
    model = build(MODEL)
    window = [(torch.arange(8)[None], torch.arange(8)[None])]
    optimizers = make_optimizers(model, TrainConfig())
    train_step(model, optimizers, window, next_token_loss())
    other = make_optimizers(model, TrainConfig())
    fill_optimizers(other, optimizer_tensors(optimizers))
    ours, theirs = optimizer_tensors(optimizers), optimizer_tensors(other)
    assert len(ours) > 5 and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_differences_are_named_both_ways():
    tensors = model_tensors(build(MODEL))
    tensors["extra"] = tensors.pop("embed.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:3]
    with pytest.raises(InputError, match=r"missing embed.weight; unexpected extra; lm_head.weight is \(3, 16\) where"):
        fill_model(build(MODEL), tensors, "here")


# ---- damage --------------------------------------------------------------------------------------------------------


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "damage, says",
    [(flip_a_byte, "sha256"), (truncate, "truncated"), (os.remove, "a file of the checkpoint is missing")],
)
def test_damage_to_any_file_is_named(damage, says, name, folder):
    damage(folder / name)
    with pytest.raises(InputError, match=says) as error:
        load_checkpoint(folder)
    assert str(folder / name) in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model.safetensors": 3}', "\0"])
def test_a_damaged_manifest_is_named(content, folder):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="manifest.json is missing or damaged"):
        load_checkpoint(folder)


def test_a_manifest_may_not_name_files_elsewhere(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["../../secret"] = {"bytes": 0, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="secret"):
        verify(folder)


def test_a_newer_format_is_refused_with_the_remedy(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    newer = folder.with_name("00000004")
    save(newer)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(InputError, match="format 2 and this kobza reads format 1; install a newer kobza"):
        load_checkpoint(newer)


def test_what_is_no_safetensors_file_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(InputError, match=r"x.safetensors: cannot be read as safetensors"):
        load_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", ["", "[]", '"x"', "{}", '{"step": "a", "val_loss": 1}', '{"step": null}'])
def test_a_damaged_best_json_is_named(content, folder):
    run = folder.parent.parent
    (run / "best.json").write_text(content)
    with pytest.raises(InputError, match="best.json.*delete it to use the last checkpoint"):
        load_checkpoint(run)


# ---- whole or absent -----------------------------------------------------------------------------------------------


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_rust(*_args, **_kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "where, fails",
    [("save_file", full_disk_in_rust), ("sync", full_disk), ("_digest", full_disk), ("os.rename", full_disk)],
)
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_half_written(where, fails, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(f"kobza.checkpoint.{where}", fails)
        with pytest.raises(InputError, match="the disk is full .*earlier checkpoints are whole.*--resume"):
            save(folder.with_name("00000004"))
    assert [path.name for path in folder.parent.iterdir()] == ["00000003"]
    verify(folder)


def test_an_interrupt_leaves_nothing_half_written(tmp_path):
    def fill(aside):
        (aside / "a").write_text("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "c", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_file(tmp_path / "f", "old")
    monkeypatch.setattr("kobza.checkpoint.sync", full_disk)
    with pytest.raises(InputError, match="the disk is full"):
        write_file(tmp_path / "f", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


# ---- a run's checkpoints -------------------------------------------------------------------------------------------


def test_a_run_means_its_best_else_its_last_and_a_folder_itself(folder):
    run = folder.parent.parent
    save(folder.with_name("00000005"))
    assert find_checkpoint(run).name == "00000005"
    write_file(run / "best.json", '{"step": 3, "val_loss": 1.0}')
    assert find_checkpoint(run) == folder == find_checkpoint(folder)
    shutil.rmtree(folder)
    assert find_checkpoint(run).name == "00000005"  # the best is gone: better the last than none


def test_prune_keeps_the_last_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        (tmp_path / "checkpoints" / f"{step:08d}").mkdir(parents=True)
    write_file(tmp_path / "best.json", '{"step": 2, "val_loss": 1.0}')
    prune(tmp_path, 2)
    assert list_checkpoints(tmp_path) == [2, 4, 5]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    assert read_best(tmp_path) == {"step": 2, "val_loss": 1.0}

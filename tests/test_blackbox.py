"""A step that meets an inf or nan is not made, the last good checkpoint stays, and the replay names the culprit."""

import json
import math

import pytest
import torch
from test_run import HARD, SMALL, at_step, no_pictures, records  # noqa: F401 (no_pictures acts on every test here)

from kobza.checkpoint import list_checkpoints, load_checkpoint
from kobza.cli import main
from kobza.recipes import train as recipe


@pytest.fixture
def caught(monkeypatch):
    """The model that the recipe builds next, as caught["model"]."""
    box, build = {}, recipe.build

    def note(*args):
        box["model"] = build(*args)
        return box["model"]

    monkeypatch.setattr(recipe, "build", note)
    return box


def poison(model, name="blocks.0.attn.k_proj.weight"):
    with torch.no_grad():
        model.get_parameter(name)[1, 2] = math.inf


def fail(text, out, capsys, *more):
    """Train into the failure -> the one line that is said."""
    assert main(["train", text, "--out", str(out), *SMALL, *more]) == 1
    said = capsys.readouterr().err
    assert said.startswith("kobza: ") and said.count("\n") == 1 and "Traceback" not in said
    return said


def replayed(path, capsys, code=0):
    assert main(["replay", str(path), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_poisoned_weight_is_named_and_the_last_good_checkpoint_stays(text, tmp_path, caught, monkeypatch, capsys):
    out = tmp_path / "run"
    at_step(monkeypatch, 25, lambda: poison(caught["model"]))
    said = fail(text, out, capsys, *HARD)
    assert "loss is nan at step 26" in said
    assert f"the last good checkpoint is {out / 'checkpoints' / '00000020'}" in said
    assert f"kobza replay {out / 'blackbox' / '00000026'}" in said
    assert list_checkpoints(out)[-1] == 20
    assert all(p.isfinite().all() for p in load_checkpoint(out / "checkpoints" / "00000020").model.parameters())
    assert [r["step"] for r in records(out)] == list(range(1, 26))
    for path in (out, out / "blackbox" / "00000026"):
        found = replayed(path, capsys)
        assert found["told"]["step"] == 26
        assert found["finding"]["kind"] == "weight" and found["finding"]["name"] == "blocks.0.attn.k_proj.weight"
        assert "the first at [1, 2]" in found["finding"]["text"]
    assert main(["replay", str(out)]) == 0
    assert "first bad weight blocks.0.attn.k_proj.weight: shape (16, 16), 1 of 256 values" in capsys.readouterr().out


def test_a_weight_that_an_update_spoils_is_not_saved_in_the_checkpoint_of_that_step(
    text, tmp_path, caught, monkeypatch, capsys
):
    at_step(monkeypatch, 20, lambda: poison(caught["model"]))
    said = fail(text, tmp_path / "run", capsys)
    assert "weight blocks.0.attn.k_proj.weight is inf at step 20" in said
    assert list_checkpoints(tmp_path / "run") == [10]
    assert replayed(tmp_path / "run", capsys)["finding"]["name"] == "blocks.0.attn.k_proj.weight"


def test_the_last_step_may_not_leave_a_spoiled_model(text, tmp_path, caught, monkeypatch, capsys):
    at_step(monkeypatch, 40, lambda: poison(caught["model"]))
    assert "at step 40" in fail(text, tmp_path / "run", capsys)
    assert list_checkpoints(tmp_path / "run")[-1] == 30


def test_an_output_that_overflows_is_named(text, tmp_path, caught, monkeypatch, capsys):
    def enlarge():
        with torch.no_grad():  # finite, but its square is not
            caught["model"].get_parameter("blocks.0.mlp.up_proj.weight").fill_(1e25)

    at_step(monkeypatch, 15, enlarge)
    fail(text, tmp_path / "run", capsys)
    found = replayed(tmp_path / "run", capsys)["finding"]
    assert found["kind"] == "output" and found["name"] == "blocks.0.mlp.act"


def test_a_bad_gradient_is_named(text, tmp_path, monkeypatch, capsys):
    """A gradient can be bad where every output is finite: let a norm's backward divide by 0, in the run and the replay."""
    from kobza.train import next_token_loss

    def loss_fn_of(_config, _n_ahead, dtype):
        plain = next_token_loss(dtype)

        def loss_fn(model, batch):
            loss, n = plain(model, batch)
            zero = (model.embed.weight[0] * 0).sum()
            return loss + (zero.sqrt() if loss_fn.spoils() else zero), n  # the derivative of sqrt at 0 is inf

        loss_fn.spoils = lambda: torch.is_grad_enabled() and at.get("now")
        return loss_fn

    at = {}
    monkeypatch.setattr(recipe, "make_loss", loss_fn_of)
    monkeypatch.setattr("kobza.doctor.training.blackbox.make_loss", loss_fn_of)
    at_step(monkeypatch, 12, lambda: at.update(now=True))
    assert "gradient norm is nan at step 13" in fail(text, tmp_path / "run", capsys)
    found = replayed(tmp_path / "run", capsys)["finding"]
    assert found["kind"] == "gradient" and found["name"] == "embed.weight"


def test_a_failure_that_does_not_happen_again_says_so_and_exits_1(text, tmp_path, monkeypatch, capsys):
    from kobza.train import next_token_loss

    def flaky(_config, _n_ahead, dtype):
        plain = next_token_loss(dtype)

        def loss_fn(model, batch):
            loss, n = plain(model, batch)
            return loss * (math.nan if at.get("now") else 1), n

        return loss_fn

    at = {}
    monkeypatch.setattr(recipe, "make_loss", flaky)
    at_step(monkeypatch, 12, lambda: at.update(now=True))
    fail(text, tmp_path / "run", capsys)
    found = replayed(tmp_path / "run", capsys, code=1)["finding"]
    assert found["kind"] == "none" and not found["reproduced"]


def test_the_run_goes_on_from_the_last_good_checkpoint(text, tmp_path, caught, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 25, lambda: poison(caught["model"]))
        fail(text, tmp_path / "run", capsys)
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--device=cpu"]) == 0
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, 41))


def test_a_bundle_with_a_flipped_byte_is_refused(text, tmp_path, caught, monkeypatch, capsys):
    at_step(monkeypatch, 15, lambda: poison(caught["model"]))
    fail(text, tmp_path / "run", capsys)
    path = tmp_path / "run" / "blackbox" / "00000016" / "step.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert main(["replay", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "step.safetensors" in said and "damaged" in said and said.count("\n") == 1


def test_a_disk_too_full_for_the_bundle_still_says_what_failed(text, tmp_path, caught, monkeypatch, capsys):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    def spoil():
        poison(caught["model"])
        monkeypatch.setattr("kobza.doctor.training.blackbox.save_file", full)

    at_step(monkeypatch, 15, spoil)
    said = fail(text, tmp_path / "run", capsys)
    assert "loss is nan at step 16" in said and "the disk is full" in said

"""A run is stopped in every way and goes on as if nothing had been: the same weights, every step once."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest

from kobza.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint, read_best
from kobza.cli import main
from kobza.kernels import fused as kernels
from kobza.recipes import train as recipe

SMALL = (  # whatever the default preset says
    "--model.n_layer=1 --model.n_head=2 --model.n_embd=16 --model.max_seq_len=16 --train.micro_batch=4 --train.steps=40 "
    "--train.eval_interval=10 --train.eval_tokens=300 --train.warmup_steps=2 --train.precision=fp32 --device=cpu "
    "--model.norm=rmsnorm --model.qk_norm=true --model.mlp=relu2 --train.keep=2"
).split()
HARD = ["--model.dropout=0.1", "--train.accumulate=2", "--train.optimizer=muon"]  # all that a checkpoint must hold

# Runs the command in a process that kills itself with -9 right after the update of step KILL_AT.
KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from kobza.recipes import train
plain = train.make_record
def make_record(step, *rest):
    if step.step == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(step, *rest)
train.make_record = make_record
from kobza.cli import main
sys.exit(main(sys.argv[1:]))
"""


def verse(n_bytes: int = 20_000, seed: int = 0) -> str:
    """Words in lines and speeches, the same for a seed."""
    rng = random.Random(seed)
    words = "".join(rng.choice("bcdfglmnprst") + rng.choice("aeiou") for _ in range(200))
    lines = []
    while sum(map(len, lines)) < n_bytes:
        parts = [words[i : i + rng.choice((2, 4, 6))] for i in rng.sample(range(0, 390, 2), rng.randint(3, 7))]
        lines.append(" ".join(parts).capitalize() + rng.choice((",\n", ".\n", ":\n\n")))
    return "".join(lines)


def sha256(run, step):
    return hashlib.sha256((checkpoint_path(run, step) / "model.safetensors").read_bytes()).hexdigest()


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [(r["step"], r["train_loss"], r["grad_norm"], r["lr"], r["tokens"], r.get("val_loss")) for r in records(run)]


def kill_at(step, argv):
    """Run kobza in a process of its own until it kills itself at a step."""
    environment = os.environ | {"KILL_AT": str(step), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", KILLED, *argv], env=environment, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


def at_step(monkeypatch, step, act):
    """Call act() after the update of a step."""
    plain = recipe.make_record

    def make_record(made, *rest):
        if made.step == step:
            act()
        return plain(made, *rest)

    monkeypatch.setattr(recipe, "make_record", make_record)


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """A run of 40 steps without a stop."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert main(["train", text, "--out", str(out), *SMALL, *HARD]) == 0
    return out


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    """Pictures cost a second; test_story.py draws them."""
    monkeypatch.setattr(recipe, "draw", lambda run, *_: (run.out / "loss.png", run.out / "report.html"))


def resume(out, *more):
    return main(["train", "--resume", "--out", str(out), "--device=cpu", *more])


# ---- bit for bit ---------------------------------------------------------------------------------------------------


def test_kill_9_before_the_first_checkpoint_at_one_and_between_two_changes_nothing(text, straight, tmp_path):
    out = tmp_path / "run"
    kill_at(5, ["train", text, "--out", str(out), *SMALL, *HARD])
    assert list_checkpoints(out) == []
    kill_at(21, ["train", "--resume", "--out", str(out)])
    assert list_checkpoints(out)[-1] == 20
    kill_at(36, ["train", "--resume", "--out", str(out)])
    assert resume(out) == 0
    assert sha256(out, 40) == sha256(straight, 40)
    assert losses(out) == losses(straight)
    assert [r["step"] for r in records(out)] == list(range(1, 41))
    assert read_best(out) == read_best(straight)


FUSED = {"--model.norm=rmsnorm": "--model.norm=layernorm", "--model.qk_norm=true": "--model.qk_norm=false"}


@pytest.mark.parametrize("fused", [False, True])
def test_kill_9_changes_nothing_in_bf16(fused, text, tmp_path):
    """With dropout through the plain blocks, without it through the fused ones of kernels/fused.py."""
    bf16 = [word.replace("fp32", "bf16") for word in SMALL] + ([] if fused else HARD)
    bf16 = [FUSED.get(word, word) if fused else word for word in bf16]
    for name in ("straight", "killed"):
        argv = ["train", text, "--out", str(tmp_path / name), *bf16]
        if name == "straight":
            assert main(argv) == 0
        else:
            kill_at(27, argv)
            assert resume(tmp_path / name) == 0
    assert kernels.supports(load_checkpoint(tmp_path / "killed").run.model) is fused
    assert sha256(tmp_path / "killed", 40) == sha256(tmp_path / "straight", 40)
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_go_on_and_changes_nothing(number, text, straight, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 13, lambda: os.kill(os.getpid(), number))
        assert main(["train", text, "--out", str(out), *SMALL, *HARD]) == 130
    said = capsys.readouterr()
    assert f"interrupted at step 13; saved. Go on: kobza train --resume --out {out}" in said.out.replace("\n", " ")
    assert "Traceback" not in said.err
    assert list_checkpoints(out)[-1] == 13
    assert signal.getsignal(number) is before
    assert resume(out) == 0
    assert sha256(out, 40) == sha256(straight, 40)
    assert losses(out) == losses(straight)


def test_a_second_ctrl_c_stops_at_once(text, tmp_path, monkeypatch, capsys):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 13, twice)
    assert main(["train", text, "--out", str(tmp_path / "run"), *SMALL]) == 130
    assert capsys.readouterr().err == "kobza: interrupted\n"
    assert list_checkpoints(tmp_path / "run") == [10]


def test_a_finished_run_goes_on_with_more_steps_as_if_they_had_been_asked_for_at_first(text, tmp_path):
    for name, steps in (("short", 20), ("long", 40)):
        argv = ["train", text, "--out", str(tmp_path / name), *SMALL, "--train.schedule=constant"]
        argv[argv.index("--train.steps=40")] = f"--train.steps={steps}"
        assert main(argv) == 0
    assert resume(tmp_path / "short", "--train.steps=40") == 0
    assert sha256(tmp_path / "short", 40) == sha256(tmp_path / "long", 40)
    assert losses(tmp_path / "short") == losses(tmp_path / "long")


def test_a_finished_run_resumed_is_still_finished(straight, tmp_path, capsys):
    out = shutil.copytree(straight, tmp_path / "run")
    assert resume(out) == 0
    assert sha256(out, 40) == sha256(straight, 40)
    assert "done" in capsys.readouterr().out
    assert len(records(out)) == 40


# ---- what a kill may leave behind ----------------------------------------------------------------------------------


def test_a_half_written_checkpoint_is_ignored_and_swept(straight, tmp_path):
    out = shutil.copytree(straight, tmp_path / "run")
    part = out / "checkpoints" / ".00000050.part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"half")
    assert list_checkpoints(out)[-1] == 40
    assert load_checkpoint(out).provenance["step"] in (10, 20, 30, 40)
    assert resume(out) == 0
    assert not part.exists()


def test_a_kill_between_a_checkpoint_and_best_json_loses_nothing(straight, tmp_path):
    out = shutil.copytree(straight, tmp_path / "run")
    (out / "best.json").unlink()
    assert resume(out) == 0
    assert read_best(out) == read_best(straight)


def test_a_metrics_line_cut_short_is_written_again(straight, tmp_path):
    out = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(checkpoint_path(out, 40))
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:34]) + lines[34][:20])
    assert resume(out) == 0
    assert losses(out) == losses(straight)
    assert sha256(out, 40) == sha256(straight, 40)


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_serves(straight, tmp_path, capsys):
    out = shutil.copytree(straight, tmp_path / "run")
    last = checkpoint_path(out, 40)
    (last / "training.safetensors").write_bytes((last / "training.safetensors").read_bytes()[:-5])
    assert resume(out) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "truncated" in said and f"delete {last} to go on from the one before" in said
    shutil.rmtree(last)
    assert resume(out) == 0
    assert sha256(out, 40) == sha256(straight, 40)


# ---- what may change and what may not ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, named",
    [
        ("--train.lr=0.5", "train.lr is 0.5 but the run has"),
        ("--model.n_layer=2", "model.n_layer is 2 but the run has 1"),
        ("--data.val_fraction=0.2", "data.val_fraction is 0.2 but the run has 0.1"),
        ("--seed=9", "--seed 9 but the run has 0"),
        ("--train.steps=7", "train.steps is 7 but the run stands at step 40"),
        ("--preset=tiny", "--preset tiny has no effect with --resume"),
    ],
)
def test_resume_refuses_a_changed_setting_by_name(change, named, straight, capsys):
    before = (straight / "config.toml").read_bytes()
    assert resume(straight, change) == 2
    said = capsys.readouterr().err
    assert said.startswith("kobza: ") and said.count("\n") == 1 and named in said
    assert (straight / "config.toml").read_bytes() == before


def test_resume_refuses_a_changed_setting_of_a_config_file(straight, tmp_path, capsys):
    (tmp_path / "more.toml").write_text("[train]\nlr = 0.5\n")
    assert resume(straight, "--config", str(tmp_path / "more.toml")) == 2
    assert "train.lr is 0.5 but the run has" in capsys.readouterr().err


# ---- what is kept, and when a run ends early -----------------------------------------------------------------------


def with_losses(monkeypatch, values):
    """Let the evaluations find these validation losses."""
    found = iter(values)
    monkeypatch.setattr(recipe, "evaluate", lambda *_: next(found))


def test_the_best_checkpoint_outlives_retention(text, tmp_path, monkeypatch):
    with_losses(monkeypatch, [3.0, 2.0, 2.5, 2.6])
    assert main(["train", text, "--out", str(tmp_path / "run"), *SMALL[:-1], "--train.keep=1"]) == 0
    assert list_checkpoints(tmp_path / "run") == [20, 40]
    assert read_best(tmp_path / "run") == {"step": 20, "val_loss": 2.0}
    assert load_checkpoint(tmp_path / "run").folder == checkpoint_path(tmp_path / "run", 20)


def test_patience_stops_early_and_says_so(text, tmp_path, monkeypatch, capsys):
    with_losses(monkeypatch, [2.0, 2.5, 2.6])
    assert main(["train", text, "--out", str(tmp_path / "run"), *SMALL, "--train.patience=2"]) == 0
    assert "no better for train.patience evaluations" in capsys.readouterr().out
    assert list_checkpoints(tmp_path / "run")[-1] == 30


@pytest.mark.parametrize("option", ["--stop-at", "--train.stop_at"])
def test_stop_at_stops_at_the_first_evaluation_that_is_low_enough(option, text, tmp_path, monkeypatch, capsys):
    with_losses(monkeypatch, [3.0, 2.0])
    assert main(["train", text, "--out", str(tmp_path / "run"), *SMALL, option, "2.5", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["outcome"] == "stop_at" and summary["step"] == 20


def test_a_validation_loss_of_nan_is_no_best_and_null_in_the_record(text, tmp_path, monkeypatch):
    with_losses(monkeypatch, [float("nan"), 2.0, float("nan"), 2.5])
    assert main(["train", text, "--out", str(tmp_path / "run"), *SMALL]) == 0
    assert read_best(tmp_path / "run") == {"step": 20, "val_loss": 2.0}
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert records(tmp_path / "run")[9]["val_loss"] is None


def test_checkpoints_may_come_between_evaluations(text, tmp_path):
    argv = ["train", text, "--out", str(tmp_path / "run"), *SMALL, "--train.checkpoint_interval=7"]
    argv[argv.index("--train.keep=2")] = "--train.keep=9"
    assert main(argv) == 0
    assert {7, 14, 21, 28, 35, 40} <= set(list_checkpoints(tmp_path / "run"))

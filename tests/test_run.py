"""A run is stopped in every way and goes on as if nothing had been: the same weights, every step once."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kobza.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint, read_best
from kobza.cli import main
from kobza.kernels import fused as kernels
from kobza.recipes import train as recipe

SMALL = (  # whatever the default preset says
    "--model.n_layer=1 --model.n_head=2 --model.n_embd=16 --model.max_seq_len=16 --train.micro_batch=4 --train.steps=40 "
    "--train.eval_interval=10 --train.eval_tokens=300 --train.warmup_steps=2 --train.precision=fp32 --device=cpu "
    "--model.norm=rmsnorm --model.qk_norm=true --model.mlp=relu2 --train.keep=2"
).split()
SHORT = ["--train.steps=12", "--train.eval_interval=4"]
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


def but(argv, *changes):
    """Options with some of them changed. but(["--a=1", "--b=2"], "--a=3") -> ["--b=2", "--a=3"]"""
    changed = {word.split("=")[0] for word in changes}
    return [word for word in argv if word.split("=")[0] not in changed] + list(changes)


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


EVERY = ["--train.freeze=lm_head", "--train.layer_lr_decay=0.5", "--model.n_layer=2", "--model.n_ahead=2"]
EVERY += ["--train.label_smoothing=0.1", "--train.z_loss=0.001", "--train.min_context=3", "--model.dropout=0.1"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "lion", "sgd"])
def test_a_crash_changes_nothing_under_any_optimizer_and_objective(optimizer, text, tmp_path, monkeypatch):
    """Stopped at once, with nothing saved since step 8, as by a kill, but in this process."""
    argv = but(SMALL, *SHORT, *EVERY, f"--train.optimizer={optimizer}")
    assert main(["train", text, "--out", str(tmp_path / "straight"), *argv]) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 10, raise_interrupt)
        assert main(["train", text, "--out", str(tmp_path / "stopped"), *argv]) == 130
    assert list_checkpoints(tmp_path / "stopped")[-1] == 8
    assert resume(tmp_path / "stopped") == 0
    assert sha256(tmp_path / "stopped", 12) == sha256(tmp_path / "straight", 12)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


def raise_interrupt():
    raise KeyboardInterrupt


def test_a_run_of_an_older_kobza_goes_on(text, straight, tmp_path):
    """Format 1: train.muon_momentum for train.momentum, and none of the settings since."""
    out = shutil.copytree(straight, tmp_path / "run")
    for step in (30, 40):
        shutil.rmtree(checkpoint_path(out, step), ignore_errors=True)
    since = (
        "head_lr",
        "layer_lr_decay",
        "label_smoothing",
        "z_loss",
        "min_context",
        "ahead_weight",
        "freeze",
        "embeddings",
    )
    lines = (out / "config.toml").read_text().replace("\nmomentum =", "\nmuon_momentum =").splitlines()
    old = [line for line in lines if line.split(" =")[0] not in (*since, "fp32_parts", "embed_weight_decay")]
    assert len(old) == len(lines) - 10 and any(line.startswith("muon_momentum") for line in old)
    (out / "config.toml").write_text("\n".join(old))
    assert resume(out) == 0
    assert sha256(out, 40) == sha256(straight, 40)
    assert "\nmomentum =" in (out / "config.toml").read_text()


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


# ---- given embeddings, frozen parts, parts in float32 ----------------------------------------------------------------

WIDTH = 16
GIVEN = but(SMALL, "--train.steps=4", "--train.eval_interval=2", "--train.embed_lr=0.5")


def table_file(path, table):
    """A table as .npy or .safetensors, by the path's ending; beside it in the latter a vector."""
    if path.suffix == ".npy":
        np.save(path, table)
    else:
        save_file({"wte": torch.from_numpy(table), "bias": torch.zeros(3)}, path)
    return str(path)


def drawn_table(rows, columns=WIDTH):
    return np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)


def n_tokens(straight):
    return load_checkpoint(straight).tokenizer.vocab_size


@pytest.mark.parametrize("name, frozen, pad", [("table.npy", True, 64), ("table.safetensors", False, 0)])
def test_given_embeddings_are_taken_and_frozen_ones_stay_to_the_bit(name, frozen, pad, text, straight, tmp_path):
    table = drawn_table(n_tokens(straight))
    argv = [text, "--out", str(tmp_path / "run"), *GIVEN, f"--model.pad_vocab={pad}"]
    argv += ["--train.embeddings", table_file(tmp_path / name, table), *["--train.freeze=embed"] * frozen]
    assert main(["train", *argv]) == 0
    found = load_checkpoint(tmp_path / "run").model.embed.weight.detach().numpy()
    assert len(found) == (pad or len(table))
    assert np.array_equal(found[: len(table)], table) is frozen
    assert abs(found[: len(table)] - table).max() < 4  # the steps moved it a little: it began there


def test_a_checkpoint_needs_the_file_of_its_embeddings_no_more(text, straight, tmp_path):
    file = table_file(tmp_path / "table.npy", drawn_table(n_tokens(straight)))
    out = tmp_path / "run"
    assert main(["train", text, "--out", str(out), *GIVEN, "--train.embeddings", file]) == 0
    (tmp_path / "table.npy").unlink()
    assert resume(out, "--train.steps=6") == 0
    assert main(["train", text, "--out", str(tmp_path / "other"), *GIVEN, "--train.embeddings", file]) == 2


def damaged(folder, rows):
    """(what train.embeddings says, the words of the refusal) of every way to be wrong."""
    good, bad = drawn_table(rows), drawn_table(rows)
    bad[3, 5] = np.nan
    (folder / "text.npy").write_text("no array")
    (folder / "text.safetensors").write_text("no tensors")
    (folder / "table.bin").write_bytes(b"")
    two = {"a": torch.from_numpy(good), "b": torch.from_numpy(bad)}
    save_file(two, folder / "two.safetensors")
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    return {
        table_file(
            folder / "rows.npy", drawn_table(rows + 1)
        ): f"({rows + 1}, 16) where (vocab_size, n_embd) are ({rows}, 16)",
        table_file(folder / "wide.safetensors", drawn_table(rows, 17)): f"({rows}, 17) where (vocab_size, n_embd)",
        table_file(folder / "flat.npy", good.ravel()): f"({rows * WIDTH},) where (vocab_size, n_embd)",
        table_file(folder / "whole.npy", good.astype(np.int32)): "numbers of type torch.int32; give floats",
        table_file(folder / "nan.npy", bad): "holds an inf or nan",
        table_file(folder / "key.safetensors", good)
        + ":wtf": "it has no 'wtf'; did you mean wte?; name one as FILE:KEY",
        str(folder / "two.safetensors"): "it has no 'embed.weight'; known: a, b; name one as FILE:KEY",
        str(folder / "none.npy"): "none.npy: no such file",
        str(folder / "table.bin"): "give a .npy or .safetensors file",
        str(folder / "text.npy"): "cannot be read as an array of numbers",
        str(folder / "objects.npy"): "cannot be read as an array of numbers",
        str(folder / "text.safetensors"): "cannot be read as safetensors",
    }


def test_embeddings_that_do_not_fit_are_refused_and_leave_no_run(text, straight, tmp_path, capsys):
    for given, words in damaged(tmp_path, n_tokens(straight)).items():
        capsys.readouterr()
        assert main(["train", text, "--out", str(tmp_path / "run"), *SMALL, "--train.embeddings", given]) == 2, given
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
        assert not (tmp_path / "run" / "config.toml").exists()
    good = table_file(tmp_path / "good.npy", drawn_table(n_tokens(straight)))  # the folder is free for the mended call
    assert main(["train", text, "--out", str(tmp_path / "run"), *GIVEN, "--train.embeddings", good]) == 0


@pytest.mark.parametrize(
    "setting, words",
    [
        ("--train.freeze=emb", "train.freeze: the model has no module 'emb'; did you mean embed?"),
        ("--train.freeze=drop", "train.freeze: drop has no weights"),
        ("--train.freeze=embed,blocks,lm_head", "freezes every weight"),
        ("--train.fp32_parts=head", "train.fp32_parts: the model has no module 'head'"),
        ("--train.fp32_parts=embed", "train.fp32_parts: embed is a table"),
        ("--train.head_lr=0.1 --model.tied", "train.head_lr has no effect with model.tied"),
    ],
)
def test_parts_that_are_not_there_are_refused_before_the_text_is_read(setting, words, text, tmp_path, capsys):
    argv = but(SMALL, "--train.precision=bf16", *setting.split())
    assert main(["train", text, "--out", str(tmp_path / "run"), *argv]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_parts_in_float32_where_all_is_float32_are_refused(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kobza.device.cpu_multiplies_bf16", lambda: False)  # auto takes float32
    argv = but(SMALL, "--train.precision=auto", "--train.fp32_parts=lm_head")
    assert main(["train", text, "--out", str(tmp_path / "run"), *argv]) == 2
    assert (
        "train.fp32_parts has no effect: precision here is fp32; leave it out or take bf16" in capsys.readouterr().err
    )


@pytest.mark.parametrize("parts, fused", [("", True), ("lm_head", True), ("blocks.*.mlp", False), ("blocks", False)])
def test_parts_inside_fused_blocks_turn_them_off_and_the_run_says_why(
    parts, fused, text, tmp_path, monkeypatch, capsys
):
    bf16 = but(SMALL, *SHORT, *FUSED.values(), "--train.precision=bf16", f"--train.fp32_parts={parts}")
    assert main(["train", text, "--out", str(tmp_path / "run"), *bf16]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ("fused blocks" in said) is fused
    assert ("plain blocks since train.fp32_parts names some" in said) is (not fused)
    plain = load_checkpoint(tmp_path / "run")  # names are those of any checkpoint
    with monkeypatch.context() as patch:
        at_step(patch, 10, raise_interrupt)
        assert main(["train", text, "--out", str(tmp_path / "stopped"), *bf16]) == 130
    assert resume(tmp_path / "stopped") == 0
    assert sha256(tmp_path / "stopped", 12) == sha256(tmp_path / "run", 12)
    assert plain.run.train.fp32_parts == parts


def test_evaluations_measure_the_plain_loss_whatever_is_trained_on(text, tmp_path, capsys):
    """A rate of almost 0: the same model is measured, and only the training loss knows the objective."""
    still = but(SMALL, "--train.lr=1e-12", "--train.embed_lr=0", "--train.muon_lr=1e-12", "--train.steps=10")
    for name, more in (("plain", []), ("other", ["--train.label_smoothing=0.5", "--train.z_loss=0.1"])):
        assert main(["train", text, "--out", str(tmp_path / name), *still, *more]) == 0
        assert ("the train loss is of another objective" in capsys.readouterr().out) is (name == "other")
    plain, other = records(tmp_path / "plain")[-1], records(tmp_path / "other")[-1]
    assert other["val_loss"] == plain["val_loss"] and other["train_loss"] > plain["train_loss"] + 0.1

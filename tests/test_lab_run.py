"""The lab with runs of a tiny model: it trains as kobza train does, does nothing twice, survives a kill, reports in words."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from kobza.cli import main
from kobza.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from kobza.lab import page, runner
from kobza.lab.report import read_result
from kobza.lab.runner import run_trials
from kobza.lab.store import Trial, token_set
from kobza.recipes import trial as one
from kobza.recipes.trial import last_bytes, places

SET = {
    "model.n_layer": 1,
    "model.n_embd": 16,
    "model.n_head": 2,
    "model.max_seq_len": 16,
    "train.micro_batch": 4,
    "train.warmup_steps": 2,
    "train.precision": "fp32",
}
HEAD = 'seeds = 2\nbudget = { steps = 6 }\nevaluations = 2\neval_bytes = 200\ntitle = "Which <norm> | at all?"\n'
NORM = '[factors]\n"model.norm" = ["rmsnorm", "layernorm"]\n'


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """drawn() draws the pictures, which take most of a report's time; without that call there are none."""
    real = page.pictures
    monkeypatch.setattr(page, "pictures", lambda content: [])
    return lambda: monkeypatch.setattr(page, "pictures", real)


@pytest.fixture
def lab(tmp_path, text, monkeypatch, capsys):
    """lab(design, *argv) -> (exit code, printed JSON or complaint), in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "n_cores", lambda: 1)  # a thread more costs such models more than it computes

    def call(content, *argv, name="d", changes=None):
        settings = "".join(f'"{key}" = {json.dumps(value)}\n' for key, value in {**SET, **(changes or {})}.items())
        (tmp_path / f"{name}.toml").write_text(
            f"text = [{json.dumps(text)}]\n{content}\n[set]\n{settings}", encoding="utf-8"
        )
        code = main(["lab", "run", f"{name}.toml", "--out", "out", "--json", *(argv or ["--jobs", "1"])])
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if code == 0 else printed.err + printed.out

    return call


def result_files(folder):
    return sorted((folder / "out" / "runs").glob("*/result.json"))


# ---- what a run is -------------------------------------------------------------------------------------------------


def test_a_lab_run_is_the_training_of_kobza_train(lab, tmp_path, text):
    code, content = lab(HEAD + NORM)
    assert code == 0
    argv = [f"--{key}={value}" for key, value in SET.items()]
    argv += ["--preset", "tiny", "--train.steps=6", "--seed", "1", "--out", "run", "--train.eval_interval", "6"]
    assert main(["train", text, *argv]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train_loss"] for record in records]
    result = read_result(tmp_path / "out", content["arms"][0]["runs"]["1"])
    curve = result["curve"]
    assert [point["step"] for point in curve] == [3, 6]
    assert [point["train_loss"] for point in curve] == [
        pytest.approx(np.mean(losses[:3]), abs=2e-6),
        pytest.approx(np.mean(losses[3:]), abs=2e-6),
    ]
    assert curve[-1]["tokens"] == records[-1]["tokens"] and result["steps"] == 6


def test_places_are_even_and_end_with_the_last():
    assert places(10, 3) == {3, 7, 10} and places(2, 6) == {1, 2} and max(places(7, 1)) == 7


def test_every_tokenizer_is_judged_on_the_same_text(tmp_path, text):
    tails = []
    for data in (DataConfig(), DataConfig(tokenizer="bpe", vocab_size=300), DataConfig(tokenizer="byte")):
        config = RunConfig(ModelConfig(max_seq_len=16), data, TrainConfig())
        found = token_set(tmp_path, [text], config)
        corpus, tokenizer = one.load_tokens(found.folder, config)
        tail = last_bytes(corpus.val, tokenizer, 300, "arm")
        pieces = [tokenizer.piece_bytes[i] for i in tail.array()[1:]]
        assert 300 <= sum(pieces) < 300 + max(tokenizer.piece_bytes) + 1
        tails.append(tokenizer.decode(tail.array().tolist())[-250:])
    assert len(set(tails)) == 1


def test_bits_per_byte_are_the_nats_over_the_bytes_of_the_targets(lab, tmp_path):
    _, content = lab(HEAD.replace("200", "300") + 'measure = "val_bpb"\n' + NORM, changes={"data.tokenizer": "byte"})
    point = read_result(tmp_path / "out", content["arms"][0]["runs"]["0"])["curve"][-1]
    assert point["val_bpb"] == pytest.approx(point["val_loss"] / np.log(2)) and content["unit"] == "bits per byte"


def test_an_objective_is_trained_on_and_the_plain_loss_judges(lab, tmp_path):
    _, content = lab(HEAD + '[factors]\n"train.z_loss" = [0.0, 0.3]\n')
    plain, other = (read_result(tmp_path / "out", arm["runs"]["0"])["curve"][0] for arm in content["arms"])
    assert other["train_loss"] > plain["train_loss"] + 1  # 0.3 times the square of log Z, about ln V
    assert 0 < abs(other["val_loss"] - plain["val_loss"]) < 0.3


def test_a_diverged_arm_is_a_result(lab):
    code, content = lab(HEAD + '[factors]\n"train.lr" = [1e-3, 1e30]\n', changes={"train.optimizer": "adamw"})
    assert code == 0 and content["arms"][1]["diverged"] == 2
    assert content["comparisons"][0]["verdict"] == "diverges: 2 of 2 runs diverged"
    assert content["arms"][1]["values"] == {"0": None, "1": None}


# ---- nothing twice -------------------------------------------------------------------------------------------------


def test_what_is_done_is_never_repeated_across_designs(lab, tmp_path, monkeypatch):
    assert lab(HEAD + NORM)[0] == 0
    done = {path: path.stat().st_mtime_ns for path in result_files(tmp_path)}
    assert len(done) == 4
    # another design that shares the baseline adds its own arm's runs only
    assert lab(HEAD + '[factors]\n"model.tied" = [false, true]\n', name="e")[0] == 0
    assert len(result_files(tmp_path)) == 6

    def never(*_):
        raise AssertionError("a run was done again")

    monkeypatch.setattr(one, "trial", never)
    assert lab(HEAD + NORM)[0] == 0 and lab(HEAD + NORM, name="f")[0] == 0
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


def test_more_seeds_run_only_the_new_ones(lab, tmp_path):
    lab(HEAD + NORM)
    _, content = lab(HEAD.replace("seeds = 2", "seeds = [0, 1, 5]") + NORM)
    assert len(result_files(tmp_path)) == 6 and content["comparisons"][0]["n"] == 3


def test_an_interrupted_lab_says_how_to_go_on_and_does(lab, tmp_path, monkeypatch, capsys):
    work, made = one.trial, []

    def breaking(given):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(given)
        return work(given)

    monkeypatch.setattr(one, "trial", breaking)
    code, said = lab(HEAD + NORM)
    assert code == 130 and "Go on: kobza lab run d.toml --out out" in said
    assert {t.seed for t in made} == {0}  # both arms of the first seed: what is there is paired
    assert main(["lab", "report", "out"]) == 0 and "not known" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "d" / "report.json").read_text())
    assert report["runs_done"] == 2 and "unfinished: 2 of 4" in report["warnings"][0]
    assert "not known" in report["comparisons"][0]["verdict"]
    monkeypatch.setattr(one, "trial", work)
    code, content = lab(HEAD + NORM)
    assert code == 0 and content["runs_done"] == 4


@pytest.mark.slow
def test_killed_workers_end_and_the_lab_goes_on_with_equal_numbers(lab, tmp_path, text):
    """kill -9 in the middle of parallel runs; then the rest, one at a time: as if undisturbed, to the bit."""
    design = HEAD.replace("steps = 6", "steps = 60").replace("seeds = 2", "seeds = 6") + NORM
    settings = "".join(f'"{key}" = {json.dumps(value)}\n' for key, value in SET.items())
    (tmp_path / "d.toml").write_text(f"text = [{json.dumps(text)}]\n{design}\n[set]\n{settings}")
    argv = [sys.executable, "-m", "kobza", "lab", "run", "d.toml", "--out", "out", "--jobs", "2"]
    process = subprocess.Popen(argv, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not result_files(tmp_path) and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while group_lives(process.pid) and time.time() < deadline:
        time.sleep(0.1)
    left = group_lives(process.pid)
    if left:
        os.killpg(process.pid, signal.SIGKILL)
    assert not left, "a worker goes on without its lab"
    before = {path: path.read_text() for path in result_files(tmp_path)}
    assert 0 < len(before) < 12
    code, content = lab(design)
    assert code == 0 and content["runs_done"] == 12
    assert all(path.read_text() == was for path, was in before.items())
    path, was = next(iter(before.items()))
    arm, seed = owner(content, path.parent.name)
    (tokens,) = (tmp_path / "out" / "tokens").iterdir()
    given = Trial("", "", seed, {**arm["settings"], "seed": seed}, str(tokens), content["eval_bytes"], 2, "cpu", 1)
    assert losses(one.trial(given)) == losses(json.loads(was))


def group_lives(group):
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def owner(content, name):
    """The arm and seed of a run."""
    return next((arm, int(seed)) for arm in content["arms"] for seed, run in arm["runs"].items() if run == name)


def losses(result):
    """The numbers of a run."""
    return [(point["step"], point["train_loss"], point["val_loss"]) for point in result["curve"]]


def test_a_result_is_written_by_the_worker_and_threads_are_put_back(tmp_path):
    before = torch.get_num_threads()
    given = Trial("abc", "arm", 0, {}, "", 1, 1, "cpu", 1)
    steps = run_trials(tmp_path, [given], lambda t: {"threads inside": torch.get_num_threads()}, 1)
    assert [result["jobs"] for _, result in steps] == [1]
    assert read_result(tmp_path, "abc")["threads inside"] >= 1 and torch.get_num_threads() == before
    assert list(run_trials(tmp_path, [given], None, 1)) == []


# ---- bad input, before any run -------------------------------------------------------------------------------------

BAD = [
    ('[factors]\n"data.tokenizer" = ["char", "byte"]\n', 'measure = "val_bpb"'),
    ('[factors]\n"train.freeze" = ["", "embbed"]\n', "embbed"),
    ('[factors]\nhead = [{name = "a"}, {name = "b", "model.n_kv_head" = 2}]\n', "same configuration"),
    ('[factors]\n"model.n_layer" = [1, 0]\n', "at least 1"),
    ('[factors]\n"train.embeddings" = ["", "no.npy"]\n', "no.npy"),
]


@pytest.mark.parametrize("factor, words", BAD, ids=[words for _, words in BAD])
def test_bad_input_is_refused_before_any_run(lab, tmp_path, factor, words):
    code, said = lab(HEAD + factor)
    assert code == 2 and words in said and said.count("\n") == 1, said
    assert not result_files(tmp_path)


def test_a_timed_design_runs_alone(lab, monkeypatch):
    timed = HEAD.replace("steps = 6", 'steps = 6, match = "seconds"') + NORM
    code, said = lab(timed, "--jobs", "2")
    assert code == 2 and "matches seconds" in said
    asked = []

    def clock(given):
        asked.append(given.label)
        return {"rmsnorm": 0.02, "layernorm": 0.01}[given.label]

    monkeypatch.setattr(one, "seconds_per_step", clock)
    code, content = lab(timed, "--jobs", "0")
    assert code == 0 and [arm["steps"] for arm in content["arms"]] == [6, 12]
    assert lab(timed, "--jobs", "0")[0] == 0 and asked == ["rmsnorm", "layernorm"]  # measured once, kept


def test_seconds_per_step_are_measured(lab, tmp_path, text, monkeypatch):
    monkeypatch.setattr(one, "CALIBRATION_SECONDS", 0.05)
    code, content = lab(HEAD.replace("steps = 6", 'steps = 6, match = "seconds"') + NORM, "--jobs", "0")
    found = [json.loads(p.read_text())["seconds_per_step"] for p in (tmp_path / "out" / "calibration").iterdir()]
    assert code == 0 and len(found) == 2 and all(1e-5 < seconds < 5 for seconds in found)


def test_an_unknown_design_and_an_empty_folder(lab, tmp_path, capsys):
    for argv, words in [
        (["run", "ab"], "did you mean aa?"),
        (["report", "."], "no design was run here"),
        (["report", "x"], "x"),
    ]:
        assert main(["lab", *argv]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


def test_an_eval_longer_than_what_is_held_out_is_shortened_for_all(lab, tmp_path):
    _, content = lab(HEAD.replace("eval_bytes = 200", "eval_bytes = 100_000_000") + NORM)
    assert 0 < content["eval_bytes"] < 0.1 * content["text"]["bytes"]


# ---- reports -------------------------------------------------------------------------------------------------------


def test_the_report_is_whole_and_self_contained(lab, tmp_path, drawn):
    drawn()
    _, content = lab(HEAD + NORM)
    folder = tmp_path / "out" / "d"
    html = (folder / "report.html").read_text()
    assert "Which &lt;norm&gt; | at all?" in html and html.count("<svg") == 2 and "<script" not in html
    assert not re.search(r'(src|href)="(?!#)', html)
    verdict = content["comparisons"][0]["verdict"]
    assert "at equal steps" in verdict and all(verdict in text for text in (html, (folder / "report.md").read_text()))
    saved = json.loads((folder / "report.json").read_text())
    assert saved == {key: value for key, value in content.items() if key != "report"}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG") and (folder / "differences.png").exists()


def test_mismatches_of_what_is_not_matched_are_shown(lab, tmp_path):
    _, content = lab(
        HEAD.replace("steps = 6", 'steps = 6, parameters = "n_ff"') + '[factors]\n"model.mlp" = ["relu2", "swiglu"]\n'
    )
    report = (tmp_path / "out" / "d" / "report.md").read_text()
    counts = [arm["parameters"] for arm in content["arms"]]
    assert abs(counts[1] / counts[0] - 1) < 0.01 and content["budget"]["words"] == "equal steps and parameters"
    assert "| swiglu | 2 |" in report and "%)" in report


def test_a_grid_has_main_effects_and_sizes_a_trend(lab, drawn, tmp_path):
    drawn()
    sizes = '[sizes]\nsmall = {"model.n_ff" = 16}\nlarge = {"model.n_ff" = 256}\n'
    code, content = lab(
        'plan = "grid"\n' + HEAD + NORM.replace("rmsnorm", "rmsnorm") + '"model.bias" = [false, true]\n' + sizes
    )
    assert code == 0 and len(content["arms"]) == 8
    found = [c["arm"] for c in content["comparisons"] if c["size"] == "small"]
    assert (
        found[:2] == ["model.norm: layernorm, over the others", "model.bias: yes, over the others"] and len(found) == 5
    )
    pictures = {path.name for path in (tmp_path / "out" / "d").glob("*.png")}
    assert pictures == {"differences.png", "trend.png", "curves-1.png", "curves-2.png"}
    assert len(content["trends"]) == 5 and content["trends"][0]["parameters"][0] < content["trends"][0]["parameters"][1]


def test_the_summary_has_a_row_a_comparison_and_every_question(lab, tmp_path, capsys):
    lab(HEAD + NORM)
    lab(HEAD.replace("Which", "Who") + '[factors]\n"model.mlp" = ["relu2", "relu", "gelu"]\n', name="e")
    assert main(["lab", "report", "out", "--summary", "tables/debates.md"]) == 0
    lines = (tmp_path / "tables" / "debates.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 1 + 2 and all(len(re.findall(r"(?<!\\)\|", row)) == 9 for row in rows)
    assert "Which <norm> \\| at all?" in rows[2] and "6 steps" in rows[2] and "Who" in rows[3]
    assert any(line.startswith("- machine: ") for line in lines) and any("for 2 questions" in line for line in lines)


@pytest.mark.slow
def test_an_a_a_control_of_real_runs_is_near_alpha(lab):
    control = (
        HEAD.replace("seeds = 2", "seeds = 4").replace("evaluations = 2", "evaluations = 1")
        + 'control = "A/A"\nrepeats = 25\n'
    )
    code, content = lab(control)
    found = content["control"]
    assert code == 0 and content["runs_done"] == 200 and found["tests"] == 25
    assert found["low"] <= 0.05 <= found["high"] and abs(found["redrawn_rate"] - 0.05) < 0.03


def test_a_report_leaves_out_designs_not_begun(lab, tmp_path, capsys):
    assert lab(HEAD + NORM)[0] == 0
    design = json.loads((tmp_path / "out" / "d" / "design.json").read_text())
    for arm in design["arms"]:
        arm["runs"] = {seed: "x" + name for seed, name in arm["runs"].items()}
    (tmp_path / "out" / "e").mkdir()
    (tmp_path / "out" / "e" / "design.json").write_text(json.dumps(design))
    assert main(["lab", "report", "out"]) == 0
    assert "e: no run is done yet; left out" in capsys.readouterr().out
    assert main(["lab", "report", "out/e"]) == 2 and "no run is done yet" in capsys.readouterr().err
    (tmp_path / "out" / "d" / "design.json").write_text("{")
    assert main(["lab", "report", "out/d"]) == 2 and "damaged" in capsys.readouterr().err


def test_arms_of_equal_numbers_are_said_to_be_so(lab):
    """A setting that changes the config but not one number: zero_init's rate of decay where there is none to decay."""
    code, content = lab(HEAD + '[factors]\n"train.decay_fraction" = [0.3, 0.5]\n')
    if code == 2:  # refused where the config itself knows that it has no effect
        assert "decay_fraction" in content
        return
    assert content["comparisons"][0]["verdict"].startswith("no effect: both arms computed the very same numbers")
    assert any("does nothing here" in warning for warning in content["warnings"])


def test_without_the_extra_the_line_to_install_it_is_given(lab, monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    code, said = lab(HEAD + NORM)
    assert code == 2 and 'pip install "kobza[lab]"' in said

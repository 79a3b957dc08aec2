"""The command line that scripts rely on: settings and where they come from, --json, help, exit codes."""

import json
import subprocess
import sys
import tomllib

import pytest
from test_run import SMALL, no_pictures  # noqa: F401 (no_pictures acts on every test here)

from kobza import __version__
from kobza.cli import main
from kobza.config import SECTIONS, load_toml, preset, preset_names, run_from_dict, to_dict


@pytest.fixture
def settings(monkeypatch):
    """settings(argv) -> the RunConfig that `train` would run, and what else it was called with."""

    def call(*argv):
        found = {}

        def note(text, run, out, name, *rest):
            found.update(text=text, run=run, out=out, name=name, rest=rest)
            return 0

        monkeypatch.setattr("kobza.recipes.train.main", note)
        assert main(["train", *argv]) == 0
        return found

    return call


SHORT = [word.replace("steps=40", "steps=2") for word in SMALL]


# ---- where a setting comes from ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, section, field, value",
    [
        (["--train.steps", "60"], "train", "steps", 60),
        (["--train.steps=60"], "train", "steps", 60),
        (["--model.n_embd", "126", "--model.n_head", "3"], "model", "n_head", 3),
        (["--model.n_embd=126", "--model.n-head", "3"], "model", "n_head", 3),
        (["--data.val_fraction", "0.2"], "data", "val_fraction", 0.2),
        (["--data.val-fraction=0.2"], "data", "val_fraction", 0.2),
        (["--train.lr", "1e-4"], "train", "lr", 1e-4),
        (["--model.no-qk-norm"], "model", "qk_norm", False),
        (["--model.bias"], "model", "bias", True),
        (["--model.bias=false"], "model", "bias", False),
        (["--model.mlp", "gelu"], "model", "mlp", "gelu"),
        (["--tokenizer", "bpe"], "data", "vocab_size", 4096),
        (["--tokenizer=bpe", "--vocab-size=300"], "data", "vocab_size", 300),
        (["--unknown", "bytes"], "data", "unknown", "bytes"),
        (["--text-field", "body"], "data", "text_field", "body"),
        (["--stop-at", "1.5"], "train", "stop_at", 1.5),
    ],
)
def test_a_setting_on_the_command_line(argv, section, field, value, settings):
    assert getattr(getattr(settings(*argv)["run"], section), field) == value


def test_every_field_can_be_set_by_its_name(settings):
    run = to_dict(run_from_dict(preset("demo"), "demo"))
    for section in SECTIONS:
        for field, value in run[section].items():
            option = f"--{section}.{field}"
            if field == "vocab_size" or (field == "rope_theta" and run["model"]["position"] == "learned"):
                continue  # has no effect here, so it is refused
            word = str(value).lower() if isinstance(value, bool) else value
            assert to_dict(settings(f"{option}={word}")["run"])[section][field] == value


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_gives_all_its_sections(name, settings):
    assert settings("--preset", name)["run"] == run_from_dict(preset(name), name)


def test_a_file_wins_over_the_preset_and_the_command_line_over_the_file(tmp_path, settings):
    (tmp_path / "my.toml").write_text(
        "seed = 5\n[train]\nsteps = 7\nlr = 0.5\n[model]\nn_layer = 3\n[data]\nbos = true\n"
    )
    found = settings("--preset", "workshop", "--config", str(tmp_path / "my.toml"), "--train.lr", "0.25")
    run = found["run"]
    assert (run.seed, run.train.steps, run.train.lr, run.model.n_layer, run.data.bos) == (5, 7, 0.25, 3, True)
    workshop = run_from_dict(preset("workshop"), "workshop")
    assert run.model.n_embd == workshop.model.n_embd and run.train.micro_batch == workshop.train.micro_batch
    assert found["name"] == "workshop"


def test_a_file_may_hold_half_of_what_belongs_together(tmp_path, settings):
    (tmp_path / "my.toml").write_text("[model]\nn_head = 3\n")
    run = settings("--config", str(tmp_path / "my.toml"), "--model.n_embd", "48")["run"]
    assert (run.model.n_head, run.model.n_embd, run.model.head_dim) == (3, 48, 16)


def test_texts_folders_and_options_may_stand_in_any_order(settings):
    found = settings("a.txt", "--seed", "3", "b", "-", "--out", "here")
    assert found["text"] == ["a.txt", "b", "-"] and found["run"].seed == 3 and str(found["out"]) == "here"


def test_the_settings_stand_beside_the_run_and_make_the_same_run_again(text, tmp_path):
    for name, argv in (("one", ["--seed", "4", *SMALL]), ("two", ["--config", str(tmp_path / "one" / "config.toml")])):
        assert main(["train", text, "--out", str(tmp_path / name), *argv]) == 0
    assert load_toml(tmp_path / "one" / "config.toml") == load_toml(tmp_path / "two" / "config.toml")
    one, two = ((tmp_path / n / "checkpoints" / "00000040" / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    index = json.loads((tmp_path / "one" / "tokens" / "index.json").read_text())
    assert index["files"] == ["verse.txt"]


def test_runs_without_out_stand_side_by_side(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", text, "--preset", "tiny", *SHORT, "--json"]) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["tiny", "tiny-2"]
    assert [json.loads(line)["run"] for line in capsys.readouterr().out.splitlines()] == ["runs/tiny", "runs/tiny-2"]


def test_without_text_the_default_text_is_taken_and_said(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kobza.recipes.train.default_text", lambda: (text, "text: the default one"))
    assert main(["train", "--out", str(tmp_path / "run"), *SHORT]) == 0
    assert "text: the default one" in capsys.readouterr().out


# ---- what scripts read ---------------------------------------------------------------------------------------------

KEYS = {"step", "train_loss", "lr", "grad_norm", "tokens", "seconds", "tokens_per_second"}


def test_metrics_have_a_line_a_step_with_the_promised_keys(text, tmp_path):
    assert main(["train", text, "--out", str(tmp_path / "run"), *SMALL]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    for line in lines:
        evaluated = {"val_loss", "val_bpb"} if line["step"] % 10 == 0 else set()
        assert line.keys() == KEYS | evaluated
    assert lines[-1]["tokens"] == 40 * 4 * 16
    assert lines[-1]["val_loss"] < lines[9]["val_loss"] < 4


def one_object(capsys):
    """The one JSON object on stdout."""
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    found = json.loads(said)
    assert isinstance(found, dict)
    return found


def test_json_is_one_object_on_stdout_for_every_verb_that_reports(text, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "run")
    assert main(["train", text, "--out", out, *SMALL, "--json"]) == 0
    summary = one_object(capsys)
    assert summary["run"] == out and summary["outcome"] == "done" and summary["step"] == 40
    assert summary["best"]["step"] in (10, 20, 30, 40) and summary["best"]["val_loss"] > 0
    assert main(["generate", out, "--json", "--tokens", "5", "--samples", "2", "--show-probabilities"]) == 0
    made = one_object(capsys)
    assert [len(sample["steps"]) for sample in made["samples"]] == [5, 5]
    assert made["samples"][0]["steps"][0]["candidates"][0]["probability"] > 0
    assert main(["describe", out, "--json"]) == 0
    assert one_object(capsys)["model"]["n_embd"] == 16
    assert main(["report", out, "--json"]) == 0
    assert one_object(capsys)["best"] == summary["best"]
    assert main(["presets", "--json"]) == 0
    assert len(one_object(capsys)["presets"]) == len(preset_names())
    monkeypatch.setattr("kobza.recipes.data.shakespeare", lambda: tmp_path / "run" / "metrics.jsonl")
    assert main(["data", "shakespeare", "--json"]) == 0
    assert one_object(capsys)["bytes"] > 0


# ---- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb", [[], *([v] for v in ("train generate chat describe data report replay presets demo".split()))]
)
def test_help_exits_0_and_names_the_options(verb, capsys):
    assert main([*verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert "Usage: kobza" in said
    assert "--install-completion" in said or verb


def test_no_command_at_all_is_help(capsys):
    assert main([]) == 0
    assert "Usage: kobza" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["presets"], ["describe", "tiny", "--json"]])
def test_what_needs_no_torch_loads_none(argv):
    code = (
        "import sys; from kobza.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'matplotlib'} & sys.modules.keys(); sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    found = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_completion_can_be_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHELL", "/bin/bash")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--install-completion", "--shell", "bash", "--output", str(tmp_path / "completion.bash")]) == 0
    assert "kobza" in (tmp_path / "completion.bash").read_text()


def test_the_module_and_the_script_are_one_program():
    found = subprocess.run([sys.executable, "-m", "kobza", "frobnicate"], capture_output=True, text=True)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("kobza: Unknown command") and found.stderr.count("\n") == 1
    project = tomllib.loads((__import__("pathlib").Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["kobza"] == "kobza.cli:main"


def test_ctrl_c_before_training_exits_130(monkeypatch, capsys, text, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kobza.run.prepare", interrupted)
    assert main(["train", text, "--out", str(tmp_path / "run"), *SMALL]) == 130
    assert capsys.readouterr().err == "kobza: interrupted\n"
    assert not (tmp_path / "run").exists()

"""The doctor's laws: errors are proven, skipped is no pass, each code is explained and injected, and it prints plain text."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kobza.cli import main
from kobza.config import InputError
from kobza.doctor import report, selftest
from kobza.doctor.explain import codes, explain
from kobza.doctor.finding import Check, Examination, Finding, Skip, examine, exit_code
from kobza.doctor.mutations.proof import Control, Mutation
from kobza.recipes.doctor import areas_of, suppress

ERROR = Finding(
    "G9", "error", "proven", "config.json:n_head", "4", "3", "why", "fix", counterexample="q_proj is (32, 24)"
)
WARNING = replace(ERROR, code="G4", severity="warn", confidence="likely", counterexample="")


def test_an_error_needs_a_counterexample():
    with pytest.raises(AssertionError, match="must be proven"):
        replace(WARNING, severity="error")
    with pytest.raises(AssertionError, match="proven by what"):
        replace(ERROR, counterexample="")


def outcomes(*runs):
    return examine([Check("G4 G9", f"check {i}", run) for i, run in enumerate(runs)], None)


def skip(_):
    raise Skip("nothing to hold it against")


def broken(_):
    raise RecursionError("deep")


def refused(_):
    raise InputError("config.json: not json")


def test_every_check_has_an_outcome():
    done = outcomes(lambda _: [ERROR], skip, broken, refused, lambda _: ())
    assert [o.status for o in done] == ["ran", "skipped", "failed", "failed", "ran"]
    assert done[1].reason == "nothing to hold it against" and done[2].reason == "RecursionError: deep"
    assert done[3].reason == "config.json: not json" and done[0].findings == (ERROR,)


def test_a_check_reports_only_codes_it_declares():
    with pytest.raises(AssertionError, match="declares G8"):
        examine([Check("G8", "heads", lambda _: [ERROR])], None)


@pytest.mark.parametrize(
    "runs, code",
    [
        ((lambda _: [ERROR], broken), 1),
        ((lambda _: [WARNING],), 0),
        ((broken, lambda _: ()), 2),
        ((skip, lambda _: ()), 0),
        ((), 2),
    ],
)
def test_exit_codes(runs, code):
    assert exit_code(outcomes(*runs)) == code


EXAMINATION = Examination("config", "x", tuple(outcomes(lambda _: [WARNING, ERROR], skip)), {"sizes": [["a"], ["1"]]})


def test_json_tells_of_every_check():
    told = report.to_json([EXAMINATION], {})
    (examination,) = told["examinations"]
    assert told["exit_code"] == 1 and [f["code"] for f in examination["findings"]] == ["G9", "G4"]  # errors first
    assert [c["status"] for c in examination["checks"]] == ["ran", "skipped"]
    assert json.loads(json.dumps(told)) == told


def test_what_a_hostile_file_says_stays_text():
    evil = replace(ERROR, where="<script>alert(1)</script>", got="\x1b[2J<img src=x>")
    html = report.to_html([replace(EXAMINATION, outcomes=tuple(outcomes(lambda _: [evil])))])
    assert "<script>" not in html and "<img" not in html and "\x1b" not in html and "&lt;script&gt;" in html


def test_suppressing_is_said_and_a_mistyped_code_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(".kobzadoctor").write_text("g4  # known\n")
    (kept,), gone = suppress([EXAMINATION])
    assert [f.code for f in kept.findings] == ["G9"] and gone == {"G4": 1}
    Path(".kobzadoctor").write_text("G444")
    with pytest.raises(InputError, match="did you mean"):
        suppress([EXAMINATION])


@pytest.mark.parametrize(
    "files, areas",
    [
        (["config.json", "tokenizer.json", "tokenizer_config.json"], ["config", "tokenizer"]),
        (["config.json", "chat_template.jinja"], ["config", "template"]),
        (["metrics.jsonl", "config.toml"], ["run"]),
        (["manifest.json", "config.json"], ["model"]),
    ],
)
def test_a_folder_is_guessed(files, areas, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")
    assert areas_of(str(tmp_path)) == areas


@pytest.mark.parametrize(
    "name, areas",
    [("b.jinja", ["template"]), ("Modelfile", ["template"]), ("c.csv", ["run"])],
)
def test_a_file_is_guessed(name, areas, tmp_path):
    (tmp_path / name).write_text("")
    assert areas_of(str(tmp_path / name)) == areas


def test_what_cannot_be_guessed_is_refused(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["doctor", str(tmp_path)]) == 2
    assert "doctor adapter BASE" in capsys.readouterr().err
    (tmp_path / "x.bin").write_text("")
    assert main(["doctor", str(tmp_path / "x.bin")]) == 2
    assert "name an area" in capsys.readouterr().err


# ---- codes and mutations -------------------------------------------------------------------------------------------


def test_every_code_is_explained_in_words():
    for code in codes().values():
        for text in (code.title, code.looks, code.detect, code.why, code.fix):
            assert text.strip() and "\n" not in text, code.code
        assert code.severity in ("error", "warn", "info"), code.code


@pytest.mark.parametrize("area", selftest.AREAS)
def test_every_code_of_a_check_is_explained_and_injected(area):
    """A check without a mutation fails here."""
    declared = {code for check in selftest.area_module(area).CHECKS for code in check.codes.split()}
    assert declared and declared <= set(codes()), area
    assert selftest.unproven(area) == []
    assert {m.code for m in selftest.proof_module(area).MUTATIONS} <= declared


def test_explain_from_the_command_line(capsys):
    assert main(["doctor", "explain", "g8"]) == 0
    assert capsys.readouterr().out.startswith("G8  ")
    assert main(["doctor", "explain", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(codes()) > 40
    assert main(["doctor", "explain", "G88"]) == 2
    assert "did you mean G8" in capsys.readouterr().err


def test_the_two_rates_are_kept_apart():
    checks = [Check("G9", "is odd", lambda n: [ERROR] if n % 2 else [])]
    caught, missed = (Mutation("G9", "one", lambda *_, n=n: n) for n in (1, 2))
    quiet, alarmed = (Control("two", lambda *_, n=n: n) for n in (2, 1))
    done = [selftest.run_trial("config", checks, item, 0, "fp32") for item in (caught, missed, quiet, alarmed)]
    assert selftest.rates(done) == selftest.Rates(1, 2, 1, 2) and not selftest.rates(done).good
    assert selftest.rates([done[0], done[2]]).good
    assert explain("G9").code == "G9"


FILES_ONLY = """
import sys, time
start = time.perf_counter()
from kobza.cli import main
main(["doctor", {area!r}, {folder!r}, "--json"])
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(time.perf_counter() - start, file=sys.stderr)
"""


@pytest.mark.parametrize("area", ["config", "tokenizer", "template"])
def test_files_are_read_without_torch_and_soon(area, tmp_path):
    from kobza.doctor.mutations.specimens import folder

    code = FILES_ONLY.format(area=area, folder=str(folder(tmp_path / "llama", "llama")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["exit_code"] == 0
    assert float(done.stderr.split()[-1]) < 10  # 2 s is the bar on a quiet machine; a busy one is no bug


def test_fix_writes_a_copy_that_is_well_or_says_that_there_is_nothing_to_write(tmp_path, capsys):
    from kobza.doctor.mutations.specimens import folder

    good, bad = folder(tmp_path / "good", "gemma"), folder(tmp_path / "bad", "gemma")
    config = json.loads((bad / "config.json").read_text())
    del config["head_dim"]
    (bad / "config.json").write_text(json.dumps(config))
    assert main(["doctor", "config", str(bad), "--fix", str(tmp_path / "fixed")]) == 1
    assert "written: config.json: head_dim 8, was absent (G9)" in capsys.readouterr().out
    assert "head_dim" not in json.loads((bad / "config.json").read_text())  # the original is not touched
    assert json.loads((tmp_path / "fixed" / "config.json").read_text())["head_dim"] == 8
    assert main(["doctor", "config", str(good), "--fix", str(tmp_path / "none")]) == 0
    assert "nothing into" in capsys.readouterr().out and not (tmp_path / "none").exists()

"""Records on disk as they are made, strict JSON, and a progress line only for a person."""

import io
import json
import math

import pytest
from rich.console import Console

from kobza.config import InputError
from kobza.log import MetricsLog, ProgressLine


def test_each_record_is_on_disk_when_the_call_returns(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"step": 1, "loss": 2.0})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_inf_and_nan_become_null_on_disk_and_stay_in_memory(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": None}
    assert math.isnan(log.records[0]["loss"])


def test_a_resumed_log_keeps_the_records_up_to_its_step_and_drops_a_cut_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(path, 2)
    log.write({"step": 3})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert [record["step"] for record in log.records] == [1, 2, 3]


def test_a_failure_while_resuming_costs_no_record(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n')

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kobza.log.os.replace", fails)
    with pytest.raises(OSError):
        MetricsLog(path, 1)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("line", ["garbage", "[]", "{}", '{"step": "x"}', "3"])
def test_a_damaged_line_is_named(line, tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(InputError, match="m.jsonl line 2: not a record"):
        MetricsLog(tmp_path / "m.jsonl", 5)


def test_the_progress_line_is_silent_where_no_person_looks():
    file = io.StringIO()
    line = ProgressLine(Console(file=file), 10)
    line.step(1, "loss 3")
    line.close()
    assert file.getvalue() == ""


def test_the_progress_line_shows_the_figures_to_a_person():
    file = io.StringIO()
    line = ProgressLine(Console(file=file, force_terminal=True, width=100), 10)
    line.step(1, "loss 3.25")
    line.close()
    assert "1/10" in file.getvalue() and "loss 3.25" in file.getvalue()

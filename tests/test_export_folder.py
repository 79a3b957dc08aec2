"""A folder of artifacts appears whole, or not at all."""

import errno
import signal
import subprocess
import sys
import time

import pytest

from kobza.config import InputError
from kobza.export.folder import set_aside, whole_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "a" / "out") as aside:
        (aside / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"
    assert names(tmp_path / "a") == ["out"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), whole_folder(tmp_path / "out") as aside:
        (aside / "x").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(InputError, match="disk is full .* nothing is left"), whole_folder(tmp_path / "out") as aside:
        (aside / "x").write_text("1")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_what_is_there_stays_unless_forced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(InputError, match="--force"), whole_folder(out):
        pass
    with pytest.raises(ValueError), whole_folder(out, force=True) as aside:
        raise ValueError(aside)
    assert names(out) == ["old"]
    with whole_folder(out, force=True) as aside:
        (aside / "new").write_text("1")
    assert names(out) == ["new"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("mark", ["manifest.json", "checkpoints"])
def test_a_run_is_never_replaced(tmp_path, mark):
    (tmp_path / "out" / mark).mkdir(parents=True)
    with pytest.raises(InputError, match="a run or a checkpoint"), whole_folder(tmp_path / "out", force=True):
        pass


def test_a_file_is_never_replaced(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="a file"), whole_folder(tmp_path / "out", force=True):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_what_fails_its_proof_is_kept_under_another_name(tmp_path):
    for text in "12":
        with whole_folder(tmp_path / "out") as aside:
            (aside / "x").write_text(text)
            refused = set_aside(aside, tmp_path / "out")
    assert names(tmp_path) == ["out.refused"] and (refused / "x").read_text() == "2"


def test_two_at_once_are_told(tmp_path):
    with whole_folder(tmp_path / "out"):
        with pytest.raises(InputError, match="under way"), whole_folder(tmp_path / "out"):
            pass


def test_killed_half_way_it_is_not_there_and_the_next_one_works(tmp_path):
    code = f"""
import time
from pathlib import Path
from kobza.export.folder import whole_folder
with whole_folder(Path({str(tmp_path / "out")!r})) as aside:
    (aside / "half").write_text("1")
    print("now", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"now\n"
        child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    time.sleep(0.05)
    with whole_folder(tmp_path / "out") as aside:
        (aside / "x").write_text("1")
    assert names(tmp_path / "out") == ["x"] and names(tmp_path) == ["out"]

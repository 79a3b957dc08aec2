"""A person's file -> Records: rows of named cells, and which of the known forms they have.

Read are .csv, .tsv, .jsonl, .json (each also .gz), .parquet and .xlsx. A cell becomes the text that a person would write, an
empty one None; lists and objects stay, for conversations are made of them. Nothing is guessed in silence: another encoding, a
broken quote, a row of another length are refused with the row and, where there is one, the byte. Sizes are bounded before
anything is unpacked, for a file may come from anyone. What rows mean as conversations is examples.py's business.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import math
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Literal

from kobza.config import InputError, require

LIMIT_BYTES = 1 << 30  # of a file, unpacked; its rows take some times that as Python's objects
CELL_CHARACTERS = 1 << 22
SHEET_ROWS, SHEET_CELLS = 1 << 20, 1 << 25  # the first is Excel's own
DELIMITERS = ",;\t"  # of a .csv; spreadsheets write ; where the comma is the decimal point
SAMPLE_ROWS, SAMPLE_CHARACTERS = 20, 1 << 16
BOM = "\ufeff"
QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*("|\Z)')
FAILED = ("#N/A", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!", "#REF!", "#VALUE!")

Cell = str | list | dict | None
Record = dict[str, Cell]
Form = Literal["table", "alpaca", "sharegpt", "messages", "preference", "unpaired", "prompts"]
KINDS = {
    "csv": "row",
    "tsv": "row",
    "xlsx": "row",
    "parquet": "row",
    "jsonl": "line",
    "json": "record",
}  # what `where` counts


@dataclass(frozen=True)
class Records:
    """The rows of a file, cells by column."""

    rows: list[Record]
    columns: list[str]
    form: Form
    path: Path
    kind: str
    """ "csv", "tsv", "jsonl", "json", "parquet" or "xlsx" """
    numbers: list[int]
    """of each row, as a spreadsheet shows it (the header is row 1), or its line, or its place in a list"""

    def where(self, i: int) -> str:
        """For a person: where(10) -> "titanic.csv row 12" """
        return f"{self.path.name} {KINDS[self.kind]} {self.numbers[i]}"


def read_records(path: Path) -> Records:
    """All rows of a file; what cannot be read whole is refused in one line."""
    kind = kind_of(path)
    require(path.exists(), f"{path}: no such file")
    require(path.is_file(), f"{path}: not a file; name one")
    readers = {"csv": csv_rows, "tsv": csv_rows, "jsonl": jsonl_rows, "json": json_rows}
    if kind in readers:
        found = list(readers[kind](path.name, read_text(path, kind)))
    else:
        found = list({"parquet": parquet_rows, "xlsx": xlsx_rows}[kind](path))
    columns = list(dict.fromkeys(name for _, row in found for name in row))
    full = [(n, row) for n, row in found if any(cell is not None for cell in row.values())]
    require(bool(full), f"{path}: no rows in it; a file to learn from has some, a table's below its header")
    numbers, rows = [n for n, _ in full], [row for _, row in full]
    return Records(rows, columns, form_of(columns, rows), path, kind, numbers)


def kind_of(path: Path) -> str:
    """How to read a file, by its name: kind_of(Path("a/B.CSV.gz")) -> "csv"."""
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix[1:]
    require(kind in KINDS, f"{path}: not a kind of table that kobza reads: {', '.join('.' + kind for kind in KINDS)}")
    packed = name.endswith(".gz") and kind in ("parquet", "xlsx")
    require(not packed, f"{path}: a .{kind} is compressed in itself; unpack it with: gunzip {path.name}")
    return kind


def form_of(columns: list[str], rows: list[Record]) -> Form:
    """The form of a file by its columns and what lies in them; with columns of a person's own it is a table."""
    names = set(columns)
    for column in ("messages", "conversations"):
        turns = next((row[column] for row in rows if row.get(column)), None)
        if isinstance(turns, list) and isinstance(turns[0], dict):
            return "sharegpt" if "from" in turns[0] else "messages"
    if {"chosen", "rejected"} <= names:
        return "preference"
    if {"prompt", "completion", "label"} <= names:
        return "unpaired"
    if {"instruction", "output"} <= names:
        return "alpaca"
    if "prompt" in names and names <= {"prompt", "answer", "completion", "system"}:
        return "prompts"  # with further columns it is not said what they are for: a table
    return "table"


# ---- cells ---------------------------------------------------------------------------------------------------------


def cell_of(value: Any, where: str, column: str) -> Cell:
    """What a file's library gives, as text that a person would write: 3 -> "3", 0.5 -> "0.5", True -> "true", NaN -> None."""
    if isinstance(value, str):
        check_text(value, where, column)
        return value if value.strip() else None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return None if math.isnan(value) else repr(value)
    if isinstance(value, list | dict):
        for text in texts_in(value):
            check_text(text, where, column)
        return value or None
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        value = value.date()  # a spreadsheet keeps a day as its midnight
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    require(not isinstance(value, bytes), f"{where}: column {column!r} holds bytes, not text")
    return None if value is None else str(value)


def check_text(text: str, where: str, column: str) -> None:
    """Refuse what no text holds."""
    if text.isascii() and "\0" not in text and len(text) <= CELL_CHARACTERS:
        return
    what = f"{where}: column {column!r} has"
    require(len(text) <= CELL_CHARACTERS, f"{what} {len(text):,} characters; a cell has at most {CELL_CHARACTERS:,}")
    require("\0" not in text, f"{what} a NUL character; take it out")
    half = re.search("[\ud800-\udfff]", text)
    require(half is None, f"{what} half a surrogate pair, which no UTF-8 spells; take it out")


def texts_in(value: list | dict) -> Iterator[str]:
    """All strings of nested lists and objects."""
    left: list[Any] = [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, list):
            left += part


# ---- text ----------------------------------------------------------------------------------------------------------


def read_text(path: Path, kind: str) -> str:
    """The decoded text of a file of bounded size, with its byte order mark and line ends: its places are the file's."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            raw = stream.read(LIMIT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    require(len(raw) <= LIMIT_BYTES, f"{path}: more than {LIMIT_BYTES:,} bytes; split the file")
    nul = raw.find(b"\0")
    try:
        text = raw.decode() if nul < 0 else ""
    except UnicodeDecodeError as error:
        what, at = f"byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8", error.start
    else:
        if nul < 0:
            return text
        what, at = f"a NUL at byte {nul}", nul
    place = place_behind(raw[:at].decode(errors="replace"), kind)
    raise InputError(f"{path.name} {place}: {what}; {likely_encoding(raw, at)}")


def place_behind(before: str, kind: str) -> str:
    """Where a text goes on: place_behind("a,b\\n1,", "csv") -> "row 2"; the line in JSON, and where csv gives up."""
    with wide_cells(), suppress(csv.Error):
        if kind in ("csv", "tsv"):
            return f"row {sum(1 for _ in csv.reader(lines_of(before + 'x'), delimiter=delimiter_of(before)))}"
    return f"line {1 + before.count(chr(10))}"


def likely_encoding(raw: bytes, start: int) -> str:
    """What bytes that are no UTF-8 text most likely are, with the command that converts them."""
    high = re.findall(rb"[\x80-\xff]+", raw[start : start + 4096])
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or raw[:4096].count(0) > len(raw[:4096]) // 4:
        name = "UTF-16"
    elif b"\0" in raw:
        return "it looks like a binary file, not text"
    else:  # Cyrillic letters stand side by side, those of Latin-1 among ASCII
        name = "CP1251" if sum(map(len, high)) > 2 * len(high) else "LATIN1"
    return f"it looks like {name}: save it as UTF-8, or iconv -f {name} -t UTF-8"


# ---- comma-separated -----------------------------------------------------------------------------------------------


@contextmanager
def wide_cells() -> Iterator[None]:
    """Within it csv reads cells up to CELL_CHARACTERS; its limit is one number for the whole process."""
    before = csv.field_size_limit(CELL_CHARACTERS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def delimiter_of(text: str) -> str:
    """The delimiter that cuts the first rows into the same number of cells, more than one; else the header's most frequent."""
    sample = text[:SAMPLE_CHARACTERS]
    counts: dict[str, list[int]] = {}
    for delimiter in DELIMITERS:
        rows = list(islice(filter(None, csv.reader(lines_of(sample), delimiter=delimiter)), SAMPLE_ROWS))
        whole = rows[:-1] if len(sample) < len(text) and len(rows) > 1 else rows  # the sample may end within a row
        counts[delimiter] = [len(row) for row in whole] or [1]
    same = [delimiter for delimiter, cells in counts.items() if cells[0] > 1 and len(set(cells)) == 1]
    return max(same or DELIMITERS, key=lambda delimiter: counts[delimiter][0])


def lines_of(text: str) -> io.StringIO:
    """Lines with their ends as they are, since a cell may hold some; behind a byte order mark."""
    stream = io.StringIO(text, newline="")
    stream.seek(text.startswith(BOM))
    return stream


def csv_rows(source: str, text: str) -> Iterator[tuple[int, Record]]:
    """(row number, cells by column) of a table in text."""
    tabs = source.lower().removesuffix(".gz").endswith(".tsv")
    return named(source, csv_cells(source, text, "\t" if tabs else delimiter_of(text)))


def csv_cells(source: str, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(row number, cells), every row of the header's length."""
    stream = lines_of(text)
    taken = start = stream.tell()

    def lines() -> Iterator[str]:
        nonlocal taken
        for line in stream:
            taken += len(line)
            yield line

    number, width, reader = 0, 0, csv.reader(lines(), delimiter=delimiter, strict=True)
    with wide_cells():
        while True:
            number, start = number + 1, taken
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(broken_quote(source, text, start, number, delimiter, str(error))) from None
            width = width or len(cells)
            if cells and len(cells) != width:
                remedy = f"put a cell that holds {delimiter!r} in quotes"
                if "\n" in text[start:taken].strip():
                    remedy = "it runs over several lines: is a quote in it left open?"
                raise InputError(f"{source} row {number}: {len(cells)} cells and the header has {width}; {remedy}")
            if cells:
                yield number, cells


def broken_quote(source: str, text: str, start: int, number: int, delimiter: str, why: str) -> str:
    """A complaint that names row and byte of the quote that spoils the row which starts there; csv itself says only `why`."""
    at = start
    while at < len(text):
        cell = QUOTED.match(text, at)
        end = cell.end() if cell else at + len(re.compile(rf"[^{delimiter}\r\n]*").match(text, at)[0])  # type: ignore[index]
        place = f"{source} row {number}: the quote at byte {len(text[:at].encode())}"
        if cell and not cell[1]:
            return f"{place} is never closed; close it, or take it out"
        if cell and text[end : end + 1] not in (delimiter, "\r", "\n", ""):
            early = f"is closed in the middle of a cell, at byte {len(text[: end - 1].encode())}"
            return f"{place} {early}: one of the two does not belong; a quote within a cell is written twice"
        at = end + 1
    return f"{source} row {number}: not CSV: {why}"


def named(source: str, grid: Iterable[tuple[int, Iterable[Any]]]) -> Iterator[tuple[int, Record]]:
    """(row number, cells by column) of a grid whose first row is its header; a column without a name, an index, is left out."""
    names: list[str] = []
    for number, cells in grid:
        if names:
            where, filled = f"{source} row {number}", chain(cells, repeat(None))  # a sheet's row ends at its last cell
            yield number, {name: cell_of(cell, where, name) for name, cell in zip(names, filled, strict=False) if name}
            continue
        names = ["" if cell is None else str(cell).strip() for cell in cells]
        for place, name in enumerate(names):
            again = f"{source}: columns {names.index(name) + 1} and {place + 1} are both named {name!r}; rename one"
            require(not name or names.index(name) == place, again)


# ---- JSON ----------------------------------------------------------------------------------------------------------


def jsonl_rows(source: str, text: str) -> Iterator[tuple[int, Record]]:
    """(line number, cells) of a file with an object a line."""
    for number, line in enumerate(
        text.removeprefix(BOM).split("\n"), 1
    ):  # not splitlines: U+2028 may stand within a string
        if line.strip():
            where = f"{source} line {number}"
            record = parse(line, where)
            hint = "; a whole list is a .json" if isinstance(record, list) else ""
            require(isinstance(record, dict), f"{where}: a {type(record).__name__}, not an object{hint}")
            yield number, {name: cell_of(cell, where, name) for name, cell in record.items()}


def json_rows(source: str, text: str) -> Iterator[tuple[int, Record]]:
    """(place, cells) of a file that is a list of objects, or an object with such a list as "data"."""
    found = parse(text.removeprefix(BOM), source)
    if isinstance(found, dict):
        keys = ", ".join(list(found)[:5])
        require(
            "data" in found, f'{source}: one object with {keys}; a table is a list of objects, or {{"data": [...]}}'
        )
        found = found["data"]
    require(isinstance(found, list), f"{source}: a {type(found).__name__}, not a list of objects")
    for number, record in enumerate(found, 1):
        where = f"{source} record {number}"
        require(isinstance(record, dict), f"{where}: a {type(record).__name__}, not an object")
        yield number, {name: cell_of(cell, where, name) for name, cell in record.items()}


def parse(text: str, where: str) -> Any:
    """JSON, refused in one line where it is none, is nested too deeply or names a thing twice in an object."""
    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply; a record is flat, or a list of messages") from None
    except json.JSONDecodeError as error:
        several = error.msg == "Extra data" and text[error.pos : error.pos + 1] == "{"
        hint = "; with an object a line it is a .jsonl: rename it" if several else ""
        raise InputError(f"{where}: not JSON: {error}{hint}") from None
    except ValueError as error:  # a name twice, an integer of thousands of digits
        raise InputError(f"{where}: not JSON that can be trusted: {error}") from None


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; json itself would keep the last of two values without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return found


# ---- files that a library reads ------------------------------------------------------------------------------------


def parquet_rows(path: Path) -> Iterator[tuple[int, Record]]:
    """(row number, cells by column) of a .parquet."""
    with library(path, "pyarrow"):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            about = file.metadata
            size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            require(
                size <= LIMIT_BYTES, f"{path}: {size:,} bytes unpacked; {LIMIT_BYTES:,} are the most: split the file"
            )
            names = file.schema_arrow.names
            twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
            require(twice is None, f"{path}: two columns are named {twice!r}; rename one")
            number = size = 0
            for batch in file.iter_batches(batch_size=256):  # few: a value kept once may stand in every row
                size += batch.nbytes
                require(size <= LIMIT_BYTES, f"{path}: over {LIMIT_BYTES:,} bytes unpacked; split the file")
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: cell_of(cell, f"{path.name} row {number}", name) for name, cell in row.items()}


def xlsx_rows(path: Path) -> Iterator[tuple[int, Record]]:
    """(row number, cells by column) of the first sheet of a .xlsx, or of the one that has rows."""
    with library(path, "openpyxl"), warnings.catch_warnings():
        from openpyxl import load_workbook

        warnings.simplefilter("ignore")  # on styles and the like, which hold no text
        with path.open("rb") as stream:
            old = stream.read(4) == b"\xd0\xcf\x11\xe0"
        require(not old, f"{path}: an .xls, or under a password; open it and save it as .xlsx without one")
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        require(size <= LIMIT_BYTES, f"{path}: {size:,} bytes unpacked; {LIMIT_BYTES:,} are the most: split the file")
        book = load_workbook(path, read_only=True, data_only=True)
        try:
            sheets = {sheet.title: sheet for sheet in book.worksheets}
            for sheet in sheets.values():
                sheet.reset_dimensions()  # as announced: it may lie
            full = [name for name, sheet in sheets.items() if len(list(islice(sheet_rows(path, sheet), 2))) == 2]
            require(bool(full), f"{path}: no sheet with rows below a header")
            several = f"{path}: the first sheet is empty and {', '.join(full)} are not; leave one"
            require(len(full) == 1 or full[0] == next(iter(sheets)), several)
            yield from named(path.name, sheet_rows(path, sheets[full[0]]))
        finally:
            book.close()


def sheet_rows(path: Path, sheet: Any) -> Iterator[tuple[int, list[Any]]]:
    """(row number, values) of a sheet's rows that are not empty; what a formula failed to compute is an empty cell."""
    cells = 0
    for number, values in enumerate(sheet.iter_rows(values_only=True), 1):
        cells += 1 + len(values)
        small = cells <= SHEET_CELLS and number <= SHEET_ROWS
        require(small, f"{path}: sheet {sheet.title} is larger than Excel's own")
        if any(value is not None for value in values):
            yield number, [None if value in FAILED else value for value in values]


@contextmanager
def library(path: Path, name: str) -> Iterator[None]:
    """Within it a library reads a stranger's file: whatever it raises is one line about the file."""
    try:
        yield
    except InputError:
        raise
    except ModuleNotFoundError:
        raise InputError(f'{path}: a .{kind_of(path)} needs {name}: pip install "kobza[tables]"') from None
    except Exception as error:  # a broken file makes such a library raise anything
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not a whole .{kind_of(path)}: {type(error).__name__}: {line}") from None

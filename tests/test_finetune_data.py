"""A person's file -> records -> prompts -> examples -> the two sides of the split: what is read, what is refused and how."""

import datetime
import gzip
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kobza.config import InputError
from kobza.finetune import table
from kobza.finetune.config import RowsConfig
from kobza.finetune.example import Example
from kobza.finetune.examples import join_turns, make_examples
from kobza.finetune.prompt import Prompt
from kobza.finetune.split import shares, split
from kobza.finetune.table import read_records

ROWS = RowsConfig()
PEOPLE = 'name,age,town\nAda,36,London\nBoris,,"Kyiv, Podil"\n'


@pytest.fixture
def write(tmp_path):
    """Write a file -> its path."""

    def write(name: str, content: str | bytes) -> Path:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return tmp_path / name

    return write


def refusal(path: Path, *wanted: str) -> None:
    """Reading is refused in one line that says all of this."""
    with pytest.raises(InputError) as caught:
        read_records(path)
    said = str(caught.value)
    assert "\n" not in said and all(part in said for part in wanted), said


def lines(*records: object) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["people.csv", "People.CSV.GZ", "people.csv.gz"])
@pytest.mark.parametrize(
    "dress", [str, lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n")], ids=["", "bom", "crlf"]
)
def test_a_csv_is_read_however_it_is_dressed(write, name, dress):
    content = dress(PEOPLE)
    records = read_records(write(name.replace("GZ", "gz"), content))
    assert records.rows == [
        {"name": "Ada", "age": "36", "town": "London"},
        {"name": "Boris", "age": None, "town": "Kyiv, Podil"},
    ]
    assert (records.form, records.kind, records.columns) == ("table", "csv", ["name", "age", "town"])
    assert records.where(1).endswith("row 3")


def test_rows_are_numbered_as_a_spreadsheet_shows_them(write):
    records = read_records(write("x.csv", 'a,b\n"one\ntwo",1\n\n,\nlast,2\n'))
    assert [records.where(i) for i in range(2)] == ["x.csv row 2", "x.csv row 5"]
    assert records.rows[0]["a"] == "one\ntwo"


@pytest.mark.parametrize("delimiter", ";\t,")
def test_the_delimiter_is_the_one_that_cuts_all_rows_alike(write, delimiter):
    rows = [["town", "height", "note"], ["Kyiv", "1,5", "a; b"], ["Lviv", "2,5;7,5", "x,\ty"]]
    content = "\n".join(delimiter.join(f'"{c}"' if delimiter in c else c for c in row) for row in rows)
    records = read_records(write("x.csv", content))
    assert [list(row.values()) for row in records.rows] == rows[1:]


def test_a_comma_in_the_header_misleads_nobody(write):
    assert read_records(write("x.csv", "size (w,h);note\n3;x\n")).rows == [{"size (w,h)": "3", "note": "x"}]


def test_a_column_without_commas_in_its_header_is_a_table_of_one(write):
    assert read_records(write("x.csv", "text\nhello\n")).rows == [{"text": "hello"}]
    refusal(write("y.csv", "text\nhello, you\n"), "y.csv row 2: 2 cells and the header has 1")


def test_a_column_without_a_name_is_an_index_and_left_out(write):
    assert read_records(write("x.csv", ",a\n0,p\n1,q\n")).rows == [{"a": "p"}, {"a": "q"}]


@pytest.mark.parametrize("name, content", [("x.jsonl", lambda r: lines(*r)), ("x.json", json.dumps)])
def test_cells_of_json_become_what_a_person_would_write(write, name, content):
    cells = {
        "int": 3,
        "float": 3.0,
        "big": 2**70,
        "yes": True,
        "none": None,
        "blank": "  ",
        "list": [{"a": 1}],
        "text": "ї\u2028",
    }
    (row,) = read_records(write(name, content([cells]))).rows
    assert row == {
        **{"int": "3", "float": "3.0", "big": str(2**70), "yes": "true", "none": None, "blank": None},
        **{"list": [{"a": 1}], "text": "ї\u2028"},
    }
    nan = write(name, content([{"a": 1.5, "b": float("nan")}]))
    assert read_records(nan).rows == [{"a": "1.5", "b": None}]


def test_json_may_hold_its_list_as_data_and_rows_of_unlike_keys(write):
    records = read_records(write("x.json", json.dumps({"data": [{"a": "1"}, {"b": "2"}]})))
    assert records.columns == ["a", "b"] and records.where(1) == "x.json record 2"
    assert read_records(write("x.jsonl", '\ufeff{"a": "1"}\r\n\r\n{"a": "2"}')).numbers == [1, 3]
    assert read_records(write("x.json", '\ufeff[{"a": "1"}]')).rows == [{"a": "1"}]
    assert read_records(write("x.csv", '\ufeff"a, b",c\n1,2')).columns == ["a, b", "c"]


def test_parquet_cells(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="tables of .parquet: pip install kobza[tables]")
    import pyarrow.parquet as pq

    day, moment = datetime.date(1912, 4, 15), datetime.datetime(1912, 4, 15, 2, 20)
    columns = {"n": [3, None], "x": [0.5, float("nan")], "ok": [True, False], "day": [day, None], "at": [moment, None]}
    columns |= {"text": ["a", ""], "turns": [[{"role": "user", "content": "hi"}], None]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    first, second = read_records(tmp_path / "x.parquet").rows
    turns = first.pop("turns")
    assert turns == [{"role": "user", "content": "hi"}]
    assert first == {"n": "3", "x": "0.5", "ok": "true", "day": "1912-04-15", "at": "1912-04-15T02:20:00", "text": "a"}
    assert second == {"n": None, "x": None, "ok": "false", "day": None, "at": None, "text": None, "turns": None}


def test_a_parquet_that_unpacks_to_too_much_is_refused_before(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="tables of .parquet: pip install kobza[tables]")
    import pyarrow.parquet as pq

    monkeypatch.setattr(table, "LIMIT_BYTES", 1 << 16)
    pq.write_table(pa.table({"a": ["x" * 1000] * 1000}), tmp_path / "x.parquet")  # kept once: the file is tiny
    assert (tmp_path / "x.parquet").stat().st_size < 5000
    refusal(tmp_path / "x.parquet", "65,536 bytes", "split the file")


def book(path, *sheets):
    openpyxl = pytest.importorskip("openpyxl", reason="tables of .xlsx: pip install kobza[tables]")
    made = openpyxl.Workbook()
    made.remove(made.active)
    for i, rows in enumerate(sheets):
        sheet = made.create_sheet(f"s{i}")
        for row in rows:
            sheet.append(row)
    made.save(path)
    return path


def test_spreadsheet_cells(tmp_path):
    day = datetime.datetime(1912, 4, 15)
    rows = [
        ["n", "x", "ok", "day", "err", "text", None],
        [3, 0.5, True, day, "#N/A", " a "],
        [],
        [4, None, None, None, None, "b"],
    ]
    records = read_records(book(tmp_path / "x.xlsx", rows))
    assert records.rows[0] == {"n": "3", "x": "0.5", "ok": "true", "day": "1912-04-15", "err": None, "text": " a "}
    assert records.rows[1]["n"] == "4" and records.where(1) == "x.xlsx row 4"
    empty = read_records(book(tmp_path / "y.xlsx", [["a", "b"], ["1"]]))
    assert empty.rows == [{"a": "1", "b": None}] and empty.columns == ["a", "b"]


def test_the_first_sheet_is_read_or_the_only_one_with_rows(tmp_path):
    one, two = [["a"], ["1"]], [["a"], ["2"]]
    assert read_records(book(tmp_path / "x.xlsx", one, two)).rows == [{"a": "1"}]
    assert read_records(book(tmp_path / "y.xlsx", [], [["only a title"]], two)).rows == [{"a": "2"}]
    refusal(book(tmp_path / "z.xlsx", [], one, two), "s1, s2", "leave one")
    refusal(book(tmp_path / "w.xlsx", []), "no sheet with rows")


def test_a_spreadsheet_from_a_stranger_is_bounded(tmp_path, monkeypatch):
    path, sheet = book(tmp_path / "x.xlsx", [["a"], ["1"]]), "xl/worksheets/sheet1.xml"
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    entities = f'<!DOCTYPE s [<!ENTITY l0 "ha">{laughs}<!ENTITY x SYSTEM "file:///etc/passwd">]>'.encode()
    hostile = {
        "larger than Excel's own": parts[sheet].replace(b'"2"', b'"2000000000"').replace(b'"A2"', b'"A2000000000"'),
        "amplification": entities
        + parts[sheet].replace(b"<v>1</v>", b"<v>&l9;</v>").replace(b"<t>1</t>", b"<t>&l9;</t>"),
        "undefined entity": entities
        + parts[sheet].replace(b"<v>1</v>", b"<v>&x;</v>").replace(b"<t>1</t>", b"<t>&x;</t>"),
    }
    for why, data in hostile.items():
        with zipfile.ZipFile(tmp_path / "y.xlsx", "w") as archive:
            for name, part in (parts | {sheet: data}).items():
                archive.writestr(name, part)
        refusal(tmp_path / "y.xlsx", "y.xlsx", why)
    monkeypatch.setattr(table, "LIMIT_BYTES", 1000)
    refusal(path, "bytes unpacked")


@pytest.mark.parametrize("name", ["x.parquet", "x.xlsx"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"PK\3\4", b"a,b\n1,2\n", b"PAR1" + bytes(40) + b"PAR1"])
def test_a_file_that_is_not_what_its_name_says(write, name, content):
    pytest.importorskip("pyarrow" if "parquet" in name else "openpyxl", reason="pip install kobza[tables]")
    refusal(write(name, content), name, "not a whole ." + name[2:])


def test_an_old_spreadsheet_is_told_apart(write):
    pytest.importorskip("openpyxl", reason="pip install kobza[tables]")
    refusal(write("x.xlsx", b"\xd0\xcf\x11\xe0" + bytes(600)), "an .xls, or under a password", "save it as .xlsx")


def test_a_missing_library_is_named(write, monkeypatch):
    for name, module in (("x.xlsx", "openpyxl"), ("x.parquet", "pyarrow")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        refusal(write(name, b""), f'needs {module}: pip install "kobza[tables]"')


@pytest.mark.parametrize(
    "form, record",
    [
        ("alpaca", {"instruction": "a", "output": "b"}),
        ("alpaca", {"instruction": "a", "input": "c", "output": "b", "text": "x"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}),
        ("messages", {"conversations": [{"role": "user", "content": "a"}]}),
        ("messages", {"messages": [{"role": "user", "content": "a"}], "id": "7"}),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("unpaired", {"prompt": "a", "completion": "b", "label": True}),
        ("prompts", {"prompt": "a", "answer": "b"}),
        ("prompts", {"prompt": "a"}),
        ("table", {"prompt": "a", "answer": "b", "year": "1912"}),
        ("table", {"messages": "hello", "b": "c"}),
        ("table", {"instruction": "a", "answer": "c"}),
    ],
)
def test_forms_are_known_by_names_and_shapes(write, form, record):
    assert read_records(write("x.jsonl", lines(record))).form == form


# ---- refused -------------------------------------------------------------------------------------------------------

HEAD = "name,note\nAda,fine\n"


@pytest.mark.parametrize(
    "tail, row, byte, why",
    [
        ('Boris,"open\nCleo,x\n', 3, 25, "never closed"),
        ('Їжак,"open\nCleo,"x"\n', 3, 28, "closed in the middle of a cell, at byte 39"),
        ('Boris,"a ""word"" and\nCleo,""\n', 3, 25, "never closed"),
        ('Boris,"a "word" and"\n', 3, 25, "closed in the middle of a cell, at byte 28"),
        ('"B\nC",ok\n"D,\n', 4, 28, "never closed"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_broken_quote_is_named_by_row_and_byte(write, tail, row, byte, why, mark):
    content = (mark + HEAD + tail).encode()
    if mark:
        byte, why = byte + 3, why.partition(" at byte")[0]
    assert content[byte : byte + 1] == b'"'
    refusal(write("x.csv", content), f"x.csv row {row}: the quote at byte {byte} ", why)
    refusal(
        write("x.csv", content.replace(b"\n", b"\r\n")),
        f"x.csv row {row}: the quote at byte {byte + content[:byte].count(10)} ",
    )


def test_a_quote_that_swallows_a_row_by_chance(write):
    refusal(
        write("x.csv", 'a,b,c,d\n1,"2,3,x\n4,5",6\n7,8,9,x\n'), "row 2: 3 cells", "4", "is a quote in it left open?"
    )


@pytest.mark.parametrize(
    "encoding, name", [("cp1251", "CP1251"), ("latin-1", "LATIN1"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16")]
)
def test_another_encoding_is_named_with_row_and_byte(write, encoding, name):
    text = "name,town\nAda,London\n" + ("Олена,Київ\n" if encoding == "cp1251" else "René,Nîmes\n")
    data = text.encode(encoding)
    row, byte = {"CP1251": (3, 21), "LATIN1": (3, 24)}.get(name, (1, 3 if encoding == "utf-16" else 1))
    refusal(write("x.csv", data), f"x.csv row {row}", f" {byte}", f"looks like {name}", f"iconv -f {name} -t UTF-8")


def test_the_row_of_a_wrong_byte_counts_cells_of_several_lines(write):
    refusal(write("x.csv", b'a,b\n"1\n2\n3",x\n\xe9,y\n'), "x.csv row 3: byte 0xe9 at offset 14 ")
    refusal(write("x.jsonl", b'{"a": 1}\n\n{"a": "\xe9"}\n'), "x.jsonl line 3: byte 0xe9 at offset 17 ")
    refusal(write("x.json", b'[\n{"a": "\xe9"}]'), "x.json line 2: byte 0xe9 at offset 9 ")


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("x.csv", "a,b\n1,2\n3\n", ["x.csv row 3: 1 cells and the header has 2"]),
        ("x.csv", "a,b\n1,2,3\n", ["x.csv row 2: 3 cells and the header has 2", "in quotes"]),
        ("x.csv", "a,b, a\n1,2,3\n", ["x.csv: columns 1 and 3 are both named 'a'"]),
        ("x.csv", "a,b\n", ["no rows"]),
        ("x.csv", "", ["no rows"]),
        ("x.csv", "a,b\n1,2\n3,\0x\n", ["x.csv row 3: a NUL at byte 10"]),
        ("x.jsonl", '{"a": 1}\n{"a": "\\u0000"}\n', ["x.jsonl line 2: column 'a' has a NUL"]),
        ("x.jsonl", '{"a": "\\ud800"}\n', ["line 1: column 'a' has half a surrogate"]),
        ("x.jsonl", '{"a": [{"b": "\\ud800"}]}\n', ["line 1: column 'a' has half a surrogate"]),
        ("x.jsonl", '{"a": 1}\n{"a": 2\n', ["x.jsonl line 2: not JSON"]),
        ("x.jsonl", '[{"a": 1}]\n', ["line 1: a list, not an object", ".json"]),
        ("x.jsonl", '{"a": 1, "a": 2}\n', ["line 1", "'a' stands twice"]),
        ("x.jsonl", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n", ["line 1: JSON nested too deeply"]),
        ("x.jsonl", '{"a": ' + "9" * 5000 + "}\n", ["line 1", "trusted"]),
        ("x.json", '{"a": 1}\n{"a": 2}\n', ["x.json", "rename it", ".jsonl"]),
        ("x.json", '{"a": 1}', ["one object with a", '"data"']),
        ("x.json", '{"data": {"a": 1}}', ["x.json: a dict, not a list"]),
        ("x.json", '[{"a": 1}, 2]', ["x.json record 2: a int, not an object"]),
        ("x.json", "[]", ["no rows"]),
        ("x.doc", "a", [".csv", ".xlsx"]),
        ("x.parquet.gz", "a", ["unpack it"]),
    ],
)
def test_what_is_no_table_is_refused_in_a_line(write, name, content, wanted):
    refusal(write(name, content), *wanted)


def test_a_huge_cell_a_bomb_and_a_broken_archive(write, monkeypatch):
    monkeypatch.setattr(table, "CELL_CHARACTERS", 100)
    refusal(write("x.csv", "a,b\n1," + "x" * 101 + "\n"), "x.csv row 2", "100")
    refusal(write("x.jsonl", lines({"a": "x" * 101})), "line 1", "101 characters")
    refusal(write("x.csv", 'a,b\n1,"' + "x,y\n" * 50), "x.csv row 2: the quote at byte 6 is never closed")
    refusal(write("x.csv", b'a,b\n1,"' + b"x,y\n" * 50 + b"\xe9"), "x.csv line 52: byte 0xe9")
    monkeypatch.setattr(table, "LIMIT_BYTES", 1000)
    refusal(write("x.csv.gz", "a\n" + "x\n" * 1000), "more than 1,000 bytes")
    path = write("y.csv.gz", "a\n1\n")
    path.write_bytes(path.read_bytes()[:-9])
    refusal(path, "cannot be read")
    refusal(path.parent / "none.csv", "no such file")


def test_reading_leaves_csv_as_it_was(write):
    import csv

    before = csv.field_size_limit()
    read_records(write("x.csv", PEOPLE))
    refusal(write("x.csv", 'a\n"b'), "never closed")
    assert csv.field_size_limit() == before


@given(st.binary(max_size=200), st.sampled_from(["csv", "tsv", "jsonl", "json", "csv.gz"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data, kind):
    path = tmp_path_factory.mktemp("any") / f"x.{kind}"
    path.write_bytes(data)
    try:
        records = read_records(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert records.rows and all(records.where(i) for i in range(len(records.rows)))


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(
    st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(",;\t"),
)
def test_what_csv_writes_is_read_back(tmp_path_factory, rows, end, delimiter):
    import csv

    path = tmp_path_factory.mktemp("csv") / "x.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([("a", "b", "c"), *rows])
    wanted = [dict(zip("abc", (c if c.strip() else None for c in row), strict=True)) for row in rows]
    wanted = [row for row in wanted if any(row.values())]
    if wanted:
        assert read_records(path).rows == wanted


# ---- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, row, filled",
    [
        ("Who was {name}?[[ They paid {fare}.]]", {"name": "Ada", "fare": "7"}, "Who was Ada? They paid 7."),
        ("Who was {name}?[[ They paid {fare}.]]", {"name": "Ada", "fare": None}, "Who was Ada?"),
        ("[[{a}, {b}: ]]x[[ {a}]]", {"a": "1", "b": None}, "x 1"),
        ("{{{a}}} [b] [[[[c]]]] {{}}", {"a": "1"}, "{1} [b] [[c]] {}"),
        ("[[{{{a}}}]]", {"a": "1"}, "{1}"),
        ("{home dest} { a }", {"home dest": "1", "a": "2"}, "1 2"),
        ("{a}", {"a": "{b} [[ {{ \\1"}, "{b} [[ {{ \\1"),
    ],
)
def test_a_prompt_is_filled(text, row, filled):
    assert Prompt(text).fill(row, "row 2") == filled


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("[[ {a} [[ {b} ]] ]]", "do not nest"),
        ("[[ {a}", "never closed"),
        ("{a} ]]", "]] without [["),
        ("[[ nothing ]] {a}", "names no column"),
        ("{a", "a single {"),
        ("a} {b}", "at character 2: a single }"),
        ("{}", "names no column"),
    ],
)
def test_a_prompt_that_says_nothing_clear_is_refused(text, wanted):
    with pytest.raises(InputError, match="^--prompt: ") as caught:
        Prompt(text)
    assert wanted in str(caught.value)


def test_a_column_that_is_not_there_and_cells_that_are_no_text():
    with pytest.raises(InputError, match="--prompt: x.csv has no column 'nam'; did you mean name?"):
        Prompt("{nam}").check(["name", "age"], "x.csv")
    with pytest.raises(InputError, match="a brace itself is written {{"):
        Prompt('{"a": 1}').check(["name"], "x.csv")
    with pytest.raises(InputError, match="row 3: column 'a' holds a list, not text"):
        Prompt("{a}").fill({"a": ["x"]}, "row 3")
    with pytest.raises(InputError, match="row 3: column 'a' is empty"):
        Prompt("{a}").fill({"a": None}, "row 3")
    assert Prompt("{a} {b} [[{c}]]").empty({"a": None, "b": "x", "c": None}) == ["a"]


@given(cells, cells, st.one_of(st.none(), cells))
def test_filling_takes_any_text_and_what_vanishes_leaves_no_trace(name, town, fare):
    prompt = Prompt("<{name}>[[ paid {fare} at {town};]]!")
    wanted = f"<{name}>!" if fare is None else f"<{name}> paid {fare} at {town};!"
    assert prompt.fill({"name": name, "town": town, "fare": fare}, "row 2") == wanted


@given(st.text(max_size=30))
def test_any_text_escaped_is_itself(text):
    escaped = text.replace("{", "{{").replace("}", "}}")
    if "[[" not in text and "]]" not in text:
        assert Prompt(escaped).fill({}, "row 2") == text


@given(st.text("{}[]ab ", max_size=12))
def test_any_template_is_read_or_refused(text):
    try:
        prompt = Prompt(text)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(prompt.fill(dict.fromkeys(prompt.columns, "x"), "row 2"), str)


# ---- examples ------------------------------------------------------------------------------------------------------


def made(write, *rows, objective="sft", prompt=None, answer=None, system=None, config=ROWS):
    records = read_records(write("x.jsonl", lines(*rows)))
    return make_examples(records, prompt, answer, system, config, objective)


def said(example: Example) -> list[tuple[str, str]]:
    return [(message["role"][0], message["content"]) for message in example.messages]


def test_a_table_is_made_by_templates(write):
    rows = [
        {"name": "Ada", "sex": "f", "lived": "yes", "boat": "3"},
        {"name": "Bo", "sex": "m", "lived": "no"},
        {"name": "Cy"},
    ]
    found = made(
        write,
        *rows,
        prompt="{name}[[ in {boat}]]?",
        answer="{lived}",
        system="Of {name}.",
        config=RowsConfig(group="sex", stratify="lived"),
    )
    assert [said(e) for e in found.examples] == [
        [("s", "Of Ada."), ("u", "Ada in 3?"), ("a", "yes")],
        [("s", "Of Bo."), ("u", "Bo?"), ("a", "no")],
    ]
    assert [(e.group, e.stratum, e.where) for e in found.examples] == [
        ("f", "yes", "x.jsonl line 1"),
        ("m", "no", "x.jsonl line 2"),
    ]
    assert found.skipped == [("x.jsonl line 3", "column 'lived' is empty, which --answer needs")]


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
SHAREGPT = [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
MESSAGES = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A", "reasoning_content": "R", "name": None},
]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))


@pytest.mark.parametrize(
    "record, wanted",
    [
        (ALPACA, [("u", "Add.\n\n1 2"), ("a", "3")]),
        (ALPACA | {"input": "", "system": "S"}, [("s", "S"), ("u", "Add."), ("a", "3")]),
        ({"conversations": SHAREGPT}, [("s", "S"), ("u", "Q"), ("a", "A")]),
        ({"conversations": SHAREGPT, "system": "T"}, [("s", "S"), ("u", "Q"), ("a", "A")]),
        ({"conversations": [*SHAREGPT, {"from": "human", "value": "more"}]}, [("s", "S"), ("u", "Q"), ("a", "A")]),
        ({"messages": MESSAGES * 2, "system": "T"}, [("s", "T"), *[("u", "Q"), ("a", "A")] * 2]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, GOOD]},
            [("u", "Q"), ("a", "good")],
        ),
        ({"prompt": "Q", "answer": "A"}, [("u", "Q"), ("a", "A")]),
        ({"prompt": MESSAGES[:1], "completion": [GOOD]}, [("u", "Q"), ("a", "good")]),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, [("u", "Q"), ("a", "A")]),
    ],
)
def test_known_forms_need_no_templates(write, record, wanted):
    (example,) = made(write, record).examples
    assert said(example) == wanted


def test_messages_keep_what_templates_read(write):
    (example,) = made(write, {"messages": MESSAGES, "tools": [{"name": "f"}]}).examples
    assert example.messages[-1] == {"role": "assistant", "content": "A", "reasoning_content": "R"}
    assert example.extra == {"tools": [{"name": "f"}]}


def test_templates_given_on_purpose_rule_over_a_known_form(write):
    (example,) = made(write, ALPACA, prompt="{input} -> ?", answer="{output}").examples
    assert said(example) == [("u", "1 2 -> ?"), ("a", "3")]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"prompt": MESSAGES[:1], "chosen": "good", "rejected": "bad"},
        {"prompt": MESSAGES[:1], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Q", "chosen": [MESSAGES[0], GOOD], "rejected": [MESSAGES[0], BAD]},
        {"chosen": [MESSAGES[0], GOOD], "rejected": [MESSAGES[0], BAD]},
    ],
)
def test_preferences(write, record):
    (example,) = made(write, record, objective="dpo").examples
    assert said(example) == [("u", "Q"), ("a", "good")] and example.rejected == "bad"
    good, bad = made(write, record, objective="kto").examples
    assert (said(good)[-1], good.desirable, said(bad)[-1], bad.desirable) == (("a", "good"), True, ("a", "bad"), False)
    assert good.group == bad.group != "" and all(e.rejected is None for e in (good, bad))


def test_a_question_to_preferences_may_be_made_of_columns(write):
    (example,) = made(write, {"q": "Q", "chosen": "1", "rejected": "2"}, objective="dpo", prompt="{q}?").examples
    assert said(example) == [("u", "Q?"), ("a", "1")]


@pytest.mark.parametrize(
    "other, why",
    [
        ({"rejected": [{"role": "user", "content": "P"}, BAD]}, "chosen and rejected answer different questions"),
        ({"rejected": [MESSAGES[0], GOOD]}, "chosen and rejected are the same"),
        ({"rejected": None}, "no answer in its column 'rejected'"),
        ({"rejected": MESSAGES[:1]}, "no answer in its column 'rejected'"),
    ],
)
def test_pairs_that_compare_nothing_are_skipped(write, other, why):
    pair = {"chosen": [MESSAGES[0], GOOD], "rejected": [MESSAGES[0], BAD]}
    assert made(write, pair, pair | other, objective="dpo").skipped == [("x.jsonl line 2", why)]


def test_a_system_message_of_the_files_own_stays(write):
    found = made(write, ALPACA | {"system": "S"}, ALPACA, system="T {output}")
    assert [said(e)[0] for e in found.examples] == [("s", "S"), ("s", "T 3")]


def test_unpaired_answers(write):
    rows = [{"prompt": "Q", "completion": "A", "label": label} for label in (True, False, "yes", 0)]
    assert [e.desirable for e in made(write, *rows, objective="kto").examples] == [True, False, True, False]
    assert len(made(write, *rows).examples) == 2  # supervised: the good ones


def test_questions_for_a_reward(write):
    (example,) = made(write, {"prompt": "1 + 2", "answer": 3}, objective="grpo").examples
    assert said(example) == [("u", "1 + 2")] and example.expected == "3"
    (example,) = made(write, {"a": 1, "b": 2}, objective="grpo", prompt="{a} + {b}").examples
    assert said(example) == [("u", "1 + 2")] and example.expected is None
    (example,) = made(write, {"messages": MESSAGES}, objective="grpo").examples
    assert said(example) == [("u", "Q")] and example.expected == "A"


@pytest.mark.parametrize(
    "record, why",
    [
        ({"instruction": "a", "output": " "}, "its answer is empty"),
        ({"instruction": "", "input": "", "output": "b"}, "its question is empty"),
        ({"messages": [GOOD]}, "it begins with an answer"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "its answer is empty"),
        ({"messages": [{"role": "system", "content": "S"}]}, "it has no question"),
        ({"messages": [{"role": "user", "content": " "}, GOOD]}, "a message of the user is empty"),
        (
            {"messages": [*MESSAGES, MESSAGES[0], {"role": "assistant", "content": None}]},
            "a message of the assistant is empty",
        ),
    ],
)
def test_rows_with_nothing_to_learn_are_skipped_and_named(write, record, why):
    whole = ALPACA if "instruction" in record else {"messages": MESSAGES}
    found = made(write, whole, record)
    assert found.skipped == [("x.jsonl line 2", why)] and len(found.examples) == 1
    with pytest.raises(InputError, match="1 of 1 rows have nothing to learn") as caught:
        made(write, record)
    assert why in str(caught.value) and "x.jsonl line 1" in str(caught.value)


@pytest.mark.parametrize(
    "record, options, wanted",
    [
        ({"a": "1", "b": "2"}, {}, "wants --prompt.*columns: a, b"),
        ({"a": "1", "b": "2"}, {"prompt": "{a}"}, "wants --answer"),
        ({"a": "1", "b": "2"}, {"answer": "{a}"}, "wants --prompt"),
        ({"a": "1", "b": "2"}, {"prompt": "{a}", "answer": "b"}, "--answer 'b' names no column; write {b}"),
        ({"alpha": "1", "b": "2"}, {"prompt": "{alpa}", "answer": "{b}"}, "did you mean alpha?"),
        ({"a": "1", "b": ["2"]}, {"prompt": "{a}", "answer": "{b}"}, "line 1: column 'b' holds a list, not text"),
        ({"a": "1", "b": "2"}, {"objective": "dpo"}, "wants columns chosen and rejected; it has a, b"),
        (ALPACA, {"objective": "kto"}, "wants columns prompt, completion and label"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"objective": "grpo"}, "already judged"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"objective": "dpo", "answer": "{chosen}"},
            "--answer has no effect",
        ),
        ({"chosen": "b", "rejected": "c"}, {"objective": "dpo"}, "no question"),
        (
            {"prompt": "a", "completion": "b", "label": "maybe"},
            {"objective": "kto"},
            "label is 'maybe'; it must be true or false",
        ),
        (
            {"conversations": [{"from": "humen", "value": "x"}]},
            {},
            "message 1 of 'conversations' is from 'humen'; did you mean human?",
        ),
        ({"conversations": SHAREGPT}, {"system": "T"}, "--system has no effect"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {}, "parts that are not text"),
        ({"messages": [{"role": "user", "content": 3}]}, {}, "is a int, not text"),
        ({"messages": [{"role": "user", "content": "x"}, "y"]}, {}, "no list of messages"),
        ({"messages": [{"content": "x"}]}, {}, "has no role"),
        ({"messages": MESSAGES, "tools": "{}"}, {}, "column 'tools' is no list"),
        ({"messages": MESSAGES, "tools": "["}, {}, "column 'tools': not JSON"),
        (
            ALPACA,
            {"config": RowsConfig(group="instructio")},
            "--group: x.jsonl has no column 'instructio'; did you mean instruction",
        ),
        (ALPACA, {"config": RowsConfig(stratify="x")}, "--stratify"),
        ({**ALPACA, "g": ["x"]}, {"config": RowsConfig(group="g")}, "line 1: column 'g' holds a list"),
    ],
)
def test_what_cannot_be_meant_is_refused(write, record, options, wanted):
    with pytest.raises(InputError, match=wanted) as caught:
        made(write, record, **options)
    assert "\n" not in str(caught.value)


def test_a_template_that_fills_in_nothing_skips_the_row(write):
    rows = [{"a": "1", "b": "2"}, {"a": None, "b": "2"}]
    found = made(write, *rows, prompt="[[{a}]] ", answer="{b}")
    assert found.skipped == [("x.jsonl line 2", "--prompt has nothing to fill in")]


def test_mostly_empty_answers_are_an_error_that_names_the_first(write):
    rows = [ALPACA, ALPACA | {"output": ""}, ALPACA | {"output": None}]
    assert len(made(write, *rows[:2]).skipped) == 1
    with pytest.raises(
        InputError, match="2 of 3 rows have nothing to learn: in 2 its answer is empty, the first is x.jsonl line 2"
    ):
        made(write, *rows)


# ---- turns ---------------------------------------------------------------------------------------------------------


def example(i: int, system: str = "", **more) -> Example:
    head = ({"role": "system", "content": system},) if system else ()
    pair = ({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"})
    return Example((*head, *pair), f"row {i}", **more)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 3))
def test_joined_turns_use_each_example_once(count, n, seed):
    examples = [example(i, "S" * (i % 3 == 0)) for i in range(count)]
    joined = join_turns(examples, n, seed)
    answers = Counter(m["content"] for e in joined for m in e.messages if m["role"] == "assistant")
    assert answers == Counter(f"a{i}" for i in range(count))
    for e in joined:
        roles = [m["role"] for m in e.messages]
        pairs = roles[1:] if roles[0] == "system" else roles
        assert pairs == ["user", "assistant"] * (len(pairs) // 2) and len(pairs) <= 2 * n
        systems = {int(m["content"][1:]) % 3 == 0 for m in e.messages if m["role"] == "user"}
        assert systems == {roles[0] == "system"}
        said_in = [message["content"] for message in e.messages if message["role"] != "system"]
        assert [q[1:] for q in said_in[::2]] == [a[1:] for a in said_in[1::2]]
    assert len(joined) <= count // n + 2
    assert join_turns(examples, n, seed) == joined


def test_the_seed_draws_the_turns_and_answers_that_are_judged_stand_alone():
    examples = [example(i) for i in range(20)]
    assert join_turns(examples, 1, 0) == examples
    assert join_turns(examples, 2, 0) != join_turns(examples, 2, 1)
    assert join_turns(examples, 2, 0)[0].where.count("row ") == 2
    with pytest.raises(InputError, match="--turns 2 is for"):
        join_turns([example(0, rejected="x")], 2, 0)


# ---- split ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("xyz"), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_is_a_partition_with_every_stratum_its_share(strata, fraction, seed):
    examples = [example(i, stratum=s) for i, s in enumerate(strata)]
    train, val = split(examples, fraction, seed)
    assert sorted((*train, *val), key=examples.index) == examples and train and val
    assert abs(len(val) - fraction * len(examples)) <= 1
    for stratum, size in Counter(strata).items():
        share = len(val) / len(examples) * size
        assert abs(sum(e.stratum == stratum for e in val) - share) < 1
    assert split(examples, fraction, seed) == (train, val)


@given(
    st.lists(st.sampled_from(["", "a", "b", "c", "d"]), min_size=2, max_size=40),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_groups_are_never_parted(groups, fraction, seed):
    examples = [example(i, group=g, stratum="xy"[i % 2]) for i, g in enumerate(groups)]
    if len(set(groups)) == 1 and groups[0]:
        with pytest.raises(InputError, match="one group"):
            split(examples, fraction, seed)
        return
    train, val = split(examples, fraction, seed)
    assert train and val and len(train) + len(val) == len(examples)
    assert not {e.group for e in train} & {e.group for e in val} - {""}
    largest = max(Counter(g for g in groups if g).values(), default=1)
    assert abs(len(val) - fraction * len(examples)) <= 2 * largest  # each of two strata misses by less than a group


def test_the_seed_decides_and_too_few_are_refused():
    examples = [example(i) for i in range(50)]
    assert split(examples, 0.1, 0)[1] != split(examples, 0.1, 1)[1]
    assert [e.where for e in split(examples, 0.1, 0)[1]] == [f"row {i}" for i in (2, 4, 18, 23, 36)]  # on every machine
    with pytest.raises(InputError, match="1 examples"):
        split(examples[:1], 0.5, 0)


def test_shares():
    assert shares({"a": 5, "b": 3, "c": 2}, 4) == {"a": 2, "b": 1, "c": 1}
    assert list(shares({"b": 1, "a": 1}, 1).values()) == [0, 1]  # by name, not by order

"""The notebook runs from top to bottom, with few steps."""

import contextlib
import io
import json
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "first_model.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_runs_and_learns(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"SPEAKER {i % 7}:\nTo be, or not to be, number {i}.\n\n" for i in range(400)))
    monkeypatch.setattr("kobza.hub.shakespeare.default_text", lambda: (text, "a text made by the test"))
    names: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for source in code_cells():
            few = source.replace("STEPS = 300", "STEPS = 12").replace("tokens=200", "tokens=20")
            few = few.replace("ROMEO", "SPEAKER")
            exec(compile(few, str(NOTEBOOK), "exec"), names)
    assert names["STEPS"] == 12
    first, last = names["history"][0][1], names["history"][-1][1]
    assert last < first - 0.5, "12 steps on a repetitive text must help"
    assert "SPEAKER:" in printed.getvalue()


def test_the_notebook_holds_no_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells)

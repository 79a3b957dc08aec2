"""kobza report: a run's folder -> its pictures drawn anew, and the coach's remarks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from kobza.checkpoint import read_best
from kobza.describe.parts import total_parameters
from kobza.report.coach import meaning, remarks
from kobza.report.console import facts_of, landmarks_of
from kobza.report.pages import draw, read_records
from kobza.run import open_run


def main(path: Path, as_json: bool) -> int:
    """Draw and remark -> exit code."""
    run = open_run(path)
    records, landmarks, facts = read_records(path), landmarks_of(run), facts_of(run, total_parameters(run.config.model))
    picture, page = draw(run, records, landmarks, facts)
    found = remarks(records, landmarks, facts)
    best = read_best(path)
    if as_json:
        content = {"best": best, "remarks": [asdict(r) for r in found], "picture": str(picture), "report": str(page)}
        print(json.dumps(content | {"landmarks": asdict(landmarks)}))
        return 0
    if best:
        print(f"best validation loss {best['val_loss']:.4f} at step {best['step']}")
        print(meaning(best["val_loss"], landmarks))
    for remark in found:
        print(f"coach: {remark.text} {remark.remedy}")
    print(f"picture   {picture}\nreport    {page}")
    return 0

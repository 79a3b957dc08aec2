"""A run's folder -> loss.png and report.html."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from kobza.config import require, to_dict
from kobza.pages.shell import write_png
from kobza.report.coach import Facts
from kobza.report.landmarks import Landmarks
from kobza.report.metrics import Record, read_metrics
from kobza.report.page import write_report
from kobza.report.picture import loss_figure
from kobza.run import Run


def draw(run: Run, records: list[Record], landmarks: Landmarks, facts: Facts) -> tuple[Path, Path]:
    """Draw a run's pictures anew -> the paths of loss.png and report.html."""
    out = run.out
    write_png(out / "loss.png", loss_figure(records, landmarks))
    page = write_report(out, records, landmarks, facts, read_samples(out), out.name, to_dict(run.config))
    return out / "loss.png", page


def read_records(out: Path) -> list[Record]:
    """The records of a run that has made a step."""
    records = read_metrics(out / "metrics.jsonl")
    require(bool(records), f"{out / 'metrics.jsonl'}: no record of a step; the run has not made one yet")
    return records


def read_samples(out: Path) -> list[dict[str, Any]]:
    """The samples of a run, of a step the last one written; what a kill cut short is left out."""
    path, samples = out / "samples.jsonl", {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            sample = json.loads(line)
            samples[int(sample["step"])] = {"step": int(sample["step"]), "text": str(sample["text"])}
    return list(samples.values())

"""A run's folder -> loss.png and report.html."""

from __future__ import annotations

import json
from pathlib import Path

from kobza.config import require, to_dict
from kobza.report.console import facts_of
from kobza.report.landmarks import measure_landmarks
from kobza.report.metrics import read_metrics
from kobza.report.page import write_report
from kobza.report.picture import loss_figure, write_png
from kobza.run import open_run


def draw(out: Path, n_params: int) -> tuple[Path, Path]:
    """Draw a run's pictures anew -> the paths of loss.png and report.html."""
    run = open_run(out)
    require((out / "metrics.jsonl").exists(), f"{out}: no metrics.jsonl; the run has not made a step yet")
    records = read_metrics(out / "metrics.jsonl")
    landmarks = measure_landmarks(
        run.corpus.train.array(20_000_000), run.tokenizer.vocab_size, run.tokenizer.piece_bytes
    )
    write_png(out / "loss.png", loss_figure(records, landmarks))
    facts = facts_of(run, n_params)
    page = write_report(out, records, landmarks, facts, read_samples(out), out.name, to_dict(run.config))
    return out / "loss.png", page


def read_samples(out: Path) -> list[dict[str, object]]:
    """The samples of a run, of a step the last one written."""
    path = out / "samples.jsonl"
    if not path.exists():
        return []
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({sample["step"]: sample for sample in samples}.values())

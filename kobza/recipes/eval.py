"""kobza eval: a model and a text -> loss, measures of what it writes, memorisation; or its accuracy on tasks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from kobza.checkpoint import Loaded, checkpoint_path, list_checkpoints
from kobza.config import require
from kobza.device import make_runtime, memory_error
from kobza.evals.evaluation import Evaluation, How, Subject, as_dict, evaluate, make_subject, plain, progress
from kobza.evals.picture import write_picture
from kobza.evals.stats import FEWEST_UNITS, scipy_stats
from kobza.evals.tables import checkpoint_table, evaluation_tables, task_table
from kobza.evals.tasks import Judged, accuracy, judge, read_tasks
from kobza.hub.store import find_model
from kobza.recipes.generate import check_samples
from kobza.recipes.tuned import open_checkpoint


def main(
    path: Path,
    text: list[str],
    tasks: Path | None,
    checkpoints: bool,
    text_field: str,
    unknown: str | None,
    device: str,
    as_json: bool,
    settings: dict[str, int],
) -> int:
    """Evaluate a model, or all checkpoints of a run -> exit code. `settings`: fields of How that are not the default."""
    path, how = find_model(path), How(**settings)
    console = Console(stderr=as_json, highlight=False)
    items = None if tasks is None else read_tasks(tasks)
    place = make_runtime(device, "auto").device
    folders = all_checkpoints(path) if checkpoints else [path]
    first = open_checkpoint(folders[0], place, unknown)
    size = first.run.model.max_seq_len
    stride = settings.get("stride", 1)
    require(1 <= stride <= size, f"--stride is {stride}; it must be between 1 and max_seq_len {size}")
    require(how.samples >= FEWEST_UNITS, f"--samples is {how.samples}; an interval needs at least {FEWEST_UNITS}")
    require(how.sample_tokens > 0, f"--sample-tokens is {how.sample_tokens}; it must be at least 1")
    require(0 <= how.seed < 2**63, f"--seed is {how.seed}; it must be in [0, 2**63)")
    wanted = bool(text) or items is None
    if wanted:
        check_samples(first, how.samples)
    scipy_stats()  # absent, it is said before the work rather than after
    subject = make_subject(path, text, text_field, first.tokenizer, how.most) if wanted else None
    rows: list[dict[str, Any]] = []
    evaluations: list[Evaluation] = []
    with memory_error(how.samples, size):
        for i, folder in enumerate(folders):
            with console.status(f"checkpoint {i + 1} of {len(folders)}"):
                loaded = first if i == 0 else open_checkpoint(folder, place, unknown)
                judged = [] if items is None else judge(loaded.model, loaded.tokenizer, items)
                e = None if subject is None else evaluate(loaded.model, loaded.tokenizer, subject, how)
            rows.append(row_of(loaded, e, judged))
            evaluations += [] if e is None else [e]
            if not as_json and not checkpoints:
                show(console, loaded, subject, e, judged, tasks)
            elif not as_json and judged:
                console.print(task_table(judged, f"step {loaded.provenance.get('step', '?')}: {tasks}"))
    if checkpoints:
        return conclude(console, path, rows, evaluations, as_json)
    if as_json:
        print(
            json.dumps(rows[0] | ({} if subject is None else described(subject)), ensure_ascii=False, allow_nan=False)
        )
    return 0


def all_checkpoints(path: Path) -> list[Path]:
    """The folders of a run's checkpoints, in the order of training."""
    steps = list_checkpoints(path)
    require(bool(steps), f"{path}: no checkpoints/ here; --checkpoints wants a run's folder")
    return [checkpoint_path(path, step) for step in steps]


def row_of(loaded: Loaded, e: Evaluation | None, judged: list[Judged]) -> dict[str, Any]:
    """One model's results for JSON."""
    row: dict[str, Any] = {"model": str(loaded.folder), "step": loaded.provenance.get("step")}
    row |= {} if e is None else as_dict(e)
    if judged:
        found = accuracy(judged)
        shares = {key: plain(getattr(found, key)) for key in ("choices", "choices_by_length", "generation")}
        items = [{"line": one.item.line, **{k: v for k, v in asdict(one).items() if k != "item"}} for one in judged]
        row["tasks"] = shares | {"chance": found.chance if found.choices.n else None, "items": items}
    return row


def described(subject: Subject) -> dict[str, Any]:
    """What was evaluated on, for JSON."""
    sources = [document.source for document in subject.documents[:100]]
    return {"text": {"sources": sources, "documents": len(subject.documents), "cut": subject.cut}}


def show(
    console: Console,
    loaded: Loaded,
    subject: Subject | None,
    e: Evaluation | None,
    judged: list[Judged],
    tasks: Path | None,
) -> None:
    """Print one model's results."""
    step = loaded.provenance.get("step", "?")
    console.print(f"model         {escape(str(loaded.folder))}, step {step}", soft_wrap=True)
    if judged:
        console.print(task_table(judged, str(tasks)))
    if e is None or subject is None:
        return
    n = len(subject.documents)
    source = escape(subject.documents[0].source) if n == 1 else f"{n:,} documents"
    cut = ", the first of the text (--most)" if subject.cut else ""
    console.print(f"text          {source}: {e.loss.n_tokens:,} tokens, {e.loss.n_bytes:,} bytes{cut}; "
                  f"intervals over {e.loss.unit}s\n", soft_wrap=True)  # fmt: skip
    for part in evaluation_tables(e):
        console.print(part)
        if not isinstance(part, str):
            console.print()


def conclude(
    console: Console, path: Path, rows: list[dict[str, Any]], evaluations: list[Evaluation], as_json: bool
) -> int:
    """The table, the picture and the JSON of all checkpoints -> exit code."""
    result: dict[str, Any] = {"run": str(path), "checkpoints": rows}
    if evaluations:
        steps = [row["step"] for row in rows]
        picture = path / "eval.png"
        write_picture(picture, steps, evaluations)
        result |= {"trends": progress(evaluations), "picture": str(picture)}
        if not as_json:
            console.print(checkpoint_table(steps, evaluations, result["trends"]))
            console.print(f"picture       {escape(str(picture))}", soft_wrap=True)
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    return 0

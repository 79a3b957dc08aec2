"""kobza lab run: designs -> paired runs in worker processes -> reports. One run is trial.py's work, a report lab_report.py's."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kobza.config import require
from kobza.lab.design import Design, find_design, read_design
from kobza.lab.report import read_result
from kobza.lab.statistics import extra
from kobza.recipes.lab_report import show

FINEST = 20  # lines of progress where no person watches


def run(words: list[str], out: Path, jobs: int, device: str, as_json: bool) -> int:
    """Do what designs still lack, then report -> exit code."""
    from kobza.device import pick_device
    from kobza.lab.runner import WorkerLost
    from kobza.run import lock

    console = Console(stderr=as_json, highlight=False)
    designs = [read_design(find_design(word)) for word in words]
    check_designs(designs, jobs)
    go_on = f"kobza lab run {shlex.join(words)} --out {shlex.quote(str(out))}"
    with lock(out):
        try:
            folders = work_off(designs, out, jobs, pick_device(device).type, console)
        except KeyboardInterrupt:
            console.print(f"interrupted; what is done is kept. Go on: {go_on}", markup=False, soft_wrap=True)
            return 130
        except WorkerLost as error:
            print(f"kobza: {error}; what is done is kept. Go on with fewer --jobs: {go_on}", file=sys.stderr)
            return 1
    return show(folders, console, as_json)


def check_designs(designs: list[Design], jobs: int) -> None:
    """Refuse what would fail only after the last run."""
    for library in ("scipy", "statsmodels"):
        extra(library)
    require(bool(designs), "no design given; name a .toml file, or aa, the control whose arms are equal")
    names = [design.name for design in designs]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"two designs are called {twice}, and would share a folder; rename one file")
    require(jobs >= 0, f"--jobs is {jobs}; it must be 0 (as many as fit) or more")
    timed = [design.name for design in designs if design.budget.match == "seconds"]
    require(
        not timed or jobs < 2,
        f"--jobs {jobs}: {' '.join(timed)} matches seconds, which only a run alone keeps; leave --jobs out",
    )


def work_off(designs: list[Design], out: Path, jobs: int, device: str, console: Console) -> list[Path]:
    """Plan all designs, then do their open runs -> the designs' folders. Runs that must be alone come last."""
    from kobza.lab.plan import make_plan
    from kobza.lab.runner import n_cores, run_trials
    from kobza.lab.store import write_design
    from kobza.recipes import trial as one

    folders, shared, alone = [], {}, {}
    for design in designs:
        text, note = one.lab_text(list(design.text))
        plan = make_plan(
            design, text, out, device, one.seconds_per_step, one.given_tokenizer, partial(one.check, device)
        )
        folders.append(write_design(out, design, plan.arms, plan.trials, plan.facts))
        everyone = plan.in_order()
        wanted = {t.hash: t for t in everyone if read_result(out, t.hash) is None}
        done = f"; {len(everyone) - len(wanted)} done before" * (len(wanted) < len(everyone))
        words = f"{len(plan.arms)} arms, {len(everyone)} runs at {design.budget.words()}{done}"
        console.print(f"{design.title}\n  {words}\n  {note}", markup=False)
        timed = design.budget.match == "seconds"
        if timed and wanted:
            console.print("  its runs go one at a time, for seconds are matched: keep the machine idle", markup=False)
        (alone if timed else shared).update(wanted)
    shared = {name: t for name, t in shared.items() if name not in alone}
    with RunLine(console, [*shared.values(), *alone.values()]) as line:
        for trials, at_a_time in ((shared, jobs or n_cores()), (alone, 1)):
            for done_trial, result in run_trials(out, list(trials.values()), one.trial, at_a_time):
                line.note(done_trial, result)
    return folders


class RunLine:
    """Progress in FLOPs, for runs differ in length: a bar with the time left, or a line now and then where nobody watches."""

    def __init__(self, console: Console, trials: list[Any]):
        columns = (BarColumn(bar_width=24), TextColumn("{task.fields[runs]}"), TimeRemainingColumn())
        self.console, self.n, self.done, self.said = console, len(trials), 0, 0
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task("lab", total=sum(t.flops for t in trials), runs=f"0 of {self.n} runs")

    def __enter__(self) -> RunLine:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def note(self, trial: Any, result: dict[str, Any]) -> None:
        """Count a run."""
        self.done += 1
        runs = f"{self.done} of {self.n} runs"
        self.progress.update(self.task, advance=trial.flops, runs=runs)
        value = "diverged" if result["diverged"] else f"held-out loss {result['last']['val_loss']:.4f}"
        due = self.done * FINEST // self.n
        if not self.console.is_terminal and due > self.said:
            self.said = due
            self.console.print(f"{runs}: {trial.label} seed {trial.seed}: {value}", markup=False)

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.progress.stop()

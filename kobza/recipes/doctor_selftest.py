"""kobza doctor explain, selftest: what the codes mean, and the doctor examined by injected bugs and clean controls."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console

from kobza.config import require
from kobza.doctor.explain import codes, explain
from kobza.doctor.selftest import AREAS, Trial, rates, trials, unproven
from kobza.recipes.doctor import grid


def tell(code: str | None, as_json: bool) -> int:
    """Print what a code means; without one, all codes in a line each -> exit code."""
    if code is None:
        rows = [asdict(row) for row in codes().values()]
        if as_json:
            print(json.dumps(rows))
        else:
            table = [
                ["code", "area", "worst", "what"],
                *([r["code"], r["area"], r["severity"], r["title"]] for r in rows),
            ]
            Console(highlight=False, markup=False).print(grid(table, f"{len(rows)} kinds of bugs"))
        return 0
    row = explain(code)
    if as_json:
        print(json.dumps(asdict(row)))
        return 0
    console = Console(highlight=False, markup=False)
    console.print(f"{row.code}  {row.title}  (area {row.area}, at worst {row.severity})", style="bold")
    for name in ("looks", "detect", "why", "fix"):
        console.print(f"  {name:<9} {getattr(row, name)}")
    console.print(f"  {'sources':<9} {'; '.join(row.sources)}")
    return 0


def selftest(areas: list[str], seeds: int, as_json: bool) -> int:
    """Examine the doctor: injected bugs and clean controls -> 0 where it catches at least 95% and never cries wolf."""
    for area in areas:
        require(area in AREAS, f"no area {area!r}; one of {', '.join(AREAS)}")
    require(seeds > 0, f"--seeds is {seeds}; it must be at least 1")
    console, done, holes = Console(stderr=True), [], {}
    with console.status("") as status:
        for area in areas or list(AREAS):
            for trial in trials(area, seeds):
                status.update(f"{area}: {trial.name}")
                done.append(trial)
            if missing := unproven(area):
                holes[area] = missing
    good = rates(done).good and not holes
    if as_json:
        rows = [asdict(trial) | {"good": trial.good} for trial in done]
        print(json.dumps({"trials": rows, "rates": asdict(rates(done)), "unproven": holes}))
    else:
        print_selftest(done, holes)
    return 0 if good else 1


def print_selftest(done: list[Trial], holes: dict[str, list[str]]) -> None:
    """A row an area, what went wrong, and the two rates."""
    console = Console(highlight=False, markup=False)
    rows = [["area", "injected", "caught", "clean", "false alarms", "seconds"]]
    for area in dict.fromkeys(t.area for t in done):
        mine = [t for t in done if t.area == area]
        r = rates(mine)
        rows.append([area, *map(str, (r.injected, r.caught, r.clean, r.alarms)), f"{sum(t.seconds for t in mine):.1f}"])
    console.print(grid(rows, "the doctor examined"))
    for trial in done:
        if not trial.good:
            found = ", ".join(trial.found) or "nothing"
            broken = f"; {'; '.join(trial.broken)}" if trial.broken else ""
            expected = trial.expected or "nothing"
            console.print(
                f"  {trial.area}: {trial.name} ({trial.dtype}, seed {trial.seed}): expected {expected}, found {found}{broken}"
            )
    for area, missing in holes.items():
        console.print(f"  {area}: no mutation injects {', '.join(missing)}")
    r = rates(done)
    share = f"{r.caught / r.injected:.1%}" if r.injected else "-"
    console.print(
        f"detection {share} ({r.caught} of {r.injected}, at least 95%); false alarms {r.alarms} of {r.clean} (0 allowed)"
    )


def contract() -> int:
    """Print what `kobza doctor train` asks of make_step -> exit code."""
    from kobza.doctor.training.steps import CONTRACT  # with torch

    print(CONTRACT, end="")
    return 0

"""A design's folder -> one JSON-ready dict: arms with what they spent, comparisons, trends, warnings, curves.

This is the whole truth of a report; page.py and picture.py only show it and debates.py tabulates it. An unfinished design gives a
report of what is there, which says so. No torch here: a report is read where nothing can be trained.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from kobza.config import InputError, require
from kobza.lab.design import sized
from kobza.lab.statistics import UNITS, Comparison, Control, averaged, compare, false_positives, judge, trend

FORMAT = 1  # of result.json, design.json and report.json; a new number leaves old results aside
OFF_BUDGET = 0.02  # a mismatch above this of what was to be equal is remarked

Content = dict[str, Any]


def assemble(folder: Path) -> Content:
    """The report of the design in a folder DIR/<design>."""
    design = read_noted(folder)
    arms = [arm_content(arm, folder.parent, design) for arm in design["arms"]]
    done, wanted = sum(len(arm["values"]) for arm in arms), sum(len(arm["runs"]) for arm in design["arms"])
    require(done > 0, f"{folder}: no run is done yet; start with kobza lab run")
    control = control_of(arms, design) if design["repeats"] else None
    comparisons = [] if control else comparisons_of(arms, design)
    keys = "name title plan measure at alpha n_seeds budget base text eval_bytes factors"
    content = {"format": FORMAT, **{key: design[key] for key in keys.split()}, "unit": UNITS[design["measure"]]}
    content |= {"runs_done": done, "runs_wanted": wanted}
    content |= {"comparisons": [plain(c) for c in comparisons], "control": asdict(control) if control else None}
    content |= {"trends": [] if control else trends_of(arms, comparisons, design)}
    content |= {"machine": machine(arms), "warnings": warnings(arms, comparisons, design, done, wanted)}
    for arm in arms:
        del arm["results"]
    return content | {"arms": arms, "verdict": headline(content)}


def design_folders(path: Path) -> list[Path]:
    """The designs in a lab's folder, or the one whose folder this is."""
    if (path / "design.json").exists():
        return [path]
    require(path.is_dir(), f"{path}: no such folder; give the lab's folder, the --out of kobza lab run")
    found = sorted(p.parent for p in path.glob("*/design.json"))
    require(bool(found), f"{path}: no design was run here; start with kobza lab run DESIGN.toml --out {path}")
    return found


def read_noted(folder: Path) -> Content:
    """The design.json that a lab run noted."""
    path = folder / "design.json"
    try:
        design = json.loads(path.read_text(encoding="utf-8"))
        made = design["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({type(error).__name__}); run the design again, its runs are kept") from None
    require(made == FORMAT, f"{path}: format {made}, not {FORMAT}; run the design again")
    return design


def is_begun(folder: Path) -> bool:
    """Whether any run of a design is done."""
    design = read_noted(folder)
    names = (name for arm in design["arms"] for name in arm["runs"].values())
    return any(result_path(folder.parent, name).exists() for name in names)


def result_path(out: Path, name: str) -> Path:
    """Where the result of a run lies."""
    return out / "runs" / name / "result.json"


def read_result(out: Path, name: str) -> Content | None:
    """The result of a run, or None if it is not done."""
    path = result_path(out, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def plain(c: Comparison) -> Content:
    """A comparison as JSON holds it."""
    return asdict(c) | {"half_width": c.half_width, "pairs": {str(seed): d for seed, d in c.pairs.items()}}


# ---- arms ----------------------------------------------------------------------------------------------------------


def arm_content(arm: Content, out: Path, design: Content) -> Content:
    """An arm of design.json with the values and costs of its finished runs."""
    found = {int(seed): read_result(out, name) for seed, name in arm["runs"].items()}
    results = {seed: result for seed, result in found.items() if result is not None}
    values = {seed: None if r["diverged"] else r[design["at"]][design["measure"]] for seed, r in results.items()}
    finite = [v for v in values.values() if v is not None]
    whole = [r for r in results.values() if not r["diverged"]]
    content = {key: arm[key] for key in ("name", "size", "levels", "runs")}
    content |= {"label": sized(arm["name"], arm["size"])}
    content |= {"settings": arm["values"], "values": values, "mean": fmean(finite) if finite else None}
    content |= {"sd": stdev(finite) if len(finite) > 1 else None, "diverged": len(values) - len(finite)}
    for key in ("parameters", "steps", "flops"):
        content[key] = next((r[key] for r in results.values()), None)
    content["tokens"] = next((r["tokens"] for r in whole), None)
    content["seconds"] = fmean(r["seconds"] for r in whole) if whole else None
    return content | {"curve": mean_curve(whole, design["measure"]), "results": results}


def mean_curve(results: list[Content], measure: str) -> Content:
    """The mean learning curve over seeds, with the spread: lists of equal length by name."""
    curves = [r["curve"] for r in results]
    n = min((len(curve) for curve in curves), default=0)
    values = np.array([[point[measure] for point in curve[:n]] for curve in curves]).reshape(len(curves), n)
    first = curves[0][:n] if curves else []
    per_token = results[0]["flops"] / max(1, results[0]["tokens"]) if results else 0.0
    names = ("step", "tokens")
    content: Content = {name: [point[name] for point in first] for name in names}
    content["seconds"] = [fmean(curve[i]["seconds"] for curve in curves) for i in range(n)]
    content["flops"] = [point["tokens"] * per_token for point in first]
    content["mean"] = values.mean(axis=0).tolist() if n else []
    content["sd"] = values.std(axis=0, ddof=1).tolist() if len(curves) > 1 and n else [0.0] * n
    return content


def baselines(arms: list[Content]) -> dict[str, Content]:
    """{size: its baseline}."""
    return {arm["size"]: arm for arm in arms if not any(arm["levels"])}


# ---- comparisons ---------------------------------------------------------------------------------------------------


def comparisons_of(arms: list[Content], design: Content) -> list[Comparison]:
    """Every arm beside the baseline of its size, and for a grid of several factors each level averaged over the other factors."""
    found = []
    for size, base in baselines(arms).items():
        mine = [arm for arm in arms if arm["size"] == size]
        if design["plan"] == "grid" and len(design["factors"]) > 1:
            found += main_effects(mine, design, size)
        found += [compare(a["name"], a["values"], base["name"], base["values"], size) for a in mine if a is not base]
    return judge(found, design["alpha"], UNITS[design["measure"]], design["budget"]["words"])


def main_effects(arms: list[Content], design: Content, size: str) -> list[Comparison]:
    """Each level of each factor beside the first, averaged over the levels of the other factors."""
    found = []
    for i, (factor, levels) in enumerate(design["factors"].items()):
        cells = [averaged([arm["values"] for arm in arms if arm["levels"][i] == j]) for j in range(len(levels))]
        for j in range(1, len(levels)):
            name = f"{factor}: {levels[j]}, over the others"
            found.append(compare(name, cells[j], f"{factor}: {levels[0]}", cells[0], size))
    return found


def trends_of(arms: list[Content], comparisons: list[Comparison], design: Content) -> list[Content]:
    """For each arm met at several sizes, its difference against the parameters of the baseline."""
    parameters = {size: base["parameters"] for size, base in baselines(arms).items()}
    names = dict.fromkeys(c.arm for c in comparisons if c.size)
    found = []
    for name in names:
        points = [(parameters[c.size], d) for c in comparisons if c.arm == name for d in c.pairs.values()]
        line = trend(name, points, design["alpha"], UNITS[design["measure"]])
        found += [asdict(line)] if line else []
    return found


def control_of(arms: list[Content], design: Content) -> Control:
    """The false positives of an A/A control, over the pairs that are done."""
    left, right = (list(arm["values"].values()) for arm in arms)
    both = [(a, b) for a, b in zip(left, right, strict=False) if a is not None and b is not None]
    n = design["n_seeds"]
    require(len(both) >= 2 * n, f"{design['name']}: {len(both)} pairs are done; the control needs at least {2 * n}")
    a, b = np.array(both).T
    return false_positives(a, b, n, design["alpha"])


# ---- what a reader must know ---------------------------------------------------------------------------------------


def warnings(arms: list[Content], comparisons: list[Comparison], design: Content, done: int, wanted: int) -> list[str]:
    """Remarks on what weakens the comparison, each a sentence."""
    results = [r for arm in arms for r in arm["results"].values()]
    remarks = [f"unfinished: {done} of {wanted} runs are done; run the design again to go on"] * (done < wanted)
    quantity = design["budget"]["match"]
    remarks += [off_budget(arm, base, quantity) for arm, base in with_baseline(arms)]
    if design["budget"]["parameters"]:
        remarks += [off_budget(arm, base, "parameters") for arm, base in with_baseline(arms)]
    same = [c for c in comparisons if c.identical]
    remarks += [f"{c.arm}: not one number differs from {c.baseline}; the setting does nothing here" for c in same]
    for key, what in (("source", "states of kobza's source"), ("torch", "versions of torch"), ("device", "devices")):
        kinds = {r[key] for r in results}
        remarks += [f"the runs mix {len(kinds)} {what}"] * (len(kinds) > 1)
    jobs = {r["jobs"] for r in results}
    if quantity != "seconds" and jobs != {1}:
        most = max(jobs, default=1)
        remarks.append(
            f"seconds were measured while up to {most} runs shared the machine: no basis for claims of speed"
        )
    return [remark for remark in remarks if remark]


def with_baseline(arms: list[Content]) -> list[tuple[Content, Content]]:
    """(arm, the baseline of its size) of every arm that is none itself."""
    base = baselines(arms)
    return [(arm, base[arm["size"]]) for arm in arms if any(arm["levels"]) and arm["size"] in base]


def off_budget(arm: Content, base: Content, quantity: str) -> str:
    """A sentence where an arm spent noticeably more or less of what was to be equal."""
    if not arm[quantity] or not base[quantity]:
        return ""
    share = arm[quantity] / base[quantity] - 1
    return f"{arm['label']}: {share:+.1%} {quantity} against the baseline" * (abs(share) > OFF_BUDGET)


def machine(arms: list[Content]) -> Content:
    """Where the runs were made."""
    results = [r for arm in arms for r in arm["results"].values()]
    words = {
        key: sorted({str(r[key]) for r in results}) for key in ("device", "machine", "precision", "torch", "kobza")
    }
    return words | {key: sorted({r[key] for r in results}) for key in ("jobs", "threads")}


def headline(content: Content) -> str:
    """The answer in one line."""
    if content["control"]:
        return content["control"]["verdict"]
    found = [c for c in content["comparisons"] if c["detected"]]
    if not content["comparisons"]:
        return "nothing to compare yet"
    if not found:
        verdicts = content["comparisons"]
        return f"{label(verdicts[0])}: {verdicts[0]['verdict']}" if len(verdicts) == 1 else "no difference detectable"
    return "; ".join(f"{label(c)} {c['verdict']}" for c in found)


def label(c: Content) -> str:
    """A comparison's name."""
    return sized(c["arm"], c["size"])

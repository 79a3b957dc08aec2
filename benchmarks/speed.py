"""Whole-process wall time of kobza against the plain recipe, in turn on the same cores and text.

    python benchmarks/speed.py [TEXT] [--runs 3] [--only time_to_loss throughput generate] [--note WORDS]

Prints each pair's ratio with its median and spread, and appends the medians to benchmarks/results.csv. Run it on a quiet
machine: with a second busy process torch's threads wait for each other and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
TARGET = 1.88  # nats a character: what the plain recipe reaches on Tiny Shakespeare after its 1.5M tokens


def run(*command: str) -> tuple[float, dict]:
    """Run a command to its end -> wall seconds, and the JSON object it printed last."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return seconds, json.loads(done.stdout.strip().splitlines()[-1])


def plain(*arguments: str) -> tuple[float, dict]:
    """One run of the plain recipe."""
    return run(str(HERE / "plain.py"), *arguments)


def ours(*arguments: str) -> tuple[float, dict]:
    """One run of the same work by kobza."""
    return run(str(HERE / "ours.py"), *arguments)


def kobza_train(text: str, seed: int) -> tuple[float, dict]:
    """The speedrun preset as a user calls it, from the command to its exit, stopping at the target."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "kobza", "train", text, "--preset", "speedrun", "--out", f"{folder}/run", "--json"]
        seconds, told = run(*command, "--seed", str(seed), "--stop-at", str(TARGET))
    return seconds, told


def time_to_loss(text: str, runs: int) -> dict[str, list[float]]:
    """Seconds from command to exit at the target, and the ratio pair by pair."""
    rows: dict[str, list[float]] = {"plain_seconds": [], "kobza_seconds": [], "ratio": [], "kobza_val_loss": []}
    for seed in range(runs):
        theirs, told = plain("train", text, "--seed", str(seed))
        mine, reached = kobza_train(text, seed)
        if reached["best"]["val_loss"] > TARGET:
            print(f"  seed {seed}: kobza reached only {reached['best']['val_loss']:.4f}, not {TARGET}")
        for key, value in (("plain_seconds", theirs), ("kobza_seconds", mine), ("ratio", theirs / mine)):
            rows[key].append(value)
        rows["kobza_val_loss"].append(reached["best"]["val_loss"])
        rows.setdefault("plain_val_loss", []).append(told["val_loss"])
    return rows


def throughput(text: str, runs: int) -> dict[str, list[float]]:
    """Training tokens a second of the very same GPT-2 model and batch."""
    return pairs(
        runs, lambda seed: (plain("throughput", text, "--seed", seed), ours("throughput", text, "--seed", seed))
    )


def generation(rows: int, runs: int) -> dict[str, list[float]]:
    """Generated tokens a second of the workshop model, 256 tokens a row: the plain loop with one row, ours with `rows`."""
    return pairs(
        runs, lambda seed: (plain("generate", "1", "--seed", seed), ours("generate", str(rows), "--seed", seed))
    )


def pairs(runs: int, pair) -> dict[str, list[float]]:
    """tokens_per_second of plain and kobza in turn, and their ratio."""
    table: dict[str, list[float]] = {"plain_tokens_per_second": [], "kobza_tokens_per_second": [], "ratio": []}
    for seed in range(runs):
        theirs, mine = (told["tokens_per_second"] for _, told in pair(str(seed)))
        for key, value in zip(table, (theirs, mine, mine / theirs), strict=True):
            table[key].append(value)
    return table


def report(config: str, table: dict[str, list[float]], note: str) -> None:
    """Print a table and append its medians to results.csv."""
    for metric, values in table.items():
        print(
            f"{config:20} {metric:26} median {statistics.median(values):12.3f}   {min(values):.3f} .. {max(values):.3f}"
        )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    stamp = [datetime.date.today().isoformat(), commit.strip() or "-", machine()]
    new = not (HERE / "results.csv").exists()
    with open(HERE / "results.csv", "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow("date commit machine config metric value low high runs note".split())
        for metric, values in table.items():
            figures = [f"{x:.4g}" for x in (statistics.median(values), min(values), max(values))]
            writer.writerow([*stamp, config, metric, *figures, len(values), note])


def machine() -> str:
    """Processor, cores, Python and torch."""
    import torch

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model} x{torch.get_num_threads()} torch {torch.__version__} python {platform.python_version()}"


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("text", nargs="?", help="a text like Tiny Shakespeare; default: kobza's own")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["time_to_loss", "throughput", "generate"])
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    text = args.text or run("-m", "kobza", "data", "shakespeare", "--json")[1]["path"]
    if "throughput" in args.only:
        report("train laptop", throughput(text, args.runs), args.note)
    if "generate" in args.only:
        report("generate 1 row", generation(1, args.runs), args.note)
        report("generate 16 rows", generation(16, args.runs), args.note)
    if "time_to_loss" in args.only:
        report(f"time to {TARGET}", time_to_loss(text, args.runs), args.note)


if __name__ == "__main__":
    main()

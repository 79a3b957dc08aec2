"""Numbers into ggml's blocks: kobza beside the `gguf` package, in turn, on the same float32 matrix.

    python benchmarks/quantise.py [--rows 4096] [--columns 1536] [--repeats 7] [--threads N] [--note WORDS]

MB/s of float32 that goes in; medians of the repeats. The K types and the importance are ours alone: gguf-py writes none of them.
gguf-py takes one thread, ours one for each core unless told otherwise. With --note the medians go to benchmarks/results.csv; run
it on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from kobza.formats.ggml import MADE, quantize

HERE = Path(__file__).parent
LOSES_NOTHING = ("F32",)


def main(arguments: argparse.Namespace) -> None:
    """Race every type, print, and append the medians where there is a note."""
    if arguments.threads:
        os.cpu_count = lambda: arguments.threads
    rng = np.random.default_rng(0)
    numbers = rng.normal(0, 0.02, (arguments.rows, arguments.columns)).astype(np.float32)
    counts = rng.gamma(0.5, 1, arguments.columns).astype(np.float32)
    print(f"{'':22}{'gguf-py':>10}{'ours':>10}{'ratio':>8}   MB/s")
    for type in (type for type in MADE if type not in LOSES_NOTHING):
        theirs = None if type.endswith("_K") else getattr(gguf.GGMLQuantizationType, type)
        race(type, numbers, lambda type=type: quantize(numbers, type), theirs, arguments)
    for type in (type for type in MADE if type[-2:] in ("_0", "_1", "_K") and type != "Q8_0"):
        race(f"{type} importance", numbers, lambda type=type: quantize(numbers, type, counts), None, arguments)


def race(
    name: str, numbers: np.ndarray, ours: Callable[[], object], theirs: object, arguments: argparse.Namespace
) -> None:
    """Both in turn `repeats` times; a line, and rows of results.csv where there is a note."""
    rows: dict[str, list[float]] = {"gguf_py_mb_per_second": [], "kobza_mb_per_second": []}
    for _ in range(arguments.repeats):
        if theirs is not None:
            rows["gguf_py_mb_per_second"].append(speed(numbers, lambda: gguf.quants.quantize(numbers, theirs)))
        rows["kobza_mb_per_second"].append(speed(numbers, ours))
    rows = {key: values for key, values in rows.items() if values}
    if len(rows) == 2:
        rows["ratio"] = [b / a for a, b in zip(*rows.values(), strict=True)]
    middle = {key: statistics.median(values) for key, values in rows.items()}
    columns = (middle.get("gguf_py_mb_per_second", ""), middle["kobza_mb_per_second"], middle.get("ratio", ""))
    print(
        f"{name:22}"
        + "".join(f"{v:>{w}.{d}f}" if v else " " * w for v, w, d in zip(columns, (10, 10, 8), (0, 0, 2), strict=True))
    )
    if arguments.note:
        sys.path.insert(0, str(HERE))
        from speed import report

        report(f"quantise {name}", rows, arguments.note)


def speed(numbers: np.ndarray, work: Callable[[], object]) -> float:
    """MB/s of one call."""
    start = time.perf_counter()
    work()
    return numbers.nbytes / 1e6 / (time.perf_counter() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--note", default="")
    main(parser.parse_args())

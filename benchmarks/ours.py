"""kobza's side of speed.py: training steps of the laptop preset, and generation with the workshop preset's model."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from kobza.config import SampleConfig, preset, run_from_dict
from kobza.device import make_runtime


def throughput(path: str, seed: int, steps: int = 120) -> dict:
    """Median tokens a second of `kobza train --preset laptop`, from the metrics of the run."""
    from kobza.cli import main

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = ["train", path, "--preset", "laptop", "--out", str(out), "--seed", str(seed), "--json"]
        code = main([*command, "--train.steps", str(steps), "--train.eval-interval", str(steps)])
        assert code == 0
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"tokens_per_second": float(np.median([r["tokens_per_second"] for r in records[10:]]))}


def generation(rows: int, seed: int, tokens: int = 256) -> dict:
    """Tokens a second of `rows` texts side by side, prefill included."""
    from kobza.generate import generate
    from kobza.kernels import packed
    from kobza.model import build

    make_runtime("cpu", "auto")
    config = run_from_dict(preset("workshop") | {"seed": seed}, "workshop")
    model = build(run_model(config), seed)
    if packed.supports(model):
        packed.use(model)  # as `kobza generate` does for a model of this size
    sample = SampleConfig(tokens=tokens, temperature=0.8, top_k=40)
    list(generate(model, [[0]] * rows, SampleConfig(tokens=8)))
    began = time.perf_counter()
    list(generate(model, [[0]] * rows, sample))
    return {"tokens_per_second": rows * tokens / (time.perf_counter() - began)}


def run_model(config):
    """The preset's model over Tiny Shakespeare's 65 characters."""
    from dataclasses import replace

    return replace(config.model, vocab_size=65)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("throughput", "generate"))
    parser.add_argument("argument")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = (
        throughput(args.argument, args.seed) if args.what == "throughput" else generation(int(args.argument), args.seed)
    )
    print(json.dumps(result))

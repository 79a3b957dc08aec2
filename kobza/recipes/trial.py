"""One run of the lab: a trial's settings -> its learning curve and what it cost. The parts are those of kobza train.

Whatever an arm is trained on (smoothing, several tokens ahead, ...), it is judged by the plain next-token loss on the same
bytes at the end of the text, so that objectives and tokenizers compare.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import nn

import kobza
from kobza.config import DataConfig, RunConfig, require, run_from_dict
from kobza.data import Tokens
from kobza.device import Runtime, device_name, make_runtime, memory_error
from kobza.hub.encodings import find_tokenizer
from kobza.hub.shakespeare import default_text
from kobza.lab.store import Trial, load_tokens, source_digest
from kobza.loss import make_loss
from kobza.model import n_parameters
from kobza.recipes.train import check_parts, evaluation_batches, make_training
from kobza.run import Training, given_embeddings
from kobza.tokenizer import Tokenizer
from kobza.train import Batch, NonFinite, Step, bits_per_byte, evaluate, next_token_loss, train

CALIBRATION_STEPS = 3  # left out at the start: memory is fetched and torch's kernels chosen
CALIBRATION_SECONDS = 2.0
CALIBRATION_MOST = 200


@dataclass(frozen=True)
class Bench:
    """Everything that a trial trains with, and the held-out windows that judge it."""

    config: RunConfig
    runtime: Runtime
    training: Training
    network: nn.Module
    kernels: str
    held_out: list[Batch]
    bytes_per_target: float

    def steps(self) -> Iterator[Step]:
        """Train on whatever the arm minimises."""
        config, training = self.config, self.training
        loss_fn = make_loss(config.train, config.model.n_ahead, self.runtime.compute_dtype)
        return train(self.network, training.optimizers, training.batches, config.train, loss_fn, 0, training.scaler)

    def judge(self) -> float:
        """The plain loss on the held-out windows."""
        return evaluate(self.network, self.held_out, next_token_loss(self.runtime.compute_dtype))


def trial(given: Trial) -> dict[str, Any]:
    """Train and judge -> the result. A run that diverges is a result as well."""
    config = run_from_dict(given.values, f"arm {given.label!r}")
    with memory_error(config.train.micro_batch, config.model.max_seq_len):
        bench = set_up(config, given)
        result = follow(bench.steps(), bench, places(config.train.steps, given.evaluations))
    result |= {"hash": given.hash, "seed": given.seed, "steps": config.train.steps, "kernels": bench.kernels}
    result |= {"parameters": n_parameters(bench.training.model), "flops": given.flops, "eval_bytes": given.eval_bytes}
    result |= {"precision": bench.runtime.precision, "kobza": kobza.__version__, "torch": torch.__version__}
    result |= {"source": source_digest(), "device": device_name(bench.runtime.device), "machine": platform.platform()}
    return result | {"finished": datetime.now(UTC).isoformat(timespec="seconds")}


def set_up(config: RunConfig, given: Trial) -> Bench:
    """Model, optimizers, batches and held-out windows, as kobza train makes them."""
    runtime = make_runtime(given.device, config.train.precision)
    corpus, tokenizer = load_tokens(given.tokens, config)
    training, network, kernels = make_training(config, corpus.train, runtime)
    tail = last_bytes(corpus.val, tokenizer, given.eval_bytes, given.label)
    held_out = evaluation_batches(config, tail, len(tail), runtime.device)
    targets = np.concatenate([batch[1].cpu().numpy().ravel() for batch in held_out])
    bytes_per_target = float(tokenizer.piece_bytes[targets].mean())
    return Bench(config, runtime, training, network, kernels, held_out, bytes_per_target)


def last_bytes(val: Tokens, tokenizer: Tokenizer, n_bytes: int, label: str) -> Tokens:
    """The tokens that spell the last n_bytes of the held-out text, at least one more to predict from."""
    sizes = tokenizer.piece_bytes[val.array()]
    behind = np.cumsum(sizes[::-1])
    require(
        behind[-1] > n_bytes,
        f"arm {label!r} holds out {behind[-1]:,} bytes but {n_bytes:,} are to be evaluated; lower eval_bytes or give more text",
    )
    n = int(np.searchsorted(behind, n_bytes)) + 2
    return Tokens(val.shards, max(val.start, val.stop - n), val.stop)


def places(steps: int, evaluations: int) -> set[int]:
    """The steps after which to evaluate, evenly spaced, the last among them. places(10, 3) -> {3, 7, 10}"""
    return {max(1, round(steps * i / evaluations)) for i in range(1, evaluations + 1)}


def follow(steps: Iterator[Step], bench: Bench, look: set[int]) -> dict[str, Any]:
    """Pull the steps, look at the places -> curve, last, best, seconds of training alone, and how it diverged if it did."""
    curve: list[dict[str, Any]] = []
    since: list[Step] = []
    tokens, seconds, diverged = 0, 0.0, None
    try:
        for step in steps:
            tokens, seconds = tokens + step.tokens, seconds + step.seconds
            since.append(step)
            if step.step not in look:
                continue
            val = bench.judge()
            if not math.isfinite(val):
                diverged = {"step": step.step, "what": "held-out loss"}
                break
            point = {"step": step.step, "tokens": tokens, "seconds": round(seconds, 4)}
            point |= {"train_loss": statistics.fmean(s.loss for s in since), "val_loss": val}
            curve.append(point | {"val_bpb": bits_per_byte(val, bench.bytes_per_target)})
            since = []
    except NonFinite as failure:
        diverged = {"step": failure.step, "what": failure.what}
    measures = ("val_loss", "val_bpb")
    last = None if diverged else {name: curve[-1][name] for name in measures}
    best = None if diverged else {name: min(point[name] for point in curve) for name in measures}
    return {
        "curve": curve,
        "last": last,
        "best": best,
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "diverged": diverged,
    }


def seconds_per_step(given: Trial) -> float:
    """The median time of an update of this trial, run alone and thrown away."""
    config = run_from_dict(given.values, f"arm {given.label!r}")
    bench = set_up(config, given)
    times: list[float] = []
    began = time.perf_counter()
    for step in bench.steps():
        times.append(step.seconds)
        enough = len(times) > 2 * CALIBRATION_STEPS and time.perf_counter() - began > CALIBRATION_SECONDS
        if enough or len(times) >= CALIBRATION_MOST:
            break
    return statistics.median(times[CALIBRATION_STEPS:] or times)


def check(device: str, config: RunConfig) -> None:
    """Refuse what kobza train would refuse before its first step: parts or a table that does not fit."""
    runtime = make_runtime(device, config.train.precision)
    check_parts(config, runtime)
    if config.train.embeddings:
        given_embeddings(config.train.embeddings, config.model)


def lab_text(given: list[str]) -> tuple[list[str], str]:
    """The text of a design, by default the built-in one, and a line on it."""
    if given:
        return given, f"text: {' '.join(given)}"
    path, note = default_text()
    return [str(path)], note


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that a DataConfig names; None: learned from the text."""
    return find_tokenizer(config.tokenizer, config.unknown)

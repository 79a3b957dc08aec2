"""kobza plan finetune: the memory and the time that a tuning will take, by trying slices of its model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from torch import nn

from kobza.device import Runtime, device_name, free_memory, make_runtime, memory_error
from kobza.finetune.config import TuneConfig
from kobza.finetune.plan import Estimate, Step, estimate
from kobza.recipes.base import install, load_weights, open_base, with_length, with_mended
from kobza.recipes.finetune import with_steps
from kobza.recipes.objectives import Work, make_learned, make_work
from kobza.train import Batch, train_step

LENGTHS = 150  # batches that are likely to have every length
SAMPLED = 50  # batches that tell how large a step is on average


def main(config: TuneConfig, device: str, as_json: bool) -> int:
    """Say what `kobza finetune` will take -> exit code."""
    console = Console(stderr=as_json, highlight=False)
    runtime = make_runtime(device, config.train.precision)
    base = open_base(config)
    config = with_length(config, base)
    drawn = config.objective.objective == "grpo"
    sides = tuple(side.teaching() for side in make_learned(config, base))
    base = with_mended(base, [row for side in sides for row in side.rows])
    works: list[Work] = []

    def make(n_layer: int) -> tuple[nn.Module, Step]:
        """A slice of so many blocks, ready to learn, and a step of it on the largest batch."""
        loaded = load_weights(base, config, runtime, n_layer)
        method = install(config, loaded, base, runtime)
        work = make_work(config, base, loaded.model, sides, runtime)
        works[:] = [replace(work, look=lambda: {})]  # which holds no model
        looks = [work.look]  # once: an evaluation may take more memory than a step

        def update(window: list[Batch]) -> None:
            loaded.model.train()
            train_step(loaded.model, method.optimizers, window, work.loss_fn, config.train.grad_clip)

        def step() -> None:
            update([next(work.batches) if drawn else work.batches.largest() for _ in range(config.train.accumulate)])
            if looks:
                looks.pop()()

        if n_layer == 1 and not drawn:  # the warm-up meets every length: libraries keep code of their own for each
            for _ in range(min(work.per_epoch, LENGTHS)):
                update([next(work.batches)])
        return loaded.model, step

    with (
        memory_error(config.train.micro_batch, config.rows.max_len, "--max-len"),
        console.status("trying slices of the model"),
    ):
        found = estimate(make, base.run.model.n_layer, 0, runtime.device)
    share = 1.0 if drawn else mean_size(works[0])
    steps = with_steps(config, works[0].per_epoch).train.steps
    per_step = found.seconds_per_step * share
    return tell(replace(found, seconds_per_step=per_step, seconds=per_step * steps), steps, runtime, console, as_json)


def mean_size(work: Work) -> float:
    """How large batches are on average, beside the largest."""
    size: Any = lambda batch: batch[0].numel()  # noqa: E731
    batches: list[Batch] = [next(work.batches) for _ in range(min(SAMPLED, work.per_epoch))]
    return sum(map(size, batches)) / len(batches) / size(work.batches.largest())


def tell(found: Estimate, steps: int, runtime: Runtime, console: Console, as_json: bool) -> int:
    """Print the estimate -> exit code: 1 where it does not fit."""
    free, say = free_memory(runtime.device), console.print
    more = found.peak_bytes - found.parts["process"]
    fits = free is None or more <= free
    if as_json:
        print(json.dumps(asdict(found) | {"steps": steps, "free_bytes": free, "fits": fits}))
        return 0 if fits else 1
    say(f"memory    {found.peak_bytes / 1e9:.2f} GB at the peak, on {device_name(runtime.device)}")
    for name, size in found.parts.items():
        say(f"  {name:18}{size / 1e9:.2f} GB")
    say(
        f"time      {steps:,} steps of {found.seconds_per_step:.2f} s: {found.seconds / 60:.1f} minutes, evaluations apart"
    )
    if not fits:
        lack = f"{more / 1e9:.2f} GB more are wanted and {(free or 0) / 1e9:.2f} GB are free"
        remedy = "lower --train.micro-batch and raise --train.accumulate, or give --checkpointing on"
        say(f"warning   {lack}: {remedy}", style="yellow")
    return 0 if fits else 1

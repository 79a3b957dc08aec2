"""kobza finetune: a model and a person's file -> an adapter, or a model, and what it learned.

What is learned of which rows stands in objectives.py, how a base is opened and the method put in place in base.py. Here: look at
the rows, refuse what cannot teach, go through the steps.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from kobza.checkpoint import Loaded, read_best, write_file
from kobza.config import require
from kobza.device import Runtime, device_name, make_runtime, memory_error, rng_state
from kobza.doctor.training.blackbox import refuse_spoiled
from kobza.finetune import xray_page
from kobza.finetune.config import TuneConfig
from kobza.finetune.plan import let_go
from kobza.finetune.run import (
    SaveAdapter,
    Tuning,
    read_tuning,
    restore_tuning,
    same_tuning,
    save_tuning,
    write_tuning,
)
from kobza.finetune.xray import Remark, examine
from kobza.log import MetricsLog, ProgressLine
from kobza.pages.shell import write_png, write_whole
from kobza.recipes.base import USUAL_LENGTH, Base, install, load_weights, open_base, with_length, with_mended
from kobza.recipes.objectives import SIDES, Learned, Work, load_learned, make_learned, make_work, save_learned
from kobza.recipes.train import Interrupt, make_record, stop_reason
from kobza.report.metrics import read_metrics
from kobza.report.picture import loss_figure
from kobza.run import Standing, Training, free_folder, lock
from kobza.train import NonFinite, train


def main(config: TuneConfig, out: Path | None, resume: bool, dry_run: bool, device: str, as_json: bool) -> int:
    """Tune, leaving a folder -> exit code."""
    console = Console(stderr=as_json, highlight=False)
    console.soft_wrap = not console.is_terminal
    out = out or free_folder(Path("runs") / f"{Path(config.source.model).name}-tuned")
    require(
        resume or not (out / "config.toml").exists(), f"{out}: holds a run; go on with --resume or take another --out"
    )
    runtime = make_runtime(device, config.train.precision)
    with lock(out), memory_error(config.train.micro_batch, config.rows.max_len or USUAL_LENGTH, "--max-len"):
        if resume:
            same_tuning(read_tuning(out), config, out)
        base = open_base(config)
        config = with_length(config, base)
        learn, hold = (
            (load_learned(out / "rows" / side) for side in ("train", "val")) if resume else make_learned(config, base)
        )
        base = with_mended(base, [*learn.rows, *hold.rows])
        if config.objective.objective == "grpo":  # nothing is learned of a question
            facts = show_questions(config, base, learn, hold, console)
        else:
            facts = show_rows(out, config, base, learn, hold, console)
            learn, hold = (side.teaching() for side in (learn, hold))
        if not dry_run:
            return tune(out, config, base, (learn, hold), runtime, console, resume, as_json)
        if as_json:
            print(json.dumps(facts))
        return 0


def show_questions(config: TuneConfig, base: Base, learn: Learned, hold: Learned, console: Console) -> dict[str, Any]:
    """Print what will be asked."""
    say, longest = console.print, max(len(row.ids) for row in (*learn.rows, *hold.rows))
    say(f"questions {len(learn.rows):,} to answer, {len(hold.rows):,} held out, of up to {longest} tokens; "
        f"measured by {config.objective.reward}")  # fmt: skip
    first = learn.rows[0]
    say(f"\n[dim]{escape(xray_page.line(first.where))}[/dim]")
    say(xray_page.row_text(first, base.piece, base.ends))
    say(f"[dim]expected[/dim]  {escape(str(learn.known['expected'][0]))}\n")
    for remark in base.remarks:
        say(xray_page.remark_text(remark))
    return {"questions": len(learn.rows), "held_out": len(hold.rows), "longest": longest}


def show_rows(
    out: Path, config: TuneConfig, base: Base, learn: Learned, hold: Learned, console: Console
) -> dict[str, Any]:
    """Print what will be learned, and draw it."""
    say = console.print
    remarks = [*base.remarks, *(Remark("info", "R5", note) for note in learn.notes)]
    seen = examine(learn.own, hold.own, base.ends, remarks)
    say(f"tuning    {escape(str(out))}: {escape(config.source.model)} on {escape(config.source.data)}")
    for name, value in xray_page.numbers(seen):
        say(f"{name:18}{escape(value)}")
    for row in seen.shown[:3]:
        say(f"\n[dim]{escape(xray_page.line(row.where))}[/dim]")
        say(xray_page.row_text(row, base.piece, base.ends))
    say("")
    for remark in seen.remarks:
        say(xray_page.remark_text(remark))
    title = f"{config.source.data} for {config.source.model}"
    page = write_whole(out / "xray.html", xray_page.page(title, seen, learn.own, base.piece, base.ends))
    say(f"rows      {escape(str(page))}")
    require(not seen.refuses, xray_page.line(seen.refuses[0].text) if seen.refuses else "")
    return {"xray": xray_page.figures(seen), "page": str(page)}


def tune(
    out: Path,
    config: TuneConfig,
    base: Base,
    sides: tuple[Learned, Learned],
    runtime: Runtime,
    console: Console,
    resume: bool,
    as_json: bool,
) -> int:
    """Tune a base on rows that are fit to teach -> exit code."""
    torch.manual_seed(config.seed)  # dropout
    loaded = load_weights(base, config, runtime)
    method = install(config, loaded, base, runtime)
    work = make_work(config, base, loaded.model, sides, runtime)
    config = with_steps(config, work.per_epoch)
    tuning = Tuning(out, config, loaded, base.provenance)
    scaler = torch.amp.GradScaler(runtime.device.type) if runtime.precision == "fp16" else None
    state = Training(loaded.model, method.optimizers, work.batches, scaler, Standing(), runtime.device)
    restore_tuning(tuning, state)
    if not resume:
        for name, side in zip(SIDES, sides, strict=True):
            save_learned(out / "rows" / name, side)
        write_file(out / "before.json", json.dumps(work.look()))
    write_tuning(out, config)
    before = json.loads((out / "before.json").read_text(encoding="utf-8"))
    introduce(config, loaded, work, method.words, before, runtime, console, state.standing.step)
    outcome, after = go(tuning, state, work, method.save, console)
    standing = state.standing
    del loaded, method, work, tuning, state  # before the picture, which wants room of its own
    let_go(runtime.device)
    if outcome == "interrupted":
        go_on = f"kobza finetune --resume --out {shlex.quote(str(out))}"
        console.print(f"interrupted at step {standing.step}; saved. Go on: {go_on}", markup=False, soft_wrap=True)
        return 130
    return 1 if outcome == "failed" else finish(out, config, standing, before, after, console, as_json)


def with_steps(config: TuneConfig, per_epoch: int) -> TuneConfig:
    """The settings with the number of steps that their epochs make."""
    if not config.rows.epochs:
        return config
    steps = max(1, math.ceil(config.rows.epochs * per_epoch / config.train.accumulate))
    return replace(config, train=replace(config.train, steps=steps), rows=replace(config.rows, epochs=0.0))


def introduce(
    config: TuneConfig,
    loaded: Loaded,
    work: Work,
    words: list[str],
    before: dict[str, float],
    runtime: Runtime,
    console: Console,
    first_step: int,
) -> None:
    """What learns, where, for how long, and what the model knows already."""
    say, train = console.print, config.train
    learning = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in loaded.model.parameters())
    say(
        f"learns    {learning:,} of {whole:,} weights ({learning / whole:.2%}): {config.method.method}; {'; '.join(words)}"
    )
    where = f"{runtime.precision} on {device_name(runtime.device)}"
    epochs = train.steps * train.accumulate / work.per_epoch
    size = train.micro_batch * train.accumulate
    say(f"steps     {train.steps:,} of {size} {work.unit}, {epochs:.1f} times through them, {where}")
    say(f"before    {told(before)}")
    if first_step:
        say(f"resumed   at step {first_step:,}")


def told(figures: dict[str, float]) -> str:
    """Figures of held-out rows in words."""
    names = {"val_loss": "loss {:.4f}", "val_right": "{:.1%} word for word right", "val_reward": "mean reward {:.3f}"}
    names |= {"accuracy": "{:.1%} of pairs the right way round", "margin": "margin {:.3f}"}
    return "held out: " + ", ".join(form.format(figures[name]) for name, form in names.items() if name in figures)


def go(
    tuning: Tuning, state: Training, work: Work, save: SaveAdapter | None, console: Console
) -> tuple[str, dict[str, float]]:
    """Step after step -> how it ended, and the last figures of held-out rows."""
    config, standing = tuning.config.train, state.standing
    metrics, line = (
        MetricsLog(tuning.out / "metrics.jsonl", standing.step),
        ProgressLine(console, config.steps, standing.step),
    )
    rng = partial(rng_state, state.device)
    steps = train(state.model, state.optimizers, state.batches, config, work.loss_fn, standing.step, state.scaler, rng)
    figures = work.look() if standing.step >= config.steps else {}  # a tuning that was done already
    outcome, earlier, began = "done", standing.seconds, time.perf_counter()
    with Interrupt() as interrupt:
        try:
            for step in steps:
                standing.step, standing.tokens = step.step, standing.tokens + step.tokens
                standing.seconds = earlier + time.perf_counter() - began
                record, last = make_record(step, standing, config.lr), step.step == config.steps
                look, improved = last or step.step % config.eval_interval == 0, False
                record |= {name: round(value, 6) for name, value in work.report().items()}
                if look:
                    refuse_spoiled(state.model, step.step, rng())
                    figures = work.look()
                    record |= {name: round(value, 6) for name, value in figures.items()}
                    improved = standing.note(figures["val_loss"])
                    outcome = stop_reason(config, figures["val_loss"], standing)
                metrics.write(record)
                line.step(step.step, f"loss {step.loss:.4f}  {record['tokens_per_second']:,.0f} tokens/s")
                due = step.step % (config.checkpoint_interval or config.eval_interval) == 0
                if last or due or improved or interrupt.asked or outcome != "done":
                    save_tuning(tuning, state, save)
                if look:
                    console.print(
                        f"step {step.step:,}  train {step.loss:.4f}  {told(figures)}  {standing.seconds:.1f} s"
                    )
                if interrupt.asked and not last:
                    outcome = "interrupted"
                if outcome != "done":
                    break
        except NonFinite as failure:
            remedy = f"the last checkpoint is whole; lower train.lr {config.lr:g}"
            print(f"kobza: {failure}; {remedy}", file=sys.stderr)
            outcome = "failed"
        finally:
            line.close()
            metrics.close()
    return outcome, figures


def finish(
    out: Path,
    config: TuneConfig,
    standing: Standing,
    before: dict[str, float],
    after: dict[str, float],
    console: Console,
    as_json: bool,
) -> int:
    """Draw the course and say what was reached -> exit code."""
    say = console.print
    picture = out / "loss.png"
    write_png(picture, loss_figure(read_metrics(out / "metrics.jsonl")))
    best = read_best(out) or {"step": standing.step, "val_loss": None}
    say(f"\n[bold]done[/bold] in {standing.seconds:.1f} s; best at step {best['step']:,}")
    say(f"before    {told(before)}\nafter     {told(after)}")
    name = escape(shlex.quote(str(out)))
    say(f"\npicture   {escape(str(picture))}", soft_wrap=True)
    merge = "" if config.method.method != "lora" else f"\n          kobza merge {name} --out {name}-merged"
    say(f"next      kobza chat {name}{merge}", soft_wrap=True)
    if as_json:
        print(
            json.dumps({"run": str(out), "before": before, "after": after, "best": best, "seconds": standing.seconds})
        )
    return 0

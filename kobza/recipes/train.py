"""kobza train: text -> tokens -> model -> checkpoints, metrics, pictures. The order of a run, top to bottom.

The loop itself is kobza.train; here stands what is done around its steps: look, save, remark, stop.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from kobza.checkpoint import list_checkpoints, read_best
from kobza.config import InputError, ModelConfig, RunConfig, TrainConfig, require
from kobza.data import Batches, Tokens, bytes_per_token, eval_batches, overlap
from kobza.describe.parts import training_bytes
from kobza.device import Runtime, device_name, free_memory, make_runtime, memory_error, peak_flops, rng_state
from kobza.doctor.training.blackbox import record_failure, refuse_spoiled
from kobza.hub.encodings import find_tokenizer
from kobza.hub.shakespeare import default_text
from kobza.kernels import fused as fused_blocks
from kobza.log import MetricsLog, ProgressLine
from kobza.loss import is_plain, make_loss
from kobza.model import GPT, build, training_flops_per_token
from kobza.optim import make_optimizers
from kobza.report.console import Commentator, figures, make_board, write_board
from kobza.report.pages import draw, read_records
from kobza.run import (
    Run,
    Standing,
    Training,
    free_folder,
    given_embeddings,
    lock,
    new_run,
    restore_training,
    resumed_run,
    save_training,
)
from kobza.surgery import compute_in_float32, freeze
from kobza.tokens.advisor import run_warnings
from kobza.train import Batch, NonFinite, Step, bits_per_byte, evaluate, next_token_loss, train

EVAL_TOKENS = 200_000  # train.eval_tokens 0: enough that the loss of a window is known to about 0.003 nats
EVAL_BATCH_TOKENS = 4096  # without a backward pass there is room for more rows, and a CPU is quicker with them
EVAL_BATCH_LOGITS = 1 << 27  # half a gigabyte: with a vocabulary of 200,000 it is the logits that fill the room
WINDOW_BYTES = 16  # of a token in a batch: input and target, int64
COMPILE_SECONDS = 60  # what torch.compile takes on a GPU machine before the first step


def main(
    text: list[str],
    config: RunConfig,
    out: Path | None,
    name: str,
    resume: bool = False,
    device: str = "auto",
    tensorboard: bool = False,
    as_json: bool = False,
    exportable: bool = False,
) -> int:
    """Train, leaving a run folder -> exit code."""
    console = Console(stderr=as_json, highlight=False)
    console.soft_wrap = not console.is_terminal  # a person's lines break between words, a file's nowhere
    out = out or free_folder(Path("runs") / name)
    runtime = make_runtime(device, config.train.precision)
    check_memory(config, runtime)
    check_parts(config, runtime)
    require(not (resume and text), f"--resume goes on with the text in {out}; leave out {' '.join(text)}")
    require(not (resume and exportable), "--exportable has no effect with --resume: the run's model is what it is")
    if exportable:
        check_model(config.model)
    with lock(out), memory_error(config.train.micro_batch, config.model.max_seq_len):
        if not text and not resume:
            path, note = default_text()
            console.print(note)
            text = [str(path)]
        tokenizer = None if resume else find_tokenizer(config.data.tokenizer, config.data.unknown)
        if tokenizer and not tokenizer.lossless:
            console.print(
                f"tokenizer {config.data.tokenizer}: lossy; it changes some texts, and losses are of what it keeps"
            )
        run = resumed_run(out, config) if resume else new_run(out, config, text, tokenizer)
        if exportable:
            check_vocabulary(run)
        return train_run(run, runtime, console, make_board(out) if tensorboard else None, as_json)


def check_model(model: ModelConfig) -> None:
    """Refuse a model that no other program computes, with the options of the nearest that one does."""
    from kobza.formats.stock import why_not_exportable

    for to in ("hf", "gguf"):
        why = why_not_exportable(model, to)
        require(not why, f"--exportable: --to {to} will not do: {why}")


def check_vocabulary(run: Run) -> None:
    """Refuse a vocabulary that llama.cpp would read otherwise; the run's folder is then as it was."""
    from kobza.export.vocabulary import vocabulary

    try:
        vocabulary(run.tokenizer, run.config.model.vocab_size, run.tokenizer.ends, None)
    except InputError as error:
        shutil.rmtree(run.out / "tokens")
        for name in ("tokenizer.json", "config.toml"):
            (run.out / name).unlink()
        raise InputError(f"--exportable: {error}") from None


def train_run(run: Run, runtime: Runtime, console: Console, board: Any, as_json: bool) -> int:
    """Train an opened run to its end -> exit code."""
    config, device = run.config.train, runtime.device
    training, network, kernels = make_training(run.config, run.corpus.train, runtime, not list_checkpoints(run.out))
    restore_training(run, training)
    model, standing = training.model, training.standing
    loss_fn = make_loss(config, run.config.model.n_ahead, runtime.compute_dtype)
    plain_loss = next_token_loss(runtime.compute_dtype)  # of every evaluation, so that objectives compare
    held_out = evaluation_batches(run.config, run.corpus.val, config.eval_tokens or EVAL_TOKENS, device)
    val_bytes = bytes_per_token(run.corpus.val, run.tokenizer)
    metrics = MetricsLog(run.out / "metrics.jsonl", standing.step)
    commentator = Commentator(run, model, console, metrics.records)
    introduce(run, runtime, commentator, kernels, standing.step)
    flops, peak = training_flops_per_token(model), peak_flops(device)
    line = ProgressLine(console, config.steps, standing.step)
    rng = partial(rng_state, device)
    optimizers, scaler = training.optimizers, training.scaler
    steps = train(network, optimizers, training.batches, config, loss_fn, standing.step, scaler, rng)
    outcome, val, before, began = "done", None, standing.seconds, time.perf_counter()
    with Interrupt() as interrupt:
        try:
            for step in steps:
                standing.step, standing.tokens = step.step, standing.tokens + step.tokens
                standing.seconds = before + time.perf_counter() - began
                record, last = make_record(step, standing, config.lr), step.step == config.steps
                look, improved = last or step.step % config.eval_interval == 0, False
                save = last or interrupt.asked or step.step % (config.checkpoint_interval or config.eval_interval) == 0
                if look or save:
                    refuse_spoiled(model, step.step, rng())
                if look:
                    val = evaluate(network, held_out, plain_loss)
                    record |= {"val_loss": round(val, 6), "val_bpb": round(bits_per_byte(val, val_bytes), 6)}
                    improved = standing.note(val)
                    outcome = stop_reason(config, val, standing)
                metrics.write(record)
                line.step(step.step, figures(record, val, flops, peak))
                if board:
                    write_board(board, record)
                if save or improved or outcome != "done":
                    save_training(run, training)
                if look:
                    commentator.evaluation(record)
                if interrupt.asked and not last:
                    save_training(run, training)
                    outcome = "interrupted"
                if outcome != "done":
                    break
        except NonFinite as failure:
            print("kobza:", record_failure(failure, run, model, runtime.precision), file=sys.stderr)
            return 1
        finally:
            line.close()
            metrics.close()
    if outcome == "interrupted":
        go_on = f"kobza train --resume --out {shlex.quote(str(run.out))}"
        console.print(f"interrupted at step {standing.step}; saved. Go on: {go_on}", markup=False, soft_wrap=True)
        return 130
    return finish(run, standing, outcome, commentator, as_json)


def introduce(run: Run, runtime: Runtime, commentator: Commentator, kernels: str, first_step: int) -> None:
    """Say what is trained on what, and what is wrong before the first step."""
    where = f"{runtime.precision}{kernels and ', '}{kernels} on {device_name(runtime.device)}"
    commentator.introduce(where, overlap(run.corpus.train, run.corpus.val), first_step)
    commentator.warn(run_warnings(run, commentator.facts.n_params))
    if not is_plain(run.config.train, run.config.model.n_ahead):
        other = "          the train loss is of another objective than the validation loss: do not compare the two\n"
        commentator.console.print(other)


def finish(run: Run, standing: Standing, outcome: str, commentator: Commentator, as_json: bool) -> int:
    """Draw the run's pictures and say what was reached -> exit code."""
    picture, page = draw(run, read_records(run.out), commentator.landmarks, commentator.facts)
    best = read_best(run.out) or {"step": standing.step, "val_loss": None}
    commentator.conclude(outcome, best, standing.seconds, picture, page)
    if as_json:
        summary = {"run": str(run.out), "outcome": outcome, "best": best, "picture": str(picture), "report": str(page)}
        print(json.dumps(summary | {key: getattr(standing, key) for key in ("step", "tokens", "seconds")}))
    return 0


def check_memory(config: RunConfig, runtime: Runtime) -> None:
    """Refuse, with the numbers, a model whose weights and optimizer alone cannot fit, before anything is allocated."""
    model, free = config.model, free_memory(runtime.device)
    if not model.vocab_size:
        model = replace(model, vocab_size=1)  # known later; padding alone may be too much
    least, most = training_bytes(model, 0), training_bytes(model, config.train.micro_batch)
    batch = config.train.micro_batch * model.max_seq_len
    require(
        free is None or batch * (WINDOW_BYTES + 4 * model.n_embd) <= free,
        f"out of memory: train.micro_batch {config.train.micro_batch} of {model.max_seq_len} tokens does not fit into the "
        f"{(free or 0) / 1e9:.1f} GB that are free; lower train.micro_batch, and raise train.accumulate instead",
    )
    require(
        free is None or least <= free,
        f"out of memory: weights, gradients and optimizer take {least / 1e9:.1f} GB (up to {most / 1e9:.1f} with "
        f"activations) and {(free or 0) / 1e9:.1f} GB are free; lower model.n_embd {model.n_embd} or model.n_layer "
        f"{model.n_layer}",
    )


def evaluation_batches(config: RunConfig, text: Tokens, most_tokens: int, device: torch.device) -> list[Batch]:
    """The first windows of a text in batches that fill the room which an evaluation has."""
    seq_len, tokens = config.model.max_seq_len, min(EVAL_BATCH_TOKENS, EVAL_BATCH_LOGITS // config.model.vocab_size)
    return eval_batches(text, max(config.train.micro_batch, tokens // seq_len), seq_len, most_tokens, device)


def make_training(
    config: RunConfig, text: Tokens, runtime: Runtime, fresh: bool = True
) -> tuple[Training, nn.Module, str]:
    """A training before its first step, the form of its model that computes, and a word on that form. `fresh`: see make_model."""
    torch.manual_seed(config.seed)  # dropout
    model, network, kernels = make_model(config, runtime, fresh)
    seq_len, device = config.model.max_seq_len, runtime.device
    batches = Batches(text, config.train.micro_batch, seq_len, config.seed, device)
    scaler = torch.amp.GradScaler(device.type) if runtime.precision == "fp16" else None
    optimizers = make_optimizers(model, config.train, runtime.compute_dtype)
    return Training(model, optimizers, batches, scaler, Standing(), device), network, kernels


def make_model(config: RunConfig, runtime: Runtime, fresh: bool = True) -> tuple[GPT, nn.Module, str]:
    """A model as its training begins, the form of it that computes, and a word on that form. `fresh`: no checkpoint will be
    put into it, so it starts from train.embeddings where they are given."""
    train = config.train
    model = build(config.model, config.seed, runtime.device)
    if train.embeddings and fresh:
        table = given_embeddings(train.embeddings, config.model)
        with torch.no_grad():
            model.embed.weight[: len(table)].copy_(table)  # rows of padding stay as drawn
    if train.freeze:
        freeze(model, train.freeze)
    wide = compute_in_float32(model, train.fp32_parts) if train.fp32_parts else []
    if wide:
        torch.set_float32_matmul_precision("highest")  # float32, not TF32
    if compile_pays(config, runtime, model):
        return model, torch.compile(model), "compiled"  # type: ignore[return-value]
    fits = train.kernels == "auto" and runtime.device.type == "cpu" and fused_blocks.supports(model.config)
    if fits and any(name.startswith("blocks") for name in wide):
        return model, model, "plain blocks since train.fp32_parts names some"
    if fits:
        fused_blocks.use(model)
    return model, model, "fused blocks" * fits


def check_parts(config: RunConfig, runtime: Runtime) -> None:
    """Refuse names of parts that the model has not, before the text is read: on its skeleton, which has no numbers."""
    train = config.train
    idle = train.fp32_parts and runtime.compute_dtype == torch.float32
    require(
        not idle, f"train.fp32_parts has no effect: precision here is {runtime.precision}; leave it out or take bf16"
    )
    if not (train.freeze or train.fp32_parts):
        return  # without a skeleton: torch makes one with the compiler's machinery, a second that nobody has
    with torch.device("meta"):
        skeleton = GPT(replace(config.model, vocab_size=config.model.vocab_size or 1))
    if train.freeze:
        freeze(skeleton, train.freeze)
    if train.fp32_parts:
        compute_in_float32(skeleton, train.fp32_parts)


def compile_pays(config: RunConfig, runtime: Runtime, model: GPT) -> bool:
    """Whether torch.compile earns its start-up: on a known GPU with minutes of work ahead. On a CPU it takes longer than
    the runs that people make there, so it has to be asked for."""
    train, peak = config.train, peak_flops(runtime.device)
    if model.config.n_ahead > 1:  # their loss calls the parts of the model, not the whole that is compiled
        return False
    if train.compile != "auto" or peak is None:
        return train.compile == "on"
    return train.steps * config.batch_tokens * training_flops_per_token(model) / (0.25 * peak) > 2 * COMPILE_SECONDS


class Interrupt:
    """Ctrl-C and SIGTERM ask the loop to save and stop after its step; a second one stops at once."""

    def __enter__(self) -> Interrupt:
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, _number: int, _frame: Any) -> None:
        """Note the signal."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def stop_reason(config: TrainConfig, loss: float, standing: Standing) -> str:
    """Why to stop after this evaluation; "done" where only the last step is a reason."""
    if config.stop_at and loss <= config.stop_at:
        return "stop_at"
    if config.patience and standing.worse >= config.patience:
        return "patience"
    return "done"


def make_record(step: Step, standing: Standing, lr: float) -> dict[str, Any]:
    """A step as a line of metrics.jsonl."""
    return {
        "step": step.step,
        "train_loss": round(step.loss, 6),
        "lr": step.lr * lr,
        "grad_norm": round(step.grad_norm, 6),
        "tokens": standing.tokens,
        "seconds": round(standing.seconds, 4),
        "tokens_per_second": round(step.tokens / step.seconds, 1),
    }

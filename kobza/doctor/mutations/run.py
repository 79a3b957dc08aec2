"""Logs and runs, clean and each with one bug: curves made of formulas, and real runs of a second by kobza's own core."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kobza.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from kobza.data import Batches, bytes_per_token, eval_batches
from kobza.doctor.mutations.proof import Control, Mutation
from kobza.doctor.training.curves import Log
from kobza.doctor.training.run import open_
from kobza.log import MetricsLog
from kobza.loss import make_loss
from kobza.model import GPT, build
from kobza.optim import make_optimizers
from kobza.run import Run, Standing, Training, new_run, save_training
from kobza.train import bits_per_byte, evaluate, next_token_loss, train

Row = dict[str, Any]
VOCAB = 512


# ---- curves made of formulas ---------------------------------------------------------------------------------------


def clean_curve(seed: int, n: int = 400) -> list[Row]:
    """What a healthy run of n updates logs: a fall from ln V with noise, a warm-up and a cosine, a gradient that calms down."""
    rng = np.random.default_rng(seed)
    floor, rows = 2.0 + 0.5 * rng.random(), []
    for i in range(n):
        mean = floor + (math.log(VOCAB) - floor) * (0.25 * math.exp(-i / 120) + 0.75 * math.exp(-i / 15))
        noise = 0.02 * mean * rng.standard_normal()
        rate = 3e-4 * min(1.0, (i + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * max(0, i - 20) / (n - 20)))
        row = {"step": i + 1, "train_loss": mean + (noise if i else 0.0), "lr": rate}
        row |= {
            "grad_norm": 0.4 * math.exp(0.25 * rng.standard_normal()),
            "tokens_per_second": 5e4 * (1 + 0.05 * rng.standard_normal()),
        }
        row |= {"seconds": 0.2 * (i + 1), "batch_hash": f"{rng.integers(2**40):010x}"}
        if (i + 1) % 25 == 0:
            row["val_loss"] = mean * 1.02 + 0.003 * rng.standard_normal()
        rows.append(row)
    return rows


def nothing(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """As it is."""
    return rows


def breaks(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """The gradient grows, then the loss is nan."""
    for k, row in enumerate(rows[250:260]):
        row["grad_norm"] *= 2.0**k
    return rows[:260] + [row | {"train_loss": math.nan, "grad_norm": math.nan} for row in rows[260:]]


def overfits(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """Validation turns at half of the run."""
    return [
        row | ({"val_loss": row["val_loss"] + 0.004 * max(0, row["step"] - 200)} if "val_loss" in row else {})
        for row in rows
    ]


def learns_nothing(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """The loss stays at ln V."""
    flat = [row | {"train_loss": math.log(VOCAB) * (1 + 0.003 * rng.standard_normal())} for row in rows]
    return [row | ({"val_loss": math.log(VOCAB)} if "val_loss" in row else {}) for row in flat]


def spiking(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """Five spikes, the gradient a step before."""
    for i in (90, 150, 210, 280, 350):
        rows[i - 1]["grad_norm"] *= 8
        for k in range(4):
            rows[i + k]["train_loss"] *= 1.6 - 0.15 * k
    return rows


def clips_all(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """The norm that is logged is the limit, nearly always."""
    return [row | {"grad_norm": 0.25 if rng.random() < 0.97 else 0.2} for row in rows]


def slows(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """A third of the speed from two thirds on."""
    return [row | {"tokens_per_second": row["tokens_per_second"] / (3 if row["step"] > 260 else 1)} for row in rows]


def starts_high(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """The first loss is far above ln V."""
    return [row | {"train_loss": row["train_loss"] + 7.0 * math.exp(-i / 5)} for i, row in enumerate(rows)]


def starts_low(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """The first loss is far below ln V."""
    return [row | {"train_loss": 0.6 * row["train_loss"]} for row in rows]


def summed(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """The train loss is the sum over four ranks."""
    return [row | {"train_loss": 4 * row["train_loss"]} for row in rows]


def decays_early(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """The scheduler is stepped four times an update."""
    return [row | {"lr": rows[min(4 * i + 3, len(rows) - 1)]["lr"]} for i, row in enumerate(rows)]


def resumed(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """Stopped at 260, gone on from the checkpoint of 240 as if nothing had been."""
    return rows[:260] + [row | {"seconds": row["seconds"] - 40} for row in rows[240:]]


def resumed_higher(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """The optimizer's state was lost."""
    rows = resumed(rows, rng)
    return rows[:260] + [
        row | {"train_loss": row["train_loss"] * (1 + 0.5 * math.exp(-i / 30))} for i, row in enumerate(rows[260:])
    ]


def resumed_warming(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """The schedule begins anew."""
    again = resumed(rows, rng)
    return again[:260] + [row | {"lr": rows[min(i, 399)]["lr"]} for i, row in enumerate(again[260:])]


def resumed_replaying(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """The first batches are read again."""
    again = resumed(rows, rng)
    return again[:260] + [row | {"batch_hash": rows[i]["batch_hash"]} for i, row in enumerate(again[260:])]


def curve(
    change: Callable[[list[Row], np.random.Generator], list[Row]], kind: str = "csv"
) -> Callable[[Path, int, str], Log]:
    """A maker of a log with that change, written as another trainer would: a CSV, a JSONL, transformers' state."""

    def make(folder: Path, seed: int, _dtype: str) -> Log:
        rows = change(clean_curve(seed), np.random.default_rng(seed))
        if kind == "csv":
            path, names = folder / "log.csv", {"train_loss": "loss", "lr": "learning_rate", "step": "iter"}
            columns = {key: names.get(key, key) for key in clean_curve(seed, 25)[-1]}
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(columns.values()), restval="")
                writer.writeheader()
                writer.writerows({columns[k]: v for k, v in row.items()} for row in rows)
        elif kind == "jsonl":
            path = folder / "log.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path = folder / "trainer_state.json"
            history = [
                {"step": r["step"], "loss": r["train_loss"], "grad_norm": r["grad_norm"], "learning_rate": r["lr"]}
                for r in rows
            ]
            history += [{"step": r["step"], "eval_loss": r["val_loss"]} for r in rows if "val_loss" in r]
            history.append({"step": len(rows), "train_loss": 3.0, "train_runtime": 80.0})
            path.write_text(json.dumps({"log_history": history, "max_steps": len(rows)}))
        return open_(path, VOCAB)

    return make


# ---- real runs -----------------------------------------------------------------------------------------------------


def verse(n_bytes: int, seed: int) -> str:
    """Words of two syllables in lines."""
    rng = random.Random(seed)
    words = [
        rng.choice("bdfgklmnprst") + rng.choice("aeiou") + rng.choice("bdgklmnrst") + rng.choice("aeiou")
        for _ in range(60)
    ]
    lines: list[str] = []
    while sum(map(len, lines)) < n_bytes:
        lines.append(
            " ".join(rng.choice(words) for _ in range(rng.randint(4, 8))).capitalize() + rng.choice((",\n", ".\n"))
        )
    return "".join(lines)


SMALL = ModelConfig(max_seq_len=32, n_layer=2, n_head=2, n_embd=32)
BRIEF = TrainConfig(
    steps=48, micro_batch=8, eval_interval=12, eval_tokens=1000, warmup_steps=5, precision="fp32", keep=2
)


def tiny_run(
    folder: Path,
    seed: int,
    dtype: str,
    model: ModelConfig = SMALL,
    settings: TrainConfig = BRIEF,
    text: str = "",
    spoil: Callable[[GPT], Any] = lambda _: None,
    record: Callable[[Row], Row] = lambda row: row,
) -> Run:
    """Train a model of 30,000 weights for 48 steps as `kobza train` would. spoil: what is done to it before each checkpoint;
    record: to each line of the log."""
    source = folder / "text.txt"
    source.write_text(text or verse(12_000, seed))
    run = new_run(folder / "run", RunConfig(model, DataConfig(), settings, seed), [str(source)])
    cpu, config = torch.device("cpu"), run.config
    compute = torch.bfloat16 if dtype == "bf16" else None
    torch.manual_seed(seed)
    network = build(config.model, seed)
    optimizers = make_optimizers(network, config.train)
    batches = Batches(run.corpus.train, config.train.micro_batch, config.model.max_seq_len, seed, cpu)
    training = Training(network, optimizers, batches, None, Standing(), cpu)
    held_out = eval_batches(run.corpus.val, 16, config.model.max_seq_len, config.train.eval_tokens, cpu)
    log, standing = MetricsLog(run.out / "metrics.jsonl"), training.standing
    n_bytes = bytes_per_token(run.corpus.val, run.tokenizer)
    for step in train(network, optimizers, batches, config.train, make_loss(config.train, 1, compute)):
        standing.step, standing.tokens = step.step, standing.tokens + step.tokens
        standing.seconds += step.seconds
        row = {"step": step.step, "train_loss": step.loss, "lr": step.lr * config.train.lr, "grad_norm": step.grad_norm}
        row |= {"tokens": standing.tokens, "seconds": standing.seconds}
        if step.step % config.train.eval_interval == 0:
            spoil(network)
            val = evaluate(network, held_out, next_token_loss(compute))
            row |= {"val_loss": val, "val_bpb": bits_per_byte(val, n_bytes)}
            standing.note(val)
        log.write(record(row))
        if "val_loss" in row:
            save_training(run, training)
    log.close()
    return run


def real(**changes: Any) -> Callable[[Path, int, str], Log]:
    """A maker of a real run with those changes."""
    return lambda folder, seed, dtype: open_(tiny_run(folder, seed, dtype, **changes).out)


def with_black_box(folder: Path, seed: int, dtype: str) -> Log:
    """A run that met a nan and kept its black box."""
    run = tiny_run(folder, seed, dtype, settings=replace(BRIEF, steps=16))
    bundle = run.out / "blackbox" / "00000017"
    bundle.mkdir(parents=True)
    (bundle / "failure.json").write_text(json.dumps({"step": 17, "what": "loss", "value": "nan", "precision": "fp32"}))
    return open_(run.out)


@torch.no_grad()
def zero_head(model: GPT) -> None:
    """The first head of the second block adds nothing."""
    model.blocks[1].attn.o_proj.weight[:, : model.config.head_dim] = 0


@torch.no_grad()
def sharpen(model: GPT) -> None:
    """Queries far too long: every head sees one token."""
    for block in model.blocks:
        block.attn.q_proj.weight.div_(block.attn.q_proj.weight.norm()).mul_(100_000)


@torch.no_grad()
def negative_bias(model: GPT) -> None:
    """A ReLU that never opens."""
    model.blocks[0].mlp.up_proj.bias.fill_(-50)


@torch.no_grad()
def shout(model: GPT) -> None:
    """A head far too large."""
    model.lm_head.weight.div_(model.lm_head.weight.std()).mul_(200)


@torch.no_grad()
def swell(model: GPT) -> None:
    """The last block adds a thousand times too much."""
    model.blocks[1].mlp.down_proj.weight.mul_(3000 / (1e-6 + model.blocks[1].mlp.down_proj.weight.norm()))


def unseen_letters(seed: int) -> str:
    """Whose last tenth has letters that the rest has not."""
    text = verse(12_000, seed)
    return text[:-1100] + text[-1100:].translate(str.maketrans("aeiou", "жшґїє"))


PLAIN = replace(SMALL, qk_norm=False, init="gpt2")


def half_seen(folder: Path, seed: int, dtype: str) -> Log:
    """A run whose log says less than half of the bits that xz needs."""
    return open_(
        tiny_run(
            folder,
            seed,
            dtype,
            record=lambda row: row | ({"val_loss": 0.2 * row["val_loss"]} if "val_loss" in row else {}),
        ).out
    )


def continued(folder: Path, seed: int, dtype: str) -> Log:
    """A run of 48 steps about to be resumed to 80: its first rates are those of 48."""
    run = tiny_run(folder, seed, dtype)
    text = (run.out / "config.toml").read_text()
    assert "steps = 48" in text
    (run.out / "config.toml").write_text(text.replace("steps = 48", "steps = 80"))
    return open_(run.out)


def later_part(row: Row) -> Row:
    """The scheduler is stepped twice an update from step 30 on."""
    return row | {"lr": BRIEF.lr * max(0.0, 1 - (2 * row["step"] - 35) / 43)} if row["step"] >= 30 else row


FLAVOURS = {
    "gpt2": replace(
        SMALL, position="learned", norm="layernorm", mlp="gelu_tanh", bias=True, tied=True, qk_norm=False, init="gpt2"
    ),
    "llama": replace(SMALL, mlp="swiglu", qk_norm=False, init="gpt2", n_kv_head=1),
    "gemma": replace(
        SMALL,
        mlp="geglu_tanh",
        qk_norm=False,
        tied=True,
        norm_offset=True,
        embed_scale=32**0.5,
        attn_softcap=50.0,
        init="gpt2",
    ),
    "qwen": replace(SMALL, mlp="swiglu", qk_norm_weight=True, qkv_bias=True),
    "phi": replace(SMALL, mlp="swiglu", qk_norm=False, window=16, init="gpt2"),
}


def controls() -> Iterator[Control]:
    """Clean logs of three kinds, one resumed, and clean runs."""
    for kind in ("csv", "jsonl", "state"):
        yield Control(f"a clean curve, {kind}", curve(nothing, kind))
    yield Control("a clean curve, resumed", curve(resumed))
    for name, config in FLAVOURS.items():
        yield Control(f"a clean run, {name}", real(model=config))
    yield Control("a clean run, longer than it was begun", continued)


CONTROLS: tuple[Control, ...] = tuple(controls())
MUTATIONS: tuple[Mutation, ...] = (
    Mutation("R21", "nan", curve(breaks)),
    Mutation("R21", "nan in a jsonl", curve(breaks, "jsonl")),
    Mutation("R21", "a black box", with_black_box),
    Mutation("R21", "overfitting", curve(overfits)),
    Mutation("R21", "nothing learned", curve(learns_nothing)),
    Mutation("R21", "spikes", curve(spiking)),
    Mutation("R21", "clipped at every step", curve(clips_all)),
    Mutation("R21", "a clip at a hundredth", real(settings=replace(BRIEF, grad_clip=0.01))),
    Mutation("R21", "slower and slower", curve(slows)),
    Mutation(
        "R21",
        "letters without order",
        real(
            settings=replace(BRIEF, steps=120, eval_interval=30),
            text="".join(random.Random(1).choices("abcdefgh ", [30, 20, 10, 5, 5, 4, 3, 3, 20], k=12_000)),
        ),
    ),
    Mutation("R14", "first loss too high", curve(starts_high)),
    Mutation("R14", "first loss too low", curve(starts_low)),
    Mutation("R14", "a start of N(0, 1)", real(model=replace(SMALL, init="unit"))),
    Mutation("R10", "train loss summed over ranks", curve(summed)),
    Mutation("R1", "val loss below xz", half_seen),
    Mutation("R16", "decays four times too soon", curve(decays_early)),
    Mutation("R16", "scheduler stepped twice from step 30", real(record=later_part)),
    Mutation("R18", "optimizer lost on resume", curve(resumed_higher)),
    Mutation("R18", "warm-up again on resume", curve(resumed_warming)),
    Mutation("R18", "batches again on resume", curve(resumed_replaying)),
    Mutation("R22", "a head of zeros", real(spoil=zero_head)),
    Mutation("R22", "attention sees one token", real(model=PLAIN, spoil=sharpen)),
    Mutation("R22", "dead units", real(model=replace(PLAIN, mlp="relu", bias=True), spoil=negative_bias)),
    Mutation("R22", "logits too large", real(spoil=shout)),
    Mutation("R22", "residual stream grows", real(spoil=swell)),
    Mutation(
        "L1",
        "letters that only the validation text has",
        lambda folder, seed, dtype: open_(tiny_run(folder, seed, dtype, text=unseen_letters(seed)).out),
    ),
)

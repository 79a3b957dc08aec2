"""What a tuning learns from, by objective: a file -> examples -> rows, rows -> batches and a loss, and what is looked at."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kobza.checkpoint import write_file
from kobza.config import InputError, require
from kobza.device import Runtime
from kobza.finetune.config import TuneConfig
from kobza.finetune.distill import distill_loss, same_vocabulary
from kobza.finetune.encode import PromptRow, encode, encode_last, encode_pairs, encode_prompts, plain_encoder
from kobza.finetune.example import Example, Row
from kobza.finetune.examples import join_turns, make_examples
from kobza.finetune.lora import without_adapter
from kobza.finetune.measure import held_out
from kobza.finetune.preference import (
    PairBatches,
    Pairing,
    answer_gains,
    answer_means,
    dpo_loss,
    eval_pairs,
    kto_loss,
    kto_metrics,
    mismatched,
    need_both_kinds,
    orpo_loss,
    preference_metrics,
    reference_logprobs,
    useful,
)
from kobza.finetune.prefix import shared_hidden
from kobza.finetune.reward import make_reward
from kobza.finetune.rollouts import Rollouts, grpo_loss
from kobza.finetune.rows import PackedBatches, eval_rows, load_rows, save_rows
from kobza.finetune.sft import Hidden, sft_loss
from kobza.finetune.split import split
from kobza.finetune.table import read_records
from kobza.kernels.choose import head_loss_for
from kobza.kernels.tuned import TunedBlock
from kobza.model import GPT
from kobza.recipes.base import Base
from kobza.recipes.tuned import open_checkpoint
from kobza.train import LossFn, evaluate

SIDES = ("train", "val")
EVAL_ROWS = 4  # times a micro-batch: without a backward pass there is room


@dataclass(frozen=True)
class Learned:
    """The rows of one side, and what else is known of each example: "desirable" (KTO), "expected" (GRPO), "reference" (its
    log-probabilities under the model as it was). Of pairs the two rows follow each other."""

    rows: list[Row]
    known: dict[str, list[Any]]
    notes: tuple[str, ...] = ()

    @property
    def pairs(self) -> list[tuple[Row, Row]]:
        """The rows two by two."""
        return list(zip(self.rows[::2], self.rows[1::2], strict=True))

    @property
    def own(self) -> list[Row]:
        """The rows that the file has itself: of KTO's pairs the second is made up."""
        return self.rows[::2] if "desirable" in self.known else self.rows

    def teaching(self) -> Learned:
        """Without the rows that have nothing to learn; of pairs and questions there are none such."""
        return self if self.known else Learned([row for row in self.rows if row.learned.any()], {}, self.notes)


# ---- a file -> rows ------------------------------------------------------------------------------------------------


def make_learned(config: TuneConfig, base: Base) -> tuple[Learned, Learned]:
    """The rows to learn and those held out, out of the file."""
    source, rows = config.source, config.rows
    records = read_records(Path(source.data))
    given = (source.prompt or None, source.answer or None, source.system or None)
    made = make_examples(records, *given, rows, config.objective.objective)
    notes = [told(made.skipped, "rows")] if made.skipped else []
    sides = split(made.examples, rows.val_fraction, config.seed)
    if rows.turns > 1:
        sides = tuple(join_turns(side, rows.turns, config.seed) for side in sides)
    train, val = (rows_of(side, config, base) for side in sides)
    return Learned(train.rows, train.known, (*notes, *train.notes)), val


def rows_of(examples: list[Example], config: TuneConfig, base: Base) -> Learned:
    """Examples as the objective learns them."""
    what, encoder = config.objective.objective, base.encoder or plain_encoder(base.tokenizer, base.ends)
    if what in ("dpo", "orpo"):
        pairs, left = useful(encode_pairs(examples, encoder, config.rows))
        return paired(pairs, {}, (told(left, "pairs"),) if left else ())
    if what == "kto":
        known = list(zip(encode_last(examples, encoder, config.rows), examples, strict=True))
        kept = [(row, bool(example.desirable)) for row, example in known if row.learned.any()]
        flags = [good for _, good in kept]
        need_both_kinds(np.array(flags))
        return paired(mismatched([row for row, _ in kept], config.seed), {"desirable": flags})
    if what == "grpo":
        asked = encode_prompts(examples, encoder, config.rows)
        rows = [Row(prompt.ids, np.zeros(len(prompt.ids), bool), prompt.where) for prompt in asked]
        return Learned(rows, {"expected": [prompt.expected for prompt in asked]})
    encoded = encode(examples, encoder, config.rows, base.ends)
    return Learned(encoded.rows, {}, tuple(encoded.notes))


def paired(pairs: list[tuple[Row, Row]], known: dict[str, list[Any]], notes: tuple[str, ...] = ()) -> Learned:
    """Pairs as a side: their rows follow each other."""
    return Learned([row for pair in pairs for row in pair], known, notes)


def told(left: list[tuple[str, str]], what: str) -> str:
    """What was left out, in words. told([("a.csv row 3", "its answer is empty")], "rows") -> "1 rows left out, first ..." """
    return f"{len(left):,} {what} are left out, first {left[0][0]}: {left[0][1]}"


def save_learned(folder: Path, side: Learned) -> None:
    """Keep a side, so that going on needs no file."""
    shutil.rmtree(folder, ignore_errors=True)  # of a tuning that was killed before it stood there
    save_rows(folder, side.rows)
    write_file(folder.with_suffix(".json"), json.dumps(side.known))


def load_learned(folder: Path) -> Learned:
    """A side as it was kept."""
    path = folder.with_suffix(".json")
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{path}: missing or damaged; start the tuning anew in another --out") from None
    return Learned(load_rows(folder), known)


# ---- rows -> work --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What the loop needs: batches and a loss, how many batches are an epoch, and a look at held-out rows -> figures, of which
    "val_loss" is the one to bring down. `unit`: what a batch has so many of; `report`: of the last batch, for the record."""

    batches: Any
    loss_fn: LossFn
    per_epoch: int
    look: Callable[[], dict[str, float]]
    unit: str
    report: Callable[[], dict[str, float]] = dict


def make_work(config: TuneConfig, base: Base, model: GPT, sides: tuple[Learned, Learned], runtime: Runtime) -> Work:
    """The work of an objective. What the model as it was must say is asked here, before the first step, and kept in `known`."""
    what = config.objective.objective
    fused = all(type(block) is TunedBlock for block in model.blocks)
    hidden = partial(shared_hidden, by_document=fused)
    if what in ("sft", "distill"):
        return by_rows(config, model, sides, hidden, runtime)
    if what == "grpo":
        return by_reward(config, base, model, sides, hidden, runtime)
    return by_pairs(config, model, sides, hidden, runtime)


def by_rows(config: TuneConfig, model: GPT, sides: tuple[Learned, Learned], hidden: Hidden, runtime: Runtime) -> Work:
    """Answers are learned token by token: the tokens themselves, or a teacher's distribution over them."""
    train, rows, dtype, device = config.train, config.rows, runtime.compute_dtype, runtime.device
    batches = PackedBatches(sides[0].rows, train.micro_batch, rows.max_len, config.seed, device, rows.packing)
    held = eval_rows(sides[1].rows, train.micro_batch, rows.max_len, device, rows.packing)
    if config.objective.objective == "distill":
        teacher = open_checkpoint(Path(config.objective.teacher), device).model
        same_vocabulary(teacher, model)
        loss_fn = distill_loss(teacher.to(dtype), config.objective.temperature, dtype, hidden=hidden)
    else:
        loss_fn = sft_loss(dtype, head_loss_for(device, model), hidden)

    def look() -> dict[str, float]:
        seen = held_out(model, held, dtype, hidden)
        return {"val_loss": seen.loss, "val_right": seen.share}

    unit = f"lines of {rows.max_len} tokens" if rows.packing else "rows"
    return Work(batches, loss_fn, batches.n_batches_per_epoch, look, unit)


def by_pairs(config: TuneConfig, model: GPT, sides: tuple[Learned, Learned], hidden: Hidden, runtime: Runtime) -> Work:
    """Better answers are preferred to worse ones."""
    objective, train = config.objective, config.train
    n, dtype, device = train.micro_batch, runtime.compute_dtype, runtime.device
    pairings = []
    for side in sides:
        if objective.objective != "orpo" and "reference" not in side.known:
            side.known["reference"] = reference_logprobs(model, side.pairs, EVAL_ROWS * n, device, dtype).tolist()
        reference, desirable = (side.known.get(name) for name in ("reference", "desirable"))
        known = (np.array(reference) if reference else None, np.array(desirable) if desirable else None)
        pairings.append(Pairing(side.pairs, *known))
    batches, held = PairBatches(pairings[0], n, config.seed, device), eval_pairs(pairings[1], EVAL_ROWS * n, device)
    loss_fn = {"dpo": dpo_loss, "orpo": orpo_loss, "kto": kto_loss}[objective.objective](objective.beta, dtype, hidden)

    def look() -> dict[str, float]:
        if objective.objective == "kto":
            compared = kto_metrics(model, held, objective.beta, dtype)
        else:
            measure = answer_means if objective.objective == "orpo" else answer_gains
            compared = preference_metrics(model, held, objective.beta, measure, dtype)
        return {"val_loss": evaluate(model, held, loss_fn)} | compared

    return Work(batches, loss_fn, batches.n_batches_per_epoch, look, "pairs")


def by_reward(
    config: TuneConfig, base: Base, model: GPT, sides: tuple[Learned, Learned], hidden: Hidden, runtime: Runtime
) -> Work:
    """The model answers itself, and what is rewarded above its group becomes likelier."""
    objective, train, dtype = config.objective, config.train, runtime.compute_dtype
    size, n = objective.group_size, train.micro_batch
    whole = (
        f"--train.micro-batch {n} answers are no whole groups of --group-size {size}; take {max(1, n // size) * size}"
    )
    require(n % size == 0, whole)
    asked, held = (
        [PromptRow(row.ids, said, row.where) for row, said in zip(side.rows, side.known["expected"], strict=True)]
        for side in sides
    )
    rollouts = Rollouts(
        model,
        asked,
        base.tokenizer.decode,
        make_reward(objective.reward),
        ends=base.ends,
        group_size=size,
        answer_tokens=objective.answer_tokens,
        groups=n // size,
        seed=config.seed,
        temperature=objective.temperature,
        dtype=dtype,
        as_it_was=reference_of(config, model) if objective.beta else None,
        ahead=train.accumulate,
        hidden=hidden,
    )
    rollouts.check(held)
    loss_fn = grpo_loss(objective.beta, dtype=dtype, temperature=objective.temperature, hidden=hidden)

    def look() -> dict[str, float]:
        seen = rollouts.measure(held)
        return {"val_loss": -seen["reward"]} | {f"val_{name}": value for name, value in seen.items()}

    per_epoch = math.ceil(len(asked) * size / n)
    return Work(rollouts, loss_fn, per_epoch, look, "answers", lambda: rollouts.report)


def reference_of(config: TuneConfig, model: GPT) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the model is as it is now: without its adapter, where nothing else learns."""
    alone = config.method.method == "lora" and not config.method.embeddings
    return partial(without_adapter, model) if alone else as_it_is_now(model)


def as_it_is_now(model: GPT) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the weights that learn are what they are at this moment."""
    then = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def as_it_was() -> Iterator[None]:
        now = {name: p.data for name, p in model.named_parameters() if name in then}
        try:
            for name, parameter in model.named_parameters():
                parameter.data = then.get(name, parameter.data)
            yield
        finally:
            for name, parameter in model.named_parameters():
                parameter.data = now.get(name, parameter.data)

    return as_it_was

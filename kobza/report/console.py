"""What a person sees of a run as it goes: an introduction, a block an evaluation, the coach's remarks, a conclusion."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from kobza.config import InputError, SampleConfig
from kobza.generate import generate
from kobza.model import GPT, n_parameters
from kobza.report.coach import Facts, meaning, remarks
from kobza.report.landmarks import LOOK_AT_TOKENS, Landmarks, measure_landmarks
from kobza.run import Run

SAMPLE_TOKENS = 120
SAMPLE_LINES = 6
PROMPT_LETTERS = 24


def facts_of(run: Run, n_params: int) -> Facts:
    """What the coach must know of a run beside its records."""
    c = run.config
    return Facts(
        vocab_size=c.model.vocab_size,
        n_params=n_params,
        train_tokens=len(run.corpus.train),
        steps=c.train.steps,
        warmup_steps=c.train.warmup_steps,
        lr=c.train.lr,
        dropout=c.model.dropout,
        eval_interval=c.train.eval_interval,
    )


def landmarks_of(run: Run) -> Landmarks:
    """The losses that mean something for the run's text."""
    tokenizer = run.tokenizer
    try:
        return measure_landmarks(run.corpus.train.array(LOOK_AT_TOKENS), tokenizer.vocab_size, tokenizer.piece_bytes)
    except ValueError as error:
        raise InputError(f"{run.out / 'tokens'}: {error}") from None


class Commentator:
    """Prints a run's course to a console and keeps its samples in samples.jsonl."""

    def __init__(self, run: Run, model: GPT, console: Console, records: list[dict[str, Any]]):
        self.run, self.model, self.console, self.records = run, model, console, records
        self.facts = facts_of(run, n_parameters(model))
        self.landmarks = landmarks_of(run)
        self.said: set[str] = set()

    def introduce(self, where: str, overlap: float, first_step: int) -> None:
        """Text, model, machine, and what losses mean for this vocabulary."""
        index, c, marks = self.run.corpus.index, self.run.config, self.landmarks
        say = self.console.print
        say(f"run       {escape(str(self.run.out))}")
        say(
            f"text      {escape(named(index['files']))}: {index['n_bytes']:,} bytes, {index['n_tokens']:,} tokens of "
            f"{index['vocab_size']:,} kinds, {count(index['n_documents'], 'document')}; the last "
            f"{c.data.val_fraction:.0%} validates"
        )
        say(f"model     {self.facts.n_params:,} parameters: {count(c.model.n_layer, 'layer')} of {c.model.n_embd}, "
            f"{count(c.model.n_head, 'head')}, context {c.model.max_seq_len}")  # fmt: skip
        tokens = c.train.steps * c.batch_tokens
        epochs = tokens / len(self.run.corpus.train)
        times = f"{epochs:,.1f}" if epochs >= 1 else f"{epochs:.2f}"
        say(f"training  {c.train.steps:,} steps, {tokens:,} tokens ({times} times the text), {where}")
        say(
            f"losses    in nats a token: {marks.uniform:.3f} knows nothing, {marks.unigram:.3f} how frequent tokens are, "
            f"{marks.bigram:.3f} which token follows which; lower is better"
        )
        if overlap > 0.01:
            say(f"warning   {overlap:.1%} of the validation text stands word for word in the training text: "
                "the validation loss is too good to be true; drop the repeats", style="yellow")  # fmt: skip
        if first_step:
            say(f"resumed   at step {first_step:,}")

    def warn(self, lines: list[str]) -> None:
        """What is wrong before the first step."""
        for line in lines:
            self.console.print(f"warning   {escape(line)}", style="yellow")

    def evaluation(self, record: dict[str, Any]) -> None:
        """An evaluation's figures, a sample and what the coach newly remarks."""
        val, say = record["val_loss"], self.console.print
        train_loss, sample = mean_train_loss(self.records, self.facts.eval_interval), self.sample(record["step"])
        say(
            f"\n[bold]step {record['step']:,}[/bold]  train {train_loss:.4f}  val {val:.4f}  "
            f"{record['val_bpb']:.3f} bits/byte  perplexity {math.exp(min(val, 700)):.2f}  {record['seconds']:.1f} s"
        )
        for line in shown_lines(sample):
            say(f"  [dim]|[/dim] {escape(line)}")
        with open(self.run.out / "samples.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": record["step"], "text": sample}, ensure_ascii=False) + "\n")
        for remark in remarks(self.records, self.landmarks, self.facts):
            if remark.code not in self.said and remark.severity == "warning":
                self.said.add(remark.code)
                say(f"  coach: {escape(remark.text)} {escape(remark.remedy)}", style="yellow")

    def sample(self, step: int) -> str:
        """A passage by the model as it stands, begun with a line end where there is one."""
        tokenizer = self.run.tokenizer
        begin = tokenizer.encode(tokenizer.line_start()).tolist()
        config = SampleConfig(tokens=SAMPLE_TOKENS, seed=self.run.config.seed + step)
        ids = [choice.ids[0] for choice in generate(self.model, [begin], config, tokenizer.ends)]
        return tokenizer.decode([i for i in ids if i is not None], continues=True)

    def conclude(self, outcome: str, best: dict[str, Any], seconds: float, picture: Any, page: Any) -> None:
        """What was reached, what it means, and what to try next."""
        say, out = self.console.print, self.run.out
        why = {"stop_at": "reached train.stop_at", "patience": "no better for train.patience evaluations"}
        say(f"\n[bold]done[/bold] in {seconds:.1f} s{': ' + why[outcome] if outcome in why else ''}; best validation loss "
            f"{best['val_loss']:.4f} nats a token at step {best['step']:,}")  # fmt: skip
        say(f"  {escape(meaning(best['val_loss'], self.landmarks))}")
        for remark in remarks(self.records, self.landmarks, self.facts):
            say(f"  coach: {escape(remark.text)} {escape(remark.remedy)}")
        folder, prompt = escape(shlex.quote(str(out))), escape(shlex.quote(self.prompt()))
        say(escape(f"\npicture   {picture}\nreport    {page}"), soft_wrap=True)
        say(f"next      kobza generate {folder} --prompt {prompt}\n"
            f"          kobza chat {folder}\n          kobza describe {folder}", soft_wrap=True)  # fmt: skip

    def prompt(self) -> str:
        """The first words of the text, to try the model with."""
        text = self.run.tokenizer.decode(self.run.corpus.train.array(200).tolist())
        line = next((line.strip() for line in text.split("\n") if line.strip()), "")
        return line if len(line) <= PROMPT_LETTERS else line[:PROMPT_LETTERS].rpartition(" ")[0] or line[:1]


def shown_lines(sample: str) -> list[str]:
    """The first lines of a sample for a terminal: no empty ones at the ends, no control characters."""
    printable = "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in sample.replace("\t", "    "))
    return "\n".join(printable.strip("\n").split("\n")[:SAMPLE_LINES]).rstrip().split("\n")


def count(n: int, noun: str) -> str:
    """A number and its noun. count(1, "layer") -> "1 layer", count(2, "layer") -> "2 layers"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def named(files: list[str]) -> str:
    """The first files' names. named(["a", "b", "c", "d"]) -> "a, b, c and more"."""
    return ", ".join(files[:3]) + (" and more" if len(files) > 3 else "")


def figures(record: dict[str, Any], val: float | None, flops: int, peak: float | None) -> str:
    """The progress line's text, from a record, the last validation loss and the FLOPs of a token."""
    rate = record["tokens_per_second"]
    speed = f"MFU {rate * flops / peak:.0%}" if peak else f"{rate * flops / 1e9:.0f} GFLOP/s"
    held_out = "" if val is None else f"  val {val:.4f}"
    return f"loss {record['train_loss']:.4f}{held_out}  {rate:,.0f} tokens/s  {speed}"


def make_board(out: Path) -> Any:
    """A TensorBoard writer in the run's folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs the tensorboard package: pip install 'kobza[tensorboard]'") from None
    return SummaryWriter(str(out / "tensorboard"))


def write_board(board: Any, record: dict[str, Any]) -> None:
    """A record's numbers as TensorBoard scalars."""
    for key in record.keys() - {"step", "tokens", "seconds"}:
        board.add_scalar(key, record[key], record["step"])


def mean_train_loss(records: list[dict[str, Any]], interval: int) -> float:
    """Mean training loss of the last `interval` steps."""
    return float(np.mean([r["train_loss"] for r in records[-interval:]]))

"""What a person sees of a run as it goes: an introduction, a block an evaluation, the coach's remarks, a conclusion."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from kobza.report.coach import Facts, meaning, remarks
from kobza.report.landmarks import measure_landmarks
from kobza.run import Run

SAMPLE_LINES = 6


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


class Commentator:
    """Prints a run's course to a console and keeps its samples in samples.jsonl."""

    def __init__(self, run: Run, n_params: int, console: Console, records: list[dict[str, Any]]):
        self.run, self.console, self.records = run, console, records
        self.facts = facts_of(run, n_params)
        self.landmarks = measure_landmarks(run.corpus.train.array(20_000_000), run.tokenizer.vocab_size)
        self.said: set[str] = set()

    def introduce(self, where: str, overlap: float, first_step: int) -> None:
        """Text, model, machine, and what losses mean for this vocabulary."""
        index, c, marks = self.run.corpus.index, self.run.config, self.landmarks
        say = self.console.print
        say(
            f"text      {index['n_bytes']:,} bytes, {index['n_tokens']:,} tokens of {index['vocab_size']:,} kinds, "
            f"{index['n_documents']:,} document(s); the last {c.data.val_fraction:.0%} validates"
        )
        say(f"model     {self.facts.n_params:,} parameters: {c.model.n_layer} layers of {c.model.n_embd}, "
            f"{c.model.n_head} heads, context {c.model.max_seq_len}")  # fmt: skip
        tokens = c.train.steps * c.train.micro_batch * c.train.accumulate * c.model.max_seq_len
        epochs = tokens / len(self.run.corpus.train)
        say(f"training  {c.train.steps:,} steps, {tokens:,} tokens ({epochs:.1f} times the text), {where}")
        say(
            f"losses    knows nothing: {marks.uniform:.3f} nats a token; knows how frequent tokens are: "
            f"{marks.unigram:.3f}; knows which token follows which: {marks.bigram:.3f}"
        )
        if overlap > 0.01:
            say(f"warning   {overlap:.1%} of the validation text stands word for word in the training text: "
                "the validation loss is too good to be true; drop the repeats", style="yellow")  # fmt: skip
        if first_step:
            say(f"resumed   at step {first_step:,}")

    def evaluation(self, record: dict[str, Any], train_loss: float, sample: str) -> None:
        """An evaluation's figures, a sample and what the coach newly remarks."""
        val, say = record["val_loss"], self.console.print
        say(
            f"\n[bold]step {record['step']:,}[/bold]  train {train_loss:.4f}  val {val:.4f}  "
            f"{record['val_bpb']:.3f} bits/byte  perplexity {math.exp(min(val, 700)):.2f}  {record['seconds']:.1f} s"
        )
        lines = sample.strip("\n").split("\n")[:SAMPLE_LINES]
        say("\n".join(f"  [dim]|[/dim] {escape(line)}" for line in lines))
        with open(self.run.out / "samples.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": record["step"], "text": sample}, ensure_ascii=False) + "\n")
        for remark in remarks(self.records, self.landmarks, self.facts):
            if remark.code not in self.said and remark.severity == "warning":
                self.said.add(remark.code)
                say(f"  coach: {escape(remark.text)} {escape(remark.remedy)}", style="yellow")

    def conclude(self, outcome: str, best: dict[str, Any], seconds: float, picture: Any, page: Any) -> None:
        """What was reached, what it means, and what to try next."""
        say, out = self.console.print, self.run.out
        why = {"stop_at": "reached train.stop_at", "patience": "no better for train.patience evaluations"}
        say(f"\n[bold]done[/bold] in {seconds:.1f} s{': ' + why[outcome] if outcome in why else ''}; best validation loss "
            f"{best['val_loss']:.4f} nats a token at step {best['step']:,}")  # fmt: skip
        say(f"  {escape(meaning(best['val_loss'], self.landmarks))}")
        for remark in remarks(self.records, self.landmarks, self.facts):
            say(f"  coach: {escape(remark.text)} {escape(remark.remedy)}")
        say(f"\npicture   {picture}\nreport    {page}\nnext      kobza generate {out} --prompt 'ROMEO:'\n"
            f"          kobza chat {out}\n          kobza describe {out}")  # fmt: skip


def mean_train_loss(records: list[dict[str, Any]], interval: int) -> float:
    """Mean training loss of the last `interval` steps."""
    return float(np.mean([r["train_loss"] for r in records[-interval:]]))

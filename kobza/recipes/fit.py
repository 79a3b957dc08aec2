"""kobza tokens --fit: which tokenizer suits a text, a model and its budget of steps."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kobza.config import ModelConfig, RunConfig, require
from kobza.describe.parts import parts, total_parameters
from kobza.hub.shakespeare import default_text
from kobza.recipes.describe import find_config
from kobza.recipes.tokens import named, read_text, tokenizer_for
from kobza.tokens.advisor import Candidate, Fit, candidate, candidates, embedding_share, measure_fit, warnings

LEAST = 2000  # characters


def main(text: str | None, what: str, names: str | None, vocab_size: int, as_json: bool) -> int:
    """Print how tokenizers suit the text (default: Shakespeare) and the model of a preset, a run or a TOML file -> exit code."""
    require(names is not None or not vocab_size, f"--vocab-size {vocab_size} has no effect with --fit: it tries sizes")
    wanted = [] if names is None else named(names, vocab_size)
    whole, run = read_text(text if text is not None else str(default_text()[0])), find_config(what)
    require(len(whole) >= LEAST, f"the text has {len(whole):,} characters; a tokenizer is judged by {LEAST:,} or more")
    val, budget = run.data.val_fraction, run.train.steps * run.batch_tokens
    tried = candidates(whole, val)
    sound = [one for one in tried if not warnings(fit_of(one, run))] or tried
    best = min(sound, key=lambda one: one.bits_per_byte(budget))
    in_time = min(sound, key=lambda one: one.bits_per_byte(budget * flops(run, best) / flops(run, one)))
    n_tried = len(tried)
    for name in wanted:
        tried.append(candidate(name, tokenizer_for(name, whole, vocab_size), whole, val))
    bits, fits = [one.bits_per_byte(budget) for one in tried], [fit_of(one, run) for one in tried]
    remarks = [
        f"{one.option}: {line}" for one, fit in list(zip(tried, fits, strict=True))[n_tried:] for line in warnings(fit)
    ]
    if as_json:
        table = [
            {"tokenizer": one.option, "bits_per_byte": b} | asdict(f)
            for one, b, f in zip(tried, bits, fits, strict=True)
        ]
        pick = {"equal_steps": best.option, "equal_time": in_time.option}
        print(json.dumps({"budget_tokens": budget, "recommended": pick, "tokenizers": table, "warnings": remarks}))
        return 0
    console = Console(highlight=False)
    console.soft_wrap = not console.is_terminal
    console.print(f"text      {len(whole):,} characters; {budget:,} tokens are read in {run.train.steps:,} steps of "
                  f"{escape(what)}, width {run.model.n_embd}")  # fmt: skip
    console.print(fit_table(tried, bits, fits, best))
    console.print(f"best at equal steps  {best.option}\n     at equal time   {in_time.option}")
    for line in remarks:
        console.print(f"warning   {escape(line)}", style="yellow")
    return 0


def model_with(run: RunConfig, vocab_size: int) -> ModelConfig:
    """The run's model with another vocabulary."""
    return replace(run.model, vocab_size=vocab_size)


def flops(run: RunConfig, one: Candidate) -> int:
    """Of one token, forward."""
    return sum(part.flops_per_token for part in parts(model_with(run, one.tokenizer.vocab_size)))


def fit_of(one: Candidate, run: RunConfig) -> Fit:
    """How a candidate meets its text and the run's model."""
    model = model_with(run, one.tokenizer.vocab_size)
    return measure_fit(
        one.ids[: one.n_train], one.n_train, one.tokenizer, embedding_share(model, total_parameters(model))
    )


def fit_table(tried: list[Candidate], bits: list[float], fits: list[Fit], best: Candidate) -> Table:
    """A row a tokenizer."""
    found = Table(box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    found.add_column("tokenizer", no_wrap=True)
    heads = (
        "rows",
        "seen",
        "tokens\na row",
        "pairs",
        "times\neach",
        "bytes\na token",
        "in em-\nbedding",
        "trigrams,\nbits/byte",
    )
    for name in heads:
        found.add_column(name, justify="right")
    for one, b, fit in zip(tried, bits, fits, strict=True):
        figures = (f"{fit.vocab_size:,}", f"{fit.rows_seen:.0%}", f"{fit.row_tokens:,.1f}", f"{fit.bigrams:,}")
        figures += (
            f"{fit.bigram_count:,.1f}",
            f"{fit.text_bytes / fit.tokens:.2f}",
            f"{fit.embedding_share:.0%}",
            f"{b:.3f}",
        )
        name = one.option.removeprefix("--tokenizer ").replace("--vocab-size ", "")
        found.add_row(escape(name), *figures, style="bold" if one is best else "")
    return found

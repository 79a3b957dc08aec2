"""The verbs under `kobza doctor`; cli.py mounts them. A verb imports its recipe, and with it what is heavy, when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from kobza.config import require
from kobza.recipes import recipe

app = App(
    name="doctor",
    help="Find the bugs that others ship: in files, models, training steps and runs. Errors are proven by a counter-example.",
    help_epilogue="Exit codes: 0 nothing proven wrong, 1 an error is proven, 2 something could not be examined.",
)

Json = Annotated[bool, Parameter(negative="", help="print one JSON object instead of a table")]
Html = Annotated[Path | None, Parameter(help="also write one self-contained page here")]
Fix = Annotated[
    Path | None, Parameter(help="write a corrected copy of the config and tokenizer files into this new folder")
]


def doctor(*arguments: Any, **settings: Any) -> int:
    """Call the recipe."""
    return recipe("doctor").main(*arguments, **settings)


@app.default
def guess(path: str, /, *, json: Json = False, html: Html = None, fix: Fix = None) -> int:
    """Examine whatever PATH is: a model's folder, a .gguf, a template, a run, a log, a model to load.

    Parameters
    ----------
    path
        a file, a folder, a pulled model's name or package.module:callable
    """
    return recipe("doctor").guess(path, json, html, fix)


@app.command
def config(folder: Path, /, *, json: Json = False, html: Html = None, fix: Fix = None) -> int:
    """Hold config.json against the tensors, the tokenizer and itself, from files alone.

    Parameters
    ----------
    folder
        a model's folder as the Hugging Face hub has them
    """
    return doctor("config", [folder], json, html, fix)


@app.command
def tokenizer(
    folder: Path,
    /,
    *,
    against: Path | None = None,
    corpus: Path | None = None,
    json: Json = False,
    html: Html = None,
    fix: Fix = None,
) -> int:
    """Round trips, special tokens, BOS, spaces, pre-tokenizer: from files alone.

    Parameters
    ----------
    folder
        a model's folder, or a tokenizer.json
    against
        another tokenizer that ought to give the same ids
    corpus
        a text to compare on besides the built-in hard one
    """
    return doctor("tokenizer", [folder], json, html, fix, against=against, corpus=corpus)


@app.command
def template(
    path: Path,
    /,
    *,
    against: Path | None = None,
    train_jsonl: Path | None = None,
    json: Json = False,
    html: Html = None,
) -> int:
    """Render a chat template in a sandbox and hold it against the laws of templates.

    Parameters
    ----------
    path
        a model's folder, a .jinja file, a Modelfile or a .gguf
    against
        another that ought to render the same
    train_jsonl
        conversations to render, one {"messages": [...]} a line
    """
    return doctor("template", [path], json, html, against=against, train_jsonl=train_jsonl)


@app.command
def gguf(path: Path, /, *, hf: Path | None = None, json: Json = False, html: Html = None) -> int:
    """Check the flags and tensors of a GGUF file, alone or against the folder it was made from.

    Parameters
    ----------
    path
        the .gguf
    hf
        the model's folder as the Hugging Face hub has it
    """
    return doctor("gguf", [path], json, html, hf=hf)


@app.command
def data(
    train: Path, val: Path | None = None, /, *, tokenizer: Path | None = None, json: Json = False, html: Html = None
) -> int:
    """Contamination, duplicates, Unicode, shard width, and what is really supervised.

    Parameters
    ----------
    train
        a text, a .jsonl, a folder or token shards
    val
        what the model will be judged on
    tokenizer
        tokenizer.json, or a folder with one, to decode shards and count
    """
    return doctor("data", [train, val], json, html, tokenizer=tokenizer)


@app.command
def model(subject: str, /, *, layers: int = 0, json: Json = False, html: Html = None) -> int:
    """Laws that every causal model keeps: causality, cache, padding, packing, positions, window, loss, number formats.

    Parameters
    ----------
    subject
        a run, a pulled model, a model's folder, transformers:FOLDER, or package.module:callable (which runs your code)
    layers
        ask so many of the first blocks; 0: all of a model up to 30M weights, else a slice of two
    """
    return doctor("model", [subject], json, html, layers=layers)


@app.command
def parity(
    a: str,
    b: str,
    /,
    *,
    explain: Annotated[bool, Parameter(negative="")] = False,
    dtype: str = "fp32,bf16",
    plot: Path | None = None,
    json: Json = False,
    html: Html = None,
) -> int:
    """Put A beside B, the reference, layer by layer, forward and backward; --explain searches what makes them equal.

    Parameters
    ----------
    a
        a subject as for `doctor model`
    b
        the one to trust
    explain
        try activations, norms, scales, positions, caps and windows, singly and in pairs, until A equals B at every layer
    dtype
        number formats, joined by commas: fp32, autocast-bf16, bf16
    plot
        write the curves of log10 relative error here, as svg; of a second number format in a file beside it
    """
    return doctor("parity", [a, b], json, html, explain=explain, dtype=dtype, plot=plot)


@app.command
def train(step: str | None = None, /, *, json: Json = False, html: Html = None) -> int:
    """Laws of a training step, on your own: what is predicted, accumulation, resuming, world size, decay, schedule.

    Parameters
    ----------
    step
        module:make_step or file.py:make_step, which runs your code; without it, say what make_step returns
    """
    if step is None:
        return recipe("doctor_selftest").contract()
    return doctor("train", [step], json, html)


@app.command
def run(
    path: Path,
    /,
    *,
    vocab_size: int = 0,
    live: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
    html: Html = None,
) -> int:
    """Read a run's curves and, of our own runs, the inside of the model.

    Parameters
    ----------
    path
        a run's folder, or a .csv, .jsonl or trainer_state.json of another trainer
    vocab_size
        tokens of the vocabulary, where another trainer's log does not tell: the first loss is held against its ln
    live
        stay and say what appears, until the run ends or Ctrl-C
    """
    if live:
        require(html is None, f"--html {html} has no effect with --live; call again when the run has ended")
        return recipe("doctor_live").main(path, vocab_size, json)
    return doctor("run", [path], json, html, vocab_size=vocab_size)


@app.command
def adapter(base: Path, adapter: Path, merged: Path | None = None, /, *, json: Json = False, html: Html = None) -> int:
    """Check a LoRA adapter against its base, and a merged model against both.

    Parameters
    ----------
    base
        the folder of the model it was trained on
    adapter
        a folder in the PEFT format
    merged
        the folder of the merged model
    """
    return doctor("adapter", [base, adapter, merged], json, html)


@app.command
def explain(code: str | None = None, /, *, json: Json = False) -> int:
    """Say what a code means, how it looks, how it is seen, who met it; without one, list them all.

    Parameters
    ----------
    code
        for example G8
    """
    return recipe("doctor_selftest").tell(code, json)


@app.command
def selftest(*areas: str, seeds: int = 3, json: Json = False) -> int:
    """Examine the doctor: at least one injected bug per code, and clean models on which nothing may be found.

    Parameters
    ----------
    areas
        config, tokenizer, template, gguf, data, model, parity, train, run, adapter; default: all
    seeds
        draws of each clean control
    """
    return recipe("doctor_selftest").selftest(list(areas), seeds, json)

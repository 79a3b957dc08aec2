"""The verbs that tune a model: finetune, plan finetune, merge. cli.py mounts them; their words become a TuneConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from kobza.config import InputError, TrainConfig, load_toml, require
from kobza.finetune.config import MethodConfig, ObjectiveConfig, RowsConfig, Source, TuneConfig
from kobza.recipes import recipe

# Where a tuning differs from a training from scratch: it begins at weights that know much already
TRAIN = {"optimizer": "adamw", "lr": 2e-4, "micro_batch": 8, "warmup_steps": 10, "eval_interval": 50, "keep": 1}

Hyphened = Annotated[str, Parameter(allow_leading_hyphen=True)]
Flag = Annotated[bool, Parameter(negative="")]
Json = Annotated[bool, Parameter(negative="", help="print one JSON object instead of lines")]
Method = Annotated[MethodConfig, Parameter(name="*", group="What learns")]
Rows = Annotated[RowsConfig, Parameter(name="*", group="Rows")]
Objective = Annotated[ObjectiveConfig, Parameter(name="*", group="Objective")]
Train = Annotated[TrainConfig, Parameter(group="Training")]

plan = App(name="plan", help="Say what a work will take of memory and time, before it starts.")


def finetune(
    model: str = "",
    data: str = "",
    /,
    *,
    prompt: Hyphened = "",
    answer: Hyphened = "",
    system: Hyphened = "",
    template: str = "",
    add_tokens: str = "",
    out: Path | None = None,
    seed: int = 0,
    resume: Flag = False,
    dry_run: Flag = False,
    device: str = "auto",
    json: Json = False,
    method: Method = MethodConfig(),
    rows: Rows = RowsConfig(),
    objective: Objective = ObjectiveConfig(),
    train: Train = TrainConfig(),
) -> int:
    """Teach a model your own questions and answers: from a table, chats, or preferences; LoRA by default, on any machine.

    Parameters
    ----------
    model
        a pulled model's name, or a run's folder
    data
        a .csv, .tsv, .xlsx, .jsonl, .json or .parquet: a table of any columns, Alpaca, ShareGPT, messages, preferences
    prompt
        of a table: the question, "Did {name} survive?[[ The fare was {fare}.]]"; what is in [[ ]] vanishes with an empty column
    answer
        of a table: the answer, "{survived}"
    system
        what the model is told before the first turn
    template
        a file: two turns of example, or a Jinja chat template; default: the model's own
    add_tokens
        special tokens the model has not, by commas: [THINK],[/THINK]
    out
        the tuning's folder; default runs/MODEL-tuned, else runs/MODEL-tuned-2, ...
    seed
        of split, order, adapters and dropout
    resume
        go on with the tuning in --out, exactly where its last checkpoint stands
    dry_run
        show what would be learned, and stop
    device
        auto, cpu, cuda, cuda:1 or mps
    """
    if resume and out is not None:  # the rest of the settings is filled in by `defaults`, but what has no name
        saved = load_toml(out / "config.toml")["source"]
        model, data = model or saved["model"], data or saved["data"]
    config = tuning(model, data, prompt, answer, system, template, add_tokens, method, rows, objective, train, seed)
    return recipe("finetune").main(config, out, resume, dry_run, device, json)


def plan_finetune(
    model: str,
    data: str,
    /,
    *,
    prompt: Hyphened = "",
    answer: Hyphened = "",
    system: Hyphened = "",
    template: str = "",
    add_tokens: str = "",
    seed: int = 0,
    device: str = "auto",
    json: Json = False,
    method: Method = MethodConfig(),
    rows: Rows = RowsConfig(),
    objective: Objective = ObjectiveConfig(),
    train: Train = TrainConfig(),
) -> int:
    """Say how much memory and time `kobza finetune` will take with the same arguments, by trying a slice of the model.

    Parameters
    ----------
    model
        as in `kobza finetune`, and so the rest
    """
    config = tuning(model, data, prompt, answer, system, template, add_tokens, method, rows, objective, train, seed)
    return recipe("plan").main(config, device, json)


def merge(
    run: Path,
    /,
    *,
    out: Path,
    base: Path | None = None,
    precision: str = "auto",
    device: str = "auto",
    json: Json = False,
) -> int:
    """Put a tuning's adapter into its base's weights, in float32, and measure what that changed -> a model of its own.

    Parameters
    ----------
    run
        a tuning's folder, or an adapter's in PEFT's format
    out
        where the merged model goes
    base
        of an adapter that PEFT made: the model it was learned beside
    precision
        number format of the merged weights: fp32, bf16 or fp16; auto: the base's as it was released
    device
        auto, cpu, cuda or mps
    """
    return recipe("merge").main(run, out, base, precision, device, json)


def tuning(
    model: str,
    data: str,
    prompt: str,
    answer: str,
    system: str,
    template: str,
    add_tokens: str,
    method: MethodConfig,
    rows: RowsConfig,
    objective: ObjectiveConfig,
    train: TrainConfig,
    seed: int,
) -> TuneConfig:
    """The TuneConfig of a command line."""
    require(bool(model), "no model; name a pulled one or a run's folder: kobza finetune smollm2 table.csv")
    require(bool(data), f"no data; name a file: kobza finetune {model} table.csv --prompt '...' --answer '...'")
    source = Source(model, data, prompt, answer, system, template, add_tokens)
    return TuneConfig(source, method, rows, objective, train, seed)


def defaults(given: dict[str, str]) -> list[tuple[dict[str, Any], str]]:
    """What fills the options that argv left open: with --resume the tuning's own settings, else those of a tuning."""
    if "--resume" not in given:
        by_steps = {"epochs": 0.0} if "--train.steps" in given else {}
        both = "--train.steps" in given and "--epochs" in given
        require(not both, "--train.steps and --epochs both say how long; leave one out")
        return [(by_steps | {f"train.{name}": value for name, value in TRAIN.items()}, "finetune")]
    require("--out" in given, "--resume needs --out DIR, the tuning to go on with")
    path = Path(given["--out"]) / "config.toml"
    require(path.exists(), f"{path.parent}: no tuning here to go on with (no config.toml); start one without --resume")
    values = load_toml(path)
    if "source" not in values:
        raise InputError(f"{path.parent}: a run of `kobza train`; go on with: kobza train --resume --out {path.parent}")
    flat = {"seed": values.get("seed", 0)}
    for section in ("source", "method", "rows", "objective"):
        flat |= values.get(section, {})
    flat |= {f"train.{name}": value for name, value in values.get("train", {}).items()}
    return [(flat, str(path))]

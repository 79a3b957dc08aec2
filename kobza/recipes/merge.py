"""kobza merge: a tuning's adapter put into its base's weights, and what that changed, measured -> a model of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from kobza.checkpoint import Loaded, find_checkpoint, load_checkpoint, load_tensors, save_checkpoint
from kobza.config import InputError, require
from kobza.device import make_runtime
from kobza.finetune.merge import MergeReport, merge, quantised
from kobza.finetune.peft import load_adapter
from kobza.finetune.rows import eval_rows, load_rows
from kobza.finetune.sft import token_logprobs
from kobza.hub.store import find_model
from kobza.recipes.tuned import ADAPTER, find_base, open_adapter, weights_digest
from kobza.train import IGNORE

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEW_BITS = ("nf4", "int8", "int4", "4bit", "8bit")
MEASURED, LINES = 64, 8  # held-out rows, and how many at a time
SHOWN = 5  # modules


def main(run: Path, out: Path, base: Path | None, precision: str, device: str, as_json: bool) -> int:
    """Merge and measure -> exit code."""
    console = Console(stderr=as_json, highlight=False)
    console.soft_wrap = not console.is_terminal
    require(not out.exists(), f"--out {out} is there; name a new folder")
    coarse = f"--precision {precision}: its steps are larger than the change, which would be lost; merge in bf16, then quantise"
    require(precision not in FEW_BITS, coarse)
    require(precision in (*FORMATS, "auto"), f"--precision is {precision!r}; one of auto, {', '.join(FORMATS)}")
    loaded = opened(run, base, make_runtime(device, "fp32").device)
    model = loaded.model
    kept = loaded.provenance.get("kept", {})
    dtype = FORMATS["bf16" if set(kept) == {"bfloat16"} else "fp32"] if precision == "auto" else FORMATS[precision]
    report = merge(model, dtype, measure_of(run, model), whole_weights(model, loaded))
    about = {name: value for name, value in loaded.provenance.items() if name not in ("base", "method", "objective")}
    save_checkpoint(out, model, loaded.run, loaded.tokenizer, about | {"merged_from": str(run)})
    if as_json:
        print(json.dumps({"merged": str(out), "precision": str(dtype).removeprefix("torch.")} | as_dict(report)))
    else:
        tell(console, report, run, out, str(dtype).removeprefix("torch."))
    return 0


def opened(run: Path, base: Path | None, device: torch.device) -> Loaded:
    """A base with the adapter in place: a tuning's, or one of PEFT's files on the base that a person names."""
    folder = find_model(run)
    if (folder / ADAPTER).exists() and not (folder / "config.json").exists():
        if base is None:
            raise InputError(f"{run}: an adapter without its base; name the model it was learned beside: --base MODEL")
        place = find_checkpoint(find_model(base))
        loaded = load_checkpoint(place, device)
        load_adapter(folder, loaded.model, loaded.run.model, weights_digest(place))
        return loaded
    require(base is None, f"--base {base} has no effect: {run} names its own")
    folder = find_checkpoint(folder)
    require((folder / ADAPTER).exists(), f"{run}: it has no adapter: its weights are its own already")
    return open_adapter(folder, device)[0]


def whole_weights(model: nn.Module, loaded: Loaded) -> dict[str, Tensor] | None:
    """Of a base kept in few bits, the weights those were made of: they are merged onto."""
    names = quantised(model)
    if not names:
        return None
    whole = load_tensors(find_base(loaded.provenance, loaded.folder) / "model.safetensors")
    device = next(model.parameters()).device
    return {name: whole[f"{name}.weight"].to(device) for name in names}


def measure_of(run: Path, model: nn.Module) -> Callable[[nn.Module], Tensor] | None:
    """Log-probabilities of the run's held-out answers, as a function of a model; None where no rows are kept."""
    folder = find_model(run) / "rows" / "val"
    if not folder.exists():
        return None
    rows = [row for row in load_rows(folder) if row.learned.any()][:MEASURED]
    longest = max(len(row.ids) for row in rows)
    batches = eval_rows(rows, LINES, longest, next(model.parameters()).device, packing=False)

    def measure(model: nn.Module) -> Tensor:
        return torch.cat([token_logprobs(model, batch)[batch.targets != IGNORE] for batch in batches])

    return torch.no_grad()(measure)


def as_dict(report: MergeReport) -> dict[str, Any]:
    """The report for a script."""
    modules = [module._asdict() for module in report.modules]
    return {"modules": modules, "largest": report.largest, "mean": report.mean}


def tell(console: Console, report: MergeReport, run: Path, out: Path, precision: str) -> None:
    """The report for a person."""
    say, modules = console.print, report.modules
    say(f"merged    {len(modules)} modules of {escape(str(run))}, in float32, kept as {precision}")
    for module in sorted(modules, key=lambda module: -module.change)[:SHOWN]:
        say(f"  {module.name:28} moved by {module.change:.2%} of its size; {module.lost:.2%} of that lost to rounding")
    if report.largest is not None:
        say(f"held out  log-probabilities differ by {report.largest:.2g} at most, {report.mean:.2g} on average")
    worst = max(module.lost for module in modules)
    if worst > 0.3:
        say(f"warning   rounding took up to {worst:.0%} of the change; take --precision fp32", style="yellow")
    say(f"model     {escape(str(out))}\nnext      kobza chat {escape(str(out))}", soft_wrap=True)

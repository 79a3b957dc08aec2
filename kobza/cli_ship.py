"""The verbs that hand a model on: export, quantize and certificate. cli.py mounts them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from kobza.recipes import recipe

Hyphened = Annotated[str | None, Parameter(allow_leading_hyphen=True)]
Flag = Annotated[bool, Parameter(negative="")]
Json = Annotated[bool, Parameter(negative="", help="print one JSON object instead of lines")]


def export(
    run: Path,
    /,
    *,
    to: Literal["hf", "gguf", "ollama", "onnx"],
    out: Path | None = None,
    name: str = "",
    types: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    adapter: Flag = False,
    base: str | None = None,
    importance: str | None = None,
    max_kl: float | None = None,
    held_out: Path | None = None,
    system: Hyphened = None,
    num_ctx: int | None = None,
    go_template: Path | None = None,
    no_certificate: Flag = False,
    force: Flag = False,
    json: Json = False,
) -> int:
    """Write a model as other programs read it, open it with one of them, and prove that it is the same model.

    The folder appears under its name whole and proven, or not at all: what fails its proof stays aside as OUT.refused, and the
    exit code is 1. What was proven is in certificate.html and certificate.json.

    Parameters
    ----------
    run
        a run's folder (its best checkpoint), a checkpoint's, a tuning's (its adapter is merged), or a pulled model's name
    to
        hf: a folder for AutoModelForCausalLM; gguf: files for llama.cpp; ollama: a Modelfile with its GGUF; onnx: one graph
    out
        the folder; default exports/NAME-TO
    name
        what to call the model there; default: the run's own name
    types
        of the weights in a GGUF, by commas, a file each: F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q4_K_M ...; default Q8_0
    dtype
        of the weights in a Hugging Face folder; auto: as they are stored
    adapter
        of a tuning: only what was learned, in PEFT's format, as a LoRA of llama.cpp, or with ADAPTER in the Modelfile
    base
        with --adapter: what the adapter's files call their base; for ollama its GGUF or name there
    importance
        weigh rounding errors by how much each channel is used: a text to measure it on, or what an earlier export measured
    max_kl
        keep tensors in wider types until the rounded model is at most so far off, in nats a token
    held_out
        a text for the proof's perplexity; default: the run's own held-out part, else prose that comes with kobza
    system
        for ollama: what the model is told before the first turn
    num_ctx
        for ollama: tokens of context; default: what the model has
    go_template
        for ollama: a Go template of your own, where the chat template has no such form
    no_certificate
        leave the proof out; the folder says so
    force
        replace OUT if it is there
    """
    asked = {
        "types": types,
        "dtype": dtype,
        "base": base,
        "importance": importance,
        "max_kl": max_kl,
        "held_out": held_out,
        "system": system,
        "num_ctx": num_ctx,
        "go_template": go_template,
    }
    return recipe("export").main(run, to, out, name, asked, adapter, not no_certificate, force, json)


def quantize(
    run: Path,
    /,
    *,
    to: str = "int8",
    out: Path | None = None,
    max_kl: float | None = None,
    calibration: Annotated[list[str] | None, Parameter(negative="")] = None,
    tokens: int = 4096,
    device: str = "auto",
    json: Json = False,
) -> int:
    """Put a model's weights into few bits, and say what that costs: overall and tensor by tensor.

    Parameters
    ----------
    run
        a run's folder, a checkpoint's, a tuning's, or a pulled model's name
    to
        int8 or nf4 for kobza's own runtime; Q8_0, Q4_K_M and the other types of GGUF for the report alone
    out
        where the quantised model goes; without it there is only the report
    max_kl
        keep the tensors that suffer most in a wider format until the model is at most so far off, in nats a token
    calibration
        texts to measure on; default: the run's own held-out part, else prose that comes with kobza
    tokens
        how many of them to measure on
    device
        auto, cpu, cuda or mps
    """
    return recipe("quantize").main(run, out, to, max_kl, calibration or [], tokens, device, json)


def certificate(folder: Path, /, *, json: Json = False) -> int:
    """Say what an exported folder's certificates say, and whether its files are still those that were proven.

    Parameters
    ----------
    folder
        a folder that `kobza export` wrote
    """
    return recipe("certificate").main(folder, json)

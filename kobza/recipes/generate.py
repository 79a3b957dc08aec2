"""kobza generate: a trained model and a prompt -> text, as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kobza.checkpoint import Loaded
from kobza.config import InputError, SampleConfig, require
from kobza.describe.parts import inference_bytes
from kobza.device import free_memory, make_runtime, memory_error
from kobza.generate import Processor, generate
from kobza.kernels import packed
from kobza.model import n_parameters
from kobza.recipes.tuned import open_checkpoint
from kobza.serve.text import StopFinder
from kobza.tokenizer import StreamDecoder, Tokenizer
from kobza.tokens.alphabet import restrict

CACHE_BYTES = 32 << 20  # float32 weights up to here stay in a processor's cache, and packing them gains nothing
TEXT_BYTES = 2000  # of a text that grows: its decoder, its ids, its draws
CANDIDATES = 5  # shown at each step by --show-probabilities


def main(
    path: Path,
    prompt: str | None,
    samples: int,
    stops: list[str],
    show_probabilities: bool,
    unknown: str | None,
    device: str,
    precision: str,
    as_json: bool,
    config: SampleConfig,
) -> int:
    """Print `samples` continuations of the prompt -> exit code."""
    require(samples > 0, f"--samples is {samples}; it must be at least 1")
    check_stops(stops)
    loaded = open_model(path, device, precision, unknown)
    prompt = loaded.tokenizer.line_start() if prompt is None else read_prompt() if prompt == "-" else prompt
    ids = loaded.tokenizer.encode_prompt(prompt)
    limits(loaded, ids, config)  # refused before anything is printed
    if show_probabilities or as_json:
        return detailed(loaded, prompt, ids, samples, stops, show_probabilities, as_json, config)
    with memory_error(samples, loaded.run.model.max_seq_len):
        if samples == 1:
            print(prompt, end="", flush=True)
            write_text(loaded, ids, stops, config, lambda piece: print(piece, end="", flush=True))
            print()
        else:
            check_samples(loaded, samples)
            for i, text in enumerate(write_texts(loaded, ids, samples, stops, config)):
                print(f"{'' if i == 0 else chr(10)}--- sample {i + 1}, seed {config.seed + i}\n{prompt}{text}")
    return 0


def open_model(path: Path, device: str, precision: str, unknown: str | None) -> Loaded:
    """The model behind a run, a checkpoint or a pulled model's name, in the number format to generate in. "auto" takes bf16
    where it is the faster: on a GPU that has it, and on a CPU that has it for weights beyond its cache, which every token
    reads whole; but a pulled model whose weights bf16 would change stays what was released."""
    runtime = make_runtime(device, "auto")
    loaded = open_checkpoint(path, runtime.device, unknown)
    on_cpu, weights = runtime.device.type == "cpu", 4 * n_parameters(loaded.model)
    changed = "float32" in loaded.provenance.get("kept", {})
    if precision == "auto":
        small = on_cpu and weights <= CACHE_BYTES
        precision = "fp32" if runtime.precision != "bf16" or small or changed else "bf16"
    if precision == "bf16" and on_cpu and packed.supports(loaded.model):
        packed.use(loaded.model)
    elif precision == "bf16":
        loaded.model.to(torch.bfloat16)
    return loaded


def ends_of(loaded: Loaded) -> list[int]:
    """The ids that end a text: those a pulled model came with, else its tokenizer's."""
    ends = loaded.provenance.get("ends") or loaded.tokenizer.ends
    size, good = loaded.tokenizer.vocab_size, isinstance(ends, list)
    good = good and all(type(i) is int and 0 <= i < size for i in ends)
    require(
        good, f"{loaded.folder}/config.json: ends {ends!r} are no ids below {size:,}; pull the model again with --force"
    )
    return ends


def read_prompt() -> str:
    """The prompt on standard input."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input: byte 0x{error.object[error.start]:02x} is not UTF-8; write in UTF-8"
        ) from None


def check_stops(stops: list[str]) -> None:
    """Refuse a stop string without characters."""
    require("" not in stops, "--stop '' has no effect: it stands everywhere; leave it out or name a string")


def check_samples(loaded: Loaded, samples: int) -> None:
    """Refuse, with the numbers, more texts side by side than fit into memory."""
    model, free = loaded.run.model, free_memory(next(loaded.model.parameters()).device)
    need = inference_bytes(model, samples) - inference_bytes(model, 0) + samples * (4 * model.n_rows + TEXT_BYTES)
    require(
        free is None or need <= free,
        f"out of memory: --samples {samples} side by side take {need / 1e9:.1f} GB and {(free or 0) / 1e9:.1f} GB are free; "
        f"lower --samples",
    )


def limits(loaded: Loaded, ids: list[int], config: SampleConfig) -> list[Processor]:
    """What --alphabet forbids in the continuations of a prompt."""
    return restrict(config, loaded.tokenizer, len(ids), next(loaded.model.parameters()).device)


def write_text(
    loaded: Loaded, ids: list[int], stops: list[str], config: SampleConfig, show: Callable[[str], Any]
) -> str:
    """Generate one text, calling show(piece) as it grows -> the whole."""
    stream, finder, parts = StreamDecoder(loaded.tokenizer, continues=True), StopFinder(stops), []
    for choice in generate(loaded.model, [ids], config, ends_of(loaded), extra=limits(loaded, ids, config)):
        if choice.ids[0] is not None:
            parts.append(finder.feed(stream.feed(choice.ids[0])))
            show(parts[-1])
        if finder.found:
            return "".join(parts)
    parts.append(finder.feed(stream.flush()) + finder.held)
    show(parts[-1])
    return "".join(parts)


def write_texts(loaded: Loaded, ids: list[int], samples: int, stops: list[str], config: SampleConfig) -> list[str]:
    """Generate several texts side by side."""
    streams = [StreamDecoder(loaded.tokenizer, continues=True) for _ in range(samples)]
    finders = [StopFinder(stops) for _ in range(samples)]
    texts = [""] * samples
    for choice in generate(loaded.model, [ids] * samples, config, ends_of(loaded), extra=limits(loaded, ids, config)):
        for i, token in enumerate(choice.ids):
            if token is not None and not finders[i].found:
                texts[i] += finders[i].feed(streams[i].feed(token))
        if all(finder.found for finder in finders):
            break
    rests = (f.feed(s.flush()) + f.held if not f.found else "" for f, s in zip(finders, streams, strict=True))
    return [text + rest for text, rest in zip(texts, rests, strict=True)]


def detailed(
    loaded: Loaded,
    prompt: str,
    ids: list[int],
    samples: int,
    stops: list[str],
    show_probabilities: bool,
    as_json: bool,
    config: SampleConfig,
) -> int:
    """Print the texts with the candidates of each step, for a person or as JSON -> exit code."""
    results = []
    if not as_json:
        print("  chosen           the likeliest, by the model's own probabilities")
    for i in range(samples):
        one, steps, text, finder = replace(config, seed=config.seed + i), [], "", StopFinder(stops)
        stream = StreamDecoder(loaded.tokenizer, continues=True)
        for choice in generate(loaded.model, [ids], one, ends_of(loaded), extra=limits(loaded, ids, one)):
            steps.append(candidates(loaded.tokenizer, choice.logits[0], choice.ids[0]))
            text += finder.feed(stream.feed(choice.ids[0]))
            if not as_json:
                row = "  ".join(f"{c['token']} {c['probability']:.1%}" for c in steps[-1]["candidates"])
                print(f"{steps[-1]['token']:>8}  {steps[-1]['probability']:6.1%}   {row}")
            if finder.found:
                break
        text += "" if finder.found else finder.feed(stream.flush()) + finder.held
        results.append({"seed": one.seed, "text": text} | ({"steps": steps} if show_probabilities else {}))
        if not as_json:
            print(f"\n{prompt}{text}")
    if as_json:
        print(json.dumps({"prompt": prompt, "samples": results}, ensure_ascii=False))
    return 0


def candidates(tokenizer: Tokenizer, logits: Tensor, chosen: int | None) -> dict[str, Any]:
    """The chosen token and the likeliest ones, with the model's own probabilities before any knob."""
    assert chosen is not None
    probabilities = logits.softmax(-1)
    top = probabilities.topk(min(CANDIDATES, len(probabilities)))
    rows = [
        {"id": i, "token": tokenizer.show(i), "probability": p}
        for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    return {"token": tokenizer.show(chosen), "probability": float(probabilities[chosen]), "candidates": rows}

"""kobza export: a model written as other programs read it, opened by one of them, and held against the model that was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from kobza.config import require
from kobza.export import vocabulary
from kobza.export.folder import set_aside, whole_folder
from kobza.export.gguf import write_ggufs
from kobza.export.hf import write_hf
from kobza.export.importance import importance, load_importance, save_importance
from kobza.export.onnx import open_onnx, write_onnx
from kobza.export.proof.certificate import FILE, PAGE
from kobza.export.proof.page import certificate_page
from kobza.export.proof.stored import stored_of
from kobza.export.types import FLOATS, Types, types_of
from kobza.formats.stock import why_not_exportable
from kobza.hub.store import find_model
from kobza.recipes import export_adapter, quantize
from kobza.recipes.export_form import (
    CONTEXT,
    USUAL_TYPE,
    Done,
    Job,
    folder_engine,
    gguf_engine,
    one_type,
    proven_modelfile,
    written_modelfile,
)
from kobza.recipes.shipping import bar, open_source, texts_to_measure
from kobza.recipes.tuned import open_checkpoint

USED = {  # which forms a setting has an effect on
    "types": ("gguf", "ollama"),
    "dtype": ("hf",),
    "importance": ("gguf", "ollama"),
    "max_kl": ("gguf", "ollama"),
    "system": ("ollama",),
    "num_ctx": ("ollama",),
    "go_template": ("ollama",),
}
OF_A_MODEL = ("types", "dtype", "importance", "max_kl")  # an adapter's factors stay in float32
CALIBRATION = 1 << 15  # tokens that importance is measured on
HELD_OUT = 4096  # tokens of a run's own held-out part


def main(
    run: Path,
    to: str,
    out: Path | None,
    name: str,
    asked: Mapping[str, Any],
    adapter: bool,
    certify: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Export -> exit code: 0 proven (or not asked to be), 1 written and refused."""
    console = Console(stderr=as_json, highlight=False)
    console.soft_wrap = not console.is_terminal
    check_settings(to, adapter, certify, asked)
    source = open_source(run, name)
    if to != "onnx":
        why = why_not_exportable(source.config, "gguf" if to == "ollama" else to)
        require(not why, f"{run}: --to {to}: {why}")
    out = out or Path("exports") / f"{source.name}-{to}{'-adapter' * adapter}"
    given = asked.get("held_out")
    with whole_folder(out, force) as aside, bar(console) as progress:
        held_out = texts_to_measure(run, [str(given)] if given else [], source.tokenizer, HELD_OUT) if certify else []
        job = Job(source, run, asked, certify, partial(say, console), progress, held_out)
        done = (ADAPTERS if adapter else MODELS)[to](job, aside)
        for file, certificate in done.certificates.items():
            (aside / file).write_text(certificate.to_json(), encoding="utf-8")
        (aside / PAGE).write_text(certificate_page(list(done.certificates.values())), encoding="utf-8")
        good = not certify or all(certificate.ok for certificate in done.certificates.values())
        size = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file())
        place = out if good else set_aside(aside, out)
    if as_json:
        held = {file: json.loads(certificate.to_json()) for file, certificate in done.certificates.items()}
        print(json.dumps({"out": str(place), "ok": good, "bytes": size, "notes": done.notes, "certificates": held}))
    else:
        tell(console, done, place, size, good)
    return 0 if good else 1


def check_settings(to: str, adapter: bool, certify: bool, asked: Mapping[str, Any]) -> None:
    """Refuse a setting that would change nothing."""
    given = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        forms = USED.get(name)
        fits = forms is None or to in forms
        require(fits, f"{option} {value} has no effect with --to {to}; it is for --to {' or '.join(forms or ())}")
        model = not adapter or name not in OF_A_MODEL
        require(model, f"{option} {value} has no effect with --adapter: what was learned stays in float32")
    base = given.get("base")
    require(adapter or base is None, f"--base {base} has no effect without --adapter")
    require(certify or "held_out" not in given, "--held-out has no effect with --no-certificate")
    require(not adapter or to != "onnx", "--adapter has no effect with --to onnx: a graph is of a whole model")
    most = given.get("max_kl")
    require(most is None or 0 < most < 100, f"--max-kl is {most}; it must be above 0, e.g. 0.01 nats a token")
    length = given.get("num_ctx")
    require(length is None or 0 < length < 1 << 31, f"--num-ctx is {length}; it must be a number of tokens above 0")


# ---- whole models ----------------------------------------------------------------------------------------------------


def to_hf(job: Job, folder: Path) -> Done:
    """A folder for transformers."""
    write_hf(job.source, folder, job.asked["dtype"] or "auto", job.progress)
    certificate = job.proven(folder, "hf", folder_engine(folder))
    return Done({FILE: certificate}, ["transformers: AutoModelForCausalLM.from_pretrained({out!r})"])


def to_gguf(job: Job, folder: Path) -> Done:
    """A .gguf a type."""
    files, notes = written_ggufs(job, folder, (job.asked["types"] or USUAL_TYPE).split(","))
    certificates = {
        f"{path.stem}.{FILE}": job.proven(path, f"gguf {types.name}", gguf_engine(path, job.source))
        for path, types in files.items()
    }
    return Done(certificates, [f"llama-cli -m {{out}}/{path.name}" for path in files], notes)


def to_ollama(job: Job, folder: Path) -> Done:
    """A Modelfile beside its .gguf."""
    text = written_modelfile(job, f"{job.source.name}-{one_type(job).name}.gguf")
    files, notes = written_ggufs(job, folder, [one_type(job).name])
    (path, types), *_ = files.items()
    (folder / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
    certificate = job.proven(path, f"ollama {types.name}", gguf_engine(path, job.source))
    return proven_modelfile(job, folder, text, certificate, notes)


def to_onnx(job: Job, folder: Path) -> Done:
    """One graph, with its tokenizer."""
    write_onnx(job.source, folder)
    certificate = job.proven(folder, "onnx", (partial(open_onnx, folder), True), lambda: stored_of(job.source))
    return Done({FILE: certificate}, ["onnxruntime.InferenceSession({out!r} + '/model.onnx')"])


def written_ggufs(job: Job, folder: Path, words: list[str]) -> tuple[dict[Path, Types], list[str]]:
    """Files of these types and what a person should know of them."""
    every = [types_of(word.strip()) for word in words]
    weighed, most = None, job.asked["max_kl"]
    if job.asked["importance"]:
        few = [types.name for types in every if types.base not in FLOATS]
        require(bool(few), f"--importance has no effect on {', '.join(t.name for t in every)}; take a type of few bits")
        weighed = importance_of(job, folder)
    if most is not None:
        texts = job.held_out or texts_to_measure(job.run, [], job.source.tokenizer, HELD_OUT)
        loaded = open_checkpoint(find_model(job.run))
        for i, types in enumerate(every):
            job.say(f"measuring {types.name} to within {most} nats a token")
            wider = quantize.plan_types(loaded, types.name, most, texts, weighed, job.progress)
            every[i] = Types(types.name, wider)
    files = {folder / f"{job.source.name}-{types.name}.gguf": types for types in every}
    require(len(files) == len(every), f"--types {','.join(words)}: one of them is given twice")
    said = write_ggufs(job.source, files, weighed, job.progress)
    notes = vocabulary.notes(job.source.tokenizer, job.source.ends)
    notes += [f"{path.name}: {note}" for path, some in said.items() for note in some]
    notes += [f"{p.name}: kept wider: {n} as {t}" for p, types in files.items() for n, t in types.overrides.items()]
    return files, notes


def importance_of(job: Job, folder: Path) -> dict[str, torch.Tensor]:
    """How strongly each column is used: what an earlier export wrote down, or measured on a text and then written down."""
    given, source = job.asked["importance"], job.source
    if given.endswith(".safetensors"):
        return load_importance(Path(given), source.sha256)
    texts = texts_to_measure(job.run, [given], source.tokenizer, CALIBRATION)
    job.say(f"importance on {given}")
    ids = [i for text in texts for i in source.tokenizer.encode(text).tolist()][:CALIBRATION]
    length = min(source.config.max_seq_len, CONTEXT)
    found = importance(source.model(), [torch.tensor([ids[i : i + length]]) for i in range(0, len(ids), length)])
    save_importance(folder / "importance.safetensors", found, source.sha256, len(ids))
    return found


MODELS = {"hf": to_hf, "gguf": to_gguf, "ollama": to_ollama, "onnx": to_onnx}
ADAPTERS = {"hf": export_adapter.to_hf, "gguf": export_adapter.to_gguf, "ollama": export_adapter.to_ollama}


# ---- telling ---------------------------------------------------------------------------------------------------------


def say(console: Console, text: str) -> None:
    """A line for a person, as it is."""
    console.print(escape(text), soft_wrap=True)


def tell(console: Console, done: Done, place: Path, size: int, good: bool) -> None:
    """The outcome for a person."""
    for note in done.notes:
        say(console, f"note      {note}")
    for certificate in done.certificates.values():
        n = len(certificate.checks)
        how = f"{certificate.engine}{'' if certificate.independent else ' (our own reader: a weaker proof)'}"
        if certificate.why_not:
            say(console, f"UNPROVEN  {certificate.form}: {certificate.why_not}")
        elif certificate.ok:
            say(console, f"proven    {certificate.form}: {n} checks hold in {how}, {certificate.seconds:.0f} s")
        else:
            say(console, f"REFUSED   {certificate.form}: {', '.join(certificate.failed)} in {how}")
        for check in (check for check in certificate.checks if not check.ok):
            say(console, f"  {check.name}: {check.measured:.3g} {check.unit}, limit {check.limit:.3g}; {check.worst}")
    say(console, f"written   {place}, {size / 1e6:,.1f} MB")
    say(console, f"read      {place / PAGE}")
    for line in done.next if good else []:
        say(console, f"next      {line.format(out=str(place))}")

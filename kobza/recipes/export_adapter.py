"""kobza export --adapter: what a tuning learned, without its base, and the proof that on its base it is the tuned model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from kobza.config import require
from kobza.export.adapter import Pair, write_lora_gguf, write_peft
from kobza.export.gguf import write_ggufs
from kobza.export.hf import write_hf, write_tokenizer
from kobza.export.proof.certificate import FILE, Certificate
from kobza.export.proof.engine import available
from kobza.export.proof.hf import open_transformers
from kobza.export.proof.llama_cpp import open_llama_cpp
from kobza.export.proof.stored import Stored, stored_in, stored_of
from kobza.export.types import Types
from kobza.recipes.export_form import CONTEXT, Done, Job, one_type, proven_modelfile, written_modelfile
from kobza.recipes.shipping import Tuning, open_tuning

PROOF = 'the proof of an adapter needs {}; pip install "kobza[parity]", or give --no-certificate'


def to_hf(job: Job, folder: Path) -> Done:
    """PEFT's files, with the tokenizer."""
    tuning = open_tuning(job.run)
    check_provable(job, "peft", "transformers")
    base, changed = job.asked["base"] or tuning.base_name, [said for said in tuning.beside if "token" in said]
    write_peft(folder, tuning.folder, base, beside=[said for said in changed if said != "the table of tokens"])
    write_tokenizer(job.source, folder)
    with beside(folder) as place:
        whole = place / "base"
        whole.mkdir()
        if job.certify:
            write_hf(tuning.base, whole, "float32", job.progress)
        engine = partial(open_transformers, whole, folder), True
        certificate = job.proven(folder, "hf adapter", engine, lambda: stored_of(job.source))
    return Done({FILE: certificate}, [f"peft: PeftModel.from_pretrained(base, {{out!r}}), where base is {base}"])


def to_gguf(job: Job, folder: Path) -> Done:
    """A LoRA of llama.cpp."""
    require(
        job.asked["base"] is None, "--base has no effect with --to gguf: the base is named when llama.cpp is called"
    )
    tuning, path = written_lora(job, folder)
    with beside(folder) as place:
        base = place / "base.gguf"
        if job.certify:
            write_ggufs(tuning.base, {base: Types("F32")}, progress=job.progress)
        certificate = proven_lora(job, tuning, path, base, "gguf adapter")
    return Done({FILE: certificate}, [f"llama-cli -m BASE.gguf --lora {{out}}/{path.name}"])


def to_ollama(job: Job, folder: Path) -> Done:
    """A Modelfile with the base's .gguf and the adapter beside it."""
    require(job.asked["base"] is None, "--base has no effect with --to ollama: the base's file is written beside")
    types = one_type(job)
    base = folder / f"{job.source.name}-base-{types.name}.gguf"
    text = written_modelfile(job, base.name, f"{job.source.name}-lora.gguf")
    tuning, path = written_lora(job, folder)
    said = write_ggufs(tuning.base, {base: types}, progress=job.progress)[base]
    (folder / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
    certificate = proven_lora(job, tuning, path, base, f"ollama {types.name} adapter")
    return proven_modelfile(job, folder, text, certificate, [f"{base.name}: {note}" for note in said])


def written_lora(job: Job, folder: Path) -> tuple[Tuning, Path]:
    """The adapter's own file."""
    tuning = open_tuning(job.run)
    check_provable(job, "xllamacpp")
    path = folder / f"{job.source.name}-lora.gguf"
    write_lora_gguf(path, tuning.base.config, tuning.pairs, job.source.name, tuning.beside)
    return tuning, path


def proven_lora(job: Job, tuning: Tuning, path: Path, base: Path, form: str) -> Certificate:
    """The certificate of an adapter's file on its base's."""
    length = min(job.source.config.max_seq_len, CONTEXT)
    engine = partial(open_llama_cpp, base, length, path), True
    return job.proven(path, form, engine, lambda: with_pairs(stored_in(base), tuning.pairs))


def check_provable(job: Job, *packages: str) -> None:
    """No reader of ours stands in for the other program here."""
    missing = [package for package in packages if available(package) is None]
    require(not job.certify or not missing, PROOF.format(" and ".join(missing)))


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A folder for what the proof alone needs, on the same disk, gone afterwards."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-proof-") as place:
        yield Path(place)


def with_pairs(base: Stored, pairs: Mapping[str, Pair]) -> Stored:
    """A base's artifact with an adapter's factors added: W + s B A. Lengths of rows and tables are not in it."""

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in base.read():
            pair = pairs.get(name.removesuffix(".weight"))
            yield name, tensor if pair is None else tensor.float() + pair.scale * (pair.b @ pair.a)

    return replace(base, read=read)

"""What the forms of `kobza export` share: the work in hand, who opens what was written, and Ollama's Modelfile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from kobza.config import require
from kobza.export import ollama
from kobza.export.proof.certificate import FILE, Certificate, hashes, not_certified, prove
from kobza.export.proof.checks import Check, shortened
from kobza.export.proof.corpus import Corpus, corpus_for
from kobza.export.proof.engine import Engine, available
from kobza.export.proof.hf import open_transformers
from kobza.export.proof.llama_cpp import open_llama_cpp
from kobza.export.proof.own import open_own
from kobza.export.proof.stored import Stored
from kobza.export.source import Source
from kobza.export.types import Types, types_of
from kobza.formats.template import Refused
from kobza.hub.gguf_tokenizer import tokenizer_text

USUAL_TYPE = "Q8_0"
CONTEXT = 512  # tokens of the engine's cache: the certificate's texts are shorter
Opened = tuple[Callable[[], Engine], bool]
"""what opens an artifact, and whether it is another program than kobza"""


@dataclass
class Job:
    """An export under way."""

    source: Source
    run: Path
    asked: Mapping[str, Any]
    """the settings that were given, of the others None"""
    certify: bool
    say: Callable[[str], None]
    progress: Callable[[str, int, int], None]
    held_out: list[str] = field(default_factory=list)

    @cached_property
    def corpus(self) -> Corpus:
        """What the engines are asked."""
        return corpus_for(self.source.tokenizer, held_out=self.held_out)

    def proven(self, path: Path, form: str, opened: Opened, stored: Callable[[], Stored] | None = None) -> Certificate:
        """The certificate of an artifact. stored: its weights, where it is but a part of a model or in no form that we read."""
        if not self.certify:
            return not_certified(self.source, path, form, "--no-certificate was given")
        self.say(f"proving   {form}")
        return prove(self.source, path, form, opened[0], self.corpus, opened[1], stored=stored and stored())


@dataclass
class Done:
    """What an export made."""

    certificates: dict[str, Certificate]
    """by the name of the file that says so"""
    next: list[str]
    notes: list[str] = field(default_factory=list)


# ---- who opens it ----------------------------------------------------------------------------------------------------


def folder_engine(folder: Path) -> Opened:
    """A Hugging Face folder's."""
    there = available("transformers") is not None
    return partial(open_transformers if there else open_own, folder), there


def gguf_engine(path: Path, source: Source) -> Opened:
    """A .gguf's."""
    if available("xllamacpp") is None:
        return partial(open_own, path, tokenizer_text), False
    return partial(open_llama_cpp, path, min(source.config.max_seq_len, CONTEXT)), True


# ---- Ollama ----------------------------------------------------------------------------------------------------------


def one_type(job: Job) -> Types:
    """The type of the one file that a Modelfile names."""
    words = (job.asked["types"] or USUAL_TYPE).split(",")
    require(len(words) == 1, f"--types {','.join(words)}: a Modelfile has one model; give one type")
    return types_of(words[0])


def written_modelfile(job: Job, gguf: str, adapter: str = "") -> str:
    """The text of the Modelfile; what cannot be said in one is refused before anything is written."""
    source, given = job.source, job.asked["go_template"]
    require(given is None or given.is_file(), f"--go-template {given}: no such file; give a Go template")
    own = given.read_text(encoding="utf-8") if given else ""
    license = str(source.provenance.get("license") or "")
    length, most = job.asked["num_ctx"], source.config.max_seq_len
    far = f"--num-ctx is {length}; the model has a context of {most:,}, give that or less"
    require(length is None or length <= most, far)
    parameters = {} if length is None else {"num_ctx": length}
    return ollama.modelfile(source, gguf, begins(source), job.asked["system"] or "", parameters, adapter, own, license)


def begins(source: Source) -> str:
    """The text of the token that begins a text, which llama.cpp itself puts there."""
    bos = source.tokenizer.bos_id
    return "" if bos is None else next(name for name, i in source.tokenizer.specials.items() if i == bos)


def proven_modelfile(job: Job, folder: Path, text: str, certificate: Certificate, notes: list[str]) -> Done:
    """The certificate of all files of the folder, with one check more: by the Modelfile Ollama sends what the template writes."""
    certificate = replace(certificate, artifact=hashes(folder))
    source, notes = job.source, [*notes, *ollama.notes(job.source)]
    if job.certify and source.template is not None:
        check = modelfile_check(source, text, job.asked["system"] or "", job.corpus.conversations)
        certificate = replace(certificate, checks=(*certificate.checks, check))
    return Done({FILE: certificate}, [f"cd {{out}} && {ollama.create_line(source.name)}"], notes)


def modelfile_check(
    source: Source, text: str, system: str, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> Check:
    """Conversations by the Modelfile and by the chat template; words come trimmed, for Go cannot trim them."""
    template, bos, differ = source.template, begins(source), []
    assert template is not None
    asked = [[{**m, "content": m["content"].strip()} for m in chat] for chat in conversations]
    looked = 0
    for chat in asked:
        told = [{"role": "system", "content": system}] if system and chat[0]["role"] != "system" else []
        try:
            wanted = template.render([*told, *chat], True).removeprefix(bos)
        except Refused:
            continue
        got, looked = ollama.rendered(text, chat), looked + 1
        differ += [(chat, wanted, got)] if got != wanted else []
    worst = ""
    if differ:
        chat, wanted, got = min(differ, key=lambda one: len(str(one[0])))
        worst = (
            f"{shortened(chat, 120)} becomes {shortened(got)}, and in the model that was trained {shortened(wanted)}"
        )
    what = "the text of conversations by the Modelfile"
    return Check("modelfile", what, not differ, len(differ), 0, f"of {looked} differ", worst)

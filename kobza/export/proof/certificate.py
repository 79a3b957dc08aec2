"""A certificate: what was checked of an exported model, by whom, against what, and the hashes of both sides.

`prove` opens an artifact, asks it what checks.py asks, and gives a Certificate; `verify` holds one against the files as they are
now. The file, certificate.json, one object:

    kobza_certificate  1, the version of this form
    certified          true only if there were checks and all hold
    why_not            why nothing was checked, "" where it was
    name, form         of the model; what it was written as: "hf", "gguf Q4_K_M"
    engine             what ran the artifact, with its version
    independent        true: another program than kobza; false: kobza's own reader of the artifact, a weaker proof
    checks             [{name, what, ok, measured, limit, unit, worst, note}]: measured is at most limit where ok
    source, artifact   {"sha256": of the weights that were exported}, {file: its sha256}
    versions, machine  {package: version}, in words
    seed, held_out     of the corpus; where its held-out text comes from
    date, seconds      when (UTC), and how long it took
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kobza
from kobza.config import InputError, require
from kobza.export.proof import checks
from kobza.export.proof.checks import Check, Passage, attempted
from kobza.export.proof.corpus import Corpus, without
from kobza.export.proof.engine import Engine, EngineError, Reference, reference_of
from kobza.export.proof.stored import (
    Stored,
    beginning_that_differs,
    settings_that_differ,
    stored_in,
    wanted_weight,
)
from kobza.export.proof.tolerance import (
    WeightError,
    added,
    engine_rounding,
    limits,
    twin_of,
    weight_error,
    with_noise,
)
from kobza.export.source import Source
from kobza.export.vocabulary import exceptions
from kobza.formats.headers import inside

FORM = 1
FILE, PAGE = "certificate.json", "certificate.html"
DRAWS = 4  # of random rounding, of which the costliest counts: where few tensors are in few bits they are of many sizes
COST = 2.0  # of its divergence, in amplitude: what was written is another draw, and block formats round a little one-sidedly


@dataclass(frozen=True)
class Certificate:
    """See the head of this file."""

    name: str
    form: str
    engine: str = ""
    independent: bool = False
    checks: tuple[Check, ...] = ()
    why_not: str = ""
    source: Mapping[str, str] = field(default_factory=dict)
    artifact: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    seed: int = 0
    held_out: str = ""
    date: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the artifact is certified."""
        return not self.why_not and bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def failed(self) -> list[str]:
        """The names of the checks that fail, each once."""
        return list(dict.fromkeys(check.name for check in self.checks if not check.ok))

    def to_json(self) -> str:
        """The text of certificate.json."""
        whole = {"kobza_certificate": FORM, "certified": self.ok} | dataclasses.asdict(self)
        return json.dumps(_plain(whole), ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """The certificate of a certificate.json; InputError where it is none, or says other than its checks do."""
        try:
            whole = json.loads(text)
            require(whole.get("kobza_certificate") == FORM, "it is of another version")
            fields = {f.name: whole[f.name] for f in dataclasses.fields(cls)}
            fields["checks"] = tuple(Check(**_numbers(check)) for check in whole["checks"])
            found = cls(**fields)
            require(whole["certified"] == found.ok, "it says other than its checks do")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise InputError(f"{FILE}: not a certificate of this kobza: {said}; export again") from None
        return found


def _plain(value: Any) -> Any:
    """JSON has no infinity: a measure that is none becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _numbers(check: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of _plain for a check."""
    return dict(check) | {key: math.inf if check[key] is None else float(check[key]) for key in ("measured", "limit")}


def not_certified(source: Source, path: Path, form: str, why: str) -> Certificate:
    """What stands beside an artifact that nobody checked."""
    return _record(source, path, form, why_not=why)


def verify(certificate: Certificate, folder: Path) -> list[str]:
    """What in a folder is no longer as it was certified, in words; [] where all is."""
    found = []
    for name, sha256 in certificate.artifact.items():
        if not (folder / name).is_file():
            found.append(f"{name} is not there")
        elif sha256_of(inside(folder, name)) != sha256:
            found.append(f"{name} has changed since")
    return found


def sha256_of(path: Path) -> str:
    """The hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(path: Path) -> dict[str, str]:
    """Of a file, or of all files of a folder but certificates: {"model.safetensors": "5f2b..."}."""
    if path.is_file():
        return {path.name: sha256_of(path)}
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("certificate"))
    return {file.relative_to(path).as_posix(): sha256_of(file) for file in files}


def _record(source: Source, path: Path, form: str, **more: Any) -> Certificate:
    versions = {"kobza": kobza.__version__, "torch": torch.__version__, "python": platform.python_version()}
    machine = f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    sides = {"source": {"sha256": source.sha256}, "artifact": hashes(path)}
    said = sides | {"versions": versions, "machine": machine, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    return Certificate(source.name, form, **said | more)


# -- proving -----------------------------------------------------------------------------------------------------------


def prove(
    source: Source,
    path: Path,
    form: str,
    open_engine: Callable[[], Engine],
    corpus: Corpus,
    independent: bool = True,
    n_places: int = 0,
    stored: Stored | None = None,
) -> Certificate:
    """Open what was written to `path` (a folder or a .gguf) and hold it against its source, check by check.

    open_engine is called once the files have been read; independent: whether it runs another program than kobza; n_places: at
    how many places probabilities are asked, 0 for as many as the vocabulary leaves time for; stored: what the engine runs, where
    `path` is but a part of it or in a form that kobza does not read.
    """
    start = time.monotonic()
    found: list[Check] = []
    engine, alone = "", stored is None
    if stored is None:
        try:
            stored = stored_in(path)
        except InputError as error:
            found.append(Check("reads", "kobza reads the artifact", False, 1, 0, "files refused", str(error)))
    if stored is not None and stored.read_back:
        found += stored_checks(source, stored, path if alone else None)
    corpus = without(corpus, exceptions(source.tokenizer)) if path.suffix == ".gguf" else corpus
    try:
        with open_engine() as artifact:
            engine = artifact.name
            found += certify(source, reference_of(source), artifact, stored, corpus, n_places)
    except EngineError as error:
        found.append(Check("opens", "the engine opens the artifact", False, 1, 0, "files refused", str(error)))
    more = {"checks": tuple(found), "engine": engine, "independent": independent, "seed": corpus.seed}
    more |= {"held_out": corpus.held_out_is, "seconds": round(time.monotonic() - start, 2)}
    return _record(source, path, form, **more)


def stored_checks(source: Source, stored: Stored, path: Path | None) -> list[Check]:
    """Settings and weights, as the files have them; the tokenizer's own too where there is a path."""

    def settings() -> Check:
        begins = beginning_that_differs(source, path) if path else []
        return checks.settings_check(settings_that_differ(source.config, stored) + begins)

    what = "each tensor against its source"
    found = attempted("settings", "the settings in the artifact", settings)
    return found + attempted("weights", what, lambda: checks.weights_check(weight_errors(source, stored)))


def weight_errors(source: Source, stored: Stored) -> Iterator[WeightError]:
    """Each tensor against its source; what a family has and the source lacks against what changes nothing."""
    for name, tensor in stored.weights(source.config):
        yield weight_error(name, stored.types[name], wanted_weight(source, name, tensor), tensor)
    lost = [name for name in source.shapes if name not in stored.types and not name.startswith("ahead.")]
    require(not lost, f"the artifact has no {', '.join(lost[:3])}")


def certify(
    source: Source, reference: Reference, artifact: Engine, stored: Stored | None, corpus: Corpus, n_places: int = 0
) -> list[Check]:
    """The checks that ask an engine. stored: what kobza reads of the artifact; without it no probability has a limit."""
    specials = source.tokenizer.specials
    stops = partial(checks.stop_check, artifact, source.ends, specials, corpus.seed)
    found = checks.text_checks(reference, artifact, corpus)
    found += checks.chat_checks(reference, artifact, corpus, list(specials))
    found += attempted("stops", "where it stops", stops)
    what = "log-probabilities"
    if stored is None or artifact.vocab_size < reference.vocab_size:
        rows = f"{artifact.vocab_size:,} rows, and the model that was trained has {reference.vocab_size:,}"
        why = "kobza cannot read the weights" if stored is None else rows
        return [*found, Check("probabilities", what, False, 1, 0, "models cannot be compared", why)]
    function = partial(function_checks, reference, artifact, stored, corpus, n_places)
    return found + attempted("probabilities", what, function)


def function_checks(
    reference: Reference, artifact: Engine, stored: Stored, corpus: Corpus, n_places: int = 0
) -> list[Check]:
    """Probabilities on fixed, random and held-out text, and the perplexity of the last. One copy of the model at a time."""
    asked = {kind: texts for kind, texts in checks.passages(reference, artifact, corpus, n_places).items() if texts}
    require(bool(asked), f"a context of {reference.n_ctx} leaves nothing to compare")
    model, tokenizer = reference.model, reference.tokenizer
    ours, got = (_answers(engine, asked) for engine in (reference, artifact))
    seeds = range(corpus.seed, corpus.seed + DRAWS)
    rounded = [_answers(Reference(with_noise(model, stored.types, seed), tokenizer), asked) for seed in seeds]
    twin = Reference(twin_of(model, stored), tokenizer)
    exact = _answers(twin, asked)
    with engine_rounding(twin.model, stored.types, artifact.name):
        noisy = _answers(twin, asked)
    found: list[Check] = []
    for kind, texts in asked.items():
        came = torch.tensor([text.ids[place + 1] for text in texts for place in text.places])
        source, own, theirs = ours[kind], exact[kind], got[kind][:, : reference.vocab_size]
        noise, drawn = (
            checks.distance(own, noisy[kind], came),
            [checks.distance(source, r[kind], came) for r in rounded],
        )
        most = limits(noise.max_logprob, noise.mean_kl, noise.nll)
        cost = added(COST**2 * max(draw.mean_kl for draw in drawn), most.mean_kl)
        found += checks.probability_checks(kind, source, own, theirs, came, most, cost, token_of(reference))
        if kind == "held-out text":
            found.append(_perplexity(source, theirs, came, COST * max(draw.nll for draw in drawn) + most.nll))
    return found


def _answers(engine: Engine, asked: Mapping[str, Sequence[Passage]]) -> dict[str, Tensor]:
    return {kind: checks.asked(engine, texts) for kind, texts in asked.items()}


def token_of(reference: Reference) -> Callable[[int], str]:
    """What shows a token to a person."""
    known = reference.tokenizer.vocab_size
    return lambda i: reference.tokenizer.show(i) if i < known else f"id {i}"


def _perplexity(ours: Tensor, got: Tensor, came: Tensor, limit: float) -> Check:
    """The mean log-probability of what came, by both."""
    tables = (checks.normalised(table, ~table.isnan()) for table in (ours, got))
    a, b = (float(-table.gather(1, came[:, None]).mean()) for table in tables)
    words = f"perplexity {math.exp(min(b, 700)):.3f}, of the model that was trained {math.exp(min(a, 700)):.3f}"
    what = "perplexity of held-out text"
    return Check("perplexity", what, abs(b - a) <= limit, abs(b - a), limit, "nats a token", words)

"""kobza serve: a model behind OpenAI's and Ollama's interfaces, after it has proven on itself that it serves what was trained."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kobza.checkpoint import Loaded, find_checkpoint
from kobza.config import InputError, SampleConfig, require
from kobza.device import make_runtime, memory_error
from kobza.hub.store import find_model, sampling
from kobza.model import n_parameters
from kobza.recipes.generate import ends_of
from kobza.recipes.shipping import open_tuning
from kobza.recipes.tuned import QUANTISED, open_checkpoint, template_of, weights_digest
from kobza.serve.chat import Talk
from kobza.serve.config import ServeConfig
from kobza.serve.constraint import Grammars
from kobza.serve.engine import Engine
from kobza.serve.request import Limits
from kobza.serve.runner import Adapter, LowRank, Runner, make_runner
from kobza.serve.selftest import Check, failed, selftest
from kobza.tokens.alphabet import restrict

LOG = "%(asctime)s %(name)s %(message)s"


def main(
    path: Path,
    name: str,
    adapters: list[str],
    draft: Path | None,
    keys: list[str],
    key_file: Path | None,
    origins: list[str],
    hosts: list[str],
    only_test: bool,
    no_test: bool,
    as_json: bool,
    config: ServeConfig,
) -> int:
    """Prove, then serve until a signal -> exit code."""
    from kobza.serve.http.app import make_app
    from kobza.serve.http.service import Service
    from kobza.web.guard import Guard
    from kobza.web.run import run

    require(not (only_test and no_test), "--selftest and --no-selftest exclude each other; leave one out")
    guessing = draft is not None or config.lookup
    require(bool(config.guess) or not guessing, "--draft and --lookup have no effect with --guess 0; 4 is usual")
    body = int(config.max_body * 1e6)
    keys = [*keys, *read_keys(key_file)]
    guard = Guard(config.host, tuple(keys), tuple(hosts), tuple(origins), max_body=body, seconds=config.seconds + 60)

    def prepare() -> tuple[list[Check], Engine, dict[str, Any]]:
        loaded = open_served(path, config)
        parts = {given.partition("=")[0]: open_part(given, loaded.folder) for given in adapters}
        make = engines(loaded, parts, draft, config)
        checks = [] if no_test else prove(make, loaded)
        engine = make()  # it has its own form of the weights: the model goes with this function
        return checks, engine, served(loaded, name or path.resolve().name, engine, list(parts))

    compute = ThreadPoolExecutor(1, "kobza-engine")  # one thread for all products: see Engine.start
    checks, engine, models = compute.submit(prepare).result()
    if not no_test:
        show(checks, as_json)
    if only_test or failed(checks):
        return int(bool(failed(checks)))
    service = Service(models, config.seconds, config.max_tokens or 1 << 20)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG)

    def ready(url: str) -> None:
        plain = f"serving   {', '.join(models)} at {url}/v1 and {url}/api; Ctrl-C ends"
        print(json.dumps({"address": url, "models": list(models)}) if as_json else plain, flush=True)

    engine.start(compute.submit)
    try:
        return run(make_app(service, guard), config.host, config.port, guard=guard, grace=config.drain, on_ready=ready)
    finally:
        engine.close()


def read_keys(path: Path | None) -> list[str]:
    """The keys of a file, one a line."""
    if path is None:
        return []
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--key-file {path}: cannot be read: {error}") from None
    require(bool(found), f"--key-file {path}: no key in it; write one a line")
    return found


def prove(make: Callable[..., Engine], loaded: Loaded) -> list[Check]:
    """The engine against itself, and against the plain model with the same weights."""

    @torch.no_grad()
    def reference(ids: list[int]) -> torch.Tensor:
        return loaded.model(torch.tensor([ids], device=next(loaded.model.parameters()).device))[0]

    plain = make().runner.digest.endswith(":fp32")
    return selftest(make, reference=reference, tolerance=1e-3 if plain else 0.1)


# ---- what is opened --------------------------------------------------------------------------------------------------


def open_served(path: Path, config: ServeConfig) -> Loaded:
    """The model behind a run, a checkpoint, a tuning or a pulled model; one that is kept in int8 stays so."""
    device = make_runtime(config.device, "auto").device
    folder = find_checkpoint(find_model(path))
    if (folder / QUANTISED).exists() and config.precision in ("auto", "int8"):
        from kobza.quant.nf4 import Linear4bit
        from kobza.quant.saved import open_quantised

        loaded = open_quantised(folder, device)
        if not any(isinstance(module, Linear4bit) for module in loaded.model.modules()):
            return loaded
    return open_checkpoint(path, device)


def open_part(given: str, base: Path) -> Adapter:
    """NAME=DIR -> what a tuning of this very model has learned."""
    name, _, place = given.partition("=")
    require(
        bool(name and place), f"--adapter {given!r}: name it and say where it is, as in --adapter titanic=runs/titanic"
    )
    tuning = open_tuning(Path(place))
    other = f"--adapter {name}: {place} was learned beside a model of sha256 {tuning.base.sha256[:12]}"
    require(tuning.base.sha256 == weights_digest(base), f"{other}, and this is {weights_digest(base)[:12]}")
    more = f"--adapter {name}: {place} learned {', '.join(tuning.beside)} besides, which cannot be shared"
    require(not tuning.beside, f"{more}; serve it merged: kobza serve {place}")
    return Adapter(digest_of(tuning.folder), {at: LowRank(p.a, p.b, p.scale) for at, p in tuning.pairs.items()})


def digest_of(folder: Path) -> str:
    """Of all that a checkpoint's manifest names: its weights, what they stand beside, its settings."""
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def engines(
    loaded: Loaded, parts: Mapping[str, Adapter], draft: Path | None, config: ServeConfig
) -> Callable[..., Engine]:
    """make(lookup=..., ...) -> an engine over one runner, which they share: one at a time."""
    memory = int(config.cache * 1e9) or None
    about: dict[str, Any] = {"memory": memory, "max_seqs": config.running}
    with memory_error(config.running, loaded.run.model.max_seq_len):
        precision = precision_of(loaded, config)
        runner = make_runner(
            loaded.model, precision=precision, adapters=parts, digest=digest_of(loaded.folder), **about
        )
        guesser = None if draft is None else open_draft(draft, loaded, about, config)

    tokenizer = loaded.tokenizer

    def alphabet(sampling: SampleConfig, n_prompt: int) -> list[Any]:
        return restrict(sampling, tokenizer, n_prompt, torch.device("cpu"))

    def make(**changes: Any) -> Engine:
        limits = Limits(config.running, config.queue, config.chunk)
        settings = {"limits": limits, "draft": guesser, "speculate": config.guess, "lookup": config.lookup}
        return Engine(runner, tokenizer, alphabet=alphabet, **settings | changes)

    return make


def open_draft(path: Path, loaded: Loaded, about: Mapping[str, Any], config: ServeConfig) -> Runner:
    """A smaller model that guesses; it must speak the same tokens."""
    found = open_served(path, config)
    same = (found.folder / "tokenizer.json").read_bytes() == (loaded.folder / "tokenizer.json").read_bytes()
    require(same, f"--draft {path}: its tokenizer is another one; take a model trained with the same tokenizer")
    return make_runner(found.model, precision=precision_of(found, config), digest=digest_of(found.folder), **about)


def precision_of(loaded: Loaded, config: ServeConfig) -> str:
    """As asked; by itself a model that bf16 would change stays what was released, as in kobza generate."""
    changed = "float32" in loaded.provenance.get("kept", {}) and not hasattr(loaded.model.lm_head, "packed")
    return "fp32" if config.precision == "auto" and changed else config.precision


# ---- what is served, and what is said of it --------------------------------------------------------------------------


def served(loaded: Loaded, name: str, engine: Engine, adapters: list[str]) -> dict[str, Any]:
    """The model, and with each adapter, under the names that clients ask for."""
    from kobza.serve.http.service import Served

    template, ends = template_of(loaded.provenance, loaded.folder), tuple(ends_of(loaded))
    talk = None if template is None else Talk(template, loaded.tokenizer, ends)
    ends = ends if talk is None else tuple(talk.ends)  # with those that the template alone knows of
    known = {field.name for field in fields(SampleConfig)}
    usual = {key: value for key, value in sampling(loaded.folder).items() if key in known}
    manifest = loaded.folder / "manifest.json"
    one = Served(
        name=name,
        engine=engine,
        tokenizer=loaded.tokenizer,
        ends=ends,
        max_seq_len=engine.runner.max_seq_len,
        talk=talk,
        grammars=Grammars(loaded.tokenizer, ends, engine.runner.vocab_size),
        sampling=replace(SampleConfig(), **usual),
        facts={
            "digest": engine.runner.digest,
            "size": sum(found["bytes"] for found in json.loads(manifest.read_text(encoding="utf-8")).values()),
            "parameters": n_parameters(loaded.model),
            "template": getattr(template, "source", ""),
        },
        created=int(manifest.stat().st_mtime),
    )
    taken = f"--adapter {name}: the model is called so itself; take another name"
    require(name not in adapters and len(set(adapters)) == len(adapters), taken)
    return {name: one} | {adapter: replace(one, name=adapter, adapter=adapter) for adapter in adapters}


def show(checks: list[Check], as_json: bool) -> None:
    """What the engine has proven on itself."""
    if as_json:
        print(json.dumps({"selftest": [asdict(check) for check in checks]}), flush=True)
        return
    table = Table(box=SIMPLE, show_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "self-test", "what was found", "s"):
        table.add_column(column, justify="right" if column == "s" else "left")
    for check in checks:
        table.add_row("ok" if check.ok else "FAILED", check.name, check.what, f"{check.seconds:.1f}")
    Console().print(table)

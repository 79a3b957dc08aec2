"""What the proof of a contest's entries needs of other rooms: sizes, ends, copies of the training text, and training itself.

What an entry was trained on is proven as far as it can be: the host's text is tokenised anew with the entry's own tokenizer, and
the tokens' checksum held against the one that the checkpoint recorded. What strangers sent is verified in a process apart: a
tokenizer made to hang or to crash its library costs its entry, not the host.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from kobza.checkpoint import Loaded, find_checkpoint
from kobza.config import DataConfig, InputError, require
from kobza.contest.contest import Contest
from kobza.contest.nouns import Entry
from kobza.contest.submission import Verdict, file_digest
from kobza.contest.verify import Bench, TrainingText, verify
from kobza.data import Documents, load_corpus, prepare
from kobza.describe.parts import inference_bytes, total_parameters
from kobza.device import make_runtime
from kobza.evals.copies import TextIndex
from kobza.evals.texts import plain_text, run_folder
from kobza.hub.store import find_model
from kobza.loss import make_loss
from kobza.recipes.generate import ends_of
from kobza.recipes.train import check_memory, make_training
from kobza.report.metrics import read_metrics
from kobza.train import train

READY = b"ready"
START_SECONDS, JUDGE_SECONDS = 120, 300  # for the child to be there, and for one entry
REPLAY_TOKENS = 20_000_000  # that replayed steps may take in all: more is no beginning


def make_bench(contest: Contest, run: Path | None = None) -> Bench:
    """What `verify` needs of other rooms."""
    return Bench(
        parameters=total_parameters,
        memory=inference_bytes,
        ends=ends_of,
        records=read_metrics,
        text=lambda loaded: training_text(contest.folder / "text", loaded, run),
        losses=lambda loaded, steps: first_losses(contest.folder / "text", loaded, steps),
    )


def training_text(folder: Path, loaded: Loaded, run: Path | None) -> TrainingText | None:
    """The text a model was trained on: the host's if its tokens have the recorded checksum, else the run's own tokens if those
    have."""
    if files := host_files(folder, loaded):
        return TrainingText(tuple(file_digest(path) for path in files), index_of(tuple(files)).longest)
    home = None if run is None else run_folder(find_checkpoint(find_model(run)))
    if home is None:
        return None
    corpus = load_corpus(home / "tokens", loaded.run.model.max_seq_len)
    if corpus.index.get("sha256") != loaded.provenance.get("text_sha256"):
        return None
    return TrainingText((), TextIndex(plain_text(corpus.train, loaded.tokenizer)).longest)


def host_files(folder: Path, loaded: Loaded) -> list[Path]:
    """Those of the host's texts, all together or one, whose tokens have the checksum that a checkpoint recorded; none: []."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    choices = [files, *([path] for path in files if len(files) > 1)] if files else []
    wanted = loaded.provenance.get("text_sha256")
    return next((chosen for chosen in choices if wanted and tokens_digest(chosen, loaded) == wanted), [])


def tokens_digest(files: Sequence[Path], loaded: Loaded) -> str | None:
    """The checksum that a run records of these files under this tokenizer; None: it cannot spell them."""
    with tempfile.TemporaryDirectory(prefix="kobza-") as parent:
        try:
            tokenise(files, loaded, Path(parent) / "tokens")
        except InputError:
            return None
        return json.loads((Path(parent) / "tokens" / "index.json").read_text())["sha256"]


def tokenise(files: Sequence[Path], loaded: Loaded, folder: Path) -> None:
    """Files -> shards under a model's own tokenizer, as its training had them."""
    data: DataConfig = loaded.run.data
    prepare(Documents([str(path) for path in files], data.text_field), data, folder, loaded.tokenizer)


@functools.lru_cache(maxsize=2)
def index_of(files: tuple[Path, ...]) -> TextIndex:
    """The suffix array of texts, kept for the next entry: it takes seconds."""
    return TextIndex("\n".join("".join(blocks) for _, blocks in Documents([str(path) for path in files])))


def first_losses(folder: Path, loaded: Loaded, steps: int) -> list[float]:
    """The losses of the first steps of a model's training, done again from its seed on the host's text."""
    config, files = loaded.run, host_files(folder, loaded)
    require(
        bool(files), "its training text is not here, so its beginning cannot be trained again; the rules ask for that"
    )
    require(not config.train.embeddings, "it starts from a table of embeddings, which is not here; train without")
    tokens = steps * config.batch_tokens
    require(
        tokens <= REPLAY_TOKENS, f"{steps} steps of it take {tokens:,} tokens; at most {REPLAY_TOKENS:,} are replayed"
    )
    config = replace(config, train=replace(config.train, compile="off"))
    runtime = make_runtime("auto", config.train.precision)
    check_memory(config, runtime)
    with tempfile.TemporaryDirectory(prefix="kobza-") as parent:
        tokenise(files, loaded, Path(parent) / "tokens")
        corpus = load_corpus(Path(parent) / "tokens", config.model.max_seq_len)
        training, network, _ = make_training(config, corpus.train, runtime)
        loss_fn = make_loss(config.train, config.model.n_ahead, runtime.compute_dtype)
        doing = train(network, training.optimizers, training.batches, config.train, loss_fn, 0, training.scaler)
        return [step.loss for step in islice(doing, steps)]


# ---- apart ---------------------------------------------------------------------------------------------------------


def verdicts(
    contest: Contest, entries: Sequence[Entry], seconds: float = JUDGE_SECONDS
) -> Iterator[tuple[Entry, Verdict]]:
    """Each entry with its verdict, from a child process; one that takes longer than `seconds`, or ends it, is refused."""
    child, ours = None, None
    try:
        for entry in entries:
            if child is None:
                child, ours = start_child(contest)
            verdict = ask(ours, entry, seconds)
            if verdict is None:
                end_child(child)
                child, why = (
                    None,
                    f"its files took longer than {seconds:g} s to verify, or ended the program that read them",
                )
                verdict = Verdict(False, (f"{why}; train with a tokenizer of kobza",))
            yield entry, verdict
    finally:
        if child is not None:
            end_child(child)


def start_child(contest: Contest) -> tuple[SpawnProcess, Connection]:
    """A process that serves verdicts, ready, and our end of the line to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=serve_verdicts, args=(theirs, contest.folder), daemon=True)
    child.start()
    theirs.close()  # so that the child has the only other end, and its death is seen
    try:
        ready = ours.poll(START_SECONDS) and ours.recv_bytes() == READY
    except (EOFError, OSError):
        ready = False
    if not ready:
        end_child(child)
        raise InputError("the process that verifies does not start; free memory and try again")
    return child, ours


def end_child(child: SpawnProcess) -> None:
    """End a process, whatever it is doing."""
    child.kill()
    child.join()


def ask(child: Connection, entry: Entry, seconds: float) -> Verdict | None:
    """The child's verdict on an entry; None: it is dead, or has not answered in time."""
    try:
        child.send_bytes(str(entry.id).encode())
        found = json.loads(child.recv_bytes()) if child.poll(seconds) else None
    except (EOFError, OSError):
        return None
    return found and Verdict(found["ok"], tuple(found["lines"]))


def serve_verdicts(parent: Connection, folder: Path) -> None:
    """The child: entries' ids in, verdicts as JSON out, until there is nobody to ask."""
    contest = Contest(folder)
    bench = make_bench(contest)
    parent.send_bytes(READY)
    while True:
        try:
            entry = contest.entry(int(parent.recv_bytes()))
        except EOFError:
            return
        verdict = verify(contest.checkpoint(entry), entry.submission, contest.rules, bench)
        parent.send_bytes(verdict.to_json().encode())

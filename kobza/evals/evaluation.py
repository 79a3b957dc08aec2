"""One evaluation: what is made once for a text, and what is measured of each model on it. The rest of the room is its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kobza.config import require
from kobza.data import Corpus
from kobza.evals.copies import TextIndex
from kobza.evals.loss import Loss, Position, loss_by_document, loss_by_position, measure_loss, side_by_side
from kobza.evals.measures import Measure, make_norm, preferences, writing
from kobza.evals.memorise import Copies, Gap, find_copies, loss_gap, usual_copy, verdict
from kobza.evals.score import score
from kobza.evals.stats import Estimate, trend
from kobza.evals.texts import Document, held_out, pieces_like, plain_text, read_documents, run_folder, write
from kobza.model import GPT
from kobza.run import open_run
from kobza.tokenizer import Tokenizer

MOST_DOCUMENTS = 1000  # beyond these no row each


@dataclass(frozen=True)
class How:
    """The settings of an evaluation; their meaning stands at the verb."""

    stride: int = 0
    most: int = 200_000
    samples: int = 32
    sample_tokens: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Subject:
    """What models are measured on. `documents` are scored; `like` is held-out text of the kind that the model was trained to
    write; `usual`: the longest stretch that this shares with the training text. For a checkpoint without its run there is no
    corpus, no training text and no index of it."""

    documents: list[Document]
    cut: bool
    like: str
    training: str | None
    index: TextIndex | None
    usual: int
    corpus: Corpus | None


def make_subject(path: Path, texts: Sequence[str], text_field: str, tokenizer: Tokenizer, most: int) -> Subject:
    """The subject of a run or checkpoint and the texts given (none: the run's held-out part)."""
    require(most >= 0, f"--most is {most}; it must be 0 (all) or above")
    folder = run_folder(path)
    require(
        bool(texts) or folder is not None,
        f"{path}: a checkpoint without its run has no held-out text; give a TEXT to evaluate on",
    )
    run = None if folder is None else open_run(folder)
    documents, cut = read_documents(texts, text_field, tokenizer, most) if texts else held_out(run, most)
    require(bool(documents), f"the text is empty: {', '.join(texts) or path}; give one with at least 2 tokens")
    own = documents if run is None or not texts else held_out(run, most)[0]
    training = None if run is None else plain_text(run.corpus.train, run.tokenizer)
    like, index = "\n".join(document.text for document in own), None if training is None else TextIndex(training)
    return Subject(
        documents=documents,
        cut=cut,
        like=like,
        training=training,
        index=index,
        usual=0 if index is None else usual_copy(index, like),
        corpus=None if run is None else run.corpus,
    )


@dataclass(frozen=True)
class Evaluation:
    """All that was measured of one model."""

    loss: Loss
    positions: list[Position]
    documents: list[dict[str, Any]]
    measures: list[Measure]
    gap: Gap | None
    copies: Copies | None
    sample: str

    @property
    def memorised(self) -> bool:
        """Whether either flag of memorise.py is up."""
        return bool((self.gap and self.gap.overfit) or (self.copies and self.copies.copies))


def evaluate(model: GPT, tokenizer: Tokenizer, subject: Subject, how: How) -> Evaluation:
    """Measure a model on a subject."""
    ids = [document.ids for document in subject.documents]
    scored = score(model, tokenizer, ids, stride=how.stride)
    loss = measure_loss(tokenizer, ids, scored)
    several = 1 < len(ids) <= MOST_DOCUMENTS
    texts = write(model, tokenizer, how.samples, how.sample_tokens, how.seed)
    pieces = pieces_like(subject.like, [len(text) for text in texts])
    norm = make_norm(subject.training, subject.index, subject.like, pieces)
    asked = "\n".join(document.text for document in subject.documents)
    return Evaluation(
        loss=loss,
        positions=loss_by_position(side_by_side(model, tokenizer, ids), model.config.max_seq_len),
        documents=loss_by_document(tokenizer, subject.documents, scored) if several else [],
        measures=preferences(model, tokenizer, asked) + writing(texts, norm),
        gap=None if subject.corpus is None else loss_gap(model, tokenizer, subject.corpus),
        copies=None if subject.index is None else find_copies(texts, subject.index, pieces, subject.usual),
        sample=texts[0],
    )


# ---- for scripts ---------------------------------------------------------------------------------------------------


def plain(estimate: Estimate | None) -> dict[str, Any] | None:
    """An estimate for JSON; None where there is nothing behind it."""
    return None if estimate is None or not math.isfinite(estimate.value) else asdict(estimate)


def as_dict(e: Evaluation) -> dict[str, Any]:
    """An evaluation for JSON."""
    loss = {key: plain(getattr(e.loss, key)) for key in ("bits_per_byte", "nats_per_token", "perplexity", "accuracy")}
    loss |= {"unit": e.loss.unit, "tokens": e.loss.n_tokens, "bytes": e.loss.n_bytes}
    loss["by_position"] = [asdict(p) for p in e.positions]
    loss["by_document"] = e.documents
    measures = [asdict(measure) | {"estimate": plain(measure.estimate)} for measure in e.measures]
    memorisation: dict[str, Any] = {"memorised": e.memorised, "verdict": verdict(e.gap, e.copies)}
    memorisation["gap"] = None if e.gap is None else asdict(e.gap)
    memorisation["copies"] = None if e.copies is None else asdict(e.copies)
    return {"loss": loss, "measures": measures, "memorisation": memorisation, "sample": e.sample}


def progress(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, Any]]:
    """How loss and measures move over checkpoints: {name: Trend}, more being better; what some checkpoint lacks is left out."""
    rows = {"bits per byte": [Measure("", e.loss.bits_per_byte, "down").progress for e in evaluations]}
    for i, measure in enumerate(evaluations[0].measures):
        rows[measure.name] = [e.measures[i].progress for e in evaluations]
    return {name: asdict(trend(row)) for name, row in rows.items() if all(e is not None for e in row)}

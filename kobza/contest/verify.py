"""Is a submission what it claims, and within the rules? A Verdict with a line for all that was looked at, or for each refusal.

    files       weights, config and tokenizer are those that were hashed; the weights are as many as the config has
    rules       parameters, prompt, sampling; by the run's own record: seconds and text
    text        every draw made again (draws.py), the text is what these tokens spell, and it ends where it had to
    copies      no passage of the training text word for word beyond the rules
    beginning   on demand: the first steps trained again here give the same losses

What it cannot prove it says: a record of seconds, and all training after the beginning, are the entrant's word.
What belongs to other rooms (counting parameters, looking up copies, training) comes as a Bench, from the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kobza.checkpoint import Loaded, load_checkpoint, read_config
from kobza.config import InputError, ModelConfig, RunConfig, require
from kobza.contest.draws import SLACK, replay
from kobza.contest.rules import Rules, over_in_text, over_in_training
from kobza.contest.submission import METRICS, Submission, Verdict, checkpoint_digest
from kobza.formats.headers import read_header

MOST_MEMORY = 8_000_000_000  # bytes of weights and cache: no model of a contest needs more
REPLAY_CLOSE = (
    0.02  # nats between a loss and the one trained again; another machine's kernels differ by less in first steps
)
SHOWN = 120  # characters of a passage that are quoted


@dataclass(frozen=True)
class TrainingText:
    """A text that a model was trained on, found by the checksum of its tokens. files: sha256 of each of the host's files that it
    is, none where the entrant brought it; longest: a text -> (n,), the longest match with this one from each place."""

    files: tuple[str, ...]
    longest: Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Bench:
    """What `verify` needs of other rooms."""

    parameters: Callable[[ModelConfig], int]
    memory: Callable[[ModelConfig], int]
    """bytes of the weights and a full cache"""
    ends: Callable[[Loaded], list[int]]
    """ids that end a text"""
    records: Callable[[Path], Sequence[dict[str, Any]]]
    """the records of a metrics.jsonl, in order"""
    text: Callable[[Loaded], TrainingText | None]
    """the training text, where it is at hand"""
    losses: Callable[[Loaded, int], Sequence[float]]
    """the losses of the first n steps, trained again on that text"""


class Found:
    """Lines as they come; a refusal is kept apart, for all of them are told."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.refused: list[str] = []

    def verdict(self) -> Verdict:
        """The refusals if there are any, else what was seen."""
        return Verdict(not self.refused, tuple(self.refused or self.seen))


def verify(folder: Path, submission: Submission, rules: Rules, bench: Bench) -> Verdict:
    """Look at all there is to see. folder: the checkpoint of the submission."""
    found = Found()
    try:
        loaded = open_entry(folder, submission, rules, bench)
        found.seen.append(f"files: {submission.n_parameters:,} parameters, checkpoint {submission.checkpoint[:12]}")
        outside = list(over_in_text(rules, submission.prompt, submission.sampling))
        found.refused += outside
        check_record(found, folder, submission, rules, bench, loaded)
        if not outside:  # else the work could be without end
            check_text(found, submission, loaded, bench.ends(loaded))
        text = bench.text(loaded)
        check_source(found, rules, loaded, text)
        check_copies(found, submission.text, rules, text)
        if rules.require_replay_steps and not found.refused:
            check_beginning(found, folder, rules.require_replay_steps, bench, loaded)
    except InputError as error:
        found.refused.append(str(error))
    except (RecursionError, OverflowError, MemoryError) as error:
        found.refused.append(f"its files cannot be read: {type(error).__name__}; train and pack it again")
    return found.verdict()


def open_entry(folder: Path, submission: Submission, rules: Rules, bench: Bench) -> Loaded:
    """The model in memory, after its sizes were held against its files and what was claimed: nothing large is made on a claim."""
    digest = checkpoint_digest(folder)
    same = f"the checkpoint's sha256 is {digest[:12]} and the submission says {submission.checkpoint[:12]}"
    require(digest == submission.checkpoint, f"{same}: its files were changed since")
    run, provenance = read_config(folder / "config.json")
    require(isinstance(provenance, dict), "config.json: its provenance is no object; train it again")
    other = differing(run, submission)
    require(not other, f"its config is another than the submission's: {other}")
    tensors = read_header(folder / "model.safetensors")
    require(
        run.model.n_layer <= len(tensors), f"config has {run.model.n_layer:,} layers, {len(tensors):,} tensors are here"
    )
    n = sum(int(np.prod(info.shape, dtype=object)) for info in tensors.values())
    claimed, wanted = submission.n_parameters, bench.parameters(run.model)
    require(n == wanted, f"the config has {wanted:,} parameters, the weights {n:,}")
    require(n == claimed, f"it has {n:,} parameters, and the submission says {claimed:,}")
    most = rules.most_parameters
    require(not most or n <= most, f"the model has {n:,} parameters; at most {most:,}")
    need = bench.memory(run.model)
    require(need <= MOST_MEMORY, f"it takes {need / 1e9:,.1f} GB to run; at most {MOST_MEMORY / 1e9:.0f}")
    loaded = load_checkpoint(folder)
    size, vocab = loaded.tokenizer.vocab_size, loaded.run.model.vocab_size
    require(size <= vocab, f"its tokenizer has {size:,} tokens, its model {vocab:,}")
    return loaded


def differing(run: RunConfig, submission: Submission) -> str:
    """The first field in which the checkpoint's model config is not the submission's; empty: none."""
    ours, theirs = vars(run.model), vars(submission.model)
    words = (f"{name} is {ours[name]!r}, not {theirs[name]!r}" for name in ours if ours[name] != theirs[name])
    return next(words, "")


def check_record(
    found: Found, folder: Path, submission: Submission, rules: Rules, bench: Bench, loaded: Loaded
) -> None:
    """The rules on the model and its training, by its own record, which must at least agree with itself."""
    claim, provenance = submission.record, loaded.provenance
    for key, said in (("step", claim.steps), ("tokens", claim.tokens), ("text_sha256", claim.text_sha256)):
        if provenance.get(key) != said:
            found.refused.append(
                f"the checkpoint's record of {key} is {provenance.get(key)!r}, the submission's {said!r}"
            )
    records = bench.records(folder / METRICS) if (folder / METRICS).is_file() else []
    seconds = seconds_of(records)
    if seconds != claim.seconds:
        found.refused.append(f"the run's record says {seconds} s of training, the submission {claim.seconds}")
    there = [record.get("tokens") for record in records if record["step"] == provenance.get("step")]
    if records and there != [provenance.get("tokens")]:
        found.refused.append(
            f"the run's record is of another training: it has no step {provenance.get('step')} like this"
        )
    found.refused += over_in_training(rules, seconds)
    took = "an unknown time" if seconds is None else f"{seconds:.1f} s"
    found.seen.append(f"training: {claim.steps or 'unknown'} steps in {took}, by the entrant's own record")


def seconds_of(records: Sequence[dict[str, Any]]) -> float | None:
    """How long a run was trained: to its end, for who picks the best of its checkpoints has seen them all."""
    times = [record["seconds"] for record in records if isinstance(record.get("seconds"), int | float)]
    return round(float(max(times)), 4) if times and np.isfinite(times).all() else None


def check_text(found: Found, submission: Submission, loaded: Loaded, ends: Sequence[int]) -> None:
    """The text is what the model writes by this seed."""
    ids, config, size = submission.ids, submission.sampling, loaded.tokenizer.vocab_size
    require(max(ids) < size, f"token {max(ids):,} is none of the tokenizer's {size:,}")
    require(len(ids) <= config.tokens, f"the text has {len(ids):,} tokens where --tokens is {config.tokens:,}")
    early = next((n for n, i in enumerate(ids[:-1]) if i in ends), None)
    require(early is None, f"the text goes on after token {early}, which ends it")
    whole = len(ids) == config.tokens or ids[-1] in ends
    require(whole, f"the text is cut short: it stops after {len(ids):,} of {config.tokens:,} tokens without an end")
    if (spelled := loaded.tokenizer.decode(ids, continues=True)) != submission.text:
        at = next((n for n, (a, b) in enumerate(zip(spelled, submission.text, strict=False)) if a != b), None)
        at = min(len(spelled), len(submission.text)) if at is None else at
        found.refused.append(f"the text was edited: from character {at:,} on it is not what its tokens spell")
    result = replay(loaded.model, loaded.tokenizer.encode_prompt(submission.prompt), ids, config, ends)
    if result.wrong is not None:
        shown, other = loaded.tokenizer.show(ids[result.wrong]), loaded.tokenizer.show(result.drawn)
        why = f"has probability {result.probability:.2%} there, and seed {config.seed} draws {other}"
        found.refused.append(f"the model does not write this text: token {result.wrong}, {shown}, {why}")
    elif result.too_many_near:
        found.refused.append(f"{result.near} of {len(ids):,} draws lie at a boundary; more than rounding brings about")
    elif result.near:
        within = f"(probability within {SLACK:g} at {result.near} of {len(ids):,} tokens)"
        found.seen.append(f"text: the same within rounding of another machine {within}")
    else:
        found.seen.append(f"text: the same, all {len(ids):,} tokens")


def check_source(found: Found, rules: Rules, loaded: Loaded, text: TrainingText | None) -> None:
    """The checkpoint names a text that the rules allow."""
    recorded = loaded.provenance.get("text_sha256")
    files = set(text.files) if text is not None else set()
    known = recorded in rules.texts or bool(files) and files <= set(rules.texts)
    if rules.texts and not known:
        is_ = f"of sha256 {str(recorded)[:12]} under its tokenizer" if recorded else "that its checkpoint does not name"
        found.refused.append(f"it was trained on another text, {is_}; the rules name theirs")
    elif rules.texts:
        found.seen.append("data: a text of the rules, by the checkpoint's own record")


def check_copies(found: Found, text: str, rules: Rules, source: TrainingText | None) -> None:
    """Nothing beyond the rules stands word for word in the training text."""
    if source is None:
        found.seen.append("copies: not looked for; its training text is not here (kobza contest new --text FILE)")
        return
    characters, words = longest_copies(text, source.longest(text))
    limits = ((characters, "characters", rules.most_copied_characters, len(characters)),
              (words, "words", rules.most_copied_words, len(words.split())))  # fmt: skip
    over = [(passage, f"{n:,} {unit}", most) for passage, unit, most, n in limits if most and n > most]
    for passage, length, most in over:
        quoted = passage if len(passage) <= SHOWN else passage[:SHOWN] + "..."
        found.refused.append(f"it copies {length} of the training text in a row, at most {most:,}: {quoted!r}")
    if not over:
        most = f"{len(characters):,} characters, {len(words.split()):,} words"
        found.seen.append(f"copies: at most {most} in a row: {characters[:SHOWN]!r}")


def longest_copies(text: str, matches: np.ndarray) -> tuple[str, str]:
    """The passages of a text with the most characters, and with the most whole words, that `matches` (n,) says are copied."""
    starts = [n for n in range(len(text)) if matches[n] and (n == 0 or matches[n - 1] <= matches[n])]
    passages = [(n, n + int(matches[n])) for n in starts]  # those that begin no later than they could
    characters = max((text[a:b] for a, b in passages), key=len, default="")
    words = max((whole_words(text, a, b) for a, b in passages), key=lambda found: len(found.split()), default="")
    return characters, words


def whole_words(text: str, start: int, end: int) -> str:
    """text[start:end] less the words that it cuts. whole_words("one two three", 1, 9) -> "two" """
    if start and not text[start - 1].isspace():
        while start < end and not text[start].isspace():
            start += 1
    if end < len(text) and not text[end].isspace():
        while end > start and not text[end - 1].isspace():
            end -= 1
    return text[start:end].strip()


def check_beginning(found: Found, folder: Path, steps: int, bench: Bench, loaded: Loaded) -> None:
    """The first steps of the run's record happen again here."""
    records = bench.records(folder / METRICS) if (folder / METRICS).is_file() else []
    claimed = [record.get("train_loss") for record in records[:steps]]
    if [record["step"] for record in records[:steps]] != list(range(1, len(claimed) + 1)) or not claimed:
        found.refused.append(
            "the run's record does not begin at its first step, so it cannot be trained again; submit a run"
        )
        return
    for step, (ours, theirs) in enumerate(zip(bench.losses(loaded, len(claimed)), claimed, strict=True), 1):
        if not isinstance(theirs, int | float) or not abs(ours - theirs) <= REPLAY_CLOSE:
            found.refused.append(f"trained again, step {step} has a loss of {ours:.4f}; the run's record says {theirs}")
            return
    found.seen.append(f"beginning: {len(claimed)} steps trained again, the same losses within {REPLAY_CLOSE} nats")


def read_lines(verdict: Verdict) -> Iterator[str]:
    """A verdict for a person."""
    word = "accepted" if verdict.ok else "refused"
    for line in verdict.lines:
        yield f"{word}  {line}"

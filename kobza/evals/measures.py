"""Measures that tell small models apart without any other model: what they prefer, and what they write.

| measure     | what is counted                                                              | better        |
|-------------|------------------------------------------------------------------------------|---------------|
| cloze       | held-out places where the next word is likelier than 3 words as long         | up, chance 1/4|
| probability | that the true word has among those four: the same, less coarse               | up, chance 1/4|
| line end    | pairs of places told apart by where the line end is likelier                 | up, chance 1/2|
| spelling    | written words that stand in the training text                                | to the text's |
| line length | Wasserstein distance of written and real lines, in characters                | down          |
| closed      | brackets and quotes that have their partner in the same paragraph            | to the text's |
| repetition  | n-grams met before in the same piece of writing                              | to the text's |
| novelty     | n-grams that do not stand in the training text                               | to the text's |

`reference` is the same count over pieces of held-out text as long as the written ones: what a perfect model would show. What is
"to the text's" gets better by coming nearer to it, so each measure has one direction in which training moves it (`progress`).
The intervals are over items (Wilson) or over written texts (bootstrap). They see form, not sense: a row of real words is spelled
well, and a name that the training text lacks counts as misspelled.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kobza.config import InputError
from kobza.evals.copies import TextIndex
from kobza.evals.score import score
from kobza.evals.stats import Estimate, over_units, ratio, scipy_stats, share
from kobza.model import GPT
from kobza.tokenizer import Tokenizer

WORD = re.compile(r"[^\W\d_]+(?:['’ʼ-][^\W\d_]+)*")
DISTRACTORS = 3
ITEMS = 800  # cloze items, and pairs of line ends, at most: a share is known to 0.035 at worst
FEWEST = 20  # fewer items, lines or marks than these are no measurement
REPEATED = 4  # characters of the n-grams that are looked for earlier in a text: about a syllable
NOVEL = 8  # of those looked for in the training text: longer than most words, so that it takes in how they join
NO_TRAINING_TEXT = "the training text is not at hand: it lies in the run's folder"
PAIRS = {"(": ")", "[": "]", "{": "}", "“": "”", "«": "»", "„": "“"}
CLOSERS = set(PAIRS.values())


@dataclass(frozen=True)
class Measure:
    """One measure with its interval; `aim` is up, down or reference; `why` says why there is no value."""

    name: str
    estimate: Estimate | None
    aim: str
    reference: float | None = None
    unit: str = "share"
    why: str = ""

    @property
    def progress(self) -> Estimate | None:
        """The estimate turned so that more is better."""
        e, r = self.estimate, self.reference
        if e is None or (self.aim == "reference" and r is None):
            return None
        if self.aim == "up":
            return e
        if self.aim == "down":
            return Estimate(-e.value, *(None if x is None else -x for x in (e.high, e.low)), e.n)
        half = None if e.low is None or e.high is None else (e.high - e.low) / 2
        distance = abs(e.value - r)
        return Estimate(-distance, *((None, None) if half is None else (-distance - half, -distance + half)), e.n)


# ---- what it prefers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClozeItem:
    """A context and what may follow it; the first candidate does."""

    context: str
    candidates: tuple[str, ...]


def cloze_items(text: str, context: int, seed: int = 0, most: int = ITEMS) -> list[ClozeItem]:
    """Places of a text with the next word and words of the same length, drawn as often as the text has them: neither length nor
    frequency gives the answer away. `context`: characters before."""
    rng = random.Random(seed)
    places = [m for m in WORD.finditer(text) if m.start() > context // 2 and text[m.start() - 1] == " "]
    counts: dict[int, Counter[str]] = {}
    for match in WORD.finditer(text):
        counts.setdefault(len(match[0]), Counter())[match[0]] += 1
    rng.shuffle(places)
    items: list[ClozeItem] = []
    for place in places:
        pool = counts[len(place[0])]
        if len(items) == most:
            break
        if len(pool) > DISTRACTORS:
            others = _draw(rng, pool, place[0])
            before = text[max(0, place.start() - context) : place.start() - 1]
            items.append(ClozeItem(before, tuple(f" {word}" for word in (place[0], *others))))
    return items


def _draw(rng: random.Random, pool: Counter[str], true: str) -> list[str]:
    """DISTRACTORS different words of the pool, each in proportion to its count, none the true one."""
    left = {word: n for word, n in pool.items() if word != true}
    drawn = []
    for _ in range(DISTRACTORS):
        word = rng.choices(list(left), list(left.values()))[0]
        drawn.append(word)
        del left[word]
    return drawn


def likelihoods(model: GPT, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """log P(continuation | context) of each pair (n,), in nats."""
    ids, firsts = [], []
    for context, continuation in pairs:
        before, after = tokenizer.encode(context), tokenizer.encode(continuation)
        ids.append(np.concatenate([before, after]))
        firsts.append(len(before))
    return np.array([float(s.logprob.sum()) for s in score(model, tokenizer, ids, firsts)])


def cloze(model: GPT, tokenizer: Tokenizer, items: Sequence[ClozeItem]) -> list[Measure]:
    """How often the true word is the likeliest of its candidates, and the probability it has among them."""
    if len(items) < FEWEST:
        why = f"only {len(items)} words with enough others of their length"
        return [Measure(name, None, "up", why=why) for name in ("cloze", "cloze probability")]
    pairs = [(item.context, candidate) for item in items for candidate in item.candidates]
    table = likelihoods(model, tokenizer, pairs).reshape(len(items), -1)
    hits = int((table[:, :1] > table[:, 1:]).all(1).sum())
    among = np.exp(table[:, 0] - np.logaddexp.reduce(table, axis=1))
    chance = f"chance {1 / (DISTRACTORS + 1):.2f}"
    return [
        Measure("cloze", share(hits, len(items)), "up", unit=chance),
        Measure("cloze probability", ratio(among, np.ones(len(among))), "up", unit=chance),
    ]


def line_end_items(text: str, context: int, seed: int = 0, most: int = ITEMS) -> list[tuple[str, str]]:
    """Pairs of contexts, the first followed by a line end and the second by a blank, both ending in the same character: a comma
    alone does not give the answer away."""
    rng = random.Random(seed)
    places: dict[str, tuple[list[int], list[int]]] = {}
    for match in re.finditer(r"(?<=\S)[\n ]", text):
        if match.start() > context // 2:
            places.setdefault(text[match.start() - 1], ([], []))[match[0] == " "].append(match.start())
    pairs = []
    for ends, blanks in places.values():
        n = min(len(ends), len(blanks))
        pairs += zip(rng.sample(ends, n), rng.sample(blanks, n), strict=True)
    rng.shuffle(pairs)
    return [(text[max(0, i - context) : i], text[max(0, j - context) : j]) for i, j in pairs[:most]]


def line_end(model: GPT, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> Measure:
    """The share of pairs where the line end is likelier at the place that has one: the area under the ROC curve."""
    if len(pairs) < FEWEST:
        return Measure("line end", None, "up", why=f"only {len(pairs)} line ends in the text")
    table = likelihoods(model, tokenizer, [(context, "\n") for pair in pairs for context in pair]).reshape(-1, 2)
    hits = int((table[:, 0] > table[:, 1]).sum())
    return Measure("line end", share(hits, len(pairs)), "up", unit="chance 0.50")


# ---- what it writes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """What written texts are held against: the training text's words and index, held-out pieces, and held-out lines."""

    words: frozenset[str] | None
    index: TextIndex | None
    pieces: list[str]
    lines: list[int]


def make_norm(training: str | None, index: TextIndex | None, held_out: str, pieces: list[str]) -> Norm:
    """The norm of a training text (None: not at hand) and a held-out one."""
    return Norm(None if training is None else frozenset(words(training)), index, pieces, line_lengths(held_out))


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return [match[0].lower() for match in WORD.finditer(text)]


def whole_words(text: str) -> list[str]:
    """The words of a piece but its first and last, which may be cut."""
    return words(text)[1:-1]


def spelling(texts: Sequence[str], norm: Norm) -> Measure:
    """The share of words that stand in the training text."""
    known = norm.words
    if known is None:
        return Measure("spelling", None, "reference", why=NO_TRAINING_TEXT)

    def count(text: str) -> tuple[int, int]:
        found = whole_words(text)
        return sum(word in known for word in found), len(found)

    return _against(norm, "spelling", texts, count, "words")


def line_length(texts: Sequence[str], norm: Norm) -> Measure:
    """How far the lengths of written lines are from those of real ones; the reference is that of real pieces as long."""
    written, real = [line_lengths(text) for text in texts], [line_lengths(piece) for piece in norm.pieces]
    if sum(map(len, real)) < FEWEST:
        return Measure("line length", None, "down", unit="characters", why="the text has hardly any lines")

    def distance(lengths: Sequence[list[int]]) -> float:
        flat = [n for one in lengths for n in one]
        return float(scipy_stats().wasserstein_distance(flat, norm.lines)) if flat else float("nan")

    estimate = over_units(len(written), lambda picked: distance([written[i] for i in picked]))
    if not np.isfinite(estimate.value):
        return Measure("line length", None, "down", unit="characters", why="no whole line was written")
    return Measure("line length", estimate, "down", distance(real), "characters")


def line_lengths(text: str) -> list[int]:
    """Lengths of the lines that end in a piece, empty ones too. line_lengths("ab\\n\\nabc\\nx") -> [2, 0, 3]"""
    return [len(line) for line in text.split("\n")[:-1]]


def closed(texts: Sequence[str], norm: Norm) -> Measure:
    """The share of brackets and quotes that have a partner."""

    def count(text: str) -> tuple[int, int]:
        marks = [partners(paragraph) for paragraph in text.split("\n\n")[:-1]]  # the last is cut
        return sum(paired for paired, _ in marks), sum(n for _, n in marks)

    return _against(norm, "closed", texts, count, "brackets and quotes")


def partners(paragraph: str) -> tuple[int, int]:
    """Marks that are opened and closed in right nesting, and all marks. partners('(a [b) "c"') -> (4, 5)"""
    stack: list[str] = []
    paired = n = 0
    for c in paragraph:
        if c not in PAIRS and c not in CLOSERS and c != '"':
            continue
        n += 1
        wanted = [i for i, opener in enumerate(stack) if (c == opener == '"') or PAIRS.get(opener) == c]
        if wanted:  # what was opened after it and is still open has no partner
            del stack[wanted[-1] :]
            paired += 2
        elif c == '"' or c in PAIRS:
            stack.append(c)
    return paired, n


def repetition(texts: Sequence[str], norm: Norm) -> Measure:
    """The share of n-grams that stood in the same text before."""

    def count(text: str) -> tuple[int, int]:
        grams = [text[i : i + REPEATED] for i in range(len(text) - REPEATED + 1)]
        return len(grams) - len(set(grams)), len(grams)

    return _against(norm, f"repeated {REPEATED}-grams", texts, count, "n-grams")


def novelty(texts: Sequence[str], norm: Norm) -> Measure:
    """The share of n-grams that the training text does not have."""
    index = norm.index
    if index is None:
        return Measure(f"new {NOVEL}-grams", None, "reference", why=NO_TRAINING_TEXT)

    def count(text: str) -> tuple[int, int]:
        longest = index.longest(text)[: max(0, len(text) - NOVEL + 1)]
        return int((longest < NOVEL).sum()), len(longest)

    return _against(norm, f"new {NOVEL}-grams", texts, count, "n-grams")


def _against(
    norm: Norm, name: str, texts: Sequence[str], count: Callable[[str], tuple[int, int]], things: str
) -> Measure:
    """A share of hits over texts beside the same over the norm's pieces."""
    ours, theirs = [count(text) for text in texts], [count(piece) for piece in norm.pieces]
    n_ours, n_theirs = sum(n for _, n in ours), sum(n for _, n in theirs)
    if n_theirs < FEWEST:
        return Measure(name, None, "reference", why=f"{n_theirs} {things} in held-out text")
    if n_ours < FEWEST:
        return Measure(name, None, "reference", why=f"{n_ours} {things} written")
    estimate = ratio([hits for hits, _ in ours], [n for _, n in ours])
    return Measure(name, estimate, "reference", sum(hits for hits, _ in theirs) / n_theirs)


def preferences(model: GPT, tokenizer: Tokenizer, text: str) -> list[Measure]:
    """Cloze and line ends over a held-out text."""
    context = 4 * model.config.max_seq_len if tokenizer.vocab_size > 1000 else model.config.max_seq_len
    try:
        return [
            *cloze(model, tokenizer, cloze_items(text, context)),
            line_end(model, tokenizer, line_end_items(text, context)),
        ]
    except InputError as error:  # a text of which --unknown skip dropped the blanks
        return [Measure(name, None, "up", why=str(error)) for name in ("cloze", "cloze probability", "line end")]


def writing(texts: Sequence[str], norm: Norm) -> list[Measure]:
    """All measures of written texts."""
    return [measure(texts, norm) for measure in (spelling, line_length, closed, repetition, novelty)]

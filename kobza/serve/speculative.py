"""Guessing several tokens and checking them in one forward, so that the text comes from the same distribution.

Two who guess: `Lookup`, by what followed the last few ids earlier in the row, and `Draft`, a small model. The model then reads
the guesses in one go and goes through its own choices one by one:

- A certain guess (a look-up, or any at temperature 0): the model chooses as it would without a guess, from the same uniform
  draw, and the guess held if it is that id. It holds with probability p(x), which for q(x) = 1 is the rule below, and the text
  is, id for id, the one that is written without speculation, at every temperature.
- A guess drawn from q: it holds with probability min(1, p(x) / q(x)); else an id is drawn from max(0, p - q), normalised.
  Leviathan et al. 2023; Chen et al. 2023. p and q are what is drawn from, after all knobs and constraints.

Every draw belongs to a place in the text, not to a step, and a row's number of guesses depends on the row alone: so its text
does not depend on what else the engine has to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kobza.config import InputError, require
from kobza.serve.pool import Pool
from kobza.serve.row import Row
from kobza.serve.runner import Piece, Runner
from kobza.serve.sampling import choose

ANOTHER = 0x6B6F627A61  # makes of a row's seed that of its guesses and their judgement
NGRAMS = (4, 3, 2)  # ids that must have stood together before


class Guess(NamedTuple):
    """An id and the distribution (V,) it was drawn from; None: it was certain."""

    id: int
    q: Tensor | None = None


class Turn(NamedTuple):
    """A row's part in a step: what the model reads, of which the last ids are guesses."""

    piece: Piece
    guesses: list[Guess]


# ---- the rule ------------------------------------------------------------------------------------------------------


def invert(p: Tensor, uniform: float) -> int:
    """The id that a uniform draw in [0, 1) takes from a distribution p (V,), float64."""
    cumulative = p.cumsum(0)
    return int((cumulative <= uniform * cumulative[-1]).sum())


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What p holds beyond q (V,): where an id comes from once a guess was turned down."""
    beyond = (p - q).clamp(min=0)
    total = beyond.sum()
    return beyond / total if total > 0 else p  # equal but for rounding


def judge(p: Tensor, guess: Guess, coin: float, uniform: float) -> int:
    """The id at a guess's place: the guess with probability min(1, p / q), else one of the residual, which never is the guess."""
    assert guess.q is not None
    if coin * guess.q[guess.id] < p[guess.id]:
        return guess.id
    return invert(residual(p, guess.q), uniform)


# ---- who guesses ---------------------------------------------------------------------------------------------------


class Lookup:
    """Guesses of one row by what it repeats. Its certain guesses cannot change the text, so their number may follow success."""

    def __init__(self, most: int):
        self.most = self.n = most
        self.seen = 0
        self.after: dict[tuple[int, ...], int] = {}  # ids that stood together -> the place behind them, the last one

    def guess(self, ids: list[int], n: int) -> list[Guess]:
        """At most n guesses of what follows."""
        for end in range(max(self.seen, min(NGRAMS)), len(ids)):  # not yet the last ids: nothing is known behind them
            for size in NGRAMS:
                if size <= end:
                    self.after[tuple(ids[end - size : end])] = end
        self.seen = len(ids)
        place = next((p for size in NGRAMS if (p := self.after.get(tuple(ids[-size:]))) is not None), None)
        if place is None:
            return []
        found = ids[place : place + min(n, self.n)]
        period = len(ids) - place  # what has begun to repeat goes on repeating
        return [Guess(found[i % period]) for i in range(min(n, self.n))]

    def learn(self, guessed: int, held: int) -> None:
        """Guess more after full success, less after none."""
        if guessed and held == guessed:
            self.n = min(self.most, 2 * self.n)
        elif guessed and not held:
            self.n = max(1, self.n // 2)


class Draft:
    """A small model over the same vocabulary, with blocks of its own. Rejected guesses are forgotten by a length set back."""

    def __init__(self, runner: Runner, vocab_size: int, chunk: int):
        fits = f"the draft model has {runner.vocab_size:,} tokens and the model {vocab_size:,}; take one of the same tokenizer"
        require(runner.vocab_size == vocab_size, fits)
        self.runner, self.chunk = runner, chunk
        self.pool = Pool(runner.n_blocks, runner.block_size)

    def most(self, row: Row) -> int:
        """Guesses for which the draft has room: in its context, and in its cache if it were this row's alone."""
        return min(self.runner.max_seq_len, self.pool.n_blocks * self.pool.block_size) - len(row.ids)

    def guess(self, counts: dict[Row, int]) -> dict[Row, list[Guess]]:
        """counts[row] guesses a row, one forward for each guess of all rows. An end, or a constraint's, is the last guess."""
        guesses: dict[Row, list[Guess]] = {row: [] for row in counts}
        states = {row: row.state.copy() for row in counts if row.state is not None}
        going = dict.fromkeys(row for row, n in counts.items() if n > 0)
        while going:
            texts = {row: row.ids + [guess.id for guess in guesses[row]] for row in going}
            for (row, ids), logits in zip(texts.items(), self._read(texts), strict=True):
                state = states.get(row)
                try:
                    guess = self._one(row, ids, logits, None if state is None else state.allowed())
                    guesses[row].append(guess)
                    if state is not None and guess.id not in row.ends:
                        state.advance(guess.id)
                except InputError:  # the constraint is stuck; the row's own step will say so
                    del going[row]
                    continue
                over = guess.id in row.ends or (state is not None and state.ended)
                if over or len(guesses[row]) == counts[row]:
                    del going[row]
        return guesses

    def _one(self, row: Row, ids: list[int], logits: Tensor, allowed: Tensor | None) -> Guess:
        """A guess for the place behind ids, from the draft's logits (V,) after the row's own knobs."""
        q = row.sampler.probabilities(row.sampler.shape(logits, ids, allowed))
        if row.sampler.knobs.temperature == 0:
            return Guess(int(q.argmax()))
        return Guess(invert(q, coins(row, len(ids) - row.n_prompt)[0]), q)

    def _read(self, texts: dict[Row, list[int]]) -> Tensor:
        """Read what the draft has not seen of each text -> logits (n, V) of what follows."""
        for row, ids in texts.items():
            table = row.draft
            assert table is not None
            table.find(row.ids)
            while len(ids) - table.stored > self.chunk:  # a long prompt goes a chunk at a time
                self._forward({row: ids[: table.stored + self.chunk]}, wanted=0)
        return self._forward(texts, wanted=1)

    def _forward(self, texts: dict[Row, list[int]], wanted: int) -> Tensor:
        tables = [row.draft for row in texts if row.draft is not None]
        pieces = [
            Piece(ids[table.stored :], table.stored, table.blocks, wanted)
            for table, ids in zip(tables, texts.values(), strict=True)
        ]
        logits = self.runner.forward(pieces)
        for table, ids in zip(tables, texts.values(), strict=True):
            table.stored = len(ids)
        return logits


def coins(row: Row, place: int) -> list[float]:
    """Three draws of a row for the place-th token it writes: of the guess, of its acceptance, of the residual."""
    if row.coins is None:
        generator = torch.Generator().manual_seed(row.request.sampling.seed ^ ANOTHER)
        row.coins = torch.rand(row.request.sampling.tokens, 3, generator=generator, dtype=torch.float64)
    return row.coins[place].tolist()


# ---- from logits to ids --------------------------------------------------------------------------------------------


def advance(turns: dict[Row, Turn], logits: Tensor) -> None:
    """Let each row choose its next id, and go on to the place behind as long as its guesses hold. logits (sum of wanted, V)"""
    active: dict[Row, Tensor] = {}
    parts = logits.split([turn.piece.wanted for turn in turns.values()])
    for (row, turn), part in zip(turns.items(), parts, strict=True):
        if row.request.prompt_logprobs and not row.n_new and len(part):
            row.read_prompt(part, turn.piece.start)
            part = part[-1:] if turn.piece.start + len(turn.piece.ids) == row.n_prompt else part[:0]
        if len(part):
            active[row] = part
    place = 0
    while active:
        guesses = {row: turns[row].guesses[place] for row in active if place < len(turns[row].guesses)}
        here = {row: part[place] for row, part in active.items()}
        chosen = choose_at(here, guesses)
        for row, i in chosen.items():
            on_its_own(row, row.accept, i, here[row])
        held = (row for row, guess in guesses.items() if chosen.get(row) == guess.id and not row.finished)
        active, place = {row: active[row] for row in held}, place + 1


def choose_at(logits: dict[Row, Tensor], guesses: dict[Row, Guess]) -> dict[Row, int]:
    """The next id of each row by its raw logits (V,); it is the row's guess if that holds. A row that fails has none."""
    shaped = {row: on_its_own(row, row.shape, raw) for row, raw in logits.items()}
    shaped = {row: scores for row, scores in shaped.items() if scores is not None}
    judged = [row for row in shaped if row in guesses and guesses[row].q is not None]
    rest = [row for row in shaped if row not in judged]
    chosen = {}
    for row in judged:
        _, coin, uniform = coins(row, row.n_new)
        chosen[row] = judge(row.sampler.probabilities(shaped[row]), guesses[row], coin, uniform)
    if rest:
        stacked = torch.stack([shaped[row] for row in rest])
        ids = choose([row.sampler for row in rest], stacked, [row.n_new for row in rest])
        chosen |= dict(zip(rest, ids, strict=True))
    return chosen


def on_its_own(row: Row, work: Callable[..., Any], *args: Any) -> Any:
    """work(*args), which can fail by this row's own fault: then it ends, and the others go on."""
    try:
        return work(*args)
    except Exception as error:
        row.fail(error)
        return None

"""The self-test passes a sound engine and each of its checks catches the bug that it is there for."""

from dataclasses import replace

import pytest
import torch
from serve_cases import Markov

import kobza.serve.engine as engine_module
import kobza.serve.speculative as speculative
from kobza.config import ModelConfig, SampleConfig
from kobza.generate import generate
from kobza.model import build
from kobza.serve.engine import Engine
from kobza.serve.pool import BlockTable, Pool
from kobza.serve.request import Request
from kobza.serve.runner import make_runner
from kobza.serve.selftest import CHECKS, PLAIN, failed, selftest
from kobza.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer("abcdefghijk")
ADAPTERS = {"left": "l", "right": "r"}


def table(runner=Markov, engine=Engine, reference=None, exact=True, **settings):
    """The self-test of an engine over a test's runner."""
    own = runner(n_blocks=64, block_size=8, adapters=ADAPTERS)
    own.exact = exact
    plain = Markov(adapters=ADAPTERS)

    def logits(ids):
        marks = [(i, place, 0) for place, i in enumerate(ids)]
        return torch.stack([(reference or plain).logits_of(marks[: n + 1], 0) for n in range(len(ids))])

    return selftest(lambda **changes: engine(own, TOKENIZER, **(settings | changes)), reference=logits, tolerance=1e-3)


GUESSERS = [{}, dict(lookup=True, speculate=4), dict(draft=Markov(seed=0, history=0.0, n_blocks=64), speculate=3)]


@pytest.mark.parametrize("guesser", GUESSERS, ids=["none", "lookup", "draft"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_sound_engine_passes_every_check(guesser, exact):
    checks = table(exact=exact, **guesser)
    assert failed(checks) == [] and [check.name for check in checks] == list(CHECKS)
    said = {check.name: check.what for check in checks}
    assert "8 came from the cache" in said["prefix-cached = cold"]
    assert ("bit for bit" in said["batched = single"]) == exact
    if guesser:
        assert ("draft" in guesser) == ("a draft model guessed" in said["speculative greedy = greedy"])


def test_what_is_not_there_is_not_checked():
    own = Markov(n_blocks=64)
    names = [check.name for check in selftest(lambda **changes: Engine(own, TOKENIZER, **changes))]
    assert "adapters apart" not in names and "near the model" not in names and len(names) == len(CHECKS) - 2


def test_a_short_context_leaves_little_to_check_and_says_so():
    own = Markov(n_blocks=8, block_size=32, max_seq_len=16)
    checks = selftest(lambda **changes: Engine(own, TOKENIZER, **changes))
    assert failed(checks) == []
    assert "nothing to share" in next(check.what for check in checks if check.name == "prefix-cached = cold")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_model_served_by_the_real_runner_passes_and_writes_what_generate_writes(precision):
    config = ModelConfig(vocab_size=11, max_seq_len=64, n_layer=2, n_head=2, n_embd=64, init="gpt2")
    model = build(config, seed=3).eval()
    runner = make_runner(model, precision=precision, memory=1 << 20, block_size=8, digest="w")

    def make(**changes):
        return Engine(runner, TOKENIZER, **changes)

    with torch.inference_mode():
        checks = selftest(make, reference=lambda ids: model(torch.tensor([ids]))[0])
    assert failed(checks) == []
    if precision == "fp32":
        request = Request([1, 2, 3], SampleConfig(tokens=20, temperature=1.0, seed=5), ())
        choices = generate(model, [request.ids], request.sampling, seeds=[5])
        assert make().run([request])[0].ids == [choice.ids[0] for choice in choices]


# ---- runners with a bug ----


class LostPosition(Markov):
    """The angles begin anew at a prompt whose beginning came from the cache."""

    def place(self, piece, j):
        return j if piece.start and piece.start % self.block_size == 0 and len(piece.ids) > 1 else piece.start + j


class OffByOne(Markov):
    """A chunk that is not the first stands a place too far."""

    def place(self, piece, j):
        return piece.start + j + (piece.start > 0 and len(piece.ids) > 1)


class Crowded(Markov):
    """Rows see each other a little."""

    def forward(self, pieces):
        return super().forward(pieces) + 1e-5 * torch.arange(self.vocab_size) * (len(pieces) > 1)


class Skewed(Markov):
    """Not the weights that were trained."""

    def logits_of(self, context, number):
        return super().logits_of(context, number) * 1.01


# ---- engines with a bug ----


class NeverZero(Engine):
    """A client's temperature 0 becomes a default."""

    def submit(self, request, sink):
        warm = replace(request.sampling, temperature=request.sampling.temperature or 0.7)
        return super().submit(replace(request, sampling=warm), sink)


class OneSeed(Engine):
    """Whatever the request says."""

    def submit(self, request, sink):
        return super().submit(replace(request, sampling=replace(request.sampling, seed=0)), sink)


class AnySeed(Engine):
    """The seed hangs on the order of arrival."""

    def submit(self, request, sink):
        return super().submit(replace(request, sampling=replace(request.sampling, seed=self._n_submitted)), sink)


class Leaky(Engine):
    """Keeps a block of each."""

    def _release(self, row):
        if row.table is not None and row.finished:
            row.table.blocks = row.table.blocks[:-1]
        super()._release(row)


class Unmindful(Engine):
    """A row that makes way loses its last token."""

    def _release(self, row):
        super()._release(row)
        if row.n_new and not row.finished:
            row.ids.pop()


BUGS = {
    "prefix-cached = cold": dict(runner=LostPosition),
    "chunked = whole": dict(runner=OffByOne),
    "batched = single": dict(runner=Crowded),
    "near the model": dict(runner=Skewed),
    "temperature 0 = likeliest": dict(engine=NeverZero),
    "no block leaked": dict(engine=Leaky),
    "preempted = undisturbed": dict(engine=Unmindful),
}


@pytest.mark.parametrize("name", BUGS)
def test_each_check_catches_its_bug(name):
    assert name in failed(table(**BUGS[name]))


@pytest.mark.parametrize("engine", [OneSeed, AnySeed])
def test_seeds_that_are_not_kept_are_caught(engine):
    assert "a seed = a text" in failed(table(engine=engine))


def test_guesses_taken_for_granted_are_caught(monkeypatch):
    plain = speculative.choose_at
    believed = lambda logits, guesses: plain(logits, guesses) | {row: guess.id for row, guess in guesses.items()}  # noqa: E731
    monkeypatch.setattr(speculative, "choose_at", believed)
    assert failed(table(lookup=True, speculate=3)) == ["speculative greedy = greedy"]


def test_guesses_that_stay_in_the_cache_are_caught(monkeypatch):
    """The length is not set back after a rejected guess; what was guessed is read as if it had been written."""
    plain = Engine._settle

    def settle(self, row, turn, written):
        plain(self, row, turn, written)
        rejected = len(turn.guesses) - max(0, written - 1)
        if rejected and not row.finished:
            block, slot = divmod(row.table.stored, self.runner.block_size)
            row.ids[-1] = self.runner.memory[row.table.blocks[block]][slot][0]

    monkeypatch.setattr(Engine, "_settle", settle)
    assert failed(table(lookup=True, speculate=3)) == ["speculative greedy = greedy"]


def test_a_prefix_keyed_without_its_adapter_is_caught(monkeypatch):
    plain = engine_module.root
    monkeypatch.setattr(engine_module, "root", lambda digest, adapter: plain(digest, None))
    assert failed(table()) == ["adapters apart"]


def test_a_prefix_found_by_its_last_block_alone_is_caught(monkeypatch):
    """Keys that do not hang on what stands before; the check's second prompt shares a whole block, so none of it here."""
    monkeypatch.setattr("kobza.serve.pool.link", lambda before, ids: bytes(ids[:1]))
    assert failed(table()) != []


def test_a_prefix_cache_that_never_hits_is_caught(monkeypatch):
    monkeypatch.setattr(Pool, "find", lambda self, key: None)
    assert "prefix-cached = cold" in failed(table())


def test_a_hit_of_the_whole_prompt_is_caught(monkeypatch):
    """A length one too far after a hit."""
    plain = BlockTable.find

    def find(self, ids):
        found = plain(self, ids)
        self.stored += found > 0
        return found

    monkeypatch.setattr(BlockTable, "find", find)
    assert "prefix-cached = cold" in failed(table())


def test_rows_that_are_only_near_pass_where_the_runner_says_so():
    assert failed(table(runner=Crowded, exact=False)) == []


def test_rows_that_are_not_near_do_not():
    class Rough(Markov):
        def forward(self, pieces):
            return super().forward(pieces) + 0.3 * torch.arange(self.vocab_size) * (len(pieces) > 1)

    assert "batched = single" in failed(table(runner=Rough, exact=False))


def test_a_check_that_cannot_run_has_not_passed():
    class Broken(Markov):
        def forward(self, pieces):
            raise RuntimeError("no such op")

    checks = table(runner=Broken)
    assert set(failed(checks)) >= set(CHECKS) - {"no block leaked", "pace"}
    assert "no such op" in next(check.what for check in checks if check.name == "batched = single")
    assert PLAIN == {"draft": None, "lookup": False, "speculate": 0}

"""Speculation draws from the model's own distribution: chi-square, several tokens deep, with wrong rules that the test rejects.

ALPHA is the chance that the test rejects a right rule; with the fixed seeds here the outcome is the same every time.
"""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_cases import Markov

import kobza.serve.speculative as speculative
from kobza.config import InputError, SampleConfig
from kobza.serve.engine import Engine
from kobza.serve.request import Request
from kobza.serve.sampling import Sampler
from kobza.serve.speculative import Guess, Lookup, invert, judge, residual
from kobza.tokenizer import CharTokenizer

chisquare = pytest.importorskip("scipy.stats").chisquare
ALPHA = 1e-4
V, DEPTH, TRIALS = 3, 5, 1500
TOKENIZER = CharTokenizer("abcd")


def p_value(counts: Counter, expected: dict) -> float:
    """Of a chi-square test of counts against probabilities; rare outcomes are counted together."""
    n = sum(counts.values())
    assert not set(counts) - {key for key, p in expected.items() if p > 0}, "an outcome of probability 0 was drawn"
    rare = [key for key, p in expected.items() if p * n < 5]
    common = [key for key in expected if key not in rare]
    seen, wanted = [counts[key] for key in common], [expected[key] * n for key in common]
    if sum(expected[key] for key in rare) * n >= 1:
        seen, wanted = [*seen, sum(counts[key] for key in rare)], [*wanted, sum(expected[key] for key in rare) * n]
    scale = sum(seen) / sum(wanted)
    return float(chisquare(seen, [w * scale for w in wanted]).pvalue)


# ---- the rule alone ----


def random_distributions(seed, size=5):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(size, generator=generator, dtype=torch.float64).mul(1.5).softmax(0) for _ in range(2))
    return p, q


def drawn_by(rule, p, q, n=8000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = Counter()
    for u, coin, again in torch.rand(n, 3, generator=generator, dtype=torch.float64).tolist():
        counts[rule(p, Guess(invert(q, u), q), coin, again)] += 1
    return counts


@pytest.mark.parametrize("seed", range(3))
def test_the_rule_draws_from_p(seed):
    p, q = random_distributions(seed)
    assert p_value(drawn_by(judge, p, q), dict(enumerate(p.tolist()))) > ALPHA


def not_subtracted(p, guess, coin, again):
    return guess.id if coin * guess.q[guess.id] < p[guess.id] else invert(p, again)


def upside_down(p, guess, coin, again):
    return guess.id if coin * p[guess.id] < guess.q[guess.id] else invert(residual(p, guess.q), again)


def the_same_coin(p, guess, coin, again):
    """The draw of the residual is not independent of the acceptance."""
    return judge(p, guess, coin, coin)


def without_a_coin(p, guess, coin, again):
    return judge(p, guess, 0.5, again)


WRONG = [not_subtracted, upside_down, the_same_coin, without_a_coin]


@pytest.mark.parametrize("rule", WRONG)
def test_a_wrong_rule_is_rejected(rule):
    p, q = random_distributions(2)
    assert p_value(drawn_by(rule, p, q), dict(enumerate(p.tolist()))) < ALPHA


@given(st.integers(0, 10**6), st.floats(0, 0.999999), st.floats(0, 0.999999))
@settings(max_examples=50, deadline=None)
def test_the_residual_never_is_the_guess_and_draws_stay_possible(seed, coin, again):
    p, q = random_distributions(seed)
    p[seed % 5] = 0  # a knob has forbidden it
    p /= p.sum()
    for i in range(5):
        drawn = judge(p, Guess(i, q), coin, again)
        accepted = coin * q[i] < p[i]
        assert (drawn == i) == bool(accepted) and p[drawn] > 0


# ---- through the engine ----


def distribution(runner, sampling, prompt, ends=()):
    """Of every text of DEPTH tokens, by going through all of them."""
    expected = {}
    for text in itertools.product(range(runner.vocab_size), repeat=DEPTH):
        p, ids = 1.0, list(prompt)
        sampler = Sampler(sampling, len(prompt), ends)
        for i in text:
            logits = runner.logits_of([(j, place, 0) for place, j in enumerate(ids)], 0)
            p *= float(sampler.probabilities(sampler.shape(logits, ids))[i])
            ids.append(i)
        expected[text] = p
    return expected


KNOBS = {
    "plain": dict(top_k=0, temperature=1.0),
    "knobs": dict(top_k=3, temperature=0.8, min_p=0.02, repetition_penalty=1.3),
    "of the row": dict(top_k=0, temperature=1.5, no_repeat_ngram=3, top_p=0.95),
}
GUESSERS = {
    "none": lambda: {},
    "draft": lambda: dict(draft=Markov(V, seed=8, history=0.0), speculate=2),
    "near draft": lambda: dict(draft=Markov(V, seed=5, history=1.2), speculate=3),
    "lookup": lambda: dict(lookup=True, speculate=2),
}
PROMPT = [0, 1, 2, 0, 1, 1, 2, 2, 0, 2, 1, 0]


def drawn_by_engine(guesser, some, trials=TRIALS):
    """Texts of many seeds, and the engine's statistics."""
    engine = Engine(Markov(V, seed=5, n_blocks=400), TOKENIZER, **guesser)
    requests = [Request(PROMPT, SampleConfig(tokens=DEPTH, seed=seed, **some), ()) for seed in range(trials)]
    counts = Counter(tuple(result.ids) for result in engine.run(requests))
    return counts, engine.stats()


PAIRS = [("none", "plain"), ("draft", "plain"), ("near draft", "plain"), ("lookup", "plain"), ("draft", "knobs")]
PAIRS += [("near draft", "of the row"), ("lookup", "knobs")]


@pytest.mark.parametrize("guesser, some", PAIRS)
def test_the_engine_draws_from_the_models_distribution(guesser, some):
    guesser, some = GUESSERS[guesser], KNOBS[some]
    counts, stats = drawn_by_engine(guesser(), some)
    assert p_value(counts, distribution(Markov(V, seed=5), SampleConfig(tokens=DEPTH, **some), PROMPT)) > ALPHA
    if guesser():
        assert stats.drafted > 100 and 0 < stats.accepted < stats.drafted  # both branches were taken


def bonus_from_q(monkeypatch):
    """The bonus token is drawn as the draft would."""
    draft, plain = Markov(V, seed=8, history=0.0), speculative.choose

    def choose(samplers, shaped, places):
        marks = [
            draft.logits_of([(0, 0, 0), (1, 1, 0)], 0) if place else row
            for row, place in zip(shaped, places, strict=True)
        ]
        return plain(samplers, torch.stack(marks), places)

    monkeypatch.setattr(speculative, "choose", choose)


def one_coin_for_all(monkeypatch):
    """The draws of a step come from the row, not from the place."""
    monkeypatch.setattr(speculative, "coins", lambda row, place, plain=speculative.coins: plain(row, 0))


NAMED = {"ids": lambda rule: getattr(rule, "__name__", rule)}


@pytest.mark.parametrize("rule", [*WRONG[:2], "bonus_from_q", "one_coin_for_all"], **NAMED)
def test_the_engine_with_a_wrong_rule_is_rejected(rule, monkeypatch):
    if isinstance(rule, str):
        globals()[rule](monkeypatch)
    else:
        monkeypatch.setattr(speculative, "judge", rule)
    counts, _ = drawn_by_engine(GUESSERS["draft"](), KNOBS["plain"])
    expected = distribution(Markov(V, seed=5), SampleConfig(tokens=DEPTH, **KNOBS["plain"]), PROMPT)
    assert p_value(counts, expected) < ALPHA


def texts(some, busy=True, seeds=range(24), blocks=400, **guesser):
    engine = Engine(Markov(V, seed=5, n_blocks=blocks), TOKENIZER, **guesser)
    requests = [Request(PROMPT, SampleConfig(tokens=24, seed=seed, **some), (2,)) for seed in seeds]
    results = engine.run(requests) if busy else [engine.run([request])[0] for request in requests]
    assert engine.pool.leaked() == [] and (engine.draft is None or engine.draft.pool.leaked() == [])
    return [result.ids for result in results], engine.stats()


@pytest.mark.parametrize("name", ["draft", "near draft", "lookup"])
def test_greedy_speculation_is_greedy_token_for_token(name):
    greedy = dict(temperature=0.0, no_repeat_ngram=4)
    speculated, stats = texts(greedy, **GUESSERS[name]())
    assert speculated == texts(greedy)[0]
    assert stats.accepted > 0


def test_certain_guesses_change_no_draw_at_any_temperature():
    warm = dict(temperature=0.7, top_k=0)
    speculated, stats = texts(warm, lookup=True, speculate=4)
    assert speculated == texts(warm)[0] and stats.accepted > 20


@pytest.mark.parametrize("name", ["draft", "near draft", "lookup"])
def test_a_seed_writes_the_same_text_however_busy_the_engine_is(name):
    warm = dict(temperature=1.0, top_k=0)
    alone, _ = texts(warm, busy=False, **GUESSERS[name]())
    assert texts(warm, **GUESSERS[name]())[0] == alone
    crowded, stats = texts(warm, blocks=20, **GUESSERS[name]())
    assert crowded == alone and stats.preempted > 0


def test_a_draft_of_few_blocks_slows_down_and_changes_nothing():
    warm = dict(temperature=1.0, top_k=0)
    small = dict(draft=Markov(V, seed=8, history=0.0, n_blocks=9), speculate=2)
    alone, _ = texts(warm, busy=False, **small)
    crowded, stats = texts(warm, **small)
    assert crowded == alone and stats.drafted > 0


@pytest.mark.parametrize("name", ["near draft", "lookup"])
def test_every_guess_that_holds_saves_a_forward(name):
    _, stats = texts(dict(temperature=0.0), busy=False, seeds=[0], **GUESSERS[name]())
    assert stats.accepted > 3 and stats.forwards == stats.tokens_out - stats.accepted


# ---- look-up ----


def test_lookup_proposes_what_followed():
    lookup = Lookup(4)
    assert lookup.guess([1, 2, 3, 4, 5, 6], 4) == []
    assert [g.id for g in lookup.guess([1, 2, 3, 4, 5, 6, 2, 3], 4)] == [4, 5, 6, 2]
    assert [g.id for g in lookup.guess([1, 2, 3, 4, 5, 6, 2, 3, 9, 2, 3], 2)] == [9, 2]  # the last place counts


def test_lookup_goes_on_with_what_repeats():
    assert [g.id for g in Lookup(5).guess([7, 1, 2, 1, 2, 1, 2], 5)] == [1, 2, 1, 2, 1]


def test_lookup_guesses_less_after_failure_and_more_after_success():
    lookup, ids = Lookup(4), [1, 2, 1, 2, 1, 2]
    lookup.learn(4, 0)
    assert len(lookup.guess(ids, 4)) == 2
    lookup.learn(2, 2)
    assert len(lookup.guess(ids, 4)) == 4


@pytest.mark.parametrize(
    "some, words",
    [
        (dict(speculate=2), "no effect"),
        (dict(lookup=True), "no effect"),
        (dict(lookup=True, speculate=-1), "-1"),
        (dict(lookup=True, draft=Markov(4), speculate=2), "take one"),
        (dict(draft=Markov(5), speculate=2), "5 tokens"),
    ],
)
def test_settings_in_vain_are_refused(some, words):
    with pytest.raises(InputError, match=words):
        Engine(Markov(V), TOKENIZER, **some)

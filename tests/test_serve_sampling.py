"""The engine's choices are generate's: every knob, any mixture of rows, and the short way over a large vocabulary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_cases import Markov, Recompute

import kobza.serve.sampling as sampling
from kobza.config import ModelConfig, SampleConfig
from kobza.generate import draw, generate, processors
from kobza.model import build
from kobza.serve.engine import Engine
from kobza.serve.request import Request
from kobza.serve.sampling import Sampler, choose, logprob_of
from kobza.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvw")
LARGE = 49_152

knobs = st.fixed_dictionaries(
    dict(temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7])),
    optional=dict(
        top_k=st.sampled_from([0, 1, 5, 40]),
        top_p=st.sampled_from([0.1, 0.7, 0.95]),
        min_p=st.sampled_from([0.05, 0.5, 1.0]),
        repetition_penalty=st.sampled_from([0.8, 1.3]),
        no_repeat_ngram=st.sampled_from([1, 2, 3]),
        min_tokens=st.sampled_from([1, 6]),
        seed=st.integers(0, 2**63 - 1),
    ),
)


@pytest.fixture(scope="module")
def model():
    """A small model with strong opinions: no two logits are near each other."""
    config = ModelConfig(vocab_size=23, max_seq_len=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, init="gpt2")
    model, generator = build(config, seed=1).eval(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def generated(model, request):
    """What kobza.generate writes for a request."""
    choices = generate(model, [request.ids], request.sampling, request.ends, seeds=[request.sampling.seed])
    return [choice.ids[0] for choice in choices]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.lists(st.integers(0, 22), min_size=1, max_size=9), knobs), min_size=1, max_size=4))
def test_a_mixed_batch_writes_what_generate_writes(model, rows):
    requests = [Request(ids, SampleConfig(**(dict(tokens=8, top_k=0) | some)), (3, 4)) for ids, some in rows]
    engine = Engine(Recompute(model), TOKENIZER)
    for request, result in zip(requests, engine.run(requests), strict=True):
        assert result.ids == generated(model, request)


def test_the_test_above_can_fail(model):
    request = Request([1, 2], SampleConfig(tokens=12, temperature=1.0, top_k=0, seed=1), ())
    other = Request([1, 2], SampleConfig(tokens=12, temperature=1.0, top_k=0, seed=2), ())
    assert generated(model, request) != Engine(Recompute(model), TOKENIZER).run([other])[0].ids


# ---- the short way over a large vocabulary ----


def rows_like_a_model(n, generator, spread=3.0, V=LARGE):
    """Logits (n, V): a bulk, and some that stand out."""
    logits = spread * torch.randn(n, V, generator=generator)
    return logits + 12 * (torch.rand(n, V, generator=generator) < 4e-4)


def plain(logits, config, uniform):
    for process in processors(config, (), []):
        logits = process(logits, [])
    return draw(logits, torch.tensor(uniform, dtype=torch.float64)).tolist()


SETTINGS = [
    dict(top_k=40),
    dict(top_k=1),
    dict(top_k=40, top_p=0.9),
    dict(top_k=150, top_p=0.9, min_p=0.02),
    dict(top_k=0, top_p=0.9),
    dict(top_k=0, top_p=0.999),
    dict(top_k=0, min_p=0.05),
    dict(top_k=0, min_p=1e-5),
    dict(top_k=0, top_p=0.5, min_p=0.3),
    dict(top_k=300),
    dict(top_k=0),
]


@pytest.mark.parametrize("some", SETTINGS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_candidates_draw_what_the_whole_vocabulary_draws(some, ties):
    generator = torch.Generator().manual_seed(3)
    for temperature in (0.7, 1.0):
        config = SampleConfig(tokens=1, temperature=temperature, **some)
        logits = rows_like_a_model(4, generator)
        if ties:  # of the k-th largest, too
            logits = logits.mul(2).round().div(2)
        uniform = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        assert sampling.sample(Sampler(config, 0), logits, uniform) == plain(logits, config, uniform)


def test_of_equal_logits_the_first_are_kept():
    logits = torch.full((20, LARGE), -20.0)
    places = torch.randperm(LARGE, generator=torch.Generator().manual_seed(0))
    logits[:, places[:100]] = 5.0
    logits[:, places[100:140]] = torch.linspace(4.0, 6.0, 40)  # something to sort
    config = SampleConfig(tokens=1, temperature=1.0, top_k=0, top_p=0.495)
    uniform = [i / 20.3 for i in range(20)]
    assert sampling.sample(Sampler(config, 0), logits, uniform) == plain(logits, config, uniform)


def test_the_usual_settings_do_not_go_the_long_way(monkeypatch):
    calls = []
    monkeypatch.setattr(sampling, "whole", lambda *_: calls.append(1) or torch.zeros(1, LARGE))
    logits = rows_like_a_model(8, torch.Generator().manual_seed(3))
    for some in SETTINGS[:4] + SETTINGS[4:5] + SETTINGS[6:7] + SETTINGS[8:9]:
        calls.clear()
        sampling.sample(
            Sampler(SampleConfig(tokens=1, **(dict(top_k=0) | some)), 0), logits, [i / 8.5 for i in range(8)]
        )
        assert len(calls) <= 1, some  # once in a while a draw is too close to tell


def test_a_draw_on_the_edge_goes_the_long_way():
    """0.25 0.25 0.5: a uniform of 0.25 stands right between the first two."""
    ids, scores = torch.arange(3).numpy(), torch.tensor([0.0, 0.0, 0.6931471805599453]).numpy()
    row = torch.tensor(scores)
    assert sampling.pick(ids, scores, row, sampling.Knobs(1.0, 3, 1.0, 0.0), 0.2499) == 0
    assert sampling.pick(ids, scores, row, sampling.Knobs(1.0, 3, 1.0, 0.0), 0.2501) == 1
    assert (
        sampling.pick(ids, scores, row, sampling.Knobs(1.0, 3, 0.5, 0.0), 0.3) is None
    )  # is 0.5 reached by the first?


# ---- what generate has not ----


def one(runner=None, **some):
    return Engine(runner or Markov(), TOKENIZER).run([Request(**(dict(ids=[1, 2], ends=()) | some))])[0]


def test_a_bias_forbids_and_forces():
    greedy = SampleConfig(tokens=6, temperature=0.0)
    first = one(sampling=greedy).ids[0]
    assert first not in one(sampling=greedy, logit_bias={first: -1000.0}).ids
    assert set(one(sampling=SampleConfig(tokens=20, temperature=2.0), logit_bias={5: 1000.0}).ids) == {5}


def test_log_probabilities_are_the_models_own_whatever_the_knobs():
    wild = SampleConfig(tokens=5, temperature=2.0, top_k=2, repetition_penalty=1.5)
    runner = Markov()
    result = one(runner, sampling=wild, logprobs=3, logit_bias={4: 3.0})
    context = [1, 2]
    for logprob in result.logprobs:
        marks = [(i, place, 0) for place, i in enumerate(context)]
        own = runner.logits_of(marks, 0).double().log_softmax(-1)
        assert logprob.logprob == pytest.approx(float(own[logprob.id]), abs=1e-5)
        top = own.topk(3)
        assert [i for i, _ in logprob.top] == top.indices.tolist()
        assert [p for _, p in logprob.top] == pytest.approx(top.values.tolist(), abs=1e-5)
        context.append(logprob.id)
    assert len(result.logprobs) == 5


def test_no_log_probability_unasked():
    assert one(sampling=SampleConfig(tokens=3)).logprobs == []
    assert logprob_of(torch.zeros(4), 1, 0) == (pytest.approx(-1.3862944), ())


def test_rows_of_different_settings_do_not_mix():
    """Row by row and all at once, the ids are the same."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    configs = [SampleConfig(tokens=2, temperature=t, top_k=k, seed=i) for i, (t, k) in enumerate([(0, 0), (1, 5)] * 3)]
    samplers = [Sampler(config, 0) for config in configs]
    alone = [choose([s], logits[i : i + 1], [1])[0] for i, s in enumerate(samplers)]
    assert choose(samplers, logits, [1] * 6) == alone
    assert choose(samplers, logits, [0] * 6) != alone  # another place, another draw


def test_min_tokens_gives_way_to_a_constraint_that_allows_an_end_alone():
    sampler = Sampler(SampleConfig(tokens=9, min_tokens=5), 1, ends=(0,))
    only_end = torch.tensor([True, False, False])
    assert sampler.shape(torch.zeros(3), [1], only_end).isfinite().tolist() == [True, False, False]
    assert sampler.shape(torch.zeros(3), [1], torch.ones(3, dtype=bool)).isfinite().tolist() == [False, True, True]

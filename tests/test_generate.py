"""BLOCK 4: each knob against its plain twin, the draws against their distribution, a row alone against a row in a batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kobza.config import InputError, ModelConfig, SampleConfig
from kobza.generate import (
    draw,
    forbid_until,
    generate,
    min_p,
    no_repeat_ngram,
    processors,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)
from kobza.model import build

SWITCHES = {
    "gpt2": dict(position="learned", norm="layernorm", qk_norm=False, mlp="gelu", bias=True, tied=True, init="gpt2"),
    "modern": dict(n_kv_head=2, init="gpt2"),
}
each_model = pytest.mark.parametrize("name", SWITCHES)


def model_of(name="modern", context=16):
    """A small model with strong opinions: no two logits are near each other."""
    config = ModelConfig(vocab_size=23, max_seq_len=context, n_layer=2, n_head=4, n_embd=32, **SWITCHES[name])
    model = build(config, seed=1).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def continued(model, prompts, ends=(), seeds=None, extra=(), **knobs):
    """The new ids of each row, up to its end."""
    config = SampleConfig(**(dict(tokens=8, temperature=1.0, top_k=0) | knobs))
    rows = [[] for _ in prompts]
    for choice in generate(model, prompts, config, ends, seeds, extra):
        for row, i in zip(rows, choice.ids, strict=True):
            if i is not None:
                row.append(i)
    return rows


# ---- the loop ----


@each_model
@torch.no_grad()
def test_greedy_is_argmax_of_the_whole_forward(name):
    model, row = model_of(name), [3, 1, 4]
    config = SampleConfig(tokens=13, temperature=0.0)
    for choice in generate(model, [list(row)], config):
        logits = model(torch.tensor([row]))[0, -1]
        torch.testing.assert_close(choice.logits[0], logits, rtol=1e-4, atol=1e-4)
        row.append(int(logits.argmax()))
        assert choice.ids == [row[-1]]
    assert len(row) == 16 and len(set(row)) > 3


@each_model
@pytest.mark.parametrize("tokens, longest", [(6, 9), (50, 20)], ids=["inside the context", "beyond it"])
def test_a_row_writes_the_same_alone_and_in_a_batch(name, tokens, longest):
    """Ragged prompts, each with its own seed; beyond the context each forgets at its own time."""
    model = model_of(name)
    prompts = [[1, 2, 3, 4, 5, 6], [5], [7, 7, 2], list(range(longest))]
    together = continued(model, prompts, seeds=[10, 11, 12, 13], tokens=tokens)
    for prompt, seed, row in zip(prompts, [10, 11, 12, 13], together, strict=True):
        assert continued(model, [prompt], seeds=[seed], tokens=tokens) == [row]


def test_sample_i_has_seed_plus_i():
    model = model_of()
    together = continued(model, [[1, 2]] * 3, seed=40)
    assert together == [continued(model, [[1, 2]], seed=40 + i)[0] for i in range(3)]
    assert together[0] != together[1] and continued(model, [[1, 2]], seed=41)[0] == together[1]


def test_an_equal_seed_writes_an_equal_beginning():
    model = model_of()
    assert continued(model, [[1]], tokens=5)[0] == continued(model, [[1]], tokens=12)[0][:5]


@each_model
@pytest.mark.parametrize("context", [1, 2, 3, 16])
def test_beyond_the_context(name, context):
    model = model_of(name, context)
    prompt = [i % 23 for i in range(40)]  # itself longer than the context
    steps = list(generate(model, [prompt, [1]], SampleConfig(tokens=3 * context + 5)))
    assert len(steps) == 3 * context + 5 and all(step.logits.isfinite().all() for step in steps)


@torch.no_grad()
def test_what_is_forgotten_is_the_oldest_half():
    """Each step equals one forward over what the row still sees."""
    model, row, seen = model_of(), [1, 2, 3], 3
    for choice in generate(model, [list(row)], SampleConfig(tokens=60, temperature=0.0)):
        logits = model(torch.tensor([row[-seen:]]))[0, -1]
        torch.testing.assert_close(choice.logits[0], logits, rtol=1e-4, atol=1e-4)
        row += choice.ids
        seen = seen + 1 if seen < 16 else 8


def test_ends_stop_a_row_and_all_rows_stop_the_loop():
    model = model_of()
    prompts, free = [[1, 2], [9], [4, 4]], continued(model, [[1, 2], [9], [4, 4]], tokens=40)
    end = free[0][5]
    steps = list(generate(model, prompts, SampleConfig(tokens=40, temperature=1.0, top_k=0), ends=[end]))
    for i, row in enumerate(free):
        until = row.index(end) + 1 if end in row else 40
        assert [step.ids[i] for step in steps] == row[:until] + [None] * (len(steps) - until)
    assert len(steps) == max(row.index(end) + 1 if end in row else 40 for row in free)


def test_at_least_so_many_tokens():
    model = model_of()
    ends = list(range(0, 23, 2))  # every other token ends a text
    short = continued(model, [[1, 2]] * 30, ends)
    assert min(map(len, short)) < 3
    long = continued(model, [[1, 2]] * 30, ends, min_tokens=5)
    assert all(j not in ends for row in long for j in row[:5])
    assert min(map(len, long)) == 6  # and not forbidden for longer


def test_no_prompt_is_refused():
    for prompts in ([], [[1], []]):
        with pytest.raises(InputError, match="the prompt is empty"):
            next(generate(model_of(), prompts, SampleConfig()))


def test_extra_processors_come_first_and_choices_show_raw_logits():
    model = model_of()

    def only_seven(logits, rows):
        assert [len(row) for row in rows] == [2]
        return torch.full_like(logits, -math.inf).index_fill(1, torch.tensor([7]), 0.0)

    choice = next(generate(model, [[1, 2]], SampleConfig(top_k=3), extra=[only_seven]))
    assert choice.ids == [7]
    torch.testing.assert_close(choice.logits, model(torch.tensor([[1, 2]]))[:, -1].detach(), rtol=1e-4, atol=1e-4)


# ---- knobs, each against a plain twin over a Python list ----

VOCABULARY = 9
logit_lists = st.lists(
    st.floats(-8, 8, width=32), min_size=VOCABULARY, max_size=VOCABULARY, unique_by=lambda x: round(x, 2)
)
rows_so_far = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30)


def kept(process, logits, row=()):
    """Ids that a processor leaves possible; what it leaves it must not change."""
    scores = process(torch.tensor([logits]), [list(row)])[0]
    left = [i for i, score in enumerate(scores.tolist()) if score > -math.inf]
    assert all(scores[i] == torch.tensor(logits)[i] for i in left)
    return left


def by_likelihood(logits):
    return sorted(range(len(logits)), key=lambda i: -logits[i])


def softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


@given(logit_lists, st.integers(1, 12))
def test_top_k(logits, k):
    assert kept(top_k(k), logits) == sorted(by_likelihood(logits)[:k])


def test_top_k_keeps_ties():
    assert kept(top_k(2), [1.0, 3.0, 1.0, 0.0]) == [0, 1, 2]


@given(logit_lists, st.floats(0.01, 0.99))
def test_top_p(logits, p):
    probabilities, total, twin = softmax(logits), 0.0, []
    for i in by_likelihood(logits):
        if abs(total - p) < 1e-5:
            return  # on the very border float32 may fall either way
        if total < p:
            twin.append(i)
        total += probabilities[i]
    assert kept(top_p(p), logits) == sorted(twin)


def test_top_p_as_in_its_docstring():
    assert kept(top_p(0.6), [math.log(x) for x in (0.2, 0.5, 0.3)]) == [1, 2]
    assert kept(top_p(0.4), [math.log(x) for x in (0.2, 0.5, 0.3)]) == [1]


@given(logit_lists, st.floats(0.01, 1.0))
def test_min_p(logits, share):
    probabilities = softmax(logits)
    limit = share * max(probabilities)
    if min(abs(p - limit) for p in probabilities if p < max(probabilities)) < 1e-6:
        return
    assert kept(min_p(share), logits) == [i for i, p in enumerate(probabilities) if p >= limit]


@given(logit_lists, rows_so_far, st.floats(0.5, 3.0))
def test_repetition_penalty(logits, row, penalty):
    twin = [(x / penalty if x > 0 else x * penalty) if i in row else x for i, x in enumerate(logits)]
    scores = repetition_penalty(penalty)(torch.tensor([logits, logits]), [row, [0]])
    torch.testing.assert_close(scores[0], torch.tensor(twin))
    torch.testing.assert_close(scores[1, 1:], torch.tensor(logits[1:]))  # another row's words are not held against it


@given(logit_lists, rows_so_far, st.integers(1, 4))
def test_no_repeat_ngram(logits, row, n):
    grams = {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}
    twin = [i for i in range(VOCABULARY) if tuple([*row, i][-n:]) not in grams or len(row) + 1 < n]
    assert kept(no_repeat_ngram(n), logits, row) == (twin or list(range(VOCABULARY)))


def test_no_ngram_is_written_twice():
    model = model_of()
    (row,) = continued(model, [[1, 2, 3]], tokens=120, no_repeat_ngram=3, temperature=0.0)
    whole = [1, 2, 3, *row]
    grams = [tuple(whole[i : i + 3]) for i in range(len(whole) - 2)]
    assert len(grams) == len(set(grams))
    (loop,) = continued(model, [[1, 2, 3]], tokens=120, temperature=0.0)
    assert len(set(zip(loop, loop[1:], loop[2:], strict=False))) < 60  # or there was nothing to guard against


def test_forbid_until():
    logits, process = torch.zeros(2, 4), forbid_until(2, [1, 3], [1, 3])
    scores = process(logits, [[0, 0], [0, 0, 0, 2, 2]])  # 1 new token; 2 new tokens
    assert scores.tolist() == [[0, -math.inf, 0, -math.inf], [0, 0, 0, 0]]


@given(logit_lists, st.floats(0.05, 5))
def test_temperature(logits, value):
    torch.testing.assert_close(temperature(value)(torch.tensor([logits]), [[]])[0], torch.tensor(logits) / value)


def test_processors_leave_their_input_alone():
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    every = [temperature(0.5), top_k(2), top_p(0.5), min_p(0.5), repetition_penalty(2.0), no_repeat_ngram(1)]
    for process in [*every, forbid_until(9, [1], [0])]:
        assert not torch.equal(process(logits, [[1, 1]]), before) and torch.equal(logits, before)


def test_only_knobs_with_an_effect_are_composed():
    assert processors(SampleConfig(temperature=1.0, top_k=0), [0], [1]) == []
    assert processors(SampleConfig(temperature=0.0, top_k=5, top_p=0.5, min_p=0.1), [0], [1]) == []  # greedy
    all_on = SampleConfig(
        temperature=0.5, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=1.1, no_repeat_ngram=2, min_tokens=1
    )
    assert len(processors(all_on, [0], [1])) == 7 and len(processors(all_on, [], [1])) == 6


# ---- the draws ----


def chi_square(counts, probabilities):
    n = sum(counts)
    return sum((count - n * p) ** 2 / (n * p) for count, p in zip(counts, probabilities, strict=True))


def test_draws_follow_the_distribution():
    """Chi-square with 7 degrees of freedom is above 24.3 once in a thousand; a slightly wrong distribution is far above."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, -0.5]])
    n = 20_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids = draw(logits.expand(n, -1), uniform)
    counts = torch.bincount(ids, minlength=8).tolist()
    probabilities = logits[0].double().softmax(-1).tolist()
    assert chi_square(counts, probabilities) < 24.3
    slightly_wrong = (logits[0].double() * 1.05).softmax(-1).tolist()
    assert chi_square(counts, slightly_wrong) > 40


@given(logit_lists, st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_cumulative_distribution(logits, uniform):
    total = 0.0
    for i, p in enumerate(softmax(logits)):
        total += p
        if abs(total - uniform) < 1e-9:
            return
        if uniform < total:
            assert int(draw(torch.tensor([logits]), torch.tensor([uniform], dtype=torch.float64))) == i
            return


def test_draw_as_in_its_docstring():
    logits = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log().expand(4, -1)
    assert draw(logits, torch.tensor([0.1, 0.2 + 1e-9, 0.9, 0.0], dtype=torch.float64)).tolist() == [0, 1, 2, 0]


@given(st.sets(st.integers(0, 8), min_size=1), st.sampled_from([0.0, 1e-300, 0.5, 1 - 2**-53]))
def test_a_forbidden_token_is_never_drawn(allowed, uniform):
    logits = torch.tensor([[0.0 if i in allowed else -math.inf for i in range(9)]])
    assert int(draw(logits, torch.tensor([uniform], dtype=torch.float64))) in allowed

"""Scoring: windows score each token once, equal to token by token; a batch equals one by one; intervals hold."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kobza.config import InputError, ModelConfig
from kobza.evals.score import encode_pair, opening, score, windows
from kobza.model import build
from kobza.tokenizer import BOS, EOT, CharTokenizer

TOKENIZER = CharTokenizer("\nabcdefghij")
SIZE = 8


@pytest.fixture(scope="module")
def model():
    made = build(ModelConfig(vocab_size=11, max_seq_len=SIZE, n_layer=2, n_head=2, n_embd=16), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # fresh weights guess evenly: a test of log-probabilities needs ones that differ
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made.double().eval()


def one_by_one(model, ids, i, seen):
    """log P of ids[i] after the `seen` tokens before it, each in a forward pass of its own."""
    with torch.no_grad():
        return float(model(torch.tensor([ids[i - seen : i]]))[0, -1].log_softmax(-1)[ids[i]])


def ids_of(n, seed=0):
    return np.random.default_rng(seed).integers(1, 11, n).tolist()


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_windows_score_each_token_once_with_a_full_context(n, first, size, stride):
    stride, first = min(stride, size), min(first, n)
    plan = windows(n, first, size, stride)
    assert [t for w in plan for t in range(w.first, w.stop + 1)] == list(range(first, n))
    for w in plan:
        assert 0 <= w.start < w.stop <= n - 1 and w.stop - w.start <= size
        for t in range(w.first, w.stop + 1):
            assert min(t, size - stride + 1) <= t - w.start <= size


@pytest.mark.parametrize("n", [1, SIZE - 1, SIZE, SIZE + 1, 5 * SIZE + 3])
def test_stride_1_equals_token_by_token_with_all_the_context_there_is(model, n):
    ids = ids_of(n)
    (found,) = score(model, TOKENIZER, [ids], stride=1)
    whole = [0, *ids]  # a line end stands before
    wanted = [one_by_one(model, whole, i, min(i, SIZE)) for i in range(1, len(whole))]
    np.testing.assert_allclose(found.logprob, wanted, atol=1e-6)
    assert found.seen.tolist() == [min(i, SIZE) for i in range(1, len(whole))]


@pytest.mark.parametrize("stride", [0, 2, 3, SIZE])
def test_any_stride_equals_token_by_token_with_the_context_it_states(model, stride):
    ids = ids_of(43)
    (found,) = score(model, TOKENIZER, [ids], stride=stride)
    whole = [0, *ids]
    wanted = [one_by_one(model, whole, i, int(found.seen[i - 1])) for i in range(1, len(whole))]
    np.testing.assert_allclose(found.logprob, wanted, atol=1e-6)
    assert found.seen[SIZE:].min() >= SIZE - (stride or SIZE // 2) + 1


def test_greedy_marks_the_likeliest_token(model):
    (found,) = score(model, TOKENIZER, [ids_of(30)], stride=1)
    whole = [0, *ids_of(30)]
    with torch.no_grad():
        best = [int(model(torch.tensor([whole[max(0, i - SIZE) : i]]))[0, -1].argmax()) for i in range(1, 31)]
    assert found.greedy.tolist() == [b == t for b, t in zip(best, whole[1:], strict=True)] and found.greedy.any()


def test_a_batch_equals_one_by_one(model):
    texts = [ids_of(n, seed=n) for n in (1, 30, 7, 8, 9, 64, 2)]
    firsts = [0, 5, 3, 7, 0, 60, 1]
    together = score(model, TOKENIZER, texts, firsts)
    for text, first, found in zip(texts, firsts, together, strict=True):
        (alone,) = score(model, TOKENIZER, [text], [first])
        assert len(found.logprob) == len(text) - first
        np.testing.assert_allclose(found.logprob, alone.logprob, atol=1e-6)
        assert found.seen.tolist() == alone.seen.tolist() and found.greedy.tolist() == alone.greedy.tolist()


def test_small_batches_and_pieces_of_the_vocabulary_change_nothing(model, monkeypatch):
    texts = [ids_of(n, seed=n) for n in (20, 33, 5)]
    plain = score(model, TOKENIZER, texts)
    monkeypatch.setattr("kobza.evals.score.BATCH_TOKENS", 9)
    monkeypatch.setattr("kobza.evals.score.LOGIT_ENTRIES", 30)
    for a, b in zip(plain, score(model, TOKENIZER, texts), strict=True):
        np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-6)


def test_a_continuation_sees_its_context(model):
    ids = ids_of(7)
    (found,) = score(model, TOKENIZER, [ids], [3])
    np.testing.assert_allclose(found.logprob, [one_by_one(model, ids, i, i) for i in range(3, 7)], atol=1e-6)


def test_a_padded_vocabulary_takes_no_probability():
    padded = build(ModelConfig(vocab_size=11, pad_vocab=16, max_seq_len=8, n_layer=1, n_head=2, n_embd=16), 0)
    total = sum(math.exp(score(padded, TOKENIZER, [[3, i]], [1])[0].logprob[0]) for i in range(11))
    assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("specials, wanted", [([], 0), ([EOT], 11), ([EOT, BOS], 12)])
def test_a_text_stands_after_what_began_one_in_training(specials, wanted):
    tokenizer = CharTokenizer("\nabcdefghij", specials=specials)
    assert opening(tokenizer) == [wanted]
    assert opening(tokenizer, needed=False) == ([12] if BOS in specials else [])


@pytest.mark.parametrize("stride", [-1, SIZE + 1])
def test_a_stride_beyond_the_context_is_refused(model, stride):
    with pytest.raises(InputError, match="--stride is -?[0-9]+; it must be between 1 and max_seq_len 8"):
        score(model, TOKENIZER, [[1, 2]], stride=stride)


def test_blanks_between_context_and_continuation_belong_to_the_continuation():
    tokenizer = CharTokenizer(" ab")
    assert encode_pair(tokenizer, "a ", "b") == ([1, 0, 2], 1)
    assert encode_pair(tokenizer, "", "b") == ([2], 0)
    with pytest.raises(InputError, match="nothing to score"):
        encode_pair(tokenizer, "a", "")

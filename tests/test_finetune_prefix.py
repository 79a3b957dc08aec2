"""A batch whose shared beginning is computed once has the loss and the gradients of the plain batch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kobza.config import ModelConfig
from kobza.finetune import prefix
from kobza.finetune.example import Row
from kobza.finetune.prefix import shared_hidden
from kobza.finetune.rows import collate
from kobza.finetune.sft import hidden_of, sft_loss
from kobza.model import build

LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "n_head": 4, "n_kv_head": 2}
GPT2 = {"norm": "layernorm", "mlp": "gelu", "position": "learned", "n_head": 4, "n_kv_head": 4, "bias": True}
CAPPED = LLAMA | {"attn_softcap": 5.0, "softcap": 3.0}


def model_of(**switches):
    torch.manual_seed(0)
    model = build(ModelConfig(vocab_size=13, n_layer=2, n_embd=32, n_ff=40, max_seq_len=64, **LLAMA | switches))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def row(ids, n_learned=2):
    learned = np.zeros(len(ids), bool)
    learned[max(1, len(ids) - n_learned) :] = True
    return Row(np.array(ids, np.int32), learned, "here")


def rows_of(start, own, n_learned=2, seed=0):
    """Rows that begin with `start` ids alike and have own[i] of their own, the first of which differ."""
    draw = np.random.default_rng(seed)
    shared = draw.integers(0, 13, start).tolist()
    return [row([*shared, i % 13, *draw.integers(0, 13, n).tolist()], n_learned) for i, n in enumerate(own)]


def loss_and_gradients(loss_fn, model, batch):
    model.zero_grad()
    loss, n = loss_fn(model, batch)
    loss.backward()
    return loss.detach(), n, {name: p.grad.clone() for name, p in model.named_parameters()}


def check_equal(model, batch):
    loss, n, gradients = loss_and_gradients(sft_loss(), model, batch)
    shared_loss, shared_n, shared_gradients = loss_and_gradients(sft_loss(hidden=shared_hidden), model, batch)
    assert n == shared_n
    assert torch.allclose(loss, shared_loss, rtol=1e-10)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, shared_gradients[name], rtol=1e-9, atol=1e-10), name


def taken(monkeypatch):
    """Notes the length of each line laid out."""
    lines, lay_out = [], prefix.lay_out
    monkeypatch.setattr(prefix, "lay_out", lambda *a: lines.append(lay_out(*a)) or lines[-1])
    return lines


@pytest.mark.parametrize("switches", [LLAMA, GPT2, CAPPED], ids=["llama", "gpt2", "capped"])
def test_loss_and_gradients_are_those_of_the_plain_batch(switches, monkeypatch):
    lines = taken(monkeypatch)
    rows = rows_of(20, [6, 3, 9, 1])
    check_equal(model_of(**switches), collate([[r] for r in rows], 32))
    once = 20 + sum(len(r.ids) - 1 - 20 for r in rows)
    assert lines[0].inputs.shape[1] == -(-once // prefix.ROUND) * prefix.ROUND, "each id of the beginning once"


def test_packed_lines_share_their_beginnings_too(monkeypatch):
    lines = taken(monkeypatch)
    a, b, c, d = rows_of(12, [2, 4, 3, 5])
    check_equal(model_of(), collate([[a, b], [c, d]], 33))
    assert len(lines) == 1


def test_targets_in_the_shared_beginning_are_learned_as_often_as_they_stand_there():
    check_equal(model_of(), collate([[r] for r in rows_of(20, [3, 3, 3], n_learned=15)], 24))


def test_answers_to_one_question_and_rows_that_are_the_same():
    same = rows_of(20, [4])[0]
    check_equal(model_of(), collate([[same]] * 4, 24))
    longer = row([*same.ids, 3, 5])  # the other is wholly its beginning
    check_equal(model_of(), collate([[same], [longer], [same]], 28))


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=6), st.booleans())
def test_hidden_states_of_any_rows_are_those_of_the_plain_batch(ids, packed):
    lines = [[row(r) for r in ids]] if packed else [[row(r)] for r in ids]
    batch, model = collate(lines, max(sum(len(r.ids) - 1 for r in line) for line in lines) + 3), model_of()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "pays", lambda *_: True)
        real = batch.documents >= 0
        assert torch.allclose(shared_hidden(model, batch)[real], hidden_of(model, batch)[real], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("damage", ["mask", "positions", "places"])
def test_a_wrong_layout_would_be_seen(damage, monkeypatch):
    lay_out = prefix.lay_out

    def damaged(*args):
        line = lay_out(*args)
        wrong = {
            "mask": torch.ones_like(line.mask).tril(),
            "positions": torch.arange(line.positions.numel())[None],
            "places": line.places.flip(0),
        }
        return line._replace(**{damage: wrong[damage]})

    monkeypatch.setattr(prefix, "lay_out", damaged)
    with pytest.raises(AssertionError):
        check_equal(model_of(), collate([[r] for r in rows_of(20, [6, 3, 9, 1])], 32))


def test_it_steps_aside_where_nothing_is_gained(monkeypatch):
    lines = taken(monkeypatch)
    check_equal(model_of(window=8, window_pattern="L"), collate([[r] for r in rows_of(20, [3, 3])], 24))
    unlike = [row([i, *range(8)]) for i in range(3)]
    check_equal(model_of(), collate([[r] for r in unlike], 8))
    assert not lines

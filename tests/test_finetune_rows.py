"""Rows: whole on disk or refused; every row once an epoch; packed, padded, accumulated: what each row by itself gives."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kobza.config import InputError, ModelConfig
from kobza.finetune import rows as module
from kobza.finetune import sft
from kobza.finetune.example import Row
from kobza.finetune.rows import PackedBatches, best_fit, collate, eval_rows, load_rows, save_rows
from kobza.finetune.sft import document_mask, hidden_of, one_document_a_line, sft_loss, token_logprobs
from kobza.model import build
from kobza.train import IGNORE, evaluate

V = 31
SWITCHES = {
    "rope, gqa": dict(n_kv_head=2, n_head=4),
    "learned positions": dict(position="learned", norm="layernorm", qk_norm=False, mlp="gelu", bias=True, tied=True),
    "sinusoids": dict(position="sinusoidal"),
    "no positions": dict(position="none"),
    "window": dict(window=4, window_pattern="LG", rope_local_theta=100.0),
    "gemma 2": dict(window=5, attn_softcap=20.0, softcap=10.0, embed_scale=5.0, norm_place="both", norm_weight=True),
    "qk norm": dict(qk_norm=True, qk_norm_weight=True, pad_vocab=16),
}


def tiny(**switches):
    defaults = dict(vocab_size=V, max_seq_len=48, n_layer=3, n_head=2, n_embd=16, init="gpt2")
    return build(ModelConfig(**(defaults | switches)), seed=1).double()


def some_rows(lengths, seed=0):
    """Rows of these lengths in which a random third of the tokens is learned, the last one always."""
    generator = np.random.default_rng(seed)
    rows = []
    for i, n in enumerate(lengths):
        learned = generator.random(n) < 0.35
        learned[0], learned[-1] = generator.random() < 0.5, True  # a mark on the first token must not matter
        rows.append(Row(generator.integers(0, V, n).astype(np.int32), learned, f"row {i + 1}"))
    return rows


ROWS = some_rows([9, 3, 14, 2, 21, 7, 12, 5])
N_LEARNED = sum(int(row.learned[1:].sum()) for row in ROWS)


def alone(model, row):
    """The summed loss of one row by itself: all logits of the plain model, then what is learned of them."""
    ids = torch.from_numpy(row.ids.astype(np.int64))
    losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
    return losses[torch.from_numpy(row.learned[1:])].sum()


def gradients(model, losses):
    """(summed loss, its gradient by weight) of losses that are computed one by one."""
    model.zero_grad()
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(a, b):
    """Largest relative distance of (loss, gradients) from another. A key's bias moves no softmax: its gradient is rounding."""
    assert a[1].keys() == b[1].keys()
    least = 1e-6 * max(float(gradient.norm()) for gradient in b[1].values())
    distances = [float((a[1][n] - b[1][n]).norm()) / max(float(b[1][n].norm()), least) for n in a[1]]
    return max(abs(a[0] / b[0] - 1), *distances)


def of_batches(model, batches):
    return gradients(model, (sft_loss()(model, batch)[0] for batch in batches))


# ---- equal to each row by itself ----


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", SWITCHES)
def test_batches_equal_rows_by_themselves(name, packing):
    """In micro-batches with unequal numbers of targets: their sums are what accumulation adds up."""
    model = tiny(**SWITCHES[name])
    truth = gradients(model, (alone(model, row) for row in ROWS))
    for micro_batch, max_len in ((1, 48), (3, 24), (8, 48)):
        batches = eval_rows(ROWS, micro_batch, max_len, packing=packing)
        assert all(one_document_a_line(batch.documents) != packing for batch in batches) or micro_batch != 8
        assert apart(of_batches(model, batches), truth) < 1e-10
        assert sum(int(sft_loss()(model, batch)[1]) for batch in batches) == N_LEARNED
        assert evaluate(model, batches, sft_loss()) == pytest.approx(truth[0] / N_LEARNED, rel=1e-12)


def test_without_a_mask_one_document_a_line_is_as_with_one(monkeypatch):
    model = tiny(**SWITCHES["window"])
    batches = eval_rows(ROWS, 3, 48, packing=False)
    assert all(one_document_a_line(batch.documents) for batch in batches)
    fast = of_batches(model, batches)
    monkeypatch.setattr(sft, "one_document_a_line", lambda documents: False)
    assert apart(of_batches(model, batches), fast) < 1e-12


def test_padding_anywhere_but_at_the_end_needs_the_mask():
    line = torch.tensor([[0, 0, 0, -1]])
    assert one_document_a_line(line)
    for other in ([[-1, 0, 0, 0]], [[0, -1, 0, 0]], [[0, 0, 1, 1]], [[1, 1, -1, -1]]):
        assert not one_document_a_line(torch.tensor(other)) and not one_document_a_line(
            torch.cat((line, torch.tensor(other)))
        )


def test_token_logprobs_are_the_loss_place_by_place():
    model = tiny(**SWITCHES["gemma 2"])
    for packing in (True, False):
        for batch in eval_rows(ROWS, 4, 48, packing=packing):
            found = token_logprobs(model, batch)
            assert found.shape == batch.targets.shape and (found[batch.targets == IGNORE] == 0).all()
            assert torch.allclose(-found.sum(), sft_loss()(model, batch)[0], rtol=1e-12)
    row = ROWS[4]
    ids = torch.from_numpy(row.ids.astype(np.int64))
    expected = model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    found = token_logprobs(model, collate([[row]], 24))[0]
    learned = torch.from_numpy(np.flatnonzero(row.learned[1:]))
    assert torch.allclose(found[learned], expected[learned], rtol=1e-12)


def test_in_bf16_the_head_sees_bf16_and_the_loss_float32():
    model, batch = tiny().float(), eval_rows(ROWS, 4, 48)[0]
    loss, n = sft_loss(torch.bfloat16)(model, batch)
    assert loss.dtype == torch.float32 and token_logprobs(model, batch, torch.bfloat16).dtype == torch.float32
    assert loss.item() / n.item() == pytest.approx(sft_loss()(model, batch)[0].item() / n.item(), abs=0.02)


def test_only_targets_go_through_the_head():
    model, batch, seen = tiny(), eval_rows(ROWS, 8, 48)[0], []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    _, n = sft_loss()(model, batch)
    assert seen == [(int(n), 16)]


def test_a_batch_without_a_target_is_a_loss_of_zero():
    model, batch = tiny(), eval_rows(ROWS, 8, 48)[0]
    loss, n = sft_loss()(model, batch._replace(targets=torch.full_like(batch.targets, IGNORE)))
    loss.backward()
    assert (loss.item(), n.item()) == (0.0, 0)


# ---- documents do not see each other ----


@pytest.mark.parametrize("name", SWITCHES)
def test_one_document_tells_another_nothing(name):
    """Bit for bit: what document 0 and the padding hold moves no number of document 1, and no gradient comes back from it."""
    model = tiny(**SWITCHES[name]).float()
    batch = collate([[ROWS[4], ROWS[6]]], 40)
    first, second = batch.documents[0] == 0, batch.documents[0] == 1
    other = batch.inputs.clone()
    other[0, ~second] = (other[0, ~second] + 5) % V
    x, y = (hidden_of(model, batch._replace(inputs=ids))[0] for ids in (batch.inputs, other))
    assert torch.equal(x[second], y[second]) and not torch.equal(x[first], y[first])
    read = []
    model.embed.register_forward_hook(lambda module, args, output: (output.retain_grad(), read.append(output)) and None)
    hidden_of(model, batch)[0, second].square().sum().backward()
    moved = read[0].grad[0].abs().sum(-1) > 0
    assert torch.equal(moved, second)


def no_mask(batch, monkeypatch):
    monkeypatch.setattr(sft, "document_mask", lambda documents: document_mask(torch.zeros_like(documents)))
    return batch


def places_not_reset(batch, monkeypatch):
    return batch._replace(positions=torch.arange(batch.inputs.shape[1]).expand_as(batch.inputs))


def neighbours_learned(batch, monkeypatch):
    """The targets of a shift over the whole line: each document's last token tells the next one's first (R6)."""
    ends = (batch.documents.diff(dim=1) > 0).nonzero()
    targets = batch.targets.clone()
    targets[ends[:, 0], ends[:, 1]] = batch.inputs[ends[:, 0], ends[:, 1] + 1]
    return batch._replace(targets=targets)


def padding_learned(batch, monkeypatch):
    return batch._replace(targets=batch.targets.masked_fill(batch.documents < 0, 0))


@pytest.mark.parametrize("plant", [no_mask, places_not_reset, neighbours_learned, padding_learned])
def test_planted_bugs_are_seen(plant, monkeypatch):
    model = tiny(position="learned")  # with rope alone a shift of a whole document changes nothing
    truth = gradients(model, (alone(model, row) for row in ROWS))
    assert apart(of_batches(model, [plant(batch, monkeypatch) for batch in eval_rows(ROWS, 8, 40)]), truth) > 1e-3


def test_a_mean_of_means_is_another_loss():
    model = tiny()
    batches = eval_rows(ROWS, 1, 24)
    losses = [sft_loss()(model, batch) for batch in batches]
    means = sum(loss.item() / n.item() for loss, n in losses) / len(losses)
    assert abs(means / evaluate(model, batches, sft_loss()) - 1) > 1e-3


# ---- batches ----


def content(batches):
    """The documents of batches as a sorted list of (ids, targets)."""
    found = []
    for batch in batches:
        inputs, targets, positions, documents = (part.numpy() for part in batch)
        for b in range(len(inputs)):
            for document in range(documents[b].max() + 1):
                here = documents[b] == document
                assert np.array_equal(positions[b][here], np.arange(here.sum()))
                found.append((inputs[b][here].tolist(), targets[b][here].tolist()))
    return sorted(found)


def wanted(rows):
    return sorted((row.ids[:-1].tolist(), np.where(row.learned[1:], row.ids[1:], IGNORE).tolist()) for row in rows)


@given(
    st.lists(st.integers(2, 33), min_size=1, max_size=40),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 99),
    st.integers(1, 3),
)
def test_every_epoch_covers_every_row_once(lengths, micro_batch, packing, seed, window):
    rows, was = some_rows(lengths, seed), module.WINDOW
    module.WINDOW = window
    try:
        batches = PackedBatches(rows, micro_batch, 33, seed, packing=packing)
        for epoch in range(3):
            taken = [next(batches) for _ in range(batches.n_batches_per_epoch)]
            assert (batches.epoch, batches.position) == (epoch + 1, 0)
            assert content(taken) == wanted(rows)
            assert all(batch.inputs.shape[0] <= micro_batch and batch.inputs.shape[1] <= 33 for batch in taken)
            alone_in_line = [one_document_a_line(batch.documents) for batch in taken]
            assert packing or all(alone_in_line)
    finally:
        module.WINDOW = was


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_best_fit_holds_every_row_and_is_within_a_bound_of_the_fewest_lines(lengths):
    lines = best_fit(np.array(lengths), 50)
    assert sorted(i for line in lines for i in line) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in line) <= 50 for line in lines)
    fewest = -(-sum(lengths) // 50)
    assert len(lines) <= max(2 * fewest - 1, 1)  # two lines never fit in one
    assert best_fit(np.array([3, 5, 2]), 8) == [[1, 0], [2]]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_resumed_goes_on_exactly(packing):
    rows = some_rows(np.random.default_rng(0).integers(2, 30, 50))
    straight = PackedBatches(rows, 3, 32, 7, packing=packing)
    for _ in range(2 * straight.n_batches_per_epoch + 1):
        state = json.loads(json.dumps(straight.state_dict()))
        resumed = PackedBatches(rows, 3, 32, 7, packing=packing)
        resumed.load_state_dict(state)
        expected = copy.deepcopy(straight)
        for _ in range(3):
            for a, b in zip(next(expected), next(resumed), strict=True):
                assert torch.equal(a, b)
        next(straight)
    for other in (PackedBatches(rows, 3, 32, 8), PackedBatches(rows, 2, 32, 7), PackedBatches(rows[1:], 3, 32, 7)):
        with pytest.raises(AssertionError, match="an order of"):
            other.load_state_dict(state)


def test_the_seed_and_the_epoch_draw_the_order():
    rows = some_rows([10] * 40)
    first, same, other = (PackedBatches(rows, 4, 32, seed) for seed in (1, 1, 2))
    assert first.order == same.order != other.order
    assert first.order != first._order(1)
    grouped = [sorted(lines) for lines in PackedBatches(rows, 4, 32, 1, packing=False).order]
    assert grouped != [sorted(lines) for lines in PackedBatches(rows, 4, 32, 2, packing=False).order]
    widths = [batch.inputs.shape[1] for batch in eval_rows(some_rows(range(2, 90)), 4, 90, packing=False)]
    assert widths != sorted(widths)  # a model that sees short rows first and long ones last learns something else


def test_packing_leaves_little_padding_and_grouping_less_than_chance():
    lengths = np.random.default_rng(0).integers(20, 220, 3000)
    rows = some_rows(lengths)
    packed, grouped = (PackedBatches(rows, 8, 1024, 0, packing=packing) for packing in (True, False))
    assert packed.padding < 0.02 and grouped.padding < 0.05
    chance = PackedBatches(rows, 8, 1024, 0, packing=False)
    chance.order = [[[i] for i in range(at, at + 8)] for at in range(0, 3000, 8)]
    assert chance.padding > 0.3
    largest = packed.largest()
    assert largest.inputs.numel() == max(len(lines) * packed._width(lines) for lines in packed.order)
    documents = [int(batch.documents.max()) for batch in (next(packed) for _ in range(5))]
    assert min(documents) >= 4


def test_a_batch_holds_only_rows_that_fit_and_have_something_to_learn():
    with pytest.raises(AssertionError, match="1 to 10 tokens"):
        PackedBatches(some_rows([11]), 1, 10, 0)
    masked = Row(np.arange(4), np.array([True, False, False, False]), "row 1")
    with pytest.raises(AssertionError, match="nothing to learn"):
        PackedBatches([masked], 1, 10, 0)


# ---- on disk ----


def test_rows_come_back_as_saved(tmp_path):
    rows = [*ROWS, Row(np.array([7], np.int32), np.array([False]), "späte Zeile 9", cut=12)]
    save_rows(tmp_path / "rows", rows)
    back = load_rows(tmp_path / "rows")
    assert [(r.where, r.cut) for r in back] == [(r.where, r.cut) for r in rows]
    for a, b in zip(back, rows, strict=True):
        assert a.ids.dtype == np.int32 and a.learned.dtype == bool
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.learned, b.learned)
    save_rows(tmp_path / "none", [])
    assert load_rows(tmp_path / "none") == []


def test_a_save_that_fails_leaves_nothing(tmp_path):
    bad = Row(np.array([1, 2]), np.array([True, True]), where=object())
    with pytest.raises(TypeError):
        save_rows(tmp_path / "rows", [bad])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ids.bin", "learned.bin", "rows.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "grow", "gone", "empty"])
def test_damaged_rows_are_one_line(tmp_path, name, harm):
    save_rows(tmp_path / "rows", ROWS)
    path = tmp_path / "rows" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x04
    harmed = {"flip": bytes(content), "cut": path.read_bytes()[:-3], "grow": path.read_bytes() + b"x", "empty": b""}
    path.unlink() if harm == "gone" else path.write_bytes(harmed[harm])
    with pytest.raises(InputError, match="not as they were written") as caught:
        load_rows(tmp_path / "rows")
    assert "\n" not in str(caught.value) and str(tmp_path / "rows") in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"lengths": [1, 2]},
        {"lengths": [10**12]},
        {"lengths": [-1]},
        {"lengths": [True] * len(ROWS)},
        {"lengths": 5},
        {"where": [3] * len(ROWS)},
        {"cut": ["1"] * len(ROWS)},
        {"cut": []},
        {"format": None},
    ],
    ids=str,
)
def test_forged_rows_are_one_line(tmp_path, change):
    """With a manifest that fits: what the files say is held against each other too."""
    save_rows(tmp_path / "rows", ROWS)
    path = tmp_path / "rows" / "rows.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    manifest = {p.name: module_digest(p) for p in (tmp_path / "rows").iterdir() if p.name != "manifest.json"}
    (tmp_path / "rows" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not as they were written"):
        load_rows(tmp_path / "rows")


def module_digest(path):
    import hashlib

    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

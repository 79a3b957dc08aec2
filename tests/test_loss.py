"""Each objective is its slow, plain twin through gradients in float64, and a window of any cut is one batch under all of them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from kobza.config import InputError, ModelConfig, RunConfig, TrainConfig
from kobza.loss import is_plain, make_loss, summed_loss, with_context
from kobza.model import build
from kobza.train import IGNORE, next_token_loss, train_step

V = 13


def small(n_ahead=1, **switches):
    """A model in float64 with every weight drawn, so that no gradient is 0 by the init."""
    sizes = dict(vocab_size=V, max_seq_len=8, n_layer=2, n_head=2, n_embd=16, init="gpt2")
    return build(ModelConfig(n_ahead=n_ahead, **(sizes | switches))).double()


def masked_batch(rows=6, seed=0):
    """Inputs and targets (rows, 8) where row r lacks its first r targets, and row 0 its last."""
    ids = torch.randint(V, (rows, 9), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    targets[torch.arange(8) < torch.arange(rows)[:, None]] = IGNORE
    targets[0, -1] = IGNORE
    return ids[:, :-1], targets


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, wanted, rtol=1e-9):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-12, msg=name)


def check(config, slow, n_ahead=1, **switches):
    """loss_fn and slow(model, inputs, targets) -> (sum, count) agree, gradients and all."""
    model, batch = small(n_ahead, **switches), masked_batch()
    loss, n = make_loss(config, n_ahead)(model, batch)
    wanted, n_wanted = slow(model, *batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    assert int(n) == int(n_wanted)
    same(gradients(model, loss), gradients(model, wanted))


# ---- one by one ----


def test_with_nothing_set_it_is_the_plain_loss_to_the_bit():
    model, batch = small().float(), masked_batch()
    loss, n = make_loss(TrainConfig())(model, batch)
    plain, n_plain = next_token_loss()(model, batch)
    assert is_plain(TrainConfig()) and torch.equal(loss, plain) and torch.equal(n, n_plain)
    same(gradients(model, loss), gradients(model, next_token_loss()(model, batch)[0]), rtol=0)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothing_mixes_in_the_uniform_distribution(smoothing):
    def slow(model, inputs, targets):
        log_p, total = model(inputs).log_softmax(-1), 0.0
        for row, column in (targets != IGNORE).nonzero().tolist():
            wanted = torch.full((V,), smoothing / V, dtype=torch.float64)
            wanted[targets[row, column]] += 1 - smoothing
            total = total - (wanted * log_p[row, column]).sum()
        return total, (targets != IGNORE).sum()

    check(TrainConfig(label_smoothing=smoothing), slow)


def test_smoothing_spreads_over_no_row_of_padding():
    model, batch = small(pad_vocab=64), masked_batch()
    loss, _ = make_loss(TrainConfig(label_smoothing=0.2))(model, batch)
    torch.testing.assert_close(loss, make_loss(TrainConfig(label_smoothing=0.2))(small_of(model), batch)[0])


def small_of(model):
    """The same weights without the rows of padding."""
    bare = small()
    with torch.no_grad():
        for name, p in bare.named_parameters():
            p.copy_(dict(model.named_parameters())[name][: len(p)])
    return bare


def test_z_loss_is_the_square_of_log_z():
    def slow(model, inputs, targets):
        logits, total = model(inputs), 0.0
        for row, column in (targets != IGNORE).nonzero().tolist():
            z = logits[row, column].exp().sum()
            total = total - (logits[row, column, targets[row, column]].exp() / z).log() + 0.3 * z.log() ** 2
        return total, (targets != IGNORE).sum()

    check(TrainConfig(z_loss=0.3), slow)


def test_z_loss_pulls_log_z_to_0():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(1, 4, V, generator=generator) + 3, torch.zeros(1, 4, dtype=torch.long)

    def log_z(z_loss):
        x = logits.clone().requires_grad_()
        optimizer = torch.optim.SGD([x], lr=0.3)
        for _ in range(300):
            optimizer.zero_grad()
            summed_loss(x, targets, z_loss=z_loss).backward()
            optimizer.step()
        return float(x.detach().logsumexp(-1).abs().max())

    assert log_z(1.0) < 0.1 < 3 < log_z(0.0)


@pytest.mark.parametrize("least", [2, 5, 8])
def test_min_context_is_masking_the_targets(least):
    def slow(model, inputs, targets):
        targets = targets.clone()
        targets[:, : least - 1] = IGNORE  # target t comes after t + 1 tokens
        return next_token_loss()(model, (inputs, targets))

    check(TrainConfig(min_context=least), slow)
    assert with_context(torch.tensor([[5, 6, 7]]), 3).tolist() == [[IGNORE, IGNORE, 7]]


@pytest.mark.parametrize("n_ahead", [2, 4])
@pytest.mark.parametrize("least", [0, 3])
def test_several_tokens_ahead_is_a_slow_loop(n_ahead, least):
    weight = 0.5

    def slow(model, inputs, targets):
        x, n = model.hidden(inputs), 0
        by_head = [0.0] * n_ahead
        for row in range(inputs.shape[0]):
            for place in range(inputs.shape[1]):
                for head in range(n_ahead):
                    at = place + head
                    if at >= inputs.shape[1] or targets[row, at] == IGNORE or place + 1 < least:
                        continue
                    seen = x[row : row + 1, place : place + 1]
                    logits = model.logits(seen if head == 0 else model.ahead[head - 1](seen))
                    by_head[head] = by_head[head] - logits[0, 0].log_softmax(-1)[targets[row, at]]
                    n += head == 0
        return by_head[0] + weight * sum(by_head[1:]) / (n_ahead - 1), torch.tensor(n)

    check(TrainConfig(ahead_weight=weight, min_context=least), slow, n_ahead)


def test_extra_heads_of_a_context_too_short_for_them_have_no_targets():
    model, (inputs, targets) = small(n_ahead=4), masked_batch()
    loss, n = make_loss(TrainConfig(), 4)(model, (inputs[:, :2], targets[:, :2]))
    assert math.isfinite(loss.item()) and int(n) == int((targets[:, :2] != IGNORE).sum())


def test_all_terms_together():
    def slow(model, inputs, targets):
        total, n = torch.zeros((), dtype=torch.float64), 0
        x = model.hidden(inputs)
        for head in range(3):
            logits = model.logits(x if head == 0 else model.ahead[head - 1](x))[:, : 8 - head]
            wanted = targets[:, head:].clone()
            wanted[:, :2] = IGNORE
            learned = wanted != IGNORE
            loss = F.cross_entropy(logits[learned], wanted[learned], reduction="sum", label_smoothing=0.1)
            loss = loss + 0.01 * (logits[learned].logsumexp(-1) ** 2).sum()
            total, n = total + (loss if head == 0 else 0.35 * loss), n + (learned.sum() if head == 0 else 0)
        return total, n

    everything = TrainConfig(label_smoothing=0.1, z_loss=0.01, min_context=3, ahead_weight=0.7)
    check(everything, slow, n_ahead=3)


# ---- in the loop ----

OBJECTIVES = {
    "plain": ({}, 1),
    "smoothing": (dict(label_smoothing=0.2), 1),
    "z": (dict(z_loss=0.1), 1),
    "context": (dict(min_context=4), 1),
    "ahead": ({}, 3),
    "all": (dict(label_smoothing=0.2, z_loss=0.1, min_context=4, ahead_weight=0.5), 2),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 3, 1]], ids=str)
def test_accumulated_is_the_whole_batch(name, sizes):
    settings, n_ahead = OBJECTIVES[name]
    loss_fn, (inputs, targets) = make_loss(TrainConfig(**settings), n_ahead), masked_batch()

    def updated(window):
        model = small(n_ahead)
        before = copy.deepcopy(model)
        loss, norm = train_step(model, [torch.optim.SGD(model.parameters(), lr=1.0)], window, loss_fn)
        return loss, norm, {n: p - q for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True)}

    loss, norm, updates = updated(list(zip(inputs.split(sizes), targets.split(sizes), strict=True)))
    whole_loss, whole_norm, whole = updated([(inputs, targets)])
    assert loss == pytest.approx(whole_loss, rel=1e-6) and norm == pytest.approx(whole_norm, rel=1e-6)
    same(updates, whole, rtol=1e-6)


def test_logits_are_widened_and_computed_in_the_given_dtype():
    model = small().float()
    config, batch = TrainConfig(label_smoothing=0.1, z_loss=0.01), masked_batch()
    loss, _ = make_loss(config, dtype=torch.bfloat16)(model, batch)
    wanted = summed_loss(model(batch[0], dtype=torch.bfloat16).float(), batch[1], 0.1, 0.01)
    assert loss.dtype == torch.float32 and torch.equal(loss, wanted)
    assert not torch.equal(loss, make_loss(config)(model, batch)[0])


# ---- what is refused ----


@pytest.mark.parametrize(
    "model, train, words",
    [
        ({}, dict(ahead_weight=0.5), "train.ahead_weight has no effect with model.n_ahead=1"),
        (dict(max_seq_len=8), dict(min_context=9), "train.min_context is 9: no target has so much context"),
        (dict(n_ahead=2), dict(compile="on"), "train.compile=on has no effect with model.n_ahead > 1"),
        (dict(tied=True), dict(head_lr=0.1), "train.head_lr has no effect with model.tied"),
        (dict(n_layer=1), dict(layer_lr_decay=0.5), "train.layer_lr_decay 0.5 has no effect on a single block"),
    ],
)
def test_settings_without_effect_on_the_model_are_refused(model, train, words):
    with pytest.raises(InputError) as error:
        RunConfig(ModelConfig(**model), train=TrainConfig(**train))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert RunConfig(ModelConfig(), train=TrainConfig(min_context=64, layer_lr_decay=0.5, head_lr=0.1)) is not None


@pytest.mark.parametrize(
    "values, words",
    [
        ({"min_context": 1}, "train.min_context 1 has no effect"),
        ({"label_smoothing": 1.0}, "train.label_smoothing is 1.0; it must be in [0, 1)"),
        ({"z_loss": -1e-4}, "train.z_loss is -0.0001; it must not be negative"),
        ({"ahead_weight": 0.0}, "train.ahead_weight is 0.0; it must be above 0"),
        ({"embed_weight_decay": -0.5}, "train.embed_weight_decay is -0.5; it must be 0 or above, or -1"),
        ({"layer_lr_decay": 1.5}, "train.layer_lr_decay is 1.5; it must be in (0, 1]"),
        ({"head_lr": -1.0}, "train.head_lr is -1.0"),
        ({"momentum": 1.0}, "train.momentum is 1.0; it must be in [0, 1)"),
        ({"fp32_parts": "lm_head", "precision": "fp32"}, "train.fp32_parts lm_head has no effect with precision=fp32"),
    ],
)
def test_bad_values_are_refused(values, words):
    with pytest.raises(InputError) as error:
        TrainConfig(**values)
    assert words in str(error.value) and "\n" not in str(error.value)

"""Parameter groups are a partition, schedules pass through their corners, and Muon is its plain twin."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kobza.config import ModelConfig, TrainConfig
from kobza.model import build
from kobza.optim import AdamW, Muon, check_partition, make_optimizers, orthogonalize, parameter_groups, schedule, set_lr

SWITCHES = {
    "gpt2": dict(position="learned", norm="layernorm", mlp="gelu", bias=True, tied=True, zero_init=False),
    "modern": dict(n_kv_head=2),
    "bare": dict(norm_weight=False),
}


def small(name="modern"):
    return build(ModelConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=4, n_embd=16, **SWITCHES[name]))


# ---- groups ----


@pytest.mark.parametrize("name", SWITCHES)
def test_groups_are_a_partition(name):
    model = small(name)
    groups = parameter_groups(model)
    together = [p for parameters in groups.values() for p in parameters]
    assert {id(p) for p in together} == {id(p) for p in model.parameters()} and len(together) == len(set(together))
    assert all(p.ndim == 1 for p in groups["vectors"]) and all(p.ndim == 2 for p in groups["matrices"])
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].startswith("blocks.") for p in groups["matrices"])
    tables, head = ({names[id(p)] for p in groups[kind]} for kind in ("tables", "head"))
    assert tables == {"embed.weight", "position.weight"} & set(names.values())
    assert head == {"lm_head.weight"} & set(names.values())  # a tied head is a table


def test_a_weight_missing_or_twice_is_noticed():
    model = small()
    groups = parameter_groups(model)
    first = groups["matrices"].pop(0)
    with pytest.raises(AssertionError, match=r"in no group: \['blocks\.0\.attn\.q_proj\.weight'\]"):
        check_partition(model, groups)
    groups["vectors"] += [first, first]
    with pytest.raises(AssertionError, match="twice: .'blocks.0.attn.q_proj.weight'"):
        check_partition(model, groups)
    groups["vectors"].pop()
    check_partition(model, groups)  # in any group, but once
    groups["vectors"].append(torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(AssertionError):  # a stranger
        check_partition(model, groups)


def test_frozen_weights_are_in_no_group():
    model = small()
    model.embed.requires_grad_(False)
    groups = parameter_groups(model)
    assert all(p is not model.embed.weight for parameters in groups.values() for p in parameters)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("name", SWITCHES)
def test_optimizers_hold_every_weight_once_and_never_decay_vectors(name, optimizer):
    model = small(name)
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer, weight_decay=0.1))
    groups = [group for o in optimizers for group in o.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for group in groups:
        decays = {p.ndim > 1 for p in group["params"]}
        assert decays == {group["weight_decay"] > 0}, "a group mixes vectors and matrices, or decays the wrong one"
    assert any(isinstance(o, Muon) for o in optimizers) == (optimizer == "muon")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_decay_shrinks_matrices_and_leaves_vectors(optimizer):
    """Zero gradients: only the decay moves."""
    model = small("gpt2")
    config = TrainConfig(optimizer=optimizer, weight_decay=0.5, lr=0.1, muon_lr=0.2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for o in make_optimizers(model, config):
        o.step()
    for name, parameter in model.named_parameters():
        rate = 0.2 if optimizer == "muon" and name.startswith("blocks.") else 0.1
        shrunk = before[name] * (1 - rate * 0.5 * (parameter.ndim > 1))
        torch.testing.assert_close(parameter.detach(), shrunk, msg=name)


def test_rates_are_peak_times_multiplier():
    optimizers = make_optimizers(small(), TrainConfig(lr=0.1, muon_lr=0.2))
    for multiplier in (0.5, 1.0, 0.25):
        set_lr(optimizers, multiplier)
        rates = {type(o).__name__: {group["lr"] for group in o.param_groups} for o in optimizers}
        assert rates == {"AdamW": {0.1 * multiplier}, "Muon": {0.2 * multiplier}}


def test_the_tables_may_have_a_rate_of_their_own():
    model = small("gpt2")
    (adamw,) = make_optimizers(model, TrainConfig(optimizer="adamw", lr=0.1, embed_lr=0.4))
    rates = {id(p): group["lr"] for group in adamw.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (0.4 if name.startswith(("embed.", "position.")) else 0.1)


# ---- schedules ----


def test_corner_points():
    """100 steps, 10 of warm-up, floor 0.1: the rate before, at and after each corner."""
    base = dict(steps=100, warmup_steps=10, lr_floor=0.1)
    cosine = schedule(TrainConfig(schedule="cosine", **base))
    linear = schedule(TrainConfig(schedule="linear", **base))
    wsd = schedule(TrainConfig(schedule="wsd", decay_fraction=0.5, **base))
    constant = schedule(TrainConfig(schedule="constant", **base))
    for at in (cosine, linear, wsd, constant):
        assert [at(0), at(4), at(9), at(10)] == pytest.approx([1 / 11, 5 / 11, 10 / 11, 1.0])
    assert [linear(55), linear(99), linear(100), linear(1000)] == pytest.approx([0.55, 0.1 + 0.9 / 90, 0.1, 0.1])
    assert [cosine(55), cosine(100), cosine(1000)] == pytest.approx([0.55, 0.1, 0.1])
    assert cosine(32.5) == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * math.sqrt(0.5)))  # a quarter of the way
    assert [wsd(54), wsd(55), wsd(77.5), wsd(100)] == pytest.approx([1.0, 1.0, 0.55, 0.1])
    assert constant(99) == constant(1000) == 1.0


@given(
    st.builds(
        TrainConfig,
        steps=st.integers(1, 50),
        warmup_steps=st.integers(0, 60),
        lr_floor=st.floats(0, 1),
        decay_fraction=st.floats(0.01, 1),
        schedule=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    )
)
def test_every_schedule_rises_then_falls_within_its_bounds(config):
    rates = [schedule(config)(step) for step in range(config.steps)]
    top = min(config.warmup_steps, config.steps - 1)
    assert all(0 < rate <= 1 or config.lr_floor == 0 for rate in rates) and max(rates) <= 1 + 1e-12
    assert all(a < b for a, b in zip(rates[:top], rates[1 : top + 1], strict=True))
    assert all(a >= b - 1e-12 for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    assert min(rates[top:]) >= min(config.lr_floor, rates[top]) - 1e-12


# ---- Muon ----


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 64, 16), (2, 16, 64), (1, 96, 32), (4, 1, 8), (2, 8, 1)], ids=str)
def test_orthogonalize_moves_singular_values_to_about_one(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    before, after = torch.linalg.svdvals(stack), torch.linalg.svdvals(orthogonalize(stack))
    mild = before > 0.05 * before.amax(-1, keepdim=True)  # five steps cannot lift what is nearly zero
    assert mild.float().mean() > 0.8
    assert after[mild].min() > 0.6 and after.max() < 1.3


def test_orthogonalize_keeps_the_singular_vectors():
    matrix = torch.randn(1, 20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.mT @ orthogonalize(matrix) @ vt.mT
    off_diagonal = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(5, 12, 30), (5, 30, 12), (5, 16, 16)], ids=str)
def test_stacked_is_one_by_one(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([orthogonalize(matrix[None]) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack), alone, rtol=1e-4, atol=1e-5)


def test_a_zero_gradient_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def plain_muon(weights, gradients, lr, momentum, decay, steps=5):
    """Muon as its author writes it, a matrix at a time in float64 (Jordan 2024)."""
    weights = [w.double() for w in weights]
    buffers = [torch.zeros_like(w) for w in weights]
    for step_gradients in gradients:
        for i, g in enumerate(step_gradients):
            g = g.double()
            buffers[i] = momentum * buffers[i] + (1 - momentum) * g
            x = momentum * buffers[i] + (1 - momentum) * g
            rows, cols = x.shape
            x = x / (x.norm() + 1e-7)
            for _ in range(steps):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            weights[i] = weights[i] * (1 - lr * decay) - lr * math.sqrt(max(1, rows / cols)) * x
    return weights


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_muon_is_its_plain_twin(decay):
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 20), (20, 8), (8, 8), (8, 20), (20, 8)]  # two of a shape are stepped as one stack
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    weights = [torch.nn.Parameter(w.clone()) for w in start]
    muon = Muon(weights, lr=0.1, momentum=0.9, weight_decay=decay)
    for step_gradients in gradients:
        for weight, gradient in zip(weights, step_gradients, strict=True):
            weight.grad = gradient.clone()
        muon.step()
    for weight, twin in zip(weights, plain_muon(start, gradients, 0.1, 0.9, decay), strict=True):
        torch.testing.assert_close(weight.detach(), twin.float(), rtol=1e-3, atol=1e-4)


def test_muon_leaves_a_weight_without_gradient():
    weights = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    weights[0].grad = torch.eye(4)
    Muon(weights, lr=0.1, weight_decay=0.5).step()
    assert torch.equal(weights[1], torch.ones(4, 4)) and not torch.equal(weights[0], torch.ones(4, 4))


def test_our_adamw_is_torchs_to_the_bit():
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7)]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    groups = [[{"params": [a], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}] for a, b in (ours, theirs)]
    mine = AdamW(groups[0], 0.01, (0.9, 0.95))
    reference = torch.optim.AdamW(groups[1], lr=0.01, betas=(0.9, 0.95), fused=True)
    for _ in range(7):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_training_starts_without_importing_the_compiler():
    code = (
        "import sys, torch\nfrom kobza.config import ModelConfig, TrainConfig\nfrom kobza.model import build\n"
        "from kobza.optim import make_optimizers\nmodel = build(ModelConfig(vocab_size=9, n_layer=1, n_embd=8, n_head=2))\n"
        "optimizers = make_optimizers(model, TrainConfig())\nmodel(torch.zeros((1, 4), dtype=torch.long)).sum().backward()\n"
        "[(o.step(), o.zero_grad()) for o in optimizers]\nassert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

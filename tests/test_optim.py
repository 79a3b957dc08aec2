"""Parameter groups are a partition, schedules pass through their corners, and Muon is its plain twin."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kobza.config import InputError, ModelConfig, TrainConfig, migrate_train, run_from_dict
from kobza.model import build
from kobza.optim import (
    SGD,
    AdamW,
    Lion,
    Muon,
    check_partition,
    make_optimizers,
    orthogonalize,
    parameter_groups,
    schedule,
    set_lr,
)
from kobza.surgery import freeze

OPTIMIZERS = ["muon", "adamw", "lion", "sgd"]

SWITCHES = {
    "gpt2": dict(position="learned", norm="layernorm", mlp="gelu", bias=True, tied=True, init="gpt2"),
    "modern": dict(n_kv_head=2),
    "bare": dict(norm_weight=False),
    "ahead": dict(n_ahead=3, norm_place="everywhere"),
}


def muon_rate(optimizer):
    return {"muon_lr": 0.2} if optimizer == "muon" else {}  # elsewhere it is refused


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
    assert all(names[id(p)].startswith(("blocks.", "ahead.")) for p in groups["matrices"])
    assert {"ahead.0.proj.weight", "ahead.1.proj.weight"} <= set(names.values()) or name != "ahead"
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


# ---- frozen ----


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("patterns", ["embed", "embed,blocks.0", "blocks", "lm_head, blocks.*.mlp"])
def test_frozen_weights_are_in_no_group_and_stay_to_the_bit(patterns, optimizer):
    model = small()
    names = freeze(model, patterns)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    frozen = {n for n in before if any(n.startswith(f"{name}.") for name in names)}
    groups = parameter_groups(model)
    assert sum(map(len, groups.values())) == len(before) - len(frozen) and 0 < len(frozen) < len(before)
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer, weight_decay=0.1))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    for o in optimizers:
        o.step()
    assert {n for n, p in model.named_parameters() if torch.equal(p, before[n])} == frozen


@pytest.mark.parametrize(
    "patterns, words",
    [
        ("embd", "train.freeze: the model has no module 'embd'; did you mean embed?"),
        ("embed,blocks.0.atn", "train.freeze: the model has no module 'blocks.0.atn'; did you mean blocks.0.attn?"),
        ("embed,", "train.freeze: the model has no module ''"),
        ("blocks.7", "train.freeze: the model has no module 'blocks.7'; did you mean blocks."),
        ("drop", "train.freeze: drop has no weights; leave it out"),
        ("*", "has no weights"),
        ("embed,blocks,norm,lm_head", "freezes every weight, so nothing can learn"),
    ],
)
def test_what_cannot_be_frozen(patterns, words):
    with pytest.raises(InputError) as error:
        freeze(small(), patterns)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_tied_head_is_frozen_with_its_table():
    model = small("gpt2")
    freeze(model, "lm_head")
    assert not model.embed.weight.requires_grad and model.position.weight.requires_grad


# ---- rates and decay ----


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
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
    kinds = {"muon": [AdamW, Muon], "adamw": [AdamW], "lion": [Lion], "sgd": [SGD]}
    assert [type(o) for o in optimizers] == kinds[optimizer]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("embed_decay", [-1.0, 0.0, 0.3])
def test_decay_shrinks_matrices_and_tables_and_leaves_vectors(optimizer, embed_decay):
    """Zero gradients: only the decay moves."""
    model = build(ModelConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_embd=16, position="learned", init="gpt2"))
    decays = dict(weight_decay=0.5, embed_weight_decay=embed_decay)
    config = TrainConfig(optimizer=optimizer, lr=0.1, **muon_rate(optimizer), **decays)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for o in make_optimizers(model, config):
        o.step()
    for name, parameter in model.named_parameters():
        rate = 0.2 if optimizer == "muon" and name.startswith("blocks.") else 0.1
        table = 0.5 if embed_decay == -1 or name.startswith("blocks.") else embed_decay
        shrunk = before[name] * (1 - rate * table * (parameter.ndim > 1))
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


def test_the_head_may_have_a_rate_of_its_own():
    model = small("ahead")
    (lion,) = make_optimizers(model, TrainConfig(optimizer="lion", lr=0.1, head_lr=0.4))
    rates = {id(p): group["lr"] for group in lion.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (0.4 if name == "lm_head.weight" else 0.1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_block_learns_at_a_share_of_the_rate_above_it(optimizer):
    model = build(ModelConfig(vocab_size=11, max_seq_len=8, n_layer=3, n_embd=16, n_ahead=2))
    rates = dict(lr=0.1, embed_lr=0.3, layer_lr_decay=0.5) | muon_rate(optimizer)
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer, **rates))
    set_lr(optimizers, 0.5)
    found = {id(p): g["lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        rate = 0.2 if optimizer == "muon" and parameter.ndim > 1 and name.startswith(("blocks.", "ahead.")) else 0.1
        rate = 0.3 if name == "embed.weight" else rate
        share = 0.5 ** (2 - int(name.split(".")[1])) if name.startswith("blocks.") else 1.0
        assert found[id(parameter)] == pytest.approx(0.5 * rate * share), name


def test_without_it_the_groups_are_not_split():
    """Muon stacks what is in one group: splitting would cost its speed, and reorder the state of older checkpoints."""
    optimizers = make_optimizers(small(), TrainConfig())
    assert [len(o.param_groups) for o in optimizers] == [3, 1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_setting_of_another_optimizer_is_refused(optimizer):
    wants = {"muon_lr": ["muon"], "momentum": ["muon", "sgd"], "beta1": ["muon", "adamw", "lion"]}
    for name, optimizers in wants.items():
        if optimizer in optimizers:
            assert getattr(TrainConfig(optimizer=optimizer, **{name: 0.5}), name) == 0.5
        else:
            with pytest.raises(InputError, match=f"train.{name} 0.5 has no effect with optimizer={optimizer}"):
                TrainConfig(optimizer=optimizer, **{name: 0.5})


def test_settings_of_an_older_kobza_are_read():
    assert migrate_train({"muon_momentum": 0.8, "lr": 0.1}) == {"momentum": 0.8, "lr": 0.1}
    assert run_from_dict({"train": {"muon_momentum": 0.8}}, "config.toml").train.momentum == 0.8
    adamw = {"optimizer": "adamw", "muon_momentum": 0.8, "muon_lr": 0.1, "lr": 0.2}  # was no error then
    assert run_from_dict({"train": adamw}, "config.toml").train == TrainConfig(optimizer="adamw", lr=0.2)


# ---- schedules ----


def test_corner_points():
    """100 steps, 10 of warm-up, floor 0.1: the rate before, at and after each corner."""
    base = dict(steps=100, warmup_steps=10, lr_floor=0.1)
    cosine = schedule(TrainConfig(schedule="cosine", **base))
    linear = schedule(TrainConfig(schedule="linear", **base))
    wsd = schedule(TrainConfig(schedule="wsd", decay_fraction=0.5, **base))
    constant = schedule(TrainConfig(schedule="constant", steps=100, warmup_steps=10))
    for at in (cosine, linear, wsd, constant):
        assert [at(0), at(4), at(9), at(10)] == pytest.approx([1 / 11, 5 / 11, 10 / 11, 1.0])
    assert [linear(55), linear(99), linear(100), linear(1000)] == pytest.approx([0.55, 0.1 + 0.9 / 90, 0.1, 0.1])
    assert [cosine(55), cosine(100), cosine(1000)] == pytest.approx([0.55, 0.1, 0.1])
    assert cosine(32.5) == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * math.sqrt(0.5)))  # a quarter of the way
    assert [wsd(54), wsd(55), wsd(77.5), wsd(100)] == pytest.approx([1.0, 1.0, 0.55, 0.1])
    assert constant(99) == constant(1000) == 1.0
    root = schedule(TrainConfig(schedule="inverse_sqrt", **base))
    assert [root(4), root(9), root(10), root(43), root(98)] == pytest.approx([5 / 11, 10 / 11, 1, 0.5, 1 / 3])
    assert root(10**6) == 0.1  # the floor


def test_inverse_sqrt_is_that_of_its_paper_and_knows_no_end():
    """Vaswani et al. 2017, equation 3: min(n^-1/2, n w^-3/2) in steps from 1, here as a share of its peak w^-1/2."""
    config = dict(schedule="inverse_sqrt", warmup_steps=9)
    for step in range(500):
        n, w = step + 1, 10
        paper = min(n**-0.5, n * w**-1.5) / w**-0.5
        for steps in (10, 100, 1000):
            assert schedule(TrainConfig(steps=steps, **config))(step) == pytest.approx(paper)


@given(
    st.builds(
        lambda family, lr_floor, decay_fraction, **lengths: TrainConfig(
            schedule=family,
            **({} if family == "constant" else {"lr_floor": lr_floor}),
            **({"decay_fraction": decay_fraction} if family == "wsd" else {}),
            **lengths,
        ),
        steps=st.integers(1, 50),
        warmup_steps=st.integers(0, 60),
        lr_floor=st.floats(0, 1),
        decay_fraction=st.floats(0.01, 1),
        family=st.sampled_from(["cosine", "linear", "wsd", "inverse_sqrt", "constant"]),
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


# ---- Lion, SGD ----


def stepped(make, start, gradients):
    """The weights after a step for each list of gradients."""
    weights = [torch.nn.Parameter(w.clone()) for w in start]
    optimizer = make(weights)
    for step_gradients in gradients:
        for weight, gradient in zip(weights, step_gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return [weight.detach() for weight in weights]


def drawn(n_steps=9, dtype=torch.float64):
    """Starts and gradients of a matrix and a vector."""
    generator = torch.Generator().manual_seed(0)
    draw = [[torch.randn(s, generator=generator, dtype=dtype) for s in ((5, 3), (7,))] for _ in range(n_steps + 1)]
    return draw[0], draw[1:]


def plain_lion(start, gradients, lr, betas, decay):
    """Lion as its paper writes it (Chen et al. 2023, algorithm 2), a weight at a time."""
    weights, means = [w.clone() for w in start], [torch.zeros_like(w) for w in start]
    for step_gradients in gradients:
        for i, g in enumerate(step_gradients):
            update = torch.sign(betas[0] * means[i] + (1 - betas[0]) * g)
            weights[i] = weights[i] - lr * (update + decay * weights[i])
            means[i] = betas[1] * means[i] + (1 - betas[1]) * g
    return weights


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lion_is_its_plain_twin(decay):
    start, gradients = drawn()
    found = stepped(lambda w: Lion(w, 0.01, (0.9, 0.97), decay), start, gradients)
    for weight, twin in zip(found, plain_lion(start, gradients, 0.01, (0.9, 0.97), decay), strict=True):
        torch.testing.assert_close(weight, twin, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_to_the_bit(momentum):
    start, gradients = drawn(dtype=torch.float32)
    found = stepped(lambda w: SGD(w, 0.01, momentum), start, gradients)
    theirs = stepped(lambda w: torch.optim.SGD(w, 0.01, momentum, nesterov=momentum > 0), start, gradients)
    assert all(torch.equal(a, b) for a, b in zip(found, theirs, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found, start, strict=True))


def test_the_decay_of_sgd_stays_out_of_its_momentum():
    """Decoupled, as in the other optimizers: torch's own adds it to the gradient."""
    start, gradients = drawn()
    found = stepped(lambda w: SGD(w, 0.01, 0.9, weight_decay=0.3), start, gradients)
    weights, buffers = [w.clone() for w in start], [torch.zeros_like(w) for w in start]
    for step_gradients in gradients:
        for i, g in enumerate(step_gradients):
            buffers[i] = 0.9 * buffers[i] + g
            weights[i] = weights[i] - 0.01 * 0.3 * weights[i] - 0.01 * (g + 0.9 * buffers[i])
    for weight, twin in zip(found, weights, strict=True):
        torch.testing.assert_close(weight, twin, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [lambda w: Lion(w, 0.1, (0.9, 0.9), 0.5), lambda w: SGD(w, 0.1, 0.9, 0.5)])
def test_lion_and_sgd_leave_a_weight_without_gradient(make):
    weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    weights[0].grad = torch.ones(4)
    make(weights).step()
    assert torch.equal(weights[1], torch.ones(4)) and not torch.equal(weights[0], torch.ones(4))


def test_training_starts_without_importing_the_compiler():
    code = f"""
import sys, torch
from kobza.config import ModelConfig, TrainConfig
from kobza.model import build
from kobza.optim import make_optimizers
for optimizer in {OPTIMIZERS}:
    model = build(ModelConfig(vocab_size=9, n_layer=1, n_embd=8, n_head=2))
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer))
    model(torch.zeros((1, 4), dtype=torch.long)).sum().backward()
    [(o.step(), o.zero_grad()) for o in optimizers]
assert 'torch._dynamo' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_skeleton_is_built_where_no_part_is_named(monkeypatch):
    """On the meta device torch imports the compiler, 1.4 s before the first step of every run."""
    from kobza.config import RunConfig
    from kobza.device import make_runtime
    from kobza.recipes import train as recipe

    monkeypatch.setattr(recipe, "GPT", None)
    recipe.check_parts(RunConfig(), make_runtime("cpu", "fp32"))
    with pytest.raises(TypeError):
        recipe.check_parts(RunConfig(train=TrainConfig(freeze="embed")), make_runtime("cpu", "fp32"))

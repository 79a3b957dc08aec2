"""Adapters: at first they change nothing, merged they are what they were wrapped, and what cannot be is refused in a line."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kobza.config import InputError, ModelConfig, TrainConfig
from kobza.finetune.config import MethodConfig
from kobza.finetune.lora import (
    LoraLinear,
    adapter_tensors,
    adapters,
    add_lora,
    choose_weights,
    fill_adapter,
    freeze_base,
    without_adapter,
)
from kobza.finetune.merge import dequantised, merge
from kobza.finetune.rates import check_rates
from kobza.layers import Linear
from kobza.model import build
from kobza.optim import make_optimizers, rated_groups
from kobza.surgery import compute_in_float32, replace_modules
from kobza.train import next_token_loss, train_step

CONFIG = ModelConfig(
    vocab_size=37, max_seq_len=24, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_ff=48, mlp="swiglu", qkv_bias=True,
    init="torch",
)  # fmt: skip
GEMMA = replace(CONFIG, embed_scale=32**0.5, norm_offset=True, norm_cast="after", tied=True, qkv_bias=False)
GPT2 = replace(CONFIG, position="learned", norm="layernorm", mlp="gelu_tanh", bias=True, qkv_bias=False, qk_norm=False)
KINDS = {
    "lora": MethodConfig(rank=4, alpha=6.0),
    "rslora": MethodConfig(rank=4, alpha=6.0, rslora=True),
    "dora": MethodConfig(rank=4, alpha=6.0, dora=True),
    "all": MethodConfig(rank=3, alpha=9.0, rslora=True, dora=True, targets="*_proj,lm_head"),
}
ADAMW = TrainConfig(optimizer="adamw")
IDS = torch.randint(37, (3, 20), generator=torch.Generator().manual_seed(0))


def tuned(config=CONFIG, method=KINDS["lora"], dtype=torch.float32, size=0.1):
    """A model whose adapter has learned something."""
    model = build(config, seed=1).to(dtype).eval()
    add_lora(model, method, seed=2)
    move(model, size)
    return model


def move(model, size=0.1):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_tensors(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=size)


def log_probs(model, dtype=None):
    with torch.no_grad():
        return model(IDS, dtype=dtype).double().log_softmax(-1)


# ---- an adapter changes nothing at first ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, GEMMA, GPT2], ids=["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_no_bit(config, kind):
    method = replace(KINDS[kind], targets="*_proj") if config.tied else KINDS[kind]
    model = build(config, seed=1).eval()
    before = model(IDS)
    names = add_lora(model, method, seed=0)
    after = model(IDS)
    assert torch.equal(before, after) and any(name.endswith("q_proj") for name in names)
    (after.square().sum()).backward()
    moved = {name.rpartition(".")[2] for name, p in adapter_tensors(model).items() if p.grad.abs().sum() > 0}
    assert moved == {"lora_b", "magnitude"} - (set() if method.dora else {"magnitude"})  # A's gradient is B's values: 0
    move(model)
    assert not torch.equal(model(IDS), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [CONFIG, GEMMA, GPT2], ids=["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_frozen_matrices_in_the_compute_dtype_change_no_bit(config, kind, dtype):
    model = tuned(config, KINDS[kind])
    before = model(IDS, dtype=dtype)
    kept = freeze_base(model, dtype)
    assert torch.equal(model(IDS, dtype=dtype), before)
    stored = {name for name, p in model.named_parameters() if p.dtype == dtype}
    assert stored == set(kept) and "blocks.0.attn.q_proj.base.weight" in stored
    assert ("embed.weight" in stored) == (config.position == "rope")  # a position is added before the cast
    assert all(p.dtype == torch.float32 for p in adapter_tensors(model).values())


def test_a_fresh_dora_in_bf16_is_the_base_to_the_bit():
    """Lengths taken before the rows were rounded are theirs within bf16."""
    model = build(CONFIG, seed=1).eval()
    before = model(IDS, dtype=torch.bfloat16)
    add_lora(model, KINDS["dora"], seed=0)
    freeze_base(model, torch.bfloat16)
    assert torch.equal(model(IDS, dtype=torch.bfloat16), before)


@pytest.mark.parametrize(
    ("method", "scale"),
    [(KINDS["lora"], 1.5), (KINDS["rslora"], 3.0), (MethodConfig(rank=16, alpha=32.0, targets="q_proj"), 2.0)],
)
def test_the_scale_is_alpha_over_the_rank_or_its_root(method, scale):
    model = build(CONFIG)
    add_lora(model, method, seed=0)
    assert {module.scale for module in adapters(model).values()} == {scale}


def test_doras_lengths_are_constants_to_the_gradient():
    """As in section 4.3 of the paper: |W + s B A| is computed anew and not differentiated."""
    lora = tuned(method=KINDS["dora"]).blocks[0].attn.q_proj
    x, upstream = torch.randn(5, 32, dtype=torch.float64), torch.randn(5, 32, dtype=torch.float64)
    lora.double()(x).backward(upstream)
    found = {name: p.grad.clone() for name, p in lora.named_parameters() if p.requires_grad}
    a, b, m = (p.detach().requires_grad_() for p in (lora.lora_a, lora.lora_b, lora.magnitude))
    weight = lora.base.weight + lora.scale * b @ a
    y = x @ (m / weight.norm(dim=1).detach())[:, None].mul(weight).T + lora.base.bias
    wanted = torch.autograd.grad(y, (a, b, m), upstream)
    for name, gradient in zip(("lora_a", "lora_b", "magnitude"), wanted, strict=True):
        assert float((found[name] - gradient).abs().max()) < 1e-12, name


def test_frozen_matrices_in_bf16_change_no_bit_of_a_gradient():
    def gradients(stored):
        model = tuned(method=KINDS["dora"])
        freeze_base(model, torch.bfloat16) if stored else None
        next_token_loss(torch.bfloat16)(model, (IDS[:, :-1], IDS[:, 1:]))[0].backward()
        return {name: p.grad for name, p in adapter_tensors(model).items()}

    kept, cast = gradients(True), gradients(False)
    assert all(torch.equal(kept[name], cast[name]) for name in cast) and all(g.any() for g in cast.values())


def test_a_row_of_zeros_has_a_direction_to_learn():
    """Blocks begin at zero in kobza's own models: DoRA divides by the length of such rows."""
    model = build(replace(CONFIG, init="zero"), seed=1)
    with torch.no_grad():
        model.lm_head.weight.normal_()
    before = model(IDS)
    add_lora(model, KINDS["dora"], seed=0)
    assert torch.equal(model(IDS), before)
    optimizers = make_optimizers(model, ADAMW)
    for _ in range(3):
        assert train_step(model, optimizers, [(IDS[:, :-1], IDS[:, 1:])], next_token_loss())[1] > 0
    merged = log_probs(model)
    assert bool(merged.isfinite().all()) and not torch.equal(model(IDS), before)
    merge(model)
    assert float((log_probs(model) - merged).abs().max()) < 1e-5


def test_modules_that_compute_in_float32_keep_their_weights_wide():
    model = tuned()
    compute_in_float32(model, "blocks.0.mlp")
    before = model(IDS, dtype=torch.bfloat16)
    kept = freeze_base(model, torch.bfloat16)
    assert torch.equal(model(IDS, dtype=torch.bfloat16), before)
    assert not any(name.startswith("blocks.0.mlp.") for name in kept) and any("blocks.0.attn" in name for name in kept)


def test_dropout_acts_on_the_adapter_alone_and_only_while_training():
    model = tuned(method=replace(KINDS["lora"], dropout=0.5))
    assert torch.equal(model(IDS), model(IDS))
    quiet = model(IDS)
    model.train()
    assert not torch.equal(model(IDS), quiet)
    with without_adapter(model):
        assert torch.equal(model(IDS), model(IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_adapter_a_model_is_its_base(kind):
    model, base = tuned(method=KINDS[kind]), build(CONFIG, seed=1).eval()
    tuned_logits = model(IDS)
    with without_adapter(model):
        with without_adapter(model):
            assert torch.equal(model(IDS), base(IDS))
        assert torch.equal(model(IDS), base(IDS))
    with pytest.raises(KeyError), without_adapter(model):
        raise KeyError
    assert torch.equal(model(IDS), tuned_logits) and not torch.equal(tuned_logits, base(IDS))


def test_a_table_that_learns_is_no_reference():
    model = build(CONFIG)
    add_lora(model, MethodConfig(rank=2, embeddings=True), seed=0)
    with pytest.raises(InputError, match="embed.weight learns"), without_adapter(model):
        pass


# ---- what learns ---------------------------------------------------------------------------------------------------


def test_only_the_adapter_learns():
    model = build(CONFIG, seed=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    add_lora(model, MethodConfig(rank=2, embeddings=True, dora=True, targets="q_proj,blocks.1.mlp.*"), seed=0)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    ends = ("lora_a", "lora_b", "magnitude")
    wrapped = [f"blocks.{i}.attn.q_proj" for i in (0, 1)] + [f"blocks.1.mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert learning == {f"{name}.{end}" for name in wrapped for end in ends} | {"embed.weight", "lm_head.weight"}
    assert set(adapter_tensors(model)) == learning
    optimizers = make_optimizers(model, TrainConfig(optimizer="adamw", weight_decay=0.1))
    for _ in range(2):
        train_step(model, optimizers, [(IDS[:, :-1], IDS[:, 1:])], next_token_loss())
    for name, parameter in model.named_parameters():
        plain = name.replace(".base.", ".")
        assert name in learning or torch.equal(parameter, before[plain]), name
    assert all(not torch.equal(p, torch.zeros_like(p)) for p in adapter_tensors(model).values())
    assert not torch.equal(model.embed.weight, before["embed.weight"])


@pytest.mark.parametrize(
    ("method", "config", "learns"),
    [
        (MethodConfig("full"), CONFIG, lambda name: True),
        (MethodConfig("head"), CONFIG, lambda name: name in ("embed.weight", "lm_head.weight")),
        (MethodConfig("head"), GEMMA, lambda name: name == "embed.weight"),
        (KINDS["lora"], CONFIG, lambda name: "lora_" in name),
    ],
)
def test_a_method_says_what_learns(method, config, learns):
    model = build(config)
    learning = choose_weights(model, method, seed=0)
    assert learning == [name for name, p in model.named_parameters() if p.requires_grad]
    assert learning == [name for name, _ in model.named_parameters() if learns(name)] and learning


def test_the_seed_draws_the_factors():
    def drawn(seed):
        model = build(CONFIG)
        add_lora(model, KINDS["lora"], seed)
        return adapter_tensors(model)

    a, b, c = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(a[name], c[name]) == name.endswith("lora_b") for name in a)
    bound = 32**-0.5  # kaiming-uniform with a = sqrt(5), as PEFT draws
    q = a["blocks.0.attn.q_proj.lora_a"].detach()
    assert 0.9 * bound < float(q.abs().max()) <= bound and abs(float(q.std()) - bound / 3**0.5) < 0.1 * bound


@pytest.mark.parametrize(
    ("method", "config", "told"),
    [
        (MethodConfig(targets="q_porj"), CONFIG, "--targets 'q_porj' matches no linear module.*q_proj"),
        (MethodConfig(targets="norm"), CONFIG, "--targets 'norm' matches no linear module"),
        (MethodConfig(targets="q_proj,"), CONFIG, "--targets 'q_proj,' has an empty pattern"),
        (MethodConfig(targets="blocks.7.*"), CONFIG, "'blocks.7.*' matches no linear module"),
        (MethodConfig(rank=17, targets="k_proj"), CONFIG, "--rank is 17.*k_proj.* 32 -> 16; take 16 or less"),
        (MethodConfig(rank=4, targets="lm_head"), GEMMA, "the head is the token table"),
        (MethodConfig(rank=4, targets="lm_head", embeddings=True), CONFIG, "--embeddings learns lm_head whole"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused(method, config, told):
    model = build(config)
    with pytest.raises(InputError, match=told) as error:
        add_lora(model, method, seed=0)
    assert "\n" not in str(error.value)
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_is_refused():
    model = tuned()
    with pytest.raises(InputError, match="has an adapter already"):
        add_lora(model, KINDS["lora"], seed=0)


def test_a_saved_adapter_is_put_back_whole_or_refused():
    model, other = tuned(), build(CONFIG, seed=1)
    add_lora(other, KINDS["lora"], seed=9)
    tensors = {name: p.detach().clone() for name, p in adapter_tensors(model).items()}
    fill_adapter(other.eval(), tensors, "step 3")
    assert torch.equal(other(IDS), model(IDS))
    name, tensor = next(iter(tensors.items()))
    with pytest.raises(InputError, match=f"step 3: .*missing {name}"):
        fill_adapter(other, {k: v for k, v in tensors.items() if k != name}, "step 3")
    with pytest.raises(InputError, match="unexpected x"):
        fill_adapter(other, tensors | {"x": tensor}, "step 3")
    with pytest.raises(InputError, match=r"is \(32, 4\) where the model wants \(4, 32\)"):
        fill_adapter(other, tensors | {name: tensor.T}, "step 3")


# ---- merged is wrapped ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_wrapped_in_float64(config, kind):
    model = tuned(config, KINDS[kind], torch.float64)
    before = log_probs(model)
    report = merge(model, torch.float64)
    assert float((log_probs(model) - before).abs().max()) < 1e-12
    assert (
        float((log_probs(build(config, seed=1).double()) - before).abs().max()) > 1e-3
    )  # and not because nothing changed
    assert [name for name, _ in model.named_modules()] == [name for name, _ in build(config).named_modules()]
    assert {n: (type(m), m.training) for n, m in model.named_modules()} == {
        n: (type(m), m.training) for n, m in build(config).eval().named_modules()
    }
    assert all(p.requires_grad for p in model.parameters())
    assert len(report.modules) == 2 * (7 if config is CONFIG else 6) + (kind == "all")


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_wrapped_within_rounding(kind):
    """Measured: 6e-7 in float32; merged in bf16 is as near to the truth as wrapped in bf16 (0.75 to 1.01 times its error)."""
    truth = log_probs(tuned(method=KINDS[kind]).double())
    model = tuned(method=KINDS[kind])
    wrapped, coarse = log_probs(model), log_probs(model, torch.bfloat16)
    merge(model, torch.float32)
    assert float((log_probs(model) - wrapped).abs().max()) < 1e-5
    model = tuned(method=KINDS[kind])
    merge(model, torch.bfloat16)
    error, allowed = ((x - truth).square().mean().sqrt() for x in (log_probs(model, torch.bfloat16), coarse))
    assert 0 < float(error) < 1.5 * float(allowed) < 0.1


@given(st.data())
def test_merged_is_wrapped_for_any_shape_rank_and_scale(data):
    n_in, n_out = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    rank, dora = data.draw(st.integers(1, min(n_in, n_out))), data.draw(st.booleans())
    scale, bias = data.draw(st.floats(0.01, 50)), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    base = Linear(n_in, n_out, bias=bias).double()
    lora = LoraLinear(base, rank, scale, 0.0, dora).double()
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(5, n_in, generator=generator, dtype=torch.float64)
    model = torch.nn.Sequential(lora)
    before = model(x).detach()
    merge(model, torch.float64)
    assert type(model[0]) is Linear
    assert float((model(x).detach() - before).abs().max()) <= 1e-11 * max(1.0, float(before.abs().max()))


def test_the_report_measures_the_change_and_what_rounding_costs():
    model = tuned(size=0.01)
    weight, module = model.blocks[0].attn.q_proj.base.weight.clone(), model.blocks[0].attn.q_proj
    delta = module.scale * module.lora_b.detach() @ module.lora_a.detach()
    before = log_probs(model)
    report = merge(model, torch.bfloat16, log_probs)
    after = log_probs(model)
    first = next(m for m in report.modules if m.name == "blocks.0.attn.q_proj")
    assert first.change == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
    rounded = (weight + delta).bfloat16().float()
    assert first.lost == pytest.approx(float((rounded - weight - delta).norm() / delta.norm()), rel=1e-3)
    assert torch.equal(model.blocks[0].attn.q_proj.weight, rounded) and 0.001 < first.lost < 1
    assert report.largest == pytest.approx(float((after - before).abs().max()), rel=1e-6) and report.largest > 0
    assert report.mean == pytest.approx(float((after - before).abs().mean()), rel=1e-6)
    assert max(m.lost for m in merge(tuned(size=0.01), torch.float32).modules) < 1e-4 < first.lost


def test_a_merge_in_the_middle_of_training_measures_without_dropout():
    model = tuned(method=replace(KINDS["lora"], dropout=0.5)).train()
    report = merge(model, torch.float32, log_probs)
    assert report.largest < 1e-5 and model.training


def test_merging_again_is_refused():
    model = tuned()
    merge(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(InputError, match="no adapter.*merged already"):
        merge(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_factor_that_is_not_a_number_is_refused_before_anything_changes():
    model = tuned()
    with torch.no_grad():
        model.blocks[1].mlp.up_proj.lora_b[3, 1] = float("nan")
    with pytest.raises(InputError, match=r"blocks.1.mlp.up_proj.*not a finite number"):
        merge(model)
    assert isinstance(model.blocks[0].attn.q_proj, LoraLinear)


def test_a_merged_weight_beyond_the_format_is_refused():
    model = tuned(size=300.0)
    with pytest.raises(
        InputError, match=r"blocks.*a merged weight of \S+ is beyond torch.float16; take torch.bfloat16"
    ):
        merge(model, torch.float16)
    merge(tuned(size=300.0), torch.bfloat16)


class Coarse(torch.nn.Module):
    """Stands for a base in 4 bits: its weight is made when it is asked for."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer("codes", (linear.weight.detach() * 32).round().to(torch.int8))

    @property
    def weight(self):
        return self.codes.float() / 32

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def test_a_merge_onto_4_bits_is_refused_and_one_beside_it_is_not():
    model = build(CONFIG, seed=1).eval()
    plain = {name: module.weight.detach().clone() for name, module in model.named_modules() if name.endswith("_proj")}
    replace_modules(model, lambda name, module: name.endswith("_proj"), Coarse)
    add_lora(model, replace(KINDS["dora"], targets="q_proj,up_proj"), seed=2)
    move(model)
    before = log_probs(model)
    with pytest.raises(InputError, match="4 bits.*16-bit"):
        merge(model)
    with pytest.raises(InputError, match="no weight for blocks.0.attn.k_proj"):
        merge(model, weights={name: w for name, w in plain.items() if not name.endswith("k_proj")})
    with pytest.raises(InputError, match=r"blocks.0.attn.q_proj is \(3, 3\).*\(32, 32\)"):
        merge(model, weights=plain | {"blocks.0.attn.q_proj": torch.zeros(3, 3)})
    merge(model, weights=dequantised(model))
    assert float((log_probs(model) - before).abs().max()) < 1e-5
    assert [name for name, _ in model.named_modules()] == [name for name, _ in build(CONFIG).named_modules()]
    assert type(model.blocks[0].attn.k_proj) is Linear


# ---- rates ---------------------------------------------------------------------------------------------------------


def test_an_adapter_is_in_the_groups_of_its_block():
    model = build(CONFIG)
    add_lora(model, MethodConfig(rank=2, dora=True, embeddings=True), seed=0)
    config = TrainConfig(optimizer="adamw", lr=1e-3, embed_lr=1e-4, head_lr=1e-5, layer_lr_decay=0.5, weight_decay=0.1)
    rates = {
        id(p): group["lr"] for kind in rated_groups(model, config).values() for group in kind for p in group["params"]
    }
    decays = {
        id(p): g["weight_decay"] for kind in rated_groups(model, config).values() for g in kind for p in g["params"]
    }
    assert set(rates) == {id(p) for p in adapter_tensors(model).values()}
    q = [block.attn.q_proj for block in model.blocks]
    assert [rates[id(m.lora_a)] for m in q] == [rates[id(m.lora_b)] for m in q] == [5e-4, 1e-3]
    assert rates[id(model.embed.weight)] == 1e-4 and rates[id(model.lm_head.weight)] == 1e-5
    assert decays[id(q[0].lora_a)] == 0.1 and decays[id(q[0].magnitude)] == 0


@pytest.mark.parametrize(
    ("method", "train", "told"),
    [
        (KINDS["lora"], replace(ADAMW, head_lr=1e-3), "train.head_lr has no effect.*--embeddings"),
        (KINDS["lora"], replace(ADAMW, embed_lr=1e-3), "train.embed_lr has no effect.*--embeddings"),
        (KINDS["lora"], replace(ADAMW, embed_weight_decay=0.1), "train.embed_weight_decay has no effect"),
        (KINDS["lora"], replace(ADAMW, freeze="embed"), "train.freeze has no effect"),
        (MethodConfig("head"), replace(ADAMW, layer_lr_decay=0.9), "train.layer_lr_decay 0.9 has no effect"),
        (MethodConfig("head"), TrainConfig(), "optimizer muon has no effect"),
        (MethodConfig(eight_bit=True), TrainConfig(optimizer="lion"), "--eight-bit.*adamw"),
    ],
)
def test_rates_without_effect_are_refused(method, train, told):
    model = build(CONFIG)
    choose_weights(model, method, seed=0)
    with pytest.raises(InputError, match=told) as error:
        check_rates(model, method, train)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "train"),
    [
        (KINDS["lora"], ADAMW),
        (KINDS["all"], replace(ADAMW, head_lr=1e-3, embed_weight_decay=0.1)),
        (replace(KINDS["lora"], embeddings=True), replace(ADAMW, embed_lr=1e-3, head_lr=1e-3)),
        (MethodConfig("full"), replace(TrainConfig(), freeze="embed", layer_lr_decay=0.9)),
        (MethodConfig("head"), replace(ADAMW, embed_lr=1e-3)),
        (MethodConfig(eight_bit=True), ADAMW),
    ],
)
def test_rates_with_effect_are_not(method, train):
    model = build(CONFIG)
    choose_weights(model, method, seed=0)
    check_rates(model, method, train)

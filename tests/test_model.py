"""BLOCK 2: the same function computed two ways, wherever there are two ways."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kobza.config import InputError, ModelConfig, preset, run_from_dict
from kobza.describe.parts import parts, total_parameters
from kobza.generate import KVCache, decode, prefill
from kobza.layers import Embedding, LayerNorm, RMSNorm, rms_norm, rope_angles, rotate
from kobza.model import GPT, attend, build, n_parameters, training_flops_per_token
from kobza.train import next_token_loss

GPT2 = dict(position="learned", norm="layernorm", qk_norm=False, mlp="gelu_tanh", bias=True, tied=True, init="gpt2")
LLAMA = dict(qk_norm=False, mlp="swiglu", n_kv_head=2, init="gpt2")
MODERN = dict(n_kv_head=1, softcap=15.0)
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "modern": MODERN}

each_family = pytest.mark.parametrize("switches", FAMILIES.values(), ids=FAMILIES)


def model_of(switches, seed=0, **more):
    """A small model in eval mode whose every weight, also biases and norms, is drawn and so has an effect."""
    defaults = dict(vocab_size=17, max_seq_len=16, n_layer=2, n_head=4, n_embd=32)
    model = build(ModelConfig(**(defaults | switches | more))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(is_norm + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def some_ids(batch, length, seed=0):
    return torch.randint(17, (batch, length), generator=torch.Generator().manual_seed(seed))


def new_cache(model, batch=2):
    return KVCache(model.config, batch, torch.device("cpu"), torch.float32)


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- the cache ----


@each_family
@pytest.mark.parametrize("chunks", [[16], [1] * 16, [5, 1, 7, 3], [15, 1], [2, 14]], ids=str)
@torch.no_grad()
def test_cached_equals_uncached(switches, chunks):
    """Prefill whole, token by token, and in uneven chunks; learned positions and rope; GQA."""
    model, ids = model_of(switches), some_ids(2, 16)
    cache, parts_ = new_cache(model), []
    for part in ids.split(chunks, dim=1):
        parts_.append(model(part, cache=cache))
    assert cache.length == 16
    close(torch.cat(parts_, dim=1), model(ids))


@each_family
@torch.no_grad()
def test_padded_rows_equal_rows_alone(switches):
    """Prompts of unequal length side by side, through the prompt and three more tokens."""
    model = model_of(switches)
    rows = [some_ids(1, n, seed=n)[0].tolist() for n in (9, 1, 5)]
    cache, logits = prefill(model, rows)
    singles = [prefill(model, [row]) for row in rows]
    close(logits, torch.cat([single for _, single in singles]))
    for new in some_ids(3, 3).T.tolist():
        logits = decode(model, cache, new)
        close(logits, torch.cat([decode(model, c, [i]) for (c, _), i in zip(singles, new, strict=True)]))


@torch.no_grad()
def test_a_given_mask_takes_the_place_of_the_causal_one():
    model, ids = model_of(LLAMA), some_ids(2, 8)
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    close(model(ids, mask=causal), model(ids))
    two_texts = causal & (torch.arange(8) // 5 == torch.arange(8)[:, None] // 5)  # 5 tokens, then 3, packed in a row
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    packed = model(ids, positions, mask=two_texts)
    close(packed, torch.cat((model(ids[:, :5]), model(ids[:, 5:])), dim=1))


# ---- causality ----


@each_family
@pytest.mark.parametrize("place", [0, 7, 15])
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(switches, place):
    model, ids = model_of(switches), some_ids(2, 16)
    changed = ids.clone()
    changed[:, place] = (changed[:, place] + 1) % 17
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place:], after[:, place:])


@each_family
def test_gradients_do_not_flow_from_the_future(switches):
    model = model_of(switches)
    seen = []
    hook = model.embed.register_forward_hook(lambda _m, _i, out: seen.append(out.retain_grad() or out))
    model(some_ids(1, 8))[0, 4].sum().backward()
    hook.remove()
    by_place = seen[0].grad[0].abs().sum(-1)
    assert (by_place[:5] > 0).all() and (by_place[5:] == 0).all()


# ---- parts against plain twins ----


def plain_attention(q, k, v, visible):
    """softmax(q k^T / sqrt(D)) v with the heads of k and v repeated, step by step."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, float("-inf"))
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return weights @ v


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 5, 33])
def test_attend_is_the_plain_softmax(kv_heads, length):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, length, 10), (2, kv_heads, length, 10), (2, kv_heads, length, 10)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    ragged = causal & (torch.arange(length) != 2) | torch.eye(length, dtype=torch.bool)
    assert (attend(q, k, v, None, True, 0.0) - plain_attention(q, k, v, causal)).abs().max() < 1e-12
    assert (attend(q, k, v, ragged, False, 0.0) - plain_attention(q, k, v, ragged)).abs().max() < 1e-12


def rotated(x, places, theta=10_000.0):
    """rotate() of x (T, D) at some places."""
    angles = rope_angles(1000, x.shape[-1], theta)[places]
    return rotate(x[None, None], angles.cos(), angles.sin())[0, 0]


def test_rotate_keeps_norms_and_turns_pairs():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    y = rotated(x, torch.arange(0, 500, 10))
    close(y.norm(dim=-1), x.norm(dim=-1))
    pairs = torch.complex(x[:, :4].double(), x[:, 4:].double())  # (x[i], x[i + D/2]) as a complex number
    angles = torch.arange(0, 500, 10).double()[:, None] * 10_000 ** (-torch.arange(4).double() / 4)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    close(y, torch.cat((turned.real, turned.imag), dim=-1).float(), 1e-4)


@given(
    q_place=st.integers(0, 400), k_place=st.integers(0, 400), shift=st.integers(0, 500), theta=st.sampled_from([1e2, 1e4, 5e5])
)  # fmt: skip
def test_rotated_products_know_only_the_distance(q_place, k_place, shift, theta):
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))
    here = (rotated(q, [q_place], theta) * rotated(k, [k_place], theta)).sum()
    there = (rotated(q, [q_place + shift], theta) * rotated(k, [k_place + shift], theta)).sum()
    close(here, there, 2e-3)


def test_rotation_is_felt():
    q = torch.ones(1, 16)
    assert not torch.allclose(rotated(q, [3]), rotated(q, [4]), atol=1e-2)


@pytest.mark.parametrize("width, released", [(3072, 55.5), (2048, 45.25), (2304, 48.0), (3584, 59.75), (5376, 73.5)])
def test_the_scale_of_an_embedding_is_rounded_to_the_dtype(width, released):
    """As Gemma was released; a Python float would stay 55.4256 and round only the product."""
    table = Embedding(3, 1, width**0.5)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[1.0], [0.9921875], [3.0]]))  # bf16 numbers
        ids = torch.arange(3)
        expected = table.weight.bfloat16() * torch.tensor(released).bfloat16()
        assert torch.equal(table(ids, torch.bfloat16), expected)
        assert float(table(ids)[0]) == pytest.approx(width**0.5, rel=1e-7)  # float32 keeps it
        assert torch.equal(table.bfloat16()(ids), expected)


def test_the_1_of_gemmas_norm_is_added_in_float32():
    """1 + w has no bits left for a small w in bfloat16: 1 + 0.0039 would be 1."""
    norm = RMSNorm(8, 1e-6, offset=1.0, cast_late=True)
    with torch.no_grad():
        norm.weight.fill_(2.0**-8)
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
        wide = norm(x.float())
        error = (norm.bfloat16()(x).float() - wide).abs().max() / wide.abs().max()
    assert error < 2.0**-8  # one rounding of the output


def test_norms_are_their_formulas():
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)) * 5 + 1
    close(rms_norm(x, 1e-5), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    close(rms_norm(torch.tensor([3.0, 4.0]), 0.0), torch.tensor([0.8485, 1.1314]), 1e-3)  # the docstring's example
    norm = model_of(GPT2).norm
    assert isinstance(norm, LayerNorm)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 5 + 1
    centred = x - x.mean(-1, keepdim=True)
    plain = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    close(norm(x), plain * norm.weight + norm.bias)


@each_family
@torch.no_grad()
def test_the_whole_forward_is_its_equations(switches):
    """The network written once more, plainly, from the config's words."""
    model, ids = model_of(switches), some_ids(2, 9)
    c, T = model.config, 9

    def normed(norm, x):
        if c.norm == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * norm.weight
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * norm.weight + norm.bias

    def linear(layer, x):
        return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    def heads(x):
        x = x.view(2, T, -1, c.head_dim).transpose(1, 2)
        return x

    def tuned(x):  # queries and keys only
        x = x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() if c.qk_norm else x
        if c.position == "learned":
            return x
        angles = torch.arange(T)[:, None] * c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        left, right = x.chunk(2, -1)
        turned = (left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin())
        return torch.cat(turned, -1)

    x = model.embed.weight[ids] + (model.position.weight[:T] if c.position == "learned" else 0)
    for block in model.blocks:
        h, a, m = normed(block.attn_norm, x), block.attn, block.mlp
        q, k, v = tuned(heads(linear(a.q_proj, h))), tuned(heads(linear(a.k_proj, h))), heads(linear(a.v_proj, h))
        y = plain_attention(q, k, v, torch.ones(T, T, dtype=torch.bool).tril())
        x = x + linear(a.o_proj, y.transpose(1, 2).reshape(2, T, -1))
        h = normed(block.mlp_norm, x)
        u = linear(m.up_proj, h)
        if c.mlp == "swiglu":
            gate = linear(m.gate_proj, h)
            u = gate * gate.sigmoid() * u
        elif c.mlp == "relu2":
            u = u.clamp(min=0) ** 2
        else:
            u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear(m.down_proj, u)
    logits = normed(model.norm, x) @ model.lm_head.weight.T
    close(model(ids), c.softcap * torch.tanh(logits / c.softcap) if c.softcap else logits, 1e-4)


@torch.no_grad()
def test_gqa_equals_mha_with_repeated_heads():
    grouped = model_of(LLAMA)
    full = model_of(LLAMA, n_kv_head=4)
    weights = grouped.state_dict()
    for name in [n for n in weights if "k_proj" in n or "v_proj" in n]:
        by_head = weights[name].view(2, 8, 32)  # (K, D, C)
        weights[name] = by_head.repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(weights)
    close(full(some_ids(2, 16)), grouped(some_ids(2, 16)))


@each_family
@torch.no_grad()
def test_bf16_is_close_to_float32(switches):
    model, ids = model_of(switches), some_ids(4, 16)
    exact, rough = model(ids), model(ids, dtype=torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    error = (rough.float() - exact).norm() / exact.norm()
    assert 0 < error < 0.05  # 8 bits of mantissa through two blocks; 0 would mean that nothing was cast


# ---- counts ----

sizes = st.builds(
    lambda heads, groups, half_dim, extra, **rest: ModelConfig(
        n_head=heads * groups,
        n_kv_head=heads,
        n_embd=2 * half_dim * heads * groups,
        head_dim=2 * half_dim + 2 * extra,
        **rest,
    ),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    half_dim=st.integers(1, 4),
    extra=st.integers(0, 2),
    vocab_size=st.integers(1, 40),
    max_seq_len=st.integers(1, 20),
    n_layer=st.integers(1, 3),
    n_ff=st.integers(0, 30),
    position=st.sampled_from(["rope", "learned"]),
    norm=st.sampled_from(["rmsnorm", "layernorm"]),
    norm_weight=st.booleans(),
    qk_norm=st.booleans(),
    mlp=st.sampled_from(["relu2", "swiglu", "gelu", "gelu_tanh"]),
    bias=st.booleans(),
    tied=st.booleans(),
    init=st.sampled_from(["zero", "gpt2", "xavier"]),
    softcap=st.sampled_from([0.0, 10.0]),
)


@given(sizes)
@settings(max_examples=100)
def test_counts_by_equation_are_those_of_the_built_model(config):
    model = GPT(config)
    assert total_parameters(config) == n_parameters(model) == sum(p.numel() for p in set(model.parameters()))
    assert 3 * sum(part.flops_per_token for part in parts(config)) == training_flops_per_token(model)


@given(sizes)
@settings(max_examples=25)
def test_every_config_runs_and_starts_finite(config):
    model = build(config)
    ids = torch.zeros(2, config.max_seq_len, dtype=torch.int64)
    logits = model(ids)
    assert logits.shape == (2, config.max_seq_len, config.vocab_size)
    logits.sum().backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


def test_making_a_model_draws_nothing_from_the_global_generator():
    """So dropout's masks depend on the seed alone. On the meta device torch's own draw takes seconds: it loads the compiler."""
    before = torch.get_rng_state()
    build(ModelConfig(vocab_size=17, position="learned", n_ahead=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_workshop_model_has_the_promised_numbers():
    """Issue 2: what is often quoted, 1.8M, is one layer of the six."""
    config = ModelConfig(**(run_from_dict(preset("workshop"), "workshop").model.__dict__ | {"vocab_size": 65}))
    rows = {part.name: part for part in parts(config)}
    assert rows["embedding"].weights == 24_960 and rows["positions"].weights == 98_304
    assert (rows["attention"].copies, rows["attention"].weights) == (6, 589_824)
    assert (rows["MLP"].copies, rows["MLP"].weights) == (6, 1_179_648)
    assert rows["attention"].vectors == 4 * 384 and rows["MLP"].vectors == 1536 + 384
    assert rows["head"].parameters == 0 and rows["head"].flops_per_token == 2 * 24_960
    with torch.device("meta"):
        assert 10.7e6 < n_parameters(GPT(config)) < 10.8e6
        attention = GPT(config).blocks[0].attn
    assert sum(p.numel() for p in attention.parameters() if p.ndim == 2) == 589_824


def test_tied_weights_are_one_tensor():
    tied, untied = model_of(GPT2), model_of(GPT2, tied=False)
    assert tied.lm_head.weight is tied.embed.weight and untied.lm_head.weight is not untied.embed.weight
    assert n_parameters(untied) - n_parameters(tied) == 17 * 32


# ---- the start ----


@pytest.mark.parametrize("vocab_size", [2, 65, 1000])
def test_zero_init_starts_at_ln_v(vocab_size):
    model = build(ModelConfig(vocab_size=vocab_size, n_embd=32, n_layer=2))
    ids = torch.arange(64).view(2, 32) % vocab_size
    loss, n = next_token_loss()(model, (ids, ids.roll(1)))
    assert float(loss.detach() / n) == pytest.approx(math.log(vocab_size), rel=1e-6)


@pytest.mark.parametrize("switches", [*FAMILIES.values(), MODERN | {"tied": True}], ids=[*FAMILIES, "modern, tied"])
def test_every_start_is_near_ln_v(switches):
    model = build(ModelConfig(**(dict(vocab_size=65, n_embd=64, n_layer=2, n_head=4) | switches)))
    ids = torch.randint(65, (8, 33), generator=torch.Generator().manual_seed(0))
    loss, n = next_token_loss()(model, (ids[:, :-1], ids[:, 1:]))
    assert float(loss.detach() / n) == pytest.approx(math.log(65), rel=0.1)


def test_with_zero_init_a_block_starts_as_the_identity():
    model = build(ModelConfig(vocab_size=17, n_embd=32, n_layer=3))
    x = torch.randn(2, 5, 32)
    views = model.views(torch.arange(5), None, 0, 5)
    assert torch.equal(model.blocks[1](x, views, None), x)


def test_the_seed_draws_the_weights():
    first, again, other = (dict(build(ModelConfig(vocab_size=17), seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


def test_gpt2_init_has_its_spreads():
    model = build(ModelConfig(vocab_size=300, n_embd=128, n_layer=8, n_ff=256, **GPT2))
    spreads = {"embed": 0.02, "blocks.0.attn.q_proj": 0.02, "blocks.0.mlp.up_proj": 0.02}
    spreads |= {f"blocks.{i}.{leaf}": 0.02 / 4 for i in (0, 7) for leaf in ("attn.o_proj", "mlp.down_proj")}
    for name, std in spreads.items():
        weight = model.get_submodule(name).weight.detach()
        assert float(weight.std()) == pytest.approx(std, rel=0.05) and abs(float(weight.mean())) < std / 10
    vectors = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    assert all(torch.equal(p, torch.full_like(p, float(name.endswith("weight")))) for name, p in vectors.items())


# ---- edges ----


@each_family
@pytest.mark.parametrize("batch, length", [(1, 1), (1, 16), (5, 1), (3, 15)])
def test_shapes_at_the_edges(switches, batch, length):
    model = model_of(switches)
    assert model(some_ids(batch, length)).shape == (batch, length, 17)
    assert model.hidden(some_ids(batch, length)).shape == (batch, length, 32)


@each_family
@torch.no_grad()
def test_a_sequence_longer_than_the_context_is_refused(switches):
    model = model_of(switches)
    with pytest.raises(InputError, match=r"17 tokens but max_seq_len is 16.*--model\.max_seq_len 17"):
        model(some_ids(1, 17))
    cache = new_cache(model)
    model(some_ids(2, 16), cache=cache)
    with pytest.raises(InputError, match="17 tokens"):
        model(some_ids(2, 1), cache=cache)


def test_without_a_vocabulary_there_is_no_model():
    with pytest.raises(InputError, match="model.vocab_size is 0"):
        GPT(ModelConfig())


def test_dropout_acts_in_training_only():
    model, ids = model_of(LLAMA, dropout=0.5), some_ids(2, 8)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_softcap_bounds_the_logits():
    loud = model_of(MODERN)
    with torch.no_grad():
        loud.lm_head.weight.mul_(100)
        assert 14 < loud(some_ids(2, 16)).abs().max() <= 15


def test_rotary_angles_stay_float32_whatever_the_model_is_cast_to():
    model = build(ModelConfig(vocab_size=5, n_layer=1, n_embd=16, n_head=2, max_seq_len=4096))
    before = model.rope.cos.clone()
    model.to(torch.bfloat16)
    assert model.blocks[0].attn.q_proj.weight.dtype == torch.bfloat16
    assert model.rope.cos.dtype == torch.float32 and torch.equal(model.rope.cos, before)
    assert torch.unique(model.rope.sin[:, 0]).numel() > 4000  # in bf16 257 of them

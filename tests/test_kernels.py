"""Each fused sub-layer equals its plain twin in float64, gradients too, and steps aside where it does not apply."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kobza.config import InputError, ModelConfig, SampleConfig
from kobza.generate import KVCache, generate
from kobza.kernels import fused as blocks
from kobza.kernels import packed
from kobza.model import attend_capped, build

PLAIN = {"norm": "layernorm", "qk_norm": False}
KINDS = [
    {"mlp": "relu2", "position": "rope"},
    {"mlp": "gelu", "position": "learned", "init": "gpt2"},
    {"mlp": "gelu_tanh", "position": "rope", "norm_weight": False},
]


def twins(**switches):
    """A float64 model with every weight disturbed, and its copy with fused blocks."""
    torch.manual_seed(0)
    plain = build(
        ModelConfig(vocab_size=11, n_layer=2, n_head=3, n_embd=24, n_ff=40, max_seq_len=17, **PLAIN | switches)
    )
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain.double()
    fused = copy.deepcopy(plain)
    assert blocks.use(fused) == ["blocks.0", "blocks.1"]
    return plain, fused


def loss_and_gradients(model, ids, targets):
    loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("switches", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 13)])
def test_fused_blocks_equal_the_plain_ones(switches, shape):
    plain, fused = twins(**switches)
    ids, targets = torch.randint(11, shape), torch.randint(11, shape)
    loss, gradients = loss_and_gradients(plain, ids, targets)
    fused_loss, fused_gradients = loss_and_gradients(fused, ids, targets)
    assert torch.allclose(loss, fused_loss, rtol=1e-12)
    assert gradients.keys() == fused_gradients.keys(), "names and so checkpoints are the same"
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, fused_gradients[name], rtol=1e-9, atol=1e-13), name


def test_a_wrong_backward_would_be_seen(monkeypatch):
    monkeypatch.setattr(blocks, "relu2_backward", lambda da, positive: da.mul_(positive))  # forgets the factor 2
    monkeypatch.setattr(blocks, "ACTIVATIONS", blocks.activation_table())
    plain, fused = twins(**KINDS[0])
    ids, targets = torch.randint(11, (3, 17)), torch.randint(11, (3, 17))
    right, wrong = (loss_and_gradients(model, ids, targets)[1] for model in (plain, fused))
    assert not torch.allclose(right["blocks.0.mlp.up_proj.weight"], wrong["blocks.0.mlp.up_proj.weight"], rtol=1e-3)


def test_bf16_stays_near_float64():
    plain, fused = twins(**KINDS[0])
    ids = torch.randint(11, (4, 17))
    exact = plain(ids)
    rough = fused.float()(ids, dtype=torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    assert (rough.double() - exact).norm() / exact.norm() < 0.03


def test_with_a_cache_or_a_mask_it_is_the_plain_block():
    plain, fused = twins(**KINDS[0])
    ids = torch.randint(11, (2, 12))
    with torch.no_grad():
        cache = KVCache(fused.config, 2, torch.device("cpu"), torch.float64)
        parts = [fused(ids[:, :5], cache=cache), *(fused(ids[:, i : i + 1], cache=cache) for i in range(5, 12))]
        assert torch.allclose(torch.cat(parts, 1), plain(ids), rtol=1e-9, atol=1e-12)
        mask = torch.ones(12, 12, dtype=torch.bool).tril(-1) | torch.eye(12, dtype=torch.bool)
        assert torch.allclose(fused(ids, mask=mask), plain(ids, mask=mask), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "switches",
    [{"norm": "rmsnorm"}, {"qk_norm": True}, {"bias": True}, {"dropout": 0.1}, {"mlp": "swiglu"}, {"n_kv_head": 1}],
)
def test_says_what_it_does_not_compute(switches):
    assert blocks.supports(ModelConfig(vocab_size=11, **PLAIN))
    assert not blocks.supports(ModelConfig(vocab_size=11, **PLAIN | switches))


def test_using_it_twice_is_an_error():
    _, fused = twins(**KINDS[0])
    with pytest.raises(InputError, match="no module"):
        blocks.use(fused)


# ---- packed: bf16 weights for generating ----

needs_bf16 = pytest.mark.skipif(
    not packed.supports(build(ModelConfig(vocab_size=11, n_layer=1, n_head=1, n_embd=8))),
    reason="needs a CPU that multiplies bf16 and torch's oneDNN linear",
)
FAMILIES = [
    {"norm": "layernorm", "qk_norm": False, "mlp": "gelu", "position": "learned", "bias": True, "tied": True},
    {"mlp": "relu2", "n_kv_head": 1},
    {"mlp": "swiglu", "norm_weight": False},
    {"mlp": "gelu_tanh", "softcap": 15.0, "n_kv_head": 2},
]


def packed_pair(**switches):
    """A float32 model with every weight disturbed, and its packed copy."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 11,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "n_ff": 600,
        "max_seq_len": 24,
        "init": "gpt2",
    }
    plain = build(ModelConfig(**sizes | switches)).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    quick = copy.deepcopy(plain)
    assert packed.use(quick) == [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")]
    return plain, quick


@needs_bf16
@pytest.mark.parametrize("switches", FAMILIES)
@torch.no_grad()
def test_packed_blocks_are_the_bf16_model(switches):
    plain, quick = packed_pair(**switches)
    ids = torch.randint(11, (3, 20))
    rough = copy.deepcopy(plain).bfloat16()(ids).float()
    exact, ours = plain(ids), quick(ids).float()
    assert (ours - exact).norm() <= 1.5 * (rough - exact).norm() + 1e-6, "no further from float32 than bf16 itself"


@needs_bf16
@pytest.mark.parametrize("switches", FAMILIES)
@torch.no_grad()
def test_packed_with_a_cache_equals_without(switches):
    _, quick = packed_pair(**switches)
    ids = torch.randint(11, (3, 20))
    cache = KVCache(quick.config, 3, torch.device("cpu"), torch.float32)
    parts = [quick(ids[:, :6], cache=cache), quick(ids[:, 6:9], cache=cache)]
    parts += [quick(ids[:, i : i + 1], cache=cache) for i in range(9, 20)]
    whole = quick(ids).float()
    assert (torch.cat(parts, 1).float() - whole).norm() < 0.02 * whole.norm()


@needs_bf16
@pytest.mark.parametrize("switches", FAMILIES)
def test_packed_rows_write_the_same_alone_and_in_a_batch(switches):
    _, quick = packed_pair(**switches)
    sample = SampleConfig(tokens=40, temperature=1.0, top_k=0, seed=5)  # past the context of 24
    together = [choice.ids for choice in generate(quick, [[3, 1]] * 5, sample)]
    for row in range(5):
        alone = [choice.ids[0] for choice in generate(quick, [[3, 1]], sample, seeds=[5 + row])]
        assert alone == [ids[row] for ids in together]


@torch.no_grad()
def test_attention_by_products_equals_torchs():
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.3)
    assert torch.allclose(packed.attend_by_products(q, k, v, mask, 0.3), expected, atol=1e-6)
    assert torch.allclose(packed.attend_by_products(q, k, v, None, 0.3), expected, atol=1e-6), (
        "causal, aligned at the end"
    )
    capped = attend_capped(q, k, v, mask, False, 0.0, 0.3, 0.7)
    assert torch.allclose(packed.attend_by_products(q, k, v, mask, 0.3, 0.7), capped, atol=1e-6)
    assert not torch.allclose(capped, expected, atol=1e-3)

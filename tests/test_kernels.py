"""Each fused sub-layer equals its plain twin in float64, gradients too, and steps aside where it does not apply."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kobza.config import InputError, ModelConfig
from kobza.generate import KVCache
from kobza.kernels import cpu
from kobza.model import build

PLAIN = {"norm": "layernorm", "qk_norm": False}
KINDS = [
    {"mlp": "relu2", "position": "rope"},
    {"mlp": "gelu", "position": "learned", "zero_init": False},
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
    assert cpu.use(fused) == ["blocks.0", "blocks.1"]
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
    monkeypatch.setattr(cpu, "relu2_backward", lambda da, positive: da.mul_(positive))  # forgets the factor 2
    monkeypatch.setattr(cpu, "ACTIVATIONS", cpu.activation_table())
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
    assert cpu.supports(ModelConfig(vocab_size=11, **PLAIN))
    assert not cpu.supports(ModelConfig(vocab_size=11, **PLAIN | switches))


def test_using_it_twice_is_an_error():
    _, fused = twins(**KINDS[0])
    with pytest.raises(InputError, match="no module"):
        cpu.use(fused)

"""What the families of test_families.py do not reach: a placement of norms that none of them has, and the rotary scalings alone,
against Hugging Face's own. The names are those of kobza/formats/families.py."""

from dataclasses import replace

import pytest
import torch

from kobza.config import ModelConfig
from kobza.formats.layouts import LLAMA, LLAMA_LAYER, slots
from kobza.formats.weights import gathered
from kobza.layers import Rope, rope_angles, rope_slowdown
from kobza.model import build
from kobza.train import next_token_loss

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'kobza[parity]'")

pytestmark = pytest.mark.parity

IDS = torch.randint(37, (3, 24), generator=torch.Generator().manual_seed(0))
OLMO2_LAYER = {theirs: ours for theirs, ours in LLAMA_LAYER.items() if "layernorm" not in theirs}
OLMO2_LAYER |= {"post_attention_layernorm": "attn_out_norm", "post_feedforward_layernorm": "mlp_out_norm"}
OLMO2 = replace(LLAMA, layer=OLMO2_LAYER)


def apart(a, b):
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def olmo2_pair():
    """(theirs, ours) with equal weights; theirs without its QK-norm, which is over all heads at once and ours is not."""
    tokens = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    sizes = dict(vocab_size=37, max_position_embeddings=24, num_hidden_layers=3, num_attention_heads=4, hidden_size=32)
    sizes |= dict(num_key_value_heads=2, intermediate_size=80, rms_norm_eps=1e-6)
    theirs = transformers.Olmo2ForCausalLM._from_config(transformers.Olmo2Config(**sizes | tokens)).eval()
    for layer in theirs.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(("norm" in name) + 0.2 * torch.randn(parameter.shape, generator=generator))
    config = ModelConfig(
        vocab_size=37, max_seq_len=24, n_layer=3, n_head=4, n_embd=32, n_kv_head=2, n_ff=80, mlp="swiglu", qk_norm=False,
        norm_place="output", norm_eps=1e-6,
    )  # fmt: skip
    ours = build(config).eval()
    ours.load_state_dict(translated(config, {name: p.detach() for name, p in theirs.named_parameters()}), strict=True)
    return theirs, ours


def translated(config, tensors):
    """Theirs under our names; the same for weights and for gradients."""
    return gathered(config, slots(config, OLMO2), tensors)


def test_norms_of_the_output_alone_are_olmo_2s():
    theirs, ours = olmo2_pair()
    total, n = next_token_loss()(ours, (IDS[:, :-1], IDS[:, 1:]))
    (total / n).backward()
    expected = theirs(IDS, labels=IDS)
    expected.loss.backward()
    assert float(total.detach() / n) == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    gradients = translated(ours.config, {name: p.grad for name, p in theirs.named_parameters()})
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, parameter in ours.named_parameters():
        assert float((parameter.grad - gradients[name]).abs().max()) < 1e-4 * largest, name
    with torch.no_grad():
        assert apart(ours(IDS), expected.logits) < 1e-5
        ours.blocks[1].mlp.down_proj.weight[0, 0] += 0.5
        assert apart(ours(IDS), expected.logits) > 1e-3  # one weight of all is seen


# ours -> their name of it, their settings, and the length at which their "dynamic" stands at our fixed factor
SCALINGS = {
    "linear": ("linear", {}, None),
    "ntk": ("dynamic", {}, 28),  # 4 * 28 / 16 - 3 = 4
    "yarn": ("yarn", {}, None),
    "llama3": ("llama3", {"low_freq_factor": 1.0, "high_freq_factor": 4.0}, None),
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("head_dim, theta, length", [(8, 1e4, 16), (64, 5e5, 4096), (32, 100.0, 300)])
def test_rope_scalings_are_theirs(scaling, head_dim, theta, length):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, settings, now = SCALINGS[scaling]
    known = length if scaling in ("yarn", "llama3") else 0
    parameters = {"rope_type": theirs, "factor": 4.0, "rope_theta": theta} | settings
    parameters |= {"original_max_position_embeddings": known} if known else {}
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=16, rope_parameters=parameters
    )
    frequencies, gain = ROPE_INIT_FUNCTIONS[theirs](config, "cpu", **({"seq_len": now} if now else {}))
    ours = ModelConfig(
        n_embd=2 * head_dim, n_head=2, rope_theta=theta, rope_scaling=scaling, rope_factor=4.0, rope_original_len=known
    )
    divide, our_gain = rope_slowdown(ours)
    assert apart(rope_angles(2, head_dim, theta, divide)[1], frequencies) < 1e-5 and our_gain == pytest.approx(gain)
    assert float(divide.max()) > 1.5  # something was slowed
    rope = Rope(ours, theta, True)
    assert apart(rope.cos[5], (5 * frequencies).cos() * gain) < 1e-5

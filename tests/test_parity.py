"""The same weights in Hugging Face's GPT-2, Llama, Qwen, OLMo and Gemma give the same logits and the same gradients."""

from functools import partial

import pytest
import torch

from kobza.config import ModelConfig
from kobza.layers import Rope, rope_angles, rope_slowdown
from kobza.model import build
from kobza.train import next_token_loss

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'kobza[parity]'")

pytestmark = pytest.mark.parity

SIZES = dict(vocab_size=37, max_seq_len=24, n_layer=3, n_head=4, n_embd=32)
IDS = torch.randint(37, (3, 24), generator=torch.Generator().manual_seed(0))

# ours -> theirs, below the layer. GPT-2 keeps q, k, v in one matrix and stores matrices transposed (its Conv1D).
GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn.o_proj": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
LLAMA_LAYER = {f"attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkvo"}
LLAMA_LAYER |= {f"mlp.{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
LLAMA_LAYER |= {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def randomise(theirs):
    """Draw every weight, so that biases and norms have an effect too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            is_norm = name.endswith("weight") and ("ln_" in name or "norm" in name)
            parameter.copy_(is_norm + 0.2 * torch.randn(parameter.shape, generator=generator))


def gpt2_pair():
    config = transformers.GPT2Config(
        vocab_size=37, n_positions=24, n_layer=3, n_head=4, n_embd=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    switches = dict(position="learned", norm="layernorm", qk_norm=False, mlp="gelu_tanh", bias=True, tied=True)
    return transformers.GPT2LMHeadModel(config), build(ModelConfig(**SIZES, **switches, init="gpt2"))


def gpt2_tensors(tensors):
    """Theirs under our names; the same for weights and for gradients."""
    ours = {"embed.weight": tensors["transformer.wte.weight"], "position.weight": tensors["transformer.wpe.weight"]}
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = tensors[f"transformer.ln_f.{kind}"]
        for i in range(3):
            for our, their in GPT2_LAYER.items():
                ours[f"blocks.{i}.{our}.{kind}"] = tensors[f"transformer.h.{i}.{their}.{kind}"]
            fused = tensors[f"transformer.h.{i}.attn.c_attn.{kind}"].split(32, dim=-1)
            ours |= {f"blocks.{i}.attn.{x}_proj.{kind}": part for x, part in zip("qkv", fused, strict=True)}
    return {name: tensor.T if name.endswith("proj.weight") else tensor for name, tensor in ours.items()}


# name -> (their classes' prefix, their config, ours); what all of them share stands in `hf_pair`.
GEMMA = dict(
    n_kv_head=2, n_ff=80, head_dim=10, mlp="geglu_tanh", norm_place="both", norm_offset=True, norm_cast="after"
)
GEMMA |= dict(attn_scale=1 / 5, window=5, window_pattern="LG", embed_scale=32**0.5, tied=True)
THEIR_GEMMA = dict(head_dim=10, query_pre_attn_scalar=25, sliding_window=5, hidden_activation="gelu_pytorch_tanh")
THEIR_GEMMA |= dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"], tie_word_embeddings=True)
GLU = dict(n_kv_head=2, n_ff=80, mlp="swiglu", qk_norm=False)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
SCALED = {kind: {"rope_type": "default", "rope_theta": 100.0} for kind in ("sliding_attention", "full_attention")}
SCALED["full_attention"] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
HF = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, GLU | {"rope_theta": 5e5}),
    "llama 3": (
        "Llama",
        {"rope_parameters": LLAMA3},
        GLU | dict(rope_scaling="llama3", rope_factor=8.0, rope_original_len=16),
    ),
    "llama, yarn": (
        "Llama",
        {"rope_parameters": YARN},
        GLU | dict(rope_scaling="yarn", rope_factor=4.0, rope_original_len=16),
    ),
    "qwen 2": ("Qwen2", {}, GLU | {"qkv_bias": True}),
    "qwen 3": ("Qwen3", {"head_dim": 12}, GLU | {"head_dim": 12, "qk_norm": True, "qk_norm_weight": True}),
    "olmo 2": ("Olmo2", {}, GLU | {"norm_place": "output"}),
    "gemma 2": (
        "Gemma2",
        THEIR_GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
        GEMMA | {"qk_norm": False, "attn_softcap": 2.0, "softcap": 5.0},
    ),
    "gemma 3": (
        "Gemma3Text",
        THEIR_GEMMA | {"rope_parameters": SCALED},
        GEMMA | dict(qk_norm_weight=True, rope_local_theta=100.0, rope_scaling="linear", rope_factor=8.0),
    ),
}


def hf_pair(family):
    """(theirs, ours) of a family in the table."""
    prefix, their_settings, switches = HF[family]
    sizes = dict(vocab_size=37, max_position_embeddings=24, num_hidden_layers=3, num_attention_heads=4, hidden_size=32)
    sizes |= dict(num_key_value_heads=2, intermediate_size=80, rms_norm_eps=1e-6, tie_word_embeddings=False)
    tokens = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    config = getattr(transformers, f"{prefix}Config")(**sizes | tokens | their_settings)
    model_class = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")
    theirs = model_class._from_config(config, attn_implementation="eager")  # the one that knows soft caps
    if family == "olmo 2":  # its QK-norm is over all heads at once, which we do not have
        for layer in theirs.model.layers:
            layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    return theirs, build(ModelConfig(**SIZES, **switches, norm_eps=1e-6, init="gpt2"))


def hf_tensors(tensors):
    """Theirs under our names."""
    ours = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    sandwich = "model.layers.0.pre_feedforward_layernorm.weight" in tensors
    outputs = {"attn_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
    layer = LLAMA_LAYER | {f"attn.{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
    if "model.layers.0.post_feedforward_layernorm.weight" in tensors:
        layer |= outputs | {"mlp_norm": "pre_feedforward_layernorm" if sandwich else "none"}
    for i in range(3):
        for kind in ("weight", "bias"):
            ours |= {f"blocks.{i}.{our}.{kind}": f"model.layers.{i}.{their}.{kind}" for our, their in layer.items()}
    found = {our: tensors[their] for our, their in ours.items() if their in tensors}
    assert len({id(tensor) for tensor in found.values()}) == len(tensors)  # each of theirs has its place
    return found


PAIRS = {"gpt2": (gpt2_pair, gpt2_tensors)} | {name: (partial(hf_pair, name), hf_tensors) for name in HF}


def filled(family):
    """(theirs, ours) with equal weights; every one of ours has been given."""
    make, translate = PAIRS[family]
    theirs, ours = make()
    theirs.eval(), ours.eval()
    randomise(theirs)
    weights = translate(dict(theirs.named_parameters()))
    assert set(weights) == {name for name, _ in ours.named_parameters()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            assert parameter.shape == weights[name].shape, name
            parameter.copy_(weights[name])
    return theirs, ours


def apart(a, b):
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("family", PAIRS)
def test_logits_are_theirs(family):
    theirs, ours = filled(family)
    with torch.no_grad():
        assert apart(ours(IDS), theirs(IDS).logits) < 1e-4
        changed = ours.blocks[1].mlp.down_proj.weight
        changed[0, 0] += 0.5
        assert apart(ours(IDS), theirs(IDS).logits) > 1e-3  # one weight of all is seen


@pytest.mark.parametrize("family", PAIRS)
def test_gradients_are_theirs(family):
    theirs, ours = filled(family)
    total, n = next_token_loss()(ours, (IDS[:, :-1], IDS[:, 1:]))
    loss = total / n
    loss.backward()
    their_loss = theirs(IDS, labels=IDS).loss
    their_loss.backward()
    assert float(loss.detach()) == pytest.approx(float(their_loss.detach()), rel=1e-5)
    gradients = PAIRS[family][1]({name: p.grad for name, p in theirs.named_parameters()})
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, parameter in ours.named_parameters():
        # a key's bias moves all scores of a query alike and so has no gradient: hence the largest of all as the scale
        assert float((parameter.grad - gradients[name]).abs().max()) < 1e-4 * largest, name


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

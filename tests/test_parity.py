"""The same weights in Hugging Face's GPT-2 and Llama give the same logits and the same gradients."""

import pytest
import torch

from kobza.config import ModelConfig
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
    return transformers.GPT2LMHeadModel(config), build(ModelConfig(**SIZES, **switches, zero_init=False))


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


def llama_pair():
    config = transformers.LlamaConfig(
        vocab_size=37,
        max_position_embeddings=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=32,
        intermediate_size=80,
        rms_norm_eps=1e-6,
        rope_theta=5e5,
        tie_word_embeddings=False,
    )
    switches = dict(n_kv_head=2, n_ff=80, mlp="swiglu", norm_eps=1e-6, rope_theta=5e5, qk_norm=False)
    return transformers.LlamaForCausalLM(config), build(ModelConfig(**SIZES, **switches, zero_init=False))


def llama_tensors(tensors):
    """Theirs under our names."""
    ours = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    ours["lm_head.weight"] = "lm_head.weight"
    for i in range(3):
        ours |= {f"blocks.{i}.{our}.weight": f"model.layers.{i}.{their}.weight" for our, their in LLAMA_LAYER.items()}
    return {our: tensors[their] for our, their in ours.items()}


PAIRS = {"gpt2": (gpt2_pair, gpt2_tensors), "llama": (llama_pair, llama_tensors)}


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

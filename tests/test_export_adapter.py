"""export/adapter.py: an adapter alone computes on its base, by llama.cpp and by PEFT, what our model with it does."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kobza.config import InputError, ModelConfig
from kobza.export.adapter import Pair, placed, write_lora_gguf, write_peft
from kobza.export.proof.llama_cpp import open_llama_cpp
from kobza.finetune.config import MethodConfig
from kobza.finetune.lora import adapters, add_lora
from kobza.finetune.peft import Base, save_adapter, weights_hash
from kobza.formats.ggml import load_tensor
from kobza.formats.gguf import read_gguf, write_gguf
from kobza.formats.gguf_families import config_to_gguf
from kobza.formats.stock import config_to_hf
from kobza.formats.weights import to_gguf, to_hf
from kobza.model import build
from kobza.tokenizer import byte_of_symbol

V = 262  # bytes, a merge, and rows of padding
IDS = [(7 * i + 3) % 256 for i in range(20)]
SIZES = dict(vocab_size=V, max_seq_len=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_ff=48)
PLAIN = SIZES | dict(qk_norm=False, mlp="swiglu")
FAMILIES = {
    "llama": PLAIN,
    "tied": PLAIN | dict(tied=True),
    "qwen3": PLAIN | dict(qk_norm=True, qk_norm_weight=True, head_dim=12),
    "gemma": PLAIN
    | dict(norm_offset=True, norm_cast="after", mlp="geglu_tanh", embed_scale=32**0.5, tied=True, head_dim=10),
    "gpt2": SIZES
    | dict(n_kv_head=4, position="learned", norm="layernorm", qk_norm=False, bias=True, mlp="gelu_tanh", tied=True),
}
METHOD = MethodConfig(rank=3, alpha=7.0)
METHODS = {
    "lora": METHOD,
    "rslora": dataclasses.replace(METHOD, rslora=True),
    "some": dataclasses.replace(METHOD, targets="v_proj,down_proj,blocks.1.attn.q_proj"),
}


def base(family):
    """A random model, far from symmetric."""
    model = build(ModelConfig(**FAMILIES[family]), seed=1).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def learn(model, method=METHOD, seed=4):
    """An adapter with something in it -> the pairs as the recipe hands them over."""
    add_lora(model, method, seed=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in adapters(model).values():
            module.lora_b.add_(0.2 * torch.randn(module.lora_b.shape, generator=generator))
    return {name: Pair(m.lora_a.detach(), m.lora_b.detach(), m.scale) for name, m in adapters(model).items()}


def write_base(path, model):
    """The model as a GGUF file of float32 with a tokenizer of bytes."""
    arch, metadata = config_to_gguf(model.config)
    symbols = sorted(byte_of_symbol(), key=byte_of_symbol().get)
    tokens = [*symbols, "he", *(f"[{i}]" for i in range(257, V))]
    metadata |= {
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", "gpt-2"),
        "tokenizer.ggml.tokens": ("array:string", tokens),
        "tokenizer.ggml.token_type": ("array:int32", [1] * V),
        "tokenizer.ggml.merges": ("array:string", ["h e"]),
    }
    weights = to_gguf(model.config, arch, {name: p.detach() for name, p in model.named_parameters()})
    write_gguf(path, metadata | {"general.architecture": ("string", arch)}, {
        name: ("F32", tuple(t.shape), t.float().numpy().tobytes()) for name, t in weights.items()
    })  # fmt: skip


def ours(model):
    """Log-probabilities of what follows each of IDS, (T, V) float64."""
    with torch.no_grad():
        return model(torch.tensor([IDS]))[0].double().log_softmax(-1)


# ---- llama.cpp -------------------------------------------------------------------------------------------------------

CASES = [(family, "lora") for family in FAMILIES] + [("llama", "rslora"), ("llama", "some"), ("gpt2", "some")]


@pytest.mark.parity
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_llama_cpp_computes_with_the_adapter_what_we_do(family, kind, tmp_path):
    pytest.importorskip("xllamacpp")
    model = base(family)
    write_base(tmp_path / "base.gguf", model)
    plain = ours(model)
    pairs = learn(model, METHODS[kind])
    write_lora_gguf(tmp_path / "lora.gguf", model.config, pairs)
    places = [0, 7, len(IDS) - 1]
    with open_llama_cpp(tmp_path / "base.gguf", 32, tmp_path / "lora.gguf") as engine:
        theirs = engine.logprobs(IDS, places)
    expected, seen = ours(model)[places], theirs.isfinite()
    assert seen.float().mean() > 0.3
    assert float((theirs - expected)[seen].abs().max()) < 1e-3
    assert float((plain[places] - expected).abs().max()) > 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_in_their_places_make_the_change_of_the_whole(family):
    """The product of what is written is the change of each matrix of the base's file, in its order of rows."""
    model = base(family)
    config, arch = model.config, config_to_gguf(model.config)[0]
    before = to_gguf(config, arch, {name: p.detach().clone() for name, p in model.named_parameters()})
    pairs = learn(model)
    with torch.no_grad():
        weights = {
            name.replace(".base.", "."): p.detach() for name, p in model.named_parameters() if ".lora_" not in name
        }
        weights |= {f"{name}.weight": m.adapted(m.base.weight) for name, m in adapters(model).items()}
    after = to_gguf(config, arch, weights)
    made = placed(config, arch, pairs)
    assert made.keys() == {name for name in after if not torch.equal(after[name], before[name])}
    for name, (a, b, scale) in made.items():
        torch.testing.assert_close(scale * (b @ a), after[name] - before[name], atol=1e-5, rtol=1e-4)


def test_pairs_of_other_scales_are_scaled_in_their_rows(tmp_path):
    config = ModelConfig(**FAMILIES["llama"])
    draw = torch.Generator().manual_seed(0)
    pairs = {
        f"blocks.0.mlp.{name}_proj": Pair(torch.randn(r, i, generator=draw), torch.randn(o, r, generator=draw), scale)
        for name, r, i, o, scale in (("gate", 2, 32, 48, 0.5), ("down", 5, 48, 32, 3.0))
    }
    write_lora_gguf(tmp_path / "a.gguf", config, pairs, name="cat")
    file = read_gguf(tmp_path / "a.gguf")
    kind = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama", "general.name": "cat"}
    assert kind.items() <= file.metadata.items()
    for name, pair in pairs.items():
        theirs = f"blk.0.ffn_{name.split('.')[-1].removesuffix('_proj')}.weight"
        a, b = (torch.from_numpy(load_tensor(file, f"{theirs}.lora_{x}")) for x in "ab")
        scale = file.metadata["adapter.lora.alpha"] / len(a)
        torch.testing.assert_close(scale * (b @ a), pair.scale * (pair.b @ pair.a))


@pytest.mark.parametrize(
    ("family", "change", "more", "message"),
    [
        ("llama", {}, {"beside": ["DoRA's lengths", "a table"]}, "no place for DoRA's lengths and a table; .* kobza merge"),
        ("tied", {"lm_head": Pair(torch.ones(2, 32), torch.ones(V, 2), 1.0)}, {}, "lm_head has no matrix .* kobza merge"),
        ("llama", None, {}, "there is no adapter to write"),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_say_is_refused(family, change, more, message, tmp_path):
    pairs = {} if change is None else learn(base(family)) | change
    with pytest.raises(InputError, match=message) as caught:
        write_lora_gguf(tmp_path / "a.gguf", ModelConfig(**FAMILIES[family]), pairs, **more)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def tuning(folder, family="llama", **more):
    """A base in Hugging Face's files, and a tuning's two files -> the model with the adapter."""
    model = base(family)
    hf = config_to_hf(model.config)
    (folder / "base").mkdir()
    weights = to_hf(model.config, hf, {name: p.detach() for name, p in model.named_parameters()})
    save_file(weights, folder / "base" / "model.safetensors", {"format": "pt"})
    (folder / "base" / "config.json").write_text(json.dumps(hf))
    of = Base("its own folder", weights_hash(model), "abc")
    learn(model)
    save_adapter(folder / "tuning", model, model.config, METHOD, of, **more)
    return model


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_finds_the_base_and_computes_what_we_do(family, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = tuning(tmp_path, family)
    (tmp_path / "out").mkdir()
    write_peft(tmp_path / "out", tmp_path / "tuning", str(tmp_path / "base"))
    found = peft.PeftConfig.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(found.base_model_name_or_path)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    with torch.no_grad():
        logits = theirs(torch.tensor([IDS])).logits[0].double()
    assert float((logits.log_softmax(-1) - ours(model)).abs().max()) < 1e-4
    assert found.revision is None
    assert f"base_model: {tmp_path / 'base'}" in (tmp_path / "out" / "README.md").read_text()


def test_the_files_are_the_tunings_own(tmp_path):
    tuning(tmp_path)
    (tmp_path / "out").mkdir()
    write_peft(tmp_path / "out", tmp_path / "tuning", "its own folder")
    kept = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert kept == json.loads((tmp_path / "tuning" / "adapter_config.json").read_text()) and kept["revision"] == "abc"
    name = "adapter_model.safetensors"
    here, there = load_file(tmp_path / "out" / name), load_file(tmp_path / "tuning" / name)
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)


def test_an_adapter_that_peft_cannot_place_is_refused(tmp_path):
    config = ModelConfig(**SIZES | dict(mlp="relu2", qk_norm=True))  # no stock architecture
    model = build(config)
    of = Base("x", weights_hash(model))
    learn(model)
    save_adapter(tmp_path / "tuning", model, config, METHOD, of)
    for beside, message in (
        ((), "--exportable"),
        (["rows of new tokens"], "rows of new tokens, which b has not; .*kobza merge"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            write_peft(tmp_path, tmp_path / "tuning", "b", beside=beside)
        assert "\n" not in str(caught.value)

"""PEFT's files both ways: it computes with ours what we do, we with its what it does; nothing in a file goes unnoticed."""

import dataclasses
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kobza.config import InputError, ModelConfig
from kobza.doctor.files.adapter import CHECKS, open_
from kobza.doctor.finding import examine
from kobza.finetune.config import MethodConfig
from kobza.finetune.lora import adapter_tensors, adapters, add_lora, choose_weights, freeze_base, targets_of
from kobza.finetune.merge import merge
from kobza.finetune.peft import Base, load_adapter, save_adapter, weights_hash
from kobza.finetune.places import targets_by_name
from kobza.formats.load import load_model
from kobza.formats.stock import config_to_hf
from kobza.formats.weights import to_hf
from kobza.model import build
from kobza.optim import AdamW

V = 61
IDS = torch.randint(V, (2, 24), generator=torch.Generator().manual_seed(0))
CONFIG = ModelConfig(
    vocab_size=V, max_seq_len=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_ff=48, mlp="swiglu", qk_norm=False,
    init="torch",
)  # fmt: skip
OWN = dataclasses.replace(CONFIG, mlp="relu2", qk_norm=True)  # no stock architecture has its activation
GPT2 = dataclasses.replace(
    CONFIG, position="learned", norm="layernorm", mlp="gelu_tanh", bias=True, n_kv_head=4, tied=True
)
METHOD = MethodConfig(rank=3, alpha=7.0)
METHODS = {
    "lora": METHOD,
    "rslora": dataclasses.replace(METHOD, rslora=True),
    "dora": dataclasses.replace(METHOD, dora=True),
    "some": dataclasses.replace(METHOD, targets="v_proj,down_proj,blocks.1.attn.q_proj", dora=True, rslora=True),
    "tables": dataclasses.replace(METHOD, embeddings=True),
}
HF = {  # name -> (prefix of their classes, settings beside the sizes)
    "llama": ("Llama", {}),
    "smollm": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 10}),
    "phi3": ("Phi3", {}),
    "gpt2": ("GPT2", {}),
}


def theirs_and_ours(name, folder):
    """A random model of theirs in `folder`, and the same opened by us."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    prefix, more = HF[name]
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    sizes = dict(vocab_size=V, max_position_embeddings=32, num_hidden_layers=2, num_attention_heads=4, hidden_size=32)
    sizes |= {} if prefix == "GPT2" else dict(num_key_value_heads=2, intermediate_size=48)
    config = getattr(transformers, f"{prefix}Config")(**sizes | tokens | more)
    torch.manual_seed(0)
    head = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    theirs = getattr(transformers, f"{prefix}{head}")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


def move(model, size=0.1):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_tensors(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def write(folder, config=CONFIG, method=METHOD, **more):
    """A trained adapter of a base of ours in a folder -> the model."""
    model = build(config, seed=1).eval()
    base = Base("some/base", weights_hash(model))
    add_lora(model, method, seed=2)
    move(model)
    save_adapter(folder, model, config, method, base, **more)
    return model


def codes(base, adapter, merged=None):
    """What the doctor finds."""
    outcomes = examine(CHECKS, open_(base, adapter, merged))
    assert not [o.reason for o in outcomes if o.status == "failed"]
    return {finding.code for outcome in outcomes for finding in outcome.findings}


# ---- with PEFT -----------------------------------------------------------------------------------------------------


FUSED = ("phi3", "gpt2")
PAIRS = [(n, k) for n in HF for k in METHODS if n in ("llama", *FUSED) or k in ("lora", "some", "tables")]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_peft_computes_with_our_adapter_what_we_do(name, kind, tmp_path):
    theirs, base = theirs_and_ours(name, tmp_path / "base")
    import peft

    model, method = base.model, METHODS[kind]
    of = Base(str(tmp_path / "base"), weights_hash(model))
    add_lora(model, method, seed=2)
    move(model)
    save_adapter(tmp_path / "adapter", model, base.config, method, of, base.metadata)
    plain = theirs(IDS).logits
    tuned = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        ours, expected = model(IDS), tuned(IDS).logits
    assert float((ours - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert float((plain - expected).abs().max()) > 0.01 * float(expected.abs().max())
    assert not codes(tmp_path / "base", tmp_path / "adapter")
    again = load_model(tmp_path / "base")
    assert load_adapter(tmp_path / "adapter", again.model, again.config) == method
    same(again.model, model)


def same(a, b):
    a, b = adapter_tensors(a), adapter_tensors(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


THEIRS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"mlp.down_proj": 2, "mlp.c_proj": 2}, "alpha_pattern": {"o_proj": 3, "c_attn": 3}},
    "head": {"modules_to_save": ["lm_head"]},
}
TIED = ("qwen3", "gemma", "gpt2")  # a table apart from its head has its own test
TRAINED = [(n, k) for n in ("llama", "phi3", *TIED) for k in THEIRS if k != "head" or n not in TIED]
TARGETS = {"phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "gpt2": ["c_attn", "attn.c_proj", "mlp.c_proj"]}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "kind"), TRAINED)
def test_we_compute_with_an_adapter_that_peft_trained_what_it_does(name, kind, tmp_path):
    theirs, base = theirs_and_ours(name, tmp_path / "base")
    import peft

    targets = TARGETS.get(name, ["q_proj", "v_proj", "o_proj", "down_proj"])
    config = peft.LoraConfig(
        r=4, lora_alpha=9, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2", **THEIRS[kind]
    )
    tuned = peft.get_peft_model(theirs, config)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        tuned(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.eval().save_pretrained(tmp_path / "adapter")
    plain = base.model(IDS)
    method = load_adapter(tmp_path / "adapter", base.model, base.config)
    with torch.no_grad():
        ours, expected = base.model(IDS), tuned(IDS).logits
    assert float((ours - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert float((plain - expected).abs().max()) > 0.01 * float(expected.abs().max())
    assert (method.rank, method.alpha, method.dora, method.rslora) == (4, 9.0, kind == "dora", kind == "rslora")
    assert method.embeddings == (kind == "head")
    assert codes(tmp_path / "base", tmp_path / "adapter") <= ({"P3"} if name in FUSED else set())  # so it is
    save_adapter(tmp_path / "ours", base.model, base.config, method, Base("x", "0" * 64), base.metadata)
    fresh = load_model(tmp_path / "base")
    fresh_method = load_adapter(tmp_path / "ours", fresh.model, fresh.config, sha256="0" * 64)
    assert fresh_method == method
    same(fresh.model, base.model)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_step_of_adamw_is_that_of_peft(kind, tmp_path):
    """The same A, two steps each: the same loss and the same factors."""
    theirs, base = theirs_and_ours("llama", tmp_path / "base")
    import peft

    method = METHODS[kind]
    flags = {"use_rslora": method.rslora, "use_dora": method.dora}
    targets = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", **flags)
    tuned = peft.get_peft_model(theirs, config)
    tuned.save_pretrained(tmp_path / "adapter")
    load_adapter(tmp_path / "adapter", base.model, base.config)
    ours = adapter_tensors(base.model)
    settings_ = {
        "lr": 1e-2,
        "betas": (0.9, 0.99),
        "eps": 1e-4,
        "weight_decay": 0.0,
    }  # 1e-8 makes a step of a gradient's rounding
    our_steps = AdamW(list(ours.values()), **settings_)
    their_steps = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], **settings_)
    before = {name: p.detach().clone() for name, p in ours.items()}
    for step in range(2):
        loss = torch.nn.functional.cross_entropy(base.model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
        expected = tuned(IDS, labels=IDS).loss
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
        loss.backward(), expected.backward()
        our_steps.step(), their_steps.step()
        our_steps.zero_grad(), their_steps.zero_grad()
        shutil.rmtree(tmp_path / "adapter")
        tuned.save_pretrained(tmp_path / "adapter")
        there = load_model(tmp_path / "base")
        load_adapter(tmp_path / "adapter", there.model, there.config)
        for name, p in adapter_tensors(there.model).items():
            assert float((p - ours[name]).abs().max()) < 1e-6, (step, name)
    assert all(float((ours[name] - before[name]).detach().abs().max()) > 1e-3 for name in ours)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_a_table_that_peft_trained_apart_from_its_tied_head_is_refused(tmp_path):
    theirs, base = theirs_and_ours("smollm", tmp_path / "base")
    import peft

    settings_ = dict(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])
    apart = peft.get_peft_model(theirs, peft.LoraConfig(**settings_))
    apart.save_pretrained(tmp_path / "apart")
    with pytest.raises(InputError, match="embed_tokens alone.*ensure_weight_tying"):
        load_adapter(tmp_path / "apart", base.model, base.config)
    tied = peft.get_peft_model(apart.unload(), peft.LoraConfig(**settings_, ensure_weight_tying=True))
    optimizer = torch.optim.AdamW([p for p in tied.parameters() if p.requires_grad], lr=0.02)
    tied(IDS, labels=IDS).loss.backward()
    optimizer.step()
    tied.eval().save_pretrained(tmp_path / "tied")
    before = base.model(IDS)
    assert load_adapter(tmp_path / "tied", base.model, base.config).embeddings
    with torch.no_grad():
        ours, expected = base.model(IDS), tied(IDS).logits
    assert float((ours - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert float((ours - before).abs().max()) > 0.01 * float(expected.abs().max())


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_new_tokens_go_along(tmp_path):
    """Three rows are added to table and head and learned: PEFT has them once its model is as long."""
    theirs, base = theirs_and_ours("llama", tmp_path / "base")
    import peft

    config, known = dataclasses.replace(base.config, vocab_size=V + 3), weights_hash(base.model)

    def grown():
        model = build(config).eval()
        with torch.no_grad():
            for name, p in load_model(tmp_path / "base").model.named_parameters():
                model.get_parameter(name)[: len(p)] = p
        return model

    model = grown()
    method = dataclasses.replace(METHOD, embeddings=True)
    add_lora(model, method, seed=2)
    move(model)
    save_adapter(tmp_path / "adapter", model, config, method, Base(str(tmp_path / "base"), known), base.metadata)
    theirs.resize_token_embeddings(V + 3)
    tuned = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ids = torch.cat((IDS, torch.tensor([[V, V + 1], [V + 2, V]])), 1)
    with torch.no_grad():
        assert float((model(ids) - tuned(ids).logits).abs().max()) < 1e-4
    again = grown()
    assert load_adapter(tmp_path / "adapter", again, config, sha256=known) == method
    same(again, model)
    with pytest.raises(InputError, match=r"\(64, 32\) and this model's \(61, 32\); add its tokens"):
        load_adapter(tmp_path / "adapter", base.model, base.config)


# ---- without it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, GPT2, OWN], ids=["llama", "gpt2", "own"])
@pytest.mark.parametrize("kind", METHODS)
def test_what_is_saved_is_loaded(config, kind, tmp_path):
    model = write(tmp_path / "adapter", config, METHODS[kind])
    other = build(config, seed=1).eval()
    assert load_adapter(tmp_path / "adapter", other, config) == METHODS[kind]
    same(other, model)
    assert torch.equal(other(IDS), model(IDS)) and not torch.equal(other(IDS), build(config, seed=1)(IDS))
    assert [n for n, p in other.named_parameters() if p.requires_grad] == list(adapter_tensors(model))


@settings(max_examples=25)
@given(st.data())
def test_any_adapter_comes_back_to_the_bit(tmp_path_factory, data):
    leaves = st.sets(st.sampled_from(["q", "k", "v", "o", "up", "down"]), min_size=1)
    patterns = [f"{x}_proj" for x in sorted(data.draw(leaves))]
    only = data.draw(st.sampled_from(["", "blocks.0.*", "blocks.1.attn.*"]))
    config = data.draw(st.sampled_from([GPT2, dataclasses.replace(CONFIG, pad_vocab=16), OWN]))
    method = MethodConfig(
        rank=data.draw(st.integers(1, 16)), alpha=data.draw(st.floats(0.1, 64)), rslora=data.draw(st.booleans()),
        dora=data.draw(st.booleans()), targets=",".join([*patterns, *filter(None, [only])]),
        embeddings=data.draw(st.booleans()),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("any") / "adapter"
    model, other = write(folder, config, method), build(config, seed=1).eval()
    assert load_adapter(folder, other, config) == method
    same(other, model) if not config.pad_vocab else None
    assert torch.allclose(other(IDS), model(IDS), rtol=1e-6, atol=1e-6)


def test_a_model_without_a_twin_is_written_under_its_own_names(tmp_path):
    write(tmp_path / "adapter", OWN)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["auto_mapping"] == {"base_model_class": "GPT", "parent_library": "kobza.model"}
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.blocks.0.attn.q_proj.lora_A.weight" in names


def test_fused_names_hold_the_parts_side_by_side(tmp_path):
    model = write(tmp_path / "adapter", GPT2, dataclasses.replace(METHOD, targets="q_proj,v_proj,o_proj"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.transformer.h.0.attn.c_attn.lora_{x}.weight"] for x in "AB")
    attn, config = model.blocks[0].attn, json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert a.shape == (6, 32) and b.shape == (96, 6) and config["fan_in_fan_out"] is True
    assert torch.equal(b @ a, torch.cat([attn.q_proj.lora_b @ attn.q_proj.lora_a, torch.zeros(32, 32),
                                         attn.v_proj.lora_b @ attn.v_proj.lora_a]).detach())  # fmt: skip
    assert config["rank_pattern"] == {"c_attn": 6} and config["alpha_pattern"] == {"c_attn": 14}
    assert sorted(config["target_modules"]) == ["attn.c_proj", "c_attn"]  # not mlp.c_proj


@pytest.mark.parametrize(
    "change", [{"scale": 1.0}, {"lora_a": torch.nn.Parameter(torch.ones(2, 32))}], ids=["alpha", "rank"]
)
def test_parts_that_differ_are_not_joined(change, tmp_path):
    model = build(GPT2, seed=1)
    add_lora(model, METHOD, seed=0)
    for name, value in change.items():
        setattr(model.blocks[1].attn.k_proj, name, value)
    with pytest.raises(InputError, match="differ in rank or alpha"):
        save_adapter(tmp_path / "adapter", model, GPT2, METHOD, Base("x", "0" * 64))
    assert not (tmp_path / "adapter").exists()


def test_rows_of_padding_stay_at_home(tmp_path):
    """A head of 64 rows, 61 of them tokens: the file has the tokens', as the stock model does."""
    config = dataclasses.replace(CONFIG, pad_vocab=64)
    method = dataclasses.replace(METHOD, dora=True, targets="lm_head,q_proj")
    model, other = write(tmp_path / "adapter", config, method), build(config, seed=1).eval()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.lm_head.lora_B.weight"].shape == (61, 3)
    assert tensors["base_model.model.lm_head.lora_magnitude_vector"].shape == (61,)
    assert load_adapter(tmp_path / "adapter", other, config) == method
    assert torch.equal(other(IDS), model(IDS))
    assert torch.equal(other.lm_head.magnitude[61:], build(config, seed=1).lm_head.weight.norm(dim=1)[61:])


@pytest.mark.parametrize("alone", ["transformer.wte", "lm_head"])
def test_half_of_a_tied_pair_is_refused(alone, tmp_path):
    """PEFT would leave the other half as it was; with ensure_weight_tying it does as we do."""
    write(tmp_path / "adapter", GPT2, METHODS["tables"])
    path, settings_ = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    other = {"transformer.wte": "lm_head", "lm_head": "transformer.wte"}[alone]
    tensors = load_file(path)
    tensors.pop(f"base_model.model.{other}.weight")
    save_file(tensors, path, {"targets": "*_proj"})
    said = json.loads(settings_.read_text()) | {"modules_to_save": [alone.rpartition(".")[2]]}
    settings_.write_text(json.dumps(said))
    with pytest.raises(InputError, match=f"it has {alone} alone"):
        load_adapter(tmp_path / "adapter", build(GPT2, seed=1), GPT2)
    settings_.write_text(json.dumps(said | {"ensure_weight_tying": True}))
    assert load_adapter(tmp_path / "adapter", build(GPT2, seed=1), GPT2).embeddings


def test_a_head_that_differs_from_its_table_is_refused(tmp_path):
    write(tmp_path / "adapter", GPT2, METHODS["tables"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    assert torch.equal(tensors["base_model.model.lm_head.weight"], tensors["base_model.model.transformer.wte.weight"])
    tensors["base_model.model.lm_head.weight"][5, 5] += 1
    save_file(tensors, path, {"targets": "*_proj"})
    with pytest.raises(InputError, match="table and head differ"):
        load_adapter(tmp_path / "adapter", build(GPT2, seed=1), GPT2)


@pytest.mark.parametrize(
    "modules", [["blocks.1.attn.q_proj"], ["blocks.0.attn.q_proj", "blocks.1.attn.q_proj", "lm_head"]]
)
def test_targets_name_the_modules_again(modules):
    model = build(CONFIG)
    assert targets_of(model, targets_by_name(CONFIG, modules)) == modules
    several = ModelConfig(vocab_size=V, n_embd=32, pattern="AFAF", n_layer=2)  # a leaf in two sub-layers
    names = [f"blocks.{i}.attn2.q_proj" for i in (0, 1)]
    assert targets_of(build(several), targets_by_name(several, names)) == names


def test_blocks_that_are_none_are_refused(tmp_path):
    write(tmp_path / "adapter", GPT2)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors, own = load_file(path), {"format": "pt", "targets": "*_proj"}
    tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"][0, 5] = 0.1  # q's row, k's column
    save_file(tensors, path, own)
    with pytest.raises(InputError, match="transformer.h.1.attn.c_attn: its factors are not the blocks"):
        load_adapter(tmp_path / "adapter", build(GPT2, seed=1), GPT2)
    save_file(tensors, path, own | {"targets": "q_proj,k_proj,v_proj,o_proj"})
    with pytest.raises(InputError, match="differ in blocks.0.mlp.down_proj"):
        tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"][0, 5] = 0
        save_file(tensors, path, own | {"targets": "q_proj,k_proj,v_proj,o_proj"})
        load_adapter(tmp_path / "adapter", build(GPT2, seed=1), GPT2)


def test_our_adapter_and_its_merge_are_clean_to_the_doctor(tmp_path):
    hf = config_to_hf(CONFIG)
    model, base = write(tmp_path / "adapter"), build(CONFIG, seed=1)
    merge(model)
    for name, m in (("base", base), ("merged", model)):
        (tmp_path / name).mkdir()
        tensors = {k: p.detach() for k, p in m.named_parameters()}
        save_file(to_hf(CONFIG, hf, tensors), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(hf))
    assert codes(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged") == set()


# ---- another base --------------------------------------------------------------------------------------------------


def test_a_hash_is_of_the_numbers_not_of_their_storage():
    model = build(CONFIG, seed=1).bfloat16()
    wide = build(CONFIG).eval()
    wide.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    found = weights_hash(model)
    assert found == weights_hash(wide) and len(found) == 64
    add_lora(wide, METHOD, seed=0)
    freeze_base(wide, torch.bfloat16)
    assert weights_hash(wide) == found
    with torch.no_grad():
        wide.blocks[1].mlp.down_proj.base.weight[3, 4] += 0.1
    assert weights_hash(wide) != found
    assert weights_hash(build(CONFIG, seed=2)) != weights_hash(build(CONFIG, seed=1))


def test_an_adapter_of_another_base_is_refused_by_both_hashes(tmp_path):
    write(tmp_path / "adapter")
    other = build(CONFIG, seed=5)
    mine, its = weights_hash(other), weights_hash(build(CONFIG, seed=1))
    with pytest.raises(InputError, match=f"some/base.*{its[:12]}.*{mine[:12]}") as error:
        load_adapter(tmp_path / "adapter", other, CONFIG)
    assert "\n" not in str(error.value) and not adapters(other)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_embd": 40}, r"lora_B.weight is \(32, 3\) and this model wants \(40, 3\)"),
        ({"n_ff": 56}, r"lora_\w.*48.*56"),
        ({"n_layer": 1}, "model.layers.1.* is not in this model"),
        ({"position": "learned"}, "is not in this model"),
    ],
)
def test_a_base_of_other_shapes_is_refused_by_name(change, told, tmp_path):
    write(tmp_path / "adapter")
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(InputError, match=told) as error:
        load_adapter(tmp_path / "adapter", build(config), config, sha256=weights_hash(build(CONFIG, seed=1)))
    assert "\n" not in str(error.value)


# ---- broken and hostile files --------------------------------------------------------------------------------------

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": 5}, "rank 3 and adapter_config.json says 5"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"lora_alpha": 1e400}, "lora_alpha is inf"),
        ({"rank_pattern": {"(a+)+$": 3}}, r"rank_pattern has an expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "no lora_magnitude_vector"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"some_new_trick": {"on": 1}}, "some_new_trick is"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names 'lm_head'"),
        ({"lora_dropout": 2}, "dropout is 2"),
    ],
)
def test_settings_that_change_the_function_are_refused_by_name(change, told, tmp_path):
    write(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(tmp_path / "adapter", told)


def refused(folder, told):
    model = build(CONFIG, seed=1)
    with pytest.raises(InputError, match=told) as error:
        load_adapter(folder, model, CONFIG)
    assert "\n" not in str(error.value) and not adapters(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "junk", [None, 0, -1, 2.5, "x\ny", "", [], [1], {}, {"a\n": "b"}, {"q_proj": 3}, {"q_proj": True}, [[[]]]]
)
def test_junk_in_a_setting_is_told_in_a_line_or_means_nothing(junk, tmp_path):
    write(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(path.read_text())
    for key in [*said, "trainable_token_indices", "layer_replication", "ensure_weight_tying", "another"]:
        path.write_text(json.dumps(said | {key: junk}))
        model = build(CONFIG, seed=1)
        try:
            load_adapter(tmp_path / "adapter", model, CONFIG)
        except InputError as error:
            assert "\n" not in str(error) and not adapters(model), key
        else:
            assert len(adapters(model)) == 14, key


@pytest.mark.parametrize("own", [{"base_sha256": "x\ny"}, {"targets": "x\ny"}, {"targets": ""}, {"targets": "q_proj"}])
def test_junk_in_the_header_is_told_in_a_line(own, tmp_path):
    write(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path), path, own)
    refused(tmp_path / "adapter", next(iter(own)).removeprefix("base_"))


def dropped(name):
    return lambda tensors: tensors.pop(name)


def changed(name, new, fn):
    return lambda tensors: tensors.update({new: fn(tensors.pop(name))})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dropped(f"{Q}.lora_A.weight"), r"q_proj has no lora_A"),
        (dropped(f"{Q}.lora_B.weight"), r"q_proj has no lora_B"),
        (changed(f"{Q}.lora_A.weight", f"{Q}.lora_C.weight", lambda t: t), r"lora_C.weight.* no place"),
        (changed(f"{Q}.lora_A.weight", "x", lambda t: t), "x.* no place"),
        (
            changed(f"{Q}.lora_A.weight", f"{Q}.lora_A.weight", lambda t: t[:2]),
            "q_proj: lora_A has rank 2 and its lora_B 3",
        ),
        (changed(f"{Q}.lora_B.weight", f"{Q}.lora_B.weight", lambda t: t[:-1]), r"lora_B.weight is \(31, 3\)"),
        (changed(f"{Q}.lora_B.weight", f"{Q}.lora_B.weight", lambda t: t[0]), r"lora_B.weight is \(3,\)"),
        (changed(f"{Q}.lora_B.weight", f"{Q}.lora_B.weight", lambda t: t.int()), "lora_B.weight is I32"),
        (changed(f"{Q}.lora_B.weight", f"{Q}.lora_B.weight", lambda t: t / 0), "lora_B.weight.*not a finite number"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, V)}), "no place"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(V + 4, 32)}), r"\(65, 32\).*\(61, 32\)"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}), "norm.* is not in this model"),
        (lambda t: t.clear(), "no pair"),
        (
            lambda t: t.update({f"{Q.removeprefix('base_model.model.')}.lora_A.weight": torch.ones(3, 32)}),
            "there twice",
        ),
        (
            lambda t: t.update(
                {"base_model.model.lm_head.weight": torch.ones(V, 32), "lm_head.weight": torch.ones(V, 32)}
            ),
            "twice",
        ),
        (lambda t: t.update({f"{Q}.weight": torch.ones(32, 32)}), "q_proj is saved whole"),
    ],
)
def test_tensors_out_of_place_are_refused_by_name(change, told, tmp_path):
    write(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    refused(tmp_path / "adapter", told)


def test_what_is_no_adapter_is_refused(tmp_path):
    write(tmp_path / "adapter")
    refused(tmp_path / "nowhere", "no such folder")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(tmp_path / "adapter", "truncated")
    path.rename(tmp_path / "adapter" / "adapter_model.bin")
    refused(tmp_path / "adapter", "pickle")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    refused(tmp_path / "adapter", "no JSON")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    refused(tmp_path / "adapter", "no adapter_config.json")


def test_a_model_without_an_adapter_has_none_to_save(tmp_path):
    model = build(CONFIG)
    choose_weights(model, MethodConfig("head"), seed=0)
    with pytest.raises(InputError, match="no adapter"):
        save_adapter(tmp_path / "a", model, CONFIG, MethodConfig("head"), Base("x", "0" * 64))
    write(tmp_path / "b")
    with pytest.raises(InputError, match="is there already"):
        write(tmp_path / "b")

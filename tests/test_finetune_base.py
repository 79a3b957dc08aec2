"""A base read piece by piece is, bit for bit, what load_checkpoint gives, or what casting that gives."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from kobza.checkpoint import load_checkpoint, save_checkpoint
from kobza.config import InputError, ModelConfig, RunConfig
from kobza.finetune import base
from kobza.finetune.base import load_base, read_model
from kobza.finetune.config import MethodConfig
from kobza.finetune.lora import add_lora, freeze_base
from kobza.model import build
from kobza.tokenizer import ByteTokenizer

KINDS = {
    "llama, tied": {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "tied": True, "init": "gpt2"},
    "qwen": {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "qkv_bias": True, "tied": False},
    "gpt2, tied": {
        "norm": "layernorm",
        "mlp": "gelu",
        "position": "learned",
        "bias": True,
        "tied": True,
        "init": "gpt2",
    },
    "learned, untied": {"norm": "layernorm", "mlp": "gelu", "position": "learned", "tied": False},
}


def saved(folder, **switches):
    tokenizer = ByteTokenizer()
    config = ModelConfig(vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32, max_seq_len=16, **switches)
    model = build(config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_checkpoint(folder, model, RunConfig(model=config), tokenizer, {"step": 5})
    return folder


def weights(model):
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [64, 1 << 22])
def test_it_is_what_load_checkpoint_gives(kind, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "PIECE", piece)
    plain, lean = load_checkpoint(saved(tmp_path / "c", **KINDS[kind])), load_base(tmp_path / "c")
    assert (lean.run, lean.provenance, lean.folder) == (plain.run, plain.provenance, plain.folder)
    assert not lean.model.training
    for name, weight in weights(plain.model).items():
        assert torch.equal(weight, weights(lean.model)[name]), name
    assert (lean.model.lm_head.weight is lean.model.embed.weight) == plain.run.model.tied
    ids = torch.randint(9, (2, 7))
    assert torch.equal(plain.model(ids), lean.model(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_it_is_what_freeze_base_makes_of_it(kind, tmp_path):
    plain = load_checkpoint(saved(tmp_path / "c", **KINDS[kind])).model
    lean = load_base(tmp_path / "c", torch.bfloat16).model
    add_lora(plain, MethodConfig(rank=2), 0)
    add_lora(lean, MethodConfig(rank=2), 0)
    freeze_base(plain, torch.bfloat16)
    for name, weight in weights(plain).items():
        assert weight.dtype == weights(lean)[name].dtype and torch.equal(weight, weights(lean)[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_tables_that_will_learn_stay_wide(kind, tmp_path):
    model = load_base(saved(tmp_path / "c", **KINDS[kind]), torch.bfloat16, wide_tables=True).model
    assert model.embed.weight.dtype == model.lm_head.weight.dtype == torch.float32
    assert model.blocks[0].attn.q_proj.weight.dtype == torch.bfloat16


def test_a_file_in_bf16_is_widened(tmp_path):
    folder = saved(tmp_path / "c", **KINDS["qwen"])
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, tmp_path / "narrow.safetensors")
    model = read_model(tmp_path / "narrow.safetensors", load_checkpoint(folder).run.model)
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.float32 and torch.equal(weight, tensors[name].float()), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("norm.weight"), "missing norm.weight"),
        (lambda t: t.update(more=torch.zeros(1)), "unexpected more"),
        (
            lambda t: t.update({"norm.weight": torch.zeros(31)}),
            r"norm.weight is F32 \(31,\) where the config wants \(32,\)",
        ),
        (lambda t: t.update({"norm.weight": torch.zeros(32, dtype=torch.int64)}), "norm.weight is I64"),
    ],
)
def test_a_file_that_is_not_the_config_s_is_refused(change, words, tmp_path):
    folder = saved(tmp_path / "c", **KINDS["qwen"])
    config, tensors = load_checkpoint(folder).run.model, load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=words):
        read_model(tmp_path / "other.safetensors", config)


def test_a_file_cut_short_is_refused(tmp_path):
    folder = saved(tmp_path / "c", **KINDS["qwen"])
    path, config = folder / "model.safetensors", load_checkpoint(folder).run.model
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="truncated"):
        read_model(path, config)
    with pytest.raises(InputError, match="truncated"):
        load_base(folder)


PROGRAM = """
import resource, sys, torch
from pathlib import Path
from kobza.checkpoint import load_checkpoint, read_config
from kobza.finetune.base import read_model
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder = Path(sys.argv[1])
run, _ = read_config(folder / "config.json")
before = peak()
model = read_model(folder / "model.safetensors", run.model, torch.bfloat16)
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()) // 1024)
"""


def test_memory_holds_the_weights_once(tmp_path):
    tokenizer = ByteTokenizer()
    config = ModelConfig(vocab_size=tokenizer.vocab_size, n_layer=3, n_head=4, n_embd=1024, max_seq_len=16)
    save_checkpoint(tmp_path / "c", build(config), RunConfig(model=config), tokenizer, {})
    told = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "c")], capture_output=True, text=True)
    assert not told.returncode, told.stderr
    grown, once = (int(word) for word in told.stdout.split())
    assert once > 60_000 and grown < 1.15 * once + 12_000, f"{grown} kB for {once} kB of weights"

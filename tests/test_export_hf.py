"""The Hugging Face folder: transformers loads it with no code of ours and computes, reads, writes and stops as we do; and it
comes back to us bit for bit. Every family, the presets in small, every kind of tokenizer."""

import dataclasses
import json
import weakref

import pytest
import torch
from safetensors import safe_open
from test_families import GGUFS
from test_switches import drawn

from kobza.config import InputError, ModelConfig, preset, preset_names
from kobza.export.hf import write_hf
from kobza.export.source import Source
from kobza.formats import shards
from kobza.formats.headers import find_tensors
from kobza.formats.load import load_model
from kobza.formats.shards import write_safetensors, write_shards
from kobza.formats.stock import config_to_hf, why_not_exportable
from kobza.formats.template import ChatTemplate
from kobza.formats.weights import Piece
from kobza.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer

TEXT = "Реве та стогне Дніпр широкий, сердитий вітер завива.\n\tdef f(x):  return x ** 12345  # 🦊 їґ\n"
HARD = [
    TEXT,
    "",
    " ",
    "  a",
    "a \n\n b",
    "1234567",
    "it's  don't I'LL",
    "e\u0301 ＡＢ ﬁ",
    "<|endoftext|> <s>",
    "мʼята , x .",
]
SPECIALS = ["<|endoftext|>", "<|begin|>"]
MORE = TEXT + " ".join(HARD) + "ʼ"
TOKENIZERS = {
    "characters": CharTokenizer.train([MORE], "skip", SPECIALS),
    "characters and bytes": CharTokenizer.train([TEXT], "bytes", SPECIALS[:1]),
    "bytes": ByteTokenizer(SPECIALS[:1]),
    "byte pairs": LibraryTokenizer.train([MORE] * 3, 420, SPECIALS),
    "no specials": LibraryTokenizer.train([MORE], 300),
}
SOURCE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
TALK = [{"role": "user", "content": " їжак "}, {"role": "assistant", "content": "Ось {{ він }}"}]


def source(config, tokenizer=None, dtype=torch.float32, **about):
    """A model of drawn weights as a source; its own tokenizer is of bytes."""
    tokenizer = tokenizer or ByteTokenizer(SPECIALS[:1])
    config = dataclasses.replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size))
    model = drawn(config, dtype=torch.float32)
    tensors = {name: (0.5 * p.detach()).to(dtype) for name, p in model.named_parameters()}
    shapes, dtypes = {n: tuple(t.shape) for n, t in tensors.items()}, {n: t.dtype for n, t in tensors.items()}
    ends = tuple(tokenizer.ends)
    return Source("m", config, tokenizer, shapes, dtypes, tensors.__getitem__, "0" * 64, **{"ends": ends} | about)


def small(name):
    """A preset with its equations and not its size."""
    fields = preset(name)["model"] | {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_ff": 24, "max_seq_len": 32}
    return ModelConfig(**fields | {"vocab_size": 0})


def written(folder, *args, how=None, **about):
    """(source, folder) of a model, exported."""
    made = source(*args, **about)
    folder.mkdir(exist_ok=True)
    write_hf(made, folder, **how or {})
    return made, folder


def opened(folder):
    pytest.importorskip("transformers", reason="needs the extra: pip install 'kobza[parity]'")
    from kobza.export.proof.hf import open_transformers

    return open_transformers(folder)


def theirs_is_ours(made, engine):
    ids = torch.randint(made.tokenizer.vocab_size, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        ours = made.model()(torch.tensor([ids]))[0].double().log_softmax(-1)
    assert float((engine.logprobs(ids, list(range(20))) - ours).abs().max()) < 1e-5
    assert float(ours.std()) > 0.1  # else any model would do


STOCK = {name: ModelConfig(**fields) for name, fields in GGUFS.items() if name != "llama, 3.1"}
SHIFTED = {  # a norm of w as one of 1 + w, and the other way round
    "nemotron, norms of w": dataclasses.replace(STOCK["nemotron"], norm_offset=False, bias=False),
    "llama, norms of 1 + w": dataclasses.replace(STOCK["llama"], norm_offset=True),
}
PRESETS = [name for name in preset_names() if not why_not_exportable(small(name), "hf")]


def test_these_presets_can_be_exported():
    assert PRESETS == ["demo", "gpt2", "kobzar", "kobzar_better", "laptop", "speedrun", "workshop"]
    kinds = {config_to_hf(dataclasses.replace(small(name), vocab_size=9))["model_type"] for name in PRESETS}
    assert kinds == {"nemotron", "gpt2"}


@pytest.mark.parity
@pytest.mark.parametrize("name", [*STOCK, *SHIFTED, *PRESETS])
def test_transformers_computes_what_we_do(name, tmp_path):
    made, folder = written(tmp_path, (STOCK | SHIFTED).get(name) or small(name))
    theirs_is_ours(made, opened(folder))


@pytest.mark.parametrize("name", [*STOCK, *PRESETS])
def test_a_folder_comes_back_bit_for_bit(name, tmp_path):
    made, folder = written(tmp_path, STOCK[name] if name in STOCK else small(name))
    foreign = load_model(folder)
    found = dict(foreign.model.named_parameters())
    for key in found.keys() & made.shapes.keys():
        ours = made.read(key)[: found[key].shape[0]]
        assert torch.equal(found[key], ours), key
    for key in found.keys() - made.shapes.keys():  # filled in: what changes nothing
        assert float(found[key].detach().abs().max()) == float(
            key.endswith("norm.weight") and not foreign.config.norm_offset
        )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(foreign.model(ids), made.model()(ids), atol=1e-6)


KINDS = {"gpt2": "gpt2", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gemma": "gemma"}
KINDS |= {"gemma2": "gemma2", "gemma3": "gemma3_text", "arcee": "arcee", "nemotron": "nemotron"}


@pytest.mark.parity
@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_transformers_reads_and_writes_our_tokens(kind, name, tmp_path):
    """Whatever tokenizer class its model's type is known for."""
    tokenizer = TOKENIZERS[name]
    config = STOCK["llama"] if kind == "mistral" else STOCK[kind]
    config = dataclasses.replace(config, window=7) if kind == "mistral" else config
    made, folder = written(tmp_path, config, tokenizer)
    said = json.loads((folder / "config.json").read_text())
    assert said["model_type"] == (
        "llama" if kind == "qwen2" else KINDS.get(kind, kind)
    )  # a Qwen 2's would be built anew
    engine = opened(folder)
    assert len(engine._tokenizer) == tokenizer.vocab_size
    for text in HARD:
        ids = tokenizer.encode(text).tolist()
        assert engine.encode(text) == ids
        assert engine.begin(text) == ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + ids
        assert engine.decode(ids) == tokenizer.decode(ids)
    theirs = engine._tokenizer
    end = next(iter(tokenizer.ends), None)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.bos_id, end, None)
    assert said["eos_token_id"] == end and said["bos_token_id"] == tokenizer.bos_id


@pytest.mark.parity
def test_the_ends_the_template_and_the_sampling_go_along(tmp_path):
    tokenizer = LibraryTokenizer.train([MORE], 320, [*SPECIALS, "<|im_end|>"])
    eos, bos, turn = (tokenizer.specials[name] for name in ("<|endoftext|>", "<|begin|>", "<|im_end|>"))
    template = ChatTemplate(SOURCE, "<|begin|>", "<|im_end|>")
    about = {
        "template": template,
        "ends": (eos, turn),
        "sampling": {"temperature": 0.6, "top_k": 20, "no_repeat_ngram": 3},
    }
    made, folder = written(tmp_path, STOCK["llama"], tokenizer, **about)
    engine = opened(folder)
    assert engine.render(TALK, False) == template.render(TALK) != ""
    assert (folder / "chat_template.jinja").read_text() == SOURCE
    assert [engine.stops_at(i) for i in (eos, turn, bos)] == [True, True, False]
    said = json.loads((folder / "generation_config.json").read_text())
    assert said["eos_token_id"] == [eos, turn] and said["no_repeat_ngram_size"] == 3
    assert said["do_sample"] is True and (said["temperature"], said["top_k"]) == (0.6, 20)
    assert engine._tokenizer.eos_token == "<|im_end|>" and engine._tokenizer.bos_token_id == bos


@pytest.mark.parity
@pytest.mark.parametrize("bos, eos", [("<s>", "</s>"), ("", "<|endoftext|>"), ('"{%', "")])
def test_a_template_that_writes_tokens_the_vocabulary_has_not(bos, eos, tmp_path):
    """They are text to us and would be nothing to transformers, or a new token past the rows."""
    made, folder = written(tmp_path, STOCK["llama"], TOKENIZERS["byte pairs"], template=ChatTemplate(SOURCE, bos, eos))
    engine = opened(folder)
    assert engine.render(TALK, False) == made.template.render(TALK)
    assert len(engine._tokenizer) == made.tokenizer.vocab_size


def test_a_model_that_ends_nowhere_says_so(tmp_path):
    _, folder = written(tmp_path, STOCK["nemotron"], TOKENIZERS["no specials"])
    for name in ("config.json", "generation_config.json"):
        said = json.loads((folder / name).read_text())
        assert (
            said["eos_token_id"] is None and said["bos_token_id"] is None
        )  # their class has defaults, which are our tokens
    assert "eos_token" not in json.loads((folder / "tokenizer_config.json").read_text())


def library(model, bos=None, **parts):
    """A tokenizer.json of other people's."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import processors

    inner = Inner(model)
    for name, part in parts.items():
        setattr(inner, name, part)
    inner.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return LibraryTokenizer(inner.to_str())


def others():
    """Kinds of tokenizer that pulled models bring."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    names = ["<unk>", "<s>", "</s>", "<pad>"]
    pieces = [*names, *(f"<0x{b:02X}>" for b in range(256)), *sorted(set(MORE.replace(" ", "▁"))), "▁a", "та"]
    pieces = list(dict.fromkeys(pieces))
    vocab = {name: i for i, name in enumerate(pieces)}
    merges = [("▁", "a"), ("т", "а")]
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    yield "llama 2", library(bpe, True, normalizer=spaces, decoder=decoders.Sequence(back))
    unigram = models.Unigram([(name, -float(i)) for i, name in enumerate(pieces)], 0, True)
    plain = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    yield "unigram", library(unigram, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=plain)
    level = byte_pairs()
    splits = [pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=True)]
    yield "llama 3", library(level, True, pre_tokenizer=pre_tokenizers.Sequence(splits), decoder=decoders.ByteLevel())


def byte_pairs():
    """A byte-level vocabulary behind four special tokens."""
    from tokenizers import models

    content = json.loads(LibraryTokenizer.train([MORE] * 3, 420, ["<unk>", "<s>", "</s>", "<pad>"]).to_json())["model"]
    return models.BPE(content["vocab"], [tuple(pair) for pair in content["merges"]])


OTHERS = dict(others())


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "nemotron"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_peoples_tokenizers_are_read_as_they_are(kind, name, tmp_path):
    """Also where their file puts an end after a text, which no prompt has, and where a text spells a special token."""
    tokenizer = OTHERS[name]
    made, folder = written(tmp_path, STOCK[kind], tokenizer)
    engine = opened(folder)
    assert len(engine._tokenizer) == tokenizer.vocab_size and engine._tokenizer.pad_token == "<pad>"
    for text in [*HARD, "<unk></s> <0x41>", "\U0010fffd"]:
        ids = tokenizer.encode(text).tolist()
        assert engine.encode(text) == ids
        assert not ids or engine.begin(text) == tokenizer.encode_prompt(text)
        assert engine.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parity
def test_a_qwen_vocabulary_stays_a_qwen(tmp_path):
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    content = json.loads(LibraryTokenizer.train([MORE] * 3, 420, SPECIALS[:1]).to_json())
    content |= {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}}
    tokenizer = LibraryTokenizer(json.dumps(content))
    made, folder = written(tmp_path, STOCK["qwen2"], tokenizer)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"
    engine = opened(folder)
    assert all(engine.encode(text) == tokenizer.encode(text).tolist() for text in HARD)
    theirs_is_ours(made, engine)


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored, dtype, wanted", [
    (torch.float32, "auto", "F32"), (torch.bfloat16, "auto", "BF16"), (torch.float64, "auto", "F32"),
    (torch.float32, "bfloat16", "BF16"), (torch.bfloat16, "float16", "F16"), (torch.float16, "float32", "F32"),
])  # fmt: skip
def test_the_dtype_is_the_models_or_the_one_asked_for(stored, dtype, wanted, tmp_path):
    made, folder = written(tmp_path, STOCK["llama"], dtype=stored, how={"dtype": dtype})
    assert {info.dtype for _, info in find_tensors(folder).values()} == {wanted}
    name = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[wanted]
    assert json.loads((folder / "config.json").read_text())["dtype"] == name
    found = dict(load_model(folder).model.named_parameters())
    cast = getattr(torch, name)
    assert all(torch.equal(found[key], made.read(key).to(cast).float()) for key in found)


def test_what_a_dtype_cannot_hold_is_refused_by_name(tmp_path):
    made = source(STOCK["llama"])
    with pytest.raises(InputError, match="dtype is 'bf16'; auto, float32, bfloat16, float16; did you mean bfloat16"):
        write_hf(made, tmp_path, "bf16")
    made.read("blocks.1.mlp.up_proj.weight")[0, 0] = 7e4
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight: a weight of 70000 is more than F16 holds"):
        write_hf(made, tmp_path, "float16")
    (tmp_path / "again").mkdir()
    made.read("blocks.1.mlp.up_proj.weight")[0, 0] = float("nan")
    with pytest.raises(InputError, match="a weight is infinite or no number"):
        write_hf(made, tmp_path / "again")


@pytest.mark.parity
def test_shards_are_one_model(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.write_shards, "__defaults__", (None, 20_000))
    made, folder = written(tmp_path, STOCK["llama"])
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    assert index["metadata"]["total_size"] == sum(4 * torch.Size(s).numel() for s in made.shapes.values())
    theirs_is_ours(made, opened(folder))


def test_the_library_reads_our_safetensors_and_the_header_is_aligned(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.zeros(0, 2), "ї": torch.tensor(2.0)}
    seen = []
    pieces = [Piece(name, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]
    write_shards(tmp_path, pieces, torch.bfloat16, lambda *told: seen.append(told))
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), t.bfloat16()) for name, t in tensors.items())
    assert seen == [("a", 30, 32), ("b", 30, 32), ("ї", 32, 32)]
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "model.safetensors", pieces, torch.bfloat16)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "nemotron"])
def test_one_tensor_is_in_memory_at_a_time(name, tmp_path):
    """Fused, transposed and filled ones too: what was read for a piece is gone when the next is asked for."""
    made, alive = source(STOCK[name]), []

    def read(key):
        living = sum(ref() is not None for ref in alive)
        assert living <= 3, f"{living} tensors are alive as {key} is read"  # q, k, v of one that joins them
        tensor = made.read(key).clone()
        alive.append(weakref.ref(tensor))
        return tensor

    write_hf(dataclasses.replace(made, read=read), tmp_path)
    assert len(alive) >= len(made.shapes)

"""Tiny clean models in the form in which others release theirs: folder(path, family, seed, dtype) -> a Hugging Face style folder.

Every key, tensor name, tokenizer part and chat template is of the form the family's own files have, at width 32 and two layers,
with random weights. What is known to be wrong or doubtful in a released file (Phi-3's window of 2047 and pad = eos, its auto_map)
is right here: on these folders the doctor must find nothing. Controls and mutations of every area start from them.

No torch and no transformers: the tensors are written by numpy, the tokenizers as the json they are.
Families: gpt2, llama (3.1, instruct), gemma (2, instruct), gemma1, qwen (2.5, instruct), phi (3, instruct).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FAMILIES = ("gpt2", "llama", "gemma", "qwen", "phi")
WIDTH, LAYERS, FF, HEAD = 32, 2, 48, 8

TEXT = """The lute player sat under the tree and sang of the river, of the hills and of the long road home.
def play(notes, tempo=120): return [note for note in notes if note.length > 0]
He had 4 strings, then 12, then 60; who's counting? They're all in tune, aren't they?
Кобзар сидів під дубом і співав про річку, про гори та про довгу дорогу додому. Їхав козак за Дунай.
""".replace("\n", "\n\n")

LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

LLAMA_CHAT = (
    "{%- for message in messages %}"
    "{%- set turn = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim %}"
    "{%- set turn = turn + '<|eot_id|>' %}"
    "{%- if loop.first %}{%- set turn = bos_token + turn %}{%- endif %}"
    "{{- turn }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN_CHAT = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
PHI_CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def folder(path: Path, family: str, seed: int = 0, dtype: str = "fp32") -> Path:
    """Write the files of a tiny clean model into `path` and return it. dtype: "fp32" or "bf16", of tensors and config."""
    assert dtype in ("fp32", "bf16"), dtype
    path.mkdir(parents=True, exist_ok=True)
    files, vocab_size = _TOKENIZERS["gemma" if family == "gemma1" else family]()
    config, generation = _CONFIGS[family](files["tokenizer.json"], vocab_size)
    if family != "gpt2":  # GPT-2's says none
        config["torch_dtype"] = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    files |= {"config.json": config, "generation_config.json": generation}
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (path / name).write_bytes(text.encode())  # bytes: merges.txt must not get \r\n
    save_tensors(path / "model.safetensors", tensors(config, family, seed), dtype)
    return path


def save_tensors(path: Path, arrays: Mapping[str, np.ndarray], dtype: str = "fp32") -> None:
    """A .safetensors file. dtype "bf16" rounds the floats to the nearest bfloat16, ties to even, which numpy has no type for."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, end = [], 0
    for name, array in arrays.items():
        raw = bf16_bits(array) if dtype == "bf16" else np.ascontiguousarray(array, dtype=np.float32)
        start, end = end, end + raw.nbytes
        shown = {"fp32": "F32", "bf16": "BF16"}[dtype]
        header[name] = {"dtype": shown, "shape": list(array.shape), "data_offsets": [start, end]}
        parts.append(raw.tobytes())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def bf16_bits(array: np.ndarray) -> np.ndarray:
    """The upper 16 bits of each float32, rounded to nearest even. bf16_bits(np.float32(1)) -> 0x3F80"""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def edit(path: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change a json file in place: edit(path, "config.json", lambda config: config.update(rope_theta=1e4)) -> path"""
    content = json.loads((path / file).read_text(encoding="utf-8"))
    change(content)
    (path / file).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def edit_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    """Change the tensors of a folder in place: edit_tensors(path, lambda tensors: tensors.pop("lm_head.weight")) -> path"""
    file = path / "model.safetensors"
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    arrays, dtype = {}, "fp32"
    for name, info in header.items():
        data = np.frombuffer(raw[start + info["data_offsets"][0] : start + info["data_offsets"][1]], dtype="<u1")
        if info["dtype"] == "BF16":
            dtype, data = "bf16", (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        arrays[name] = data.view(np.float32).reshape(info["shape"]).copy()
    change(arrays)
    save_tensors(file, arrays, dtype)
    return path


# ---- tensors -----------------------------------------------------------------------------------------------------------------


def tensors(config: dict[str, Any], family: str, seed: int) -> dict[str, np.ndarray]:
    """name -> array, as the family's released safetensors name and shape them."""
    rng = np.random.default_rng(seed)
    draw = {"gpt2": _gpt2_tensors}.get(family, _llama_tensors)
    return {name: array.astype(np.float32) for name, array in draw(config, rng).items()}


def _normal(rng: np.random.Generator, *shape: int, fan_in: int = 0) -> np.ndarray:
    return rng.standard_normal(shape) / np.sqrt(fan_in or shape[-1])


def _llama_tensors(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Llama's names, which Gemma, Qwen and Phi-3 (fused) share. Norm weights near 1, near 0 where the factor is 1 + weight."""
    kind, C, F = config["model_type"], config["hidden_size"], config["intermediate_size"]
    D = config.get("head_dim") or C // config["num_attention_heads"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    center = 0.0 if kind.startswith("gemma") else 1.0
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if kind == "gemma2" else []
    found = {"model.embed_tokens.weight": rng.standard_normal((config["vocab_size"], C)) * 0.3}
    for i in range(config["num_hidden_layers"]):
        block, q, k, v = f"model.layers.{i}.", _normal(rng, H * D, C), _normal(rng, K * D, C), _normal(rng, K * D, C)
        gate, up = _normal(rng, F, C), _normal(rng, F, C)
        found |= {f"{block}{name}.weight": center + 0.1 * rng.standard_normal(C) for name in norms}
        if kind == "phi3":
            found[f"{block}self_attn.qkv_proj.weight"] = np.concatenate([q, k, v])
            found[f"{block}mlp.gate_up_proj.weight"] = np.concatenate([gate, up])
        else:
            for name, array in (("q", q), ("k", k), ("v", v)):
                found[f"{block}self_attn.{name}_proj.weight"] = array
                if kind == "qwen2":
                    found[f"{block}self_attn.{name}_proj.bias"] = 0.5 * rng.standard_normal(len(array))
            found |= {f"{block}mlp.gate_proj.weight": gate, f"{block}mlp.up_proj.weight": up}
        found |= {
            f"{block}self_attn.o_proj.weight": _normal(rng, C, H * D),
            f"{block}mlp.down_proj.weight": _normal(rng, C, F),
        }
    found["model.norm.weight"] = center + 0.1 * rng.standard_normal(C)
    if config.get("tie_word_embeddings") is False:
        found["lm_head.weight"] = _normal(rng, config["vocab_size"], C)
    return found


def _gpt2_tensors(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """GPT-2's names without a prefix, its (in, out) weights and the causal masks that its released file carries."""
    C, V, T = config["n_embd"], config["vocab_size"], config["n_ctx"]
    found = {"wte.weight": rng.standard_normal((V, C)) * 0.3, "wpe.weight": rng.standard_normal((T, C)) * 0.1}
    for i in range(config["n_layer"]):
        found[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, T, T)))
        for name, n_in, n_out in (
            ("attn.c_attn", C, 3 * C),
            ("attn.c_proj", C, C),
            ("mlp.c_fc", C, 4 * C),
            ("mlp.c_proj", 4 * C, C),
        ):
            found[f"h.{i}.{name}.weight"] = _normal(rng, n_in, n_out, fan_in=n_in)
            found[f"h.{i}.{name}.bias"] = 0.1 * rng.standard_normal(n_out)
        for name in ("ln_1", "ln_2"):
            found |= _layer_norm(f"h.{i}.{name}", C, rng)
    return found | _layer_norm("ln_f", C, rng)


def _layer_norm(name: str, C: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {f"{name}.weight": 1 + 0.1 * rng.standard_normal(C), f"{name}.bias": 0.1 * rng.standard_normal(C)}


# ---- tokenizers --------------------------------------------------------------------------------------------------------------


def byte_symbols() -> list[str]:
    """The character that stands for each of the 256 bytes in GPT-2's vocabulary: itself if printable, else from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def learn(words: list[list[str]], n_merges: int) -> list[tuple[str, str]]:
    """Byte-pair merges by count, the most frequent and then the smallest first."""
    merges: list[tuple[str, str]] = []
    for _ in range(n_merges):
        counts = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        words = [_merged(word, best) for word in words]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in word:
        out[-1:] = [out[-1] + symbol] if out and (out[-1], symbol) == pair else [*out[-1:], symbol]
    return out


def _added(names: Mapping[str, int], **flags: bool) -> list[dict[str, Any]]:
    off = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": name} | off | flags for name, i in names.items()]


def _decoder_table(added: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}


def _byte_level(
    specials: list[str], parts: dict[str, Any], **model: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A tokenizer.json of byte-level BPE, and its added tokens, which come after the 256 bytes and the merges."""
    symbols = byte_symbols()
    words = [[symbols[b] for b in word.encode()] for word in re.findall(r" ?\w+| ?[^\w\s]+|\s+", TEXT)]
    merges = learn(words, 50)
    vocab = {token: i for i, token in enumerate([*sorted(symbols), *("".join(pair) for pair in merges)])}
    added = _added({name: len(vocab) + i for i, name in enumerate(specials)})
    bpe = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    bpe |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **model}
    return _tokenizer(added, parts, bpe | {"vocab": vocab, "merges": [" ".join(pair) for pair in merges]}), added


def _sentence_piece(
    specials: list[str], later: list[str], parts: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, int]]:
    """A tokenizer.json of BPE over characters, U+2581 for the space and bytes for what has no character, as converted from a
    sentencepiece model: control tokens, bytes, merges, characters. -> also the ids of the control tokens."""
    words = [list(word.replace(" ", "▁")) for word in re.findall(r" ?\w+| ?[^\w\s]+", TEXT)]
    merges = learn(words, 40)
    characters = sorted({c for word in words for c in word} | {"▁"})
    pieces = [*specials, *(f"<0x{b:02X}>" for b in range(256)), *("".join(pair) for pair in merges), *characters]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(pieces))}
    ids = {name: vocab[name] for name in specials} | {name: len(vocab) + i for i, name in enumerate(later)}
    bpe = {"dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None}
    bpe |= {"fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    merges_text = [" ".join(pair) for pair in merges]
    return _tokenizer(_added(ids), parts, bpe | {"vocab": vocab, "merges": merges_text}), ids


def _tokenizer(added: list[dict[str, Any]], parts: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    start = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    none = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
    return start | none | parts | {"model": {"type": "BPE"} | model}


def _bytes(prefix: bool = False, trim: bool = True, regex: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": trim, "use_regex": regex}


def _split(pattern: str, then: dict[str, Any]) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, then]}


def _starts_with(token: str, i: int) -> dict[str, Any]:
    """The post-processor that puts the beginning-of-sequence token in front."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    pair = [special, first, {"SpecialToken": {"id": token, "type_id": 1}}, second]
    known = {token: {"id": token, "ids": [i], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [special, first], "pair": pair, "special_tokens": known}


def _token_map(**tokens: str) -> dict[str, Any]:
    return {
        name: {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        for name, token in tokens.items()
    }


def _gpt2_tokenizer() -> tuple[dict[str, Any], int]:
    parts = {"pre_tokenizer": _bytes(), "post_processor": _bytes(trim=False), "decoder": _bytes()}
    tokenizer, added = _byte_level(["<|endoftext|>"], parts)
    model = tokenizer["model"]
    merges = "\n".join(["#version: 0.2", *model["merges"], ""])
    vocab = json.dumps(model["vocab"] | {token["content"]: token["id"] for token in added}, ensure_ascii=False)
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": {"model_max_length": 128}}
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    return files | {"vocab.json": vocab, "merges.txt": merges, "special_tokens_map.json": end}, len(model["vocab"]) + 1


def _llama_tokenizer() -> tuple[dict[str, Any], int]:
    names = "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> "
    names += "<|finetune_right_pad_id|> <|reserved_special_token_2|> <|start_header_id|> <|end_header_id|> <|eom_id|> "
    names += "<|eot_id|> <|python_tag|>"
    parts = {"pre_tokenizer": _split(LLAMA_SPLIT, _bytes(regex=False)), "decoder": _bytes()}
    tokenizer, added = _byte_level(names.split(), parts, ignore_merges=True)
    start = _starts_with("<|begin_of_text|>", added[0]["id"])
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [_bytes(), start]}
    config = {
        "added_tokens_decoder": _decoder_table(added),
        "bos_token": "<|begin_of_text|>",
        "chat_template": LLAMA_CHAT,
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|eot_id|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    specials = _token_map(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config, "special_tokens_map.json": specials}
    return files, len(tokenizer["model"]["vocab"]) + len(added)


def _qwen_tokenizer() -> tuple[dict[str, Any], int]:
    names = "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>"
    parts = {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": _split(QWEN_SPLIT, _bytes(trim=False, regex=False)),
        "post_processor": _bytes(trim=False, regex=False),
        "decoder": _bytes(trim=False, regex=False),
    }
    tokenizer, added = _byte_level(names.split(), parts, continuing_subword_prefix="", end_of_word_suffix="")
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": _decoder_table(added),
        "additional_special_tokens": names.split()[1:],
        "bos_token": None,
        "chat_template": QWEN_CHAT,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 256,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    model = tokenizer["model"]
    merges = "\n".join(["#version: 0.2", *model["merges"], ""])
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config, "merges.txt": merges}
    files["vocab.json"] = json.dumps(model["vocab"], ensure_ascii=False)
    return files, 320  # padded to a multiple of 64, as Qwen's 151,936 rows for 151,665 tokens


def _gemma_tokenizer() -> tuple[dict[str, Any], int]:
    controls = "<pad> <eos> <bos> <unk> <mask> <unused0> <unused1> <start_of_turn> <end_of_turn>".split()
    space = {"String": " "}
    parts = {
        "normalizer": {"type": "Replace", "pattern": space, "content": "▁"},
        "pre_tokenizer": {"type": "Split", "pattern": space, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": _starts_with("<bos>", 2),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    }
    tokenizer, ids = _sentence_piece(controls, [], parts)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": _decoder_table(tokenizer["added_tokens"]),
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
        "bos_token": "<bos>",
        "chat_template": GEMMA_CHAT,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    specials: dict[str, Any] = _token_map(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    specials = {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]} | specials
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config, "special_tokens_map.json": specials}
    return files, len(tokenizer["model"]["vocab"])


def _phi_tokenizer() -> tuple[dict[str, Any], int]:
    later = "<|endoftext|> <|assistant|> <|placeholder1|> <|placeholder2|> <|system|> <|end|> <|user|>".split()
    space = {"String": " "}
    replace = {"type": "Replace", "pattern": space, "content": "▁"}
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "decoder": {
            "type": "Sequence",
            "decoders": [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
        },
    }
    tokenizer, ids = _sentence_piece(["<unk>", "<s>", "</s>"], later, parts)
    first = {"Sequence": {"id": "A", "type_id": 0}}
    pair = [first, {"Sequence": {"id": "B", "type_id": 1}}]
    none = {"type": "TemplateProcessing", "single": [first], "pair": pair, "special_tokens": {}}
    tokenizer["post_processor"] = none  # as released: add_bos_token is false
    for token in tokenizer["added_tokens"]:  # as released: what opens or ends a turn eats the blanks after it
        token["rstrip"] = token["content"] in ("</s>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": _decoder_table(tokenizer["added_tokens"]),
        "bos_token": "<s>",
        "chat_template": PHI_CHAT,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 128,
        "pad_token": "<|placeholder1|>",
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    ends = _token_map(bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|placeholder1|>", unk_token="<unk>")
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config, "special_tokens_map.json": ends}
    n = max(ids.values()) + 1
    return files, n + -n % 64  # padded, as Phi-3's 32,064 rows for 32,011 tokens


# ---- configs -----------------------------------------------------------------------------------------------------------------


def ids_of(tokenizer: dict[str, Any]) -> dict[str, int]:
    """token -> id of a tokenizer.json, added tokens included."""
    return tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


def _gpt2_config(tokenizer: dict[str, Any], vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    end = ids_of(tokenizer)["<|endoftext|>"]
    config = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": end,
        "embd_pdrop": 0.1,
        "eos_token_id": end,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 128,
        "n_embd": WIDTH,
        "n_head": 4,
        "n_layer": LAYERS,
        "n_positions": 128,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": vocab_size,
    }
    generation = {
        "_from_model_config": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "transformers_version": "4.26.0.dev0",
    }
    return config, generation


def _llama_like(architecture: str, kind: str, vocab_size: int, **more: Any) -> dict[str, Any]:
    start = {"architectures": [architecture], "attention_dropout": 0.0, "initializer_range": 0.02, "model_type": kind}
    start |= {"hidden_act": "silu", "hidden_size": WIDTH, "intermediate_size": FF, "num_hidden_layers": LAYERS}
    start |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000.0, "use_cache": True}
    return dict(sorted((start | {"vocab_size": vocab_size, "transformers_version": "4.43.0.dev0"} | more).items()))


def _llama_config(tokenizer: dict[str, Any], vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    ids = ids_of(tokenizer)
    ends = [ids[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = _llama_like(
        "LlamaForCausalLM",
        "llama",
        vocab_size,
        attention_bias=False,
        bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=ends,
        max_position_embeddings=512,
        mlp_bias=False,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling=scaling | {"original_max_position_embeddings": 32, "rope_type": "llama3"},
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )
    generation = {"bos_token_id": config["bos_token_id"], "do_sample": True, "eos_token_id": ends, "temperature": 0.6}
    return config, generation | {"top_p": 0.9, "transformers_version": "4.42.3"}


def _gemma_config(tokenizer: dict[str, Any], vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    config = _llama_like(
        "Gemma2ForCausalLM",
        "gemma2",
        vocab_size,
        attention_bias=False,
        attn_logit_softcapping=50.0,
        bos_token_id=2,
        cache_implementation="hybrid",
        eos_token_id=[1, ids_of(tokenizer)["<end_of_turn>"]],
        final_logit_softcapping=30.0,
        head_dim=HEAD,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=128,
        num_attention_heads=8,
        num_key_value_heads=4,
        pad_token_id=0,
        query_pre_attn_scalar=HEAD,
        rms_norm_eps=1e-06,
        sliding_window=16,
    )
    generation = {"_from_model_config": True, "bos_token_id": 2, "cache_implementation": "hybrid"}
    return config, generation | {
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": 0,
        "transformers_version": "4.42.4",
    }


def _gemma1_config(tokenizer: dict[str, Any], vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    config = _llama_like(
        "GemmaForCausalLM",
        "gemma",
        vocab_size,
        attention_bias=False,
        bos_token_id=2,
        eos_token_id=1,
        head_dim=HEAD,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=128,
        num_attention_heads=8,
        num_key_value_heads=1,
        pad_token_id=0,
        rms_norm_eps=1e-06,
    )
    turn = ids_of(tokenizer)["<end_of_turn>"]
    generation = {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": [1, turn], "pad_token_id": 0}
    return config, generation


def _qwen_config(tokenizer: dict[str, Any], vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    ids = ids_of(tokenizer)
    start, end = ids["<|endoftext|>"], ids["<|im_end|>"]
    config = _llama_like(
        "Qwen2ForCausalLM",
        "qwen2",
        vocab_size,
        bos_token_id=start,
        eos_token_id=end,
        max_position_embeddings=256,
        max_window_layers=1,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=256,
        tie_word_embeddings=True,
        use_sliding_window=False,
    )
    generation = {"bos_token_id": start, "pad_token_id": start, "do_sample": True, "eos_token_id": [end, start]}
    sampling = {"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    return config, generation | sampling | {"transformers_version": "4.37.0"}


def _phi_config(tokenizer: dict[str, Any], vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    ids = ids_of(tokenizer)
    config = _llama_like(
        "Phi3ForCausalLM",
        "phi3",
        vocab_size,
        attention_bias=False,
        bos_token_id=ids["<s>"],
        embd_pdrop=0.0,
        eos_token_id=ids["<|endoftext|>"],
        max_position_embeddings=128,
        num_key_value_heads=4,
        original_max_position_embeddings=128,
        pad_token_id=ids["<|placeholder1|>"],
        resid_pdrop=0.0,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        sliding_window=16,
        tie_word_embeddings=False,
    )
    generation = {"_from_model_config": True, "bos_token_id": ids["<s>"], "pad_token_id": ids["<|placeholder1|>"]}
    return config, generation | {
        "eos_token_id": [ids["<|endoftext|>"], ids["<|end|>"]],
        "transformers_version": "4.39.3",
    }


_Files = Callable[[], tuple[dict[str, Any], int]]
_Configs = Callable[[dict[str, Any], int], tuple[dict[str, Any], dict[str, Any]]]
_TOKENIZERS: dict[str, _Files] = {
    "gpt2": _gpt2_tokenizer,
    "llama": _llama_tokenizer,
    "gemma": _gemma_tokenizer,
    "qwen": _qwen_tokenizer,
    "phi": _phi_tokenizer,
}
_CONFIGS: dict[str, _Configs] = {
    "gpt2": _gpt2_config,
    "llama": _llama_config,
    "gemma": _gemma_config,
    "gemma1": _gemma1_config,
    "qwen": _qwen_config,
    "phi": _phi_config,
}

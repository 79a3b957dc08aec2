"""Bugs of configs and tensor headers, each put into a clean specimen by one edit of its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kobza.doctor.files import folder as folders
from kobza.doctor.mutations import specimens
from kobza.doctor.mutations.proof import Control, Mutation
from kobza.doctor.mutations.specimens import edit, edit_tensors

Edit = Callable[[Path], Any]


def config(**values: Any) -> Edit:
    """Sets keys of config.json; config(head_dim=None) takes the key out, which no released file means by null."""
    return _set("config.json", values)


def generation(**values: Any) -> Edit:
    """The same for generation_config.json."""
    return _set("generation_config.json", values)


def tokenizer_config(**values: Any) -> Edit:
    """The same for tokenizer_config.json."""
    return _set("tokenizer_config.json", values)


def _set(file: str, values: dict[str, Any]) -> Edit:
    def change(content: dict[str, Any]) -> None:
        content.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del content[key]

    return lambda path: edit(path, file, change)


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Edit:
    """Changes the arrays by name."""
    return lambda path: edit_tensors(path, change)


def mutation(code: str, name: str, family: str, *edits: Edit) -> Mutation:
    """A clean specimen of the family with the edits made."""

    def make(path: Path, seed: int, dtype: str) -> folders.Folder:
        specimens.folder(path, family, seed, dtype)
        for change in edits:
            change(path)
        return folders.open_(path)

    return Mutation(code, f"{family}: {name}", make)


def _control(family: str) -> Control:
    return Control(family, lambda path, seed, dtype: folders.open_(specimens.folder(path, family, seed, dtype)))


def _scaling(**values: Any) -> Edit:
    def change(content: dict[str, Any]) -> None:
        content["rope_scaling"].update(values)
        for key in [key for key, value in values.items() if value is None]:
            del content["rope_scaling"][key]

    return lambda path: edit(path, "config.json", change)


def _new_head(arrays: dict[str, np.ndarray]) -> None:
    head = arrays["model.embed_tokens.weight"].copy()
    head[7, 3] += 0.5
    arrays["lm_head.weight"] = head


def _shift_norms(by: float) -> Edit:
    def change(arrays: dict[str, np.ndarray]) -> None:
        for name in arrays:
            if "norm" in name:
                arrays[name] = arrays[name] + by

    return tensors(change)


def _stored_frequencies(arrays: dict[str, np.ndarray]) -> None:
    """As float(bfloat16(x)): eight bits of a mantissa."""
    exact = (10_000.0 ** -(np.arange(0, 8, 2) / 8)).astype(np.float32)
    bits = specimens.bf16_bits(exact).astype(np.uint32) << 16
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = bits.view(np.float32)


def _drop(name: str) -> Edit:
    return tensors(lambda arrays: arrays.pop(name))


def _zero_rows(*tokens: str) -> Edit:
    def change(path: Path) -> None:
        ids = folders.open_(path).ids()

        def zero(arrays: dict[str, np.ndarray]) -> None:
            arrays["model.embed_tokens.weight"][[ids[token] for token in tokens]] = 0

        edit_tensors(path, zero)

    return change


def _add_token(path: Path) -> None:
    """A token behind the embedding's last row, as add_tokens without resize leaves it."""

    def change(content: dict[str, Any]) -> None:
        last = content["added_tokens"][-1]
        content["added_tokens"].append(last | {"id": last["id"] + 1, "content": "<sep>"})

    edit(path, "tokenizer.json", change)


def _no_bos(path: Path) -> None:
    edit(path, "tokenizer.json", lambda content: content.update(post_processor=None))
    plain = specimens.GEMMA_CHAT.replace("{{ bos_token }}", "")
    edit(path, "tokenizer_config.json", lambda content: content.update(add_bos_token=False, chat_template=plain))


def _overflowed(arrays: dict[str, np.ndarray]) -> None:
    arrays["model.norm.weight"][3] = np.inf


def _end_as_pad(path: Path) -> None:
    edit(path, "tokenizer_config.json", lambda content: content.update(pad_token=content["eos_token"]))


CONTROLS = tuple(_control(family) for family in (*specimens.FAMILIES, "gemma1"))
MUTATIONS = (
    mutation(
        "X1", "asks for its own code", "phi", config(auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    ),
    mutation("G1", "nobody writes <bos>", "gemma", _no_bos),
    mutation("G3", "norm weights stored as the factor", "gemma", _shift_norms(1.0)),
    mutation("G3", "norm weights stored less 1", "llama", _shift_norms(-1.0)),
    mutation("G4", "epsilon of another family", "gemma", config(rms_norm_eps=1e-5)),
    mutation("G4", "epsilon absent", "qwen", config(rms_norm_eps=None)),
    mutation("G4", "epsilon 0", "llama", config(rms_norm_eps=0.0)),
    mutation("G6", "frequencies stored in bfloat16", "phi", tensors(_stored_frequencies)),
    mutation("G7", "hidden_act alone, and exact", "gemma1", config(hidden_act="gelu", hidden_activation=None)),
    mutation("G7", "exact GELU", "gemma", config(hidden_activation="gelu")),
    mutation("G8", "no head, and not tied", "llama", _drop("lm_head.weight")),
    mutation("G8", "tied, and another head in the file", "qwen", tensors(_new_head)),
    mutation("G9", "head_dim absent", "gemma", config(head_dim=None)),
    mutation("G9", "one layer too many counted", "llama", config(num_hidden_layers=3)),
    mutation("G9", "one layer too few counted", "qwen", config(num_hidden_layers=1)),
    mutation("G9", "a million layers", "phi", config(num_hidden_layers=1_000_000)),
    mutation("G9", "key/value heads that do not divide", "qwen", config(num_key_value_heads=3)),
    mutation("G9", "a layer lacks a tensor", "llama", _drop("model.layers.1.mlp.up_proj.weight")),
    mutation("G9", "vocab_size of the base model", "gpt2", config(vocab_size=300)),
    mutation("G9", "a size in quotes", "qwen", config(hidden_size="32")),
    mutation("G12", "caps off", "gemma", config(attn_logit_softcapping=0.0)),
    mutation("G13", "query scale absent", "gemma", config(query_pre_attn_scalar=None)),
    mutation("G13", "query scale of another size", "gemma", config(query_pre_attn_scalar=224)),
    mutation("G14", "an infinite weight", "qwen", tensors(_overflowed)),
    mutation("G14", "float16 for Gemma 2", "gemma", config(torch_dtype="float16")),
    mutation("P1", "a window of 15", "phi", config(sliding_window=15)),
    mutation("P1", "a window below 0", "gemma", config(sliding_window=-16)),
    mutation("P2", "too few layer types", "gemma", config(layer_types=["sliding_attention"])),
    mutation(
        "P2",
        "windowed layers and no window",
        "qwen",
        config(layer_types=["full_attention", "sliding_attention"], sliding_window=None),
    ),
    mutation("P4", "padding is the end", "phi", _end_as_pad),
    mutation("P5", "one end of two", "gemma", generation(eos_token_id=1)),
    mutation("L1", "rows of turn marks at 0", "llama", _zero_rows("<|start_header_id|>", "<|eot_id|>")),
    mutation("L4", "llama3 without its frequencies", "llama", _scaling(low_freq_factor=None, high_freq_factor=None)),
    mutation("L4", "two types", "llama", _scaling(type="linear")),
    mutation("L4", "low above high", "llama", _scaling(low_freq_factor=8.0)),
    mutation(
        "L4",
        "longrope lists of another width",
        "phi",
        config(rope_scaling={"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 4}),
    ),
    mutation("L5", "base absent", "qwen", config(rope_theta=None)),
    mutation("L5", "base at the default", "llama", config(rope_theta=10_000.0)),
    mutation("L9", "a token behind the last row", "llama", _add_token),
    mutation("L9", "an id equal to the number of rows", "gpt2", generation(bos_token_id=307)),
    mutation("L9", "end id behind the last row", "gpt2", config(eos_token_id=50256)),
)

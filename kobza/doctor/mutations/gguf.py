"""GGUF files made from the specimens, and files in which one thing is wrong.

`make` writes what llama.cpp's converter writes for each family: names, permuted rows, Gemma's 1, vocabulary, flags. Every
mutation is that file with one edit, of its settings, of the numbers before they are put into blocks, or of the blocks themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kobza.config import ModelConfig
from kobza.doctor.files.gguf_header import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, GgufSubject, hf_adds_bos, open_
from kobza.doctor.files.gguf_weights import halves, ours, pairs
from kobza.doctor.mutations.proof import Control, Mutation
from kobza.doctor.mutations.specimens import FAMILIES, edit, edit_tensors, folder
from kobza.formats.families import layout_of
from kobza.formats.ggml import BLOCKS, dequantize, quantize
from kobza.formats.gguf import read_gguf, write_gguf
from kobza.formats.gguf_families import llama3_slowdown
from kobza.formats.headers import read_numpy
from kobza.formats.layouts import Slot, layout_by_names, prefix_of, shapes, slots

Metadata = dict[str, tuple[str, Any]]
Arrays = dict[str, np.ndarray]
Blocks = dict[str, tuple[str, tuple[int, ...], np.ndarray]]
UNUSED, BYTE = 5, 6
ARCHS = {"gpt2": "gpt2", "llama": "llama", "gemma": "gemma2", "gemma1": "gemma", "qwen": "qwen2", "phi": "phi3"}
PRE = {"gpt2": "gpt-2", "llama": "llama-bpe", "qwen": "qwen2"}
TURN_ENDS = {"gemma": "<end_of_turn>", "gemma1": "<end_of_turn>", "phi": "<|end|>"}


# -- a clean file --------------------------------------------------------------------------------------------------


def make(
    path: Path,
    seed: int,
    dtype: str,
    family: str = "llama",
    type: str = "F16",
    metadata: Callable[[Metadata], Any] | None = None,
    arrays: Callable[[Arrays], Any] | None = None,
    blocks: Callable[[Blocks], Any] | None = None,
    config: Callable[[dict[str, Any]], Any] | None = None,
    weights: Callable[[Arrays], Any] | None = None,
    alone: bool = False,
) -> GgufSubject:
    """A specimen and its GGUF file, edited on the way. config and weights edit the folder; metadata, arrays (before they are put
    into blocks) and blocks the file. alone: without the folder beside it."""
    home = folder(path / "hf", family, seed, dtype)
    if config:
        edit(home, "config.json", config)
    if weights:
        edit_tensors(home, weights)
    source = GgufSubject(read_gguf(_empty(path / "empty.gguf")), home)
    said, numbers = _metadata(source, family), _arrays(source, ARCHS[family])
    if metadata:
        metadata(said)
    if arrays:
        arrays(numbers)
    made = {name: _blocks(array, type) for name, array in numbers.items()}
    if blocks:
        blocks(made)
    write_gguf(path / "model.gguf", said, made)
    return open_(path / "model.gguf", None if alone else home)


def _empty(path: Path) -> Path:
    write_gguf(path, {}, {})
    return path


def _blocks(array: np.ndarray, type: str) -> tuple[str, tuple[int, ...], np.ndarray]:
    """Vectors in F32, matrices in `type`, or in F16 where a row is not whole blocks of it, as the converter does."""
    type = "F32" if array.ndim < 2 else type if array.shape[-1] % BLOCKS[type][0] == 0 else "F16"
    return type, array.shape, quantize(array, type)


def _arrays(source: GgufSubject, arch: str) -> Arrays:
    """The folder's weights as the file keeps them, float32."""
    config, tensors = source.hf_config, source.hf_tensors
    sizes, found = shapes(config), {}
    for slot in slots(
        config, layout_by_names(config, tensors), prefix_of(layout_by_names(config, tensors), tensors), tensors
    ):
        path, info = tensors[slot.theirs]
        found |= ours(slot, np.asarray(read_numpy(path, info), np.float32), sizes)
    made = {slot.theirs: stored(slot, found) for slot in slots(config, layout_of(arch, gguf=True))}
    if config.rope_scaling == "llama3":
        made["rope_freqs.weight"] = np.float32(llama3_slowdown(config))
    return made


def stored(slot: Slot, found: Arrays) -> np.ndarray:
    """The inverse of gguf_weights.ours: our weights as one tensor of a file."""
    array = np.concatenate([found[name] for name in slot.ours])
    array = pairs(array, slot.n_heads) if slot.n_heads else array
    array = array + np.float32(slot.shift) if slot.shift else array
    return np.ascontiguousarray(array.T if slot.transposed else array)


def _metadata(source: GgufSubject, family: str) -> Metadata:
    arch, config, hf = ARCHS[family], source.hf_config, source.hf
    said: Metadata = {"general.architecture": ("string", arch), "general.name": ("string", f"tiny {family}")}
    said |= {f"{arch}.{key}": value for key, value in _settings(config, hf, arch).items()}
    return said | _tokenizer(source, family)


def _settings(config: ModelConfig, hf: dict[str, Any], arch: str) -> Metadata:
    counts = {
        "context_length": config.max_seq_len,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_ff,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_kv_head,
        "vocab_size": config.vocab_size,
    }
    if arch == "gpt2":
        eps: Metadata = {"attention.layer_norm_epsilon": ("float32", config.norm_eps)}
        return {key: ("uint32", n) for key, n in counts.items()} | eps
    counts |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    counts |= {"rope.dimension_count": config.head_dim}
    if arch in ("gemma2", "phi3") and hf.get("sliding_window"):
        counts["attention.sliding_window"] = hf["sliding_window"]
    reals = {"attention.layer_norm_rms_epsilon": config.norm_eps, "rope.freq_base": config.rope_theta}
    if arch == "gemma2":
        reals |= {"attn_logit_softcapping": config.attn_softcap, "final_logit_softcapping": config.softcap}
    return {key: ("uint32", n) for key, n in counts.items()} | {key: ("float32", x) for key, x in reals.items()}


def _tokenizer(source: GgufSubject, family: str) -> Metadata:
    """The vocabulary and its flags."""
    texts, added = source.hf_tokens, {token["id"]: token for token in source.added}
    tokens, types = [], []
    for i in range(source.hf_config.vocab_size):
        text = texts.get(i, f"[PAD{i}]")
        kind = CONTROL if added.get(i, {}).get("special") else USER_DEFINED if i in added else NORMAL
        kind = UNUSED if i not in texts else UNKNOWN if text == "<unk>" else BYTE if text.startswith("<0x") else kind
        tokens.append(text)
        types.append(kind)
    bpe = family in PRE
    ids = {text: i for i, text in texts.items()}
    said: Metadata = {"model": ("string", "gpt2" if bpe else "llama")}
    said |= {"tokens": ("array:string", tokens), "token_type": ("array:int32", types)}
    if bpe:
        said |= {"pre": ("string", PRE[family]), "merges": ("array:string", source.tokenizer["model"]["merges"])}
    else:
        said["scores"] = ("array:float32", [-float(i) for i in range(len(tokens))])
    for ours_, theirs in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        named = ids.get(str(source.tokenizer_config.get(f"{theirs}_token")))
        known = sorted(source.hf_ids(theirs)) if named is None else [named]
        said |= {f"{ours_}_token_id": ("uint32", known[0])} if known else {}
    if family in TURN_ENDS:
        said["eot_token_id"] = ("uint32", ids[TURN_ENDS[family]])
    said["add_bos_token"] = ("bool", hf_adds_bos(source))
    said = {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    template = source.tokenizer_config.get("chat_template")
    return said | ({"tokenizer.chat_template": ("string", template)} if template else {})


# -- edits ---------------------------------------------------------------------------------------------------------

T, K, Q = "tokenizer.ggml.", "blk.1.attn_k.weight", "blk.1.attn_q.weight"


def drop(*keys: str) -> Callable[[dict], None]:
    return lambda said: [said.pop(key) for key in keys] and None


def put(key: str, value: Any) -> Callable[[Metadata], None]:
    """Another value for a key that is there."""

    def change(said: Metadata) -> None:
        assert said[key][1] != value, f"{key} is {value!r} already"
        said[key] = (said[key][0], value)

    return change


def cut(key: str, n: int) -> Callable[[Metadata], None]:
    return lambda said: said.update({key: (said[key][0], said[key][1][:n])})


def retype(text: str, kind: int) -> Callable[[Metadata], None]:
    def change(said: Metadata) -> None:
        said[f"{T}token_type"][1][said[f"{T}tokens"][1].index(text)] = kind

    return change


def swap_tokens(said: Metadata) -> None:
    tokens = said[f"{T}tokens"][1]
    tokens[40], tokens[41] = tokens[41], tokens[40]


def twice(said: Metadata) -> None:
    tokens = said[f"{T}tokens"][1]
    tokens[-1] = tokens[40]


def swap_merges(said: Metadata) -> None:
    merges = said[f"{T}merges"][1]
    said[f"{T}merges"] = ("array:string", [merges[1], merges[0], *merges[2:]])


def no_byte(said: Metadata) -> None:
    tokens = said[f"{T}tokens"][1]
    tokens[tokens.index("<0x0A>")] = "newline"


def ends_elsewhere(said: Metadata) -> None:
    """Llama 3's first files: <|end_of_text|> ends the text, <|eot_id|> the turn."""
    said[f"{T}eos_token_id"] = ("uint32", said[f"{T}tokens"][1].index("<|end_of_text|>"))


def unknown_end(said: Metadata) -> None:
    """A turn that ends in a token of a name that no reader knows."""
    old, new = "<|im_end|>", "<|turn_over|>"
    tokens = said[f"{T}tokens"][1]
    tokens[tokens.index(old)] = new
    said[f"{T}eos_token_id"] = ("uint32", tokens.index("<|endoftext|>"))
    template = said["tokenizer.chat_template"][1]
    said["tokenizer.chat_template"] = ("string", template.replace(old, new))


def each(pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], None]:
    """Change the tensors whose name holds the pattern."""

    def all_of(arrays: Arrays) -> None:
        names = [name for name in arrays if pattern in name]
        assert names, pattern
        arrays.update({name: np.ascontiguousarray(change(arrays[name])) for name in names})

    return all_of


def duplicate_head(arrays: Arrays) -> None:
    arrays["output.weight"] = arrays["token_embd.weight"]


def swap_gate(arrays: Arrays) -> None:
    gate, up = "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"
    arrays[gate], arrays[up] = arrays[up], arrays[gate]


def in_blocks(name: str, change: Callable[[np.ndarray], np.ndarray], type: str = "Q4_0") -> Callable[[Blocks], None]:
    """Change the blocks of one tensor, of another type if need be: uint8 (n, bytes of a block) -> the same."""

    def one(made: Blocks) -> None:
        old, shape, raw = made[name]
        raw = quantize(dequantize(raw, old, shape), type)
        made[name] = type, shape, np.ascontiguousarray(change(raw.reshape(-1, BLOCKS[type][1]).copy())).reshape(-1)

    return one


def neighbours_share(raw: np.ndarray) -> np.ndarray:
    """Nibbles in the order 0 1, 2 3, ... in place of 0 16, 1 17, ..."""
    q = np.concatenate([raw[:, 2:] & 15, raw[:, 2:] >> 4], axis=1)  # (n, 32)
    raw[:, 2:] = q[:, 0::2] | q[:, 1::2] << np.uint8(4)
    return raw


def signed_nibbles(raw: np.ndarray) -> np.ndarray:
    """Integers -8 to 7 in two's complement, where the type adds 8."""
    raw[:, 2:] ^= 0x88
    return raw


def scaled(raw: np.ndarray) -> np.ndarray:
    """Scales made with 7 in place of 8, and the integers with 8."""
    raw[:, :2] = (raw[:, :2].copy().view("<f2") * np.float16(8 / 7)).view(np.uint8)
    return raw


def broken_scale(raw: np.ndarray) -> np.ndarray:
    raw[3, :2] = np.array([np.inf], "<f2").view(np.uint8)
    return raw


def outlier(arrays: Arrays) -> None:
    """One column in 32 forty times as large."""
    for name, array in arrays.items():
        if "attn_q.weight" in name:
            array[:, ::32] *= 40


def odd_rows(made: Blocks) -> None:
    """Rows of 48 in blocks of 32."""
    name = "blk.0.ffn_down.weight"
    type, shape, raw = made[name]
    made[name] = "Q8_0", shape, quantize(dequantize(raw, type, shape).reshape(-1, 32), "Q8_0")


def _mutations() -> tuple[Mutation, ...]:
    """Every row: code, what is wrong, and how it is made."""
    llama, qwen, gemma, phi = (partial(make, family=family) for family in ("llama", "qwen", "gemma", "phi"))
    gpt2 = partial(make, family="gpt2")
    q4 = partial(make, family="llama", type="Q4_0")
    square = "blk.0.attn_output.weight"
    rows: list[tuple[str, str, Callable[..., Any]]] = [
        ("L9", "eos beyond the vocabulary", partial(llama, metadata=put(f"{T}eos_token_id", 128_001))),
        ("L9", "padding id -1", partial(qwen, metadata=put(f"{T}padding_token_id", 2**32 - 1), alone=True)),
        ("F2", "fewer tokens than rows", partial(qwen, metadata=cut(f"{T}tokens", 300))),
        ("F2", "a flag of another type", partial(llama, metadata=_bos_as_number, alone=True)),
        ("F2", "no EOS", partial(qwen, metadata=drop(f"{T}eos_token_id"), alone=True)),
        ("F2", "types for fewer tokens", partial(llama, metadata=cut(f"{T}token_type", 9), alone=True)),
        ("F2", "a token twice", partial(llama, metadata=twice, alone=True)),
        ("F2", "a turn's end as text", partial(llama, metadata=retype("<|eot_id|>", NORMAL), alone=True)),
        ("F2", "a turn's start as text", partial(gemma, metadata=retype("<start_of_turn>", NORMAL), alone=True)),
        ("F2", "a special token as text, beside the folder", partial(llama, metadata=retype("<|python_tag|>", NORMAL))),
        ("F2", "no pre-tokenizer", partial(qwen, metadata=drop(f"{T}pre"), alone=True)),
        ("F2", "another family's pre-tokenizer", partial(qwen, metadata=put(f"{T}pre", "llama-bpe"))),
        ("F2", "GPT-2's pre-tokenizer for Llama 3", partial(llama, metadata=put(f"{T}pre", "gpt-2"))),
        ("F2", "no merges", partial(qwen, metadata=drop(f"{T}merges"), alone=True)),
        ("F2", "merges of another order", partial(qwen, metadata=swap_merges)),
        ("F2", "a byte without a token", partial(gemma, metadata=no_byte, alone=True)),
        ("F2", "no scores", partial(phi, metadata=drop(f"{T}scores"), alone=True)),
        ("F2", "two tokens swapped", partial(llama, metadata=swap_tokens)),
        ("F2", "no BOS for Gemma", partial(gemma, metadata=put(f"{T}add_bos_token", False), alone=True)),
        ("F2", "no BOS, beside the folder", partial(llama, metadata=put(f"{T}add_bos_token", False))),
        ("F2", "BOS by default that the folder lacks", partial(phi, metadata=drop(f"{T}add_bos_token"))),
        ("F2", "another BOS", partial(llama, metadata=put(f"{T}bos_token_id", 5))),
        ("F2", "another EOS", partial(gemma, metadata=put(f"{T}eos_token_id", 5))),
        ("F2", "no chat template", partial(llama, metadata=drop("tokenizer.chat_template"))),
        ("P5", "a turn's end that only a name gives away", partial(llama, metadata=ends_elsewhere, alone=True)),
        ("P5", "a turn's end that nothing gives away", partial(qwen, metadata=unknown_end, alone=True)),
        ("P5", "no eot", partial(phi, metadata=drop(f"{T}eot_token_id"), alone=True)),
        ("C5", "a template of other words", partial(llama, metadata=_respell("assistant", "model"))),
        (
            "C5",
            "a template less a newline",
            partial(gemma, metadata=_respell("+ '\n' +", "+")),
        ),
        ("L5", "rope base lost", partial(llama, metadata=drop("llama.rope.freq_base"))),
        ("L4", "Llama 3's factors for another scale", partial(llama, arrays=each("rope_freqs", _other_factors))),
        ("L4", "a scaling that the folder lacks", partial(qwen, metadata=_linear)),
        ("P2", "window lost", partial(phi, metadata=drop("phi3.attention.sliding_window"))),
        ("G4", "another epsilon", partial(llama, metadata=_other_eps)),
        ("G12", "another cap", partial(gemma, metadata=put("gemma2.final_logit_softcapping", 50.0))),
        ("G13", "a query scale that the format cannot say", partial(gemma, config=_other_scale)),
        ("F3", "fewer blocks", partial(llama, metadata=put("llama.block_count", 1))),
        ("F3", "another number of k heads", partial(llama, metadata=_other_heads, alone=True)),
        ("F3", "a norm missing", partial(llama, arrays=drop("blk.1.ffn_norm.weight"), alone=True)),
        ("F3", "rope_freqs missing", partial(llama, arrays=drop("rope_freqs.weight"))),
        ("F3", "head missing", partial(phi, arrays=drop("output.weight"))),
        ("F3", "tied head written twice", partial(gemma, arrays=duplicate_head)),
        ("F3", "q and k not permuted", partial(llama, arrays=_unpermuted)),
        ("F3", "k permuted for the heads of q", partial(llama, arrays=each("attn_k.", lambda x: _repermuted(x, 4)))),
        ("F3", "q permuted twice", partial(llama, arrays=each("attn_q.", lambda x: pairs(x, 4)))),
        ("F3", "permuted where it must not be", partial(qwen, arrays=each("attn_q.weight", lambda x: pairs(x, 4)))),
        ("F3", "Gemma's 1 not added", partial(gemma, arrays=each("norm.weight", lambda x: x - 1))),
        ("F3", "Gemma's 1 added twice", partial(gemma, arrays=each("norm.weight", lambda x: x + 1))),
        ("F3", "transposed", partial(llama, arrays=each(square, lambda x: x.T))),
        ("F3", "a tied head of other values", partial(gemma, arrays=_other_head)),
        ("F3", "stored in the order of its transpose", partial(gpt2, arrays=each("blk.0.ffn_up.weight", _conv1d))),
        ("F3", "head_count_kv that does not divide", partial(llama, metadata=_odd_heads, alone=True)),
        ("F3", "gate and up swapped", partial(llama, arrays=swap_gate)),
        ("Q1", "neighbours share a byte", partial(q4, blocks=in_blocks(square, neighbours_share))),
        ("Q1", "scale by 7", partial(q4, blocks=in_blocks(square, scaled))),
        ("Q1", "signed nibbles", partial(q4, blocks=in_blocks(square, signed_nibbles))),
        ("Q1", "an infinite scale", partial(q4, blocks=in_blocks(square, broken_scale), alone=True)),
        ("Q1", "NaN", partial(llama, type="F32", arrays=each("blk.0.ffn_up", lambda x: x * np.nan), alone=True)),
        ("Q1", "a matrix of zeros", partial(q4, arrays=each("blk.0.ffn_up", lambda x: 0 * x), alone=True)),
        ("Q2", "a large column", partial(q4, arrays=outlier, alone=True)),
        ("Q3", "rows of 48 in blocks of 32", partial(llama, blocks=odd_rows, alone=True)),
        (
            "Q4",
            "a norm in four bits",
            partial(q4, blocks=in_blocks("blk.0.attn_norm.weight", lambda raw: raw), alone=True),
        ),
    ]
    return tuple(Mutation(code, name, build) for code, name, build in rows)


def _respell(old: str, new: str) -> Callable[[Metadata], None]:
    def change(said: Metadata) -> None:
        template = said["tokenizer.chat_template"][1]
        assert old in template, f"{old!r} is not in the template"
        said["tokenizer.chat_template"] = ("string", template.replace(old, new))

    return change


def _bos_as_number(said: Metadata) -> None:
    said[f"{T}add_bos_token"] = ("uint32", 1)


def _linear(said: Metadata) -> None:
    said |= {"qwen2.rope.scaling.type": ("string", "linear"), "qwen2.rope.scaling.factor": ("float32", 2.0)}


def _other_eps(said: Metadata) -> None:
    key = "llama.attention.layer_norm_rms_epsilon"
    said[key] = ("float32", 10 * said[key][1])


def _other_scale(config: dict[str, Any]) -> None:
    config["query_pre_attn_scalar"] = 2 * config["head_dim"]


def _other_heads(said: Metadata) -> None:
    key = "llama.attention.head_count_kv"
    said[key] = ("uint32", 1 if said[key][1] > 1 else 2)


def _odd_heads(said: Metadata) -> None:
    said["llama.attention.head_count_kv"] = ("uint32", 3)


def _other_head(arrays: Arrays) -> None:
    arrays["output.weight"] = arrays["token_embd.weight"][::-1].copy()


def _conv1d(weight: np.ndarray) -> np.ndarray:
    """GPT-2's (in, out) bytes under the shape (out, in)."""
    return np.ascontiguousarray(weight.T).reshape(weight.shape)


def _other_factors(slowed: np.ndarray) -> np.ndarray:
    """The factors of a model slowed by twice as much, where they are slowed at all."""
    return np.where(slowed == slowed.max(), 2 * slowed, slowed)


def _unpermuted(arrays: Arrays) -> None:
    for name in arrays:
        if "attn_q." in name or "attn_k." in name:
            arrays[name] = np.ascontiguousarray(halves(arrays[name], 4 if "attn_q." in name else 2))


def _repermuted(rows: np.ndarray, n: int) -> np.ndarray:
    return pairs(halves(rows, 2), n)


CONTROLS = tuple(Control(family, partial(make, family=family)) for family in (*FAMILIES, "gemma1")) + tuple(
    Control(f"{family}, {type}", partial(make, family=family, type=type))
    for family, type in (
        ("gpt2", "Q5_0"),
        ("llama", "Q4_0"),
        ("gemma", "Q5_1"),
        ("qwen", "Q8_0"),
        ("phi", "Q4_1"),
        ("qwen", "BF16"),
    )
)
MUTATIONS = _mutations()

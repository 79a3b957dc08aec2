"""The tensors of a GGUF file: shapes and settings, types, numbers that are none, and every value beside the folder's.

The last dequantises a tensor and undoes what the format does to it (rows of q and k permuted for llama, 1 added to Gemma's norms,
fused parts), so that it must be the folder's tensor within the step of its type. Where it is not, the transforms that converters
forget or make twice are tried, and the one that fits is named. The order of work and the names are families.py's; no torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kobza.config import InputError, ModelConfig
from kobza.doctor.files.gguf_header import GgufSubject
from kobza.doctor.finding import Check, Finding, Skip
from kobza.formats.families import layout_of
from kobza.formats.ggml import AT_ONCE, BLOCKS, READABLE, STRUCTS, dequantize, load_tensor, tensor_bytes
from kobza.formats.gguf import GgufTensor
from kobza.formats.gguf_families import llama3_slowdown
from kobza.formats.headers import read_numpy
from kobza.formats.layouts import Slot, head_names, layout_by_names, prefix_of, shapes, slots

MOST_VALUES = 4_000_000  # compared a tensor, whole rows from its beginning; permuted ones are compared whole
PIECE = 32  # values that share a scale, at most, in every type that has scales
# Relative L2 of a type against the numbers it was made from. Largest seen on the controls (5 families, fp32 and bf16, seeds 0-2)
# stands behind; the limit is some twice that, for weights with heavier tails than a normal's.
LIMITS = {
    "F32": 1e-6,  # 3.2e-8, with Gemma's 1 + w
    "F64": 1e-6,
    "F16": 6e-4,  # 2.3e-4
    "BF16": 4e-3,  # 1.8e-3
    "Q8_0": 0.012,  # 0.0058
    "Q5_1": 0.08,  # 0.0402
    "Q5_0": 0.09,  # 0.0453
    "Q4_1": 0.16,  # 0.0809
    "Q4_0": 0.18,  # 0.0910
    # K types are not made here: as many bits, and never worse than the older type of the same
    "Q6_K": 0.05,
    "Q5_K": 0.09,
    "Q4_K": 0.18,
    "Q3_K": 0.36,
    "Q2_K": 0.72,
}
SCALE = 0.05  # how far the best single factor of a tensor in blocks may be from 1; seen: 0.0114, in a tensor of 1,536 values
SETTINGS = {  # a field of ModelConfig -> the code of its loss, and the key that holds it; any other field is F3
    "rope_theta": ("L5", "rope.freq_base"),
    "rope_local_theta": ("L5", "rope.freq_base_swa"),
    "rope_scaling": ("L4", "rope.scaling.type"),
    "rope_factor": ("L4", "rope.scaling.factor"),
    "rope_original_len": ("L4", "rope.scaling.original_context_length"),
    "window": ("P2", "attention.sliding_window"),
    "window_pattern": ("P2", "attention.sliding_window"),
    "norm_eps": ("G4", "attention.layer_norm_rms_epsilon"),
    "softcap": ("G12", "final_logit_softcapping"),
    "attn_softcap": ("G12", "attn_logit_softcapping"),
    "attn_scale": ("G13", "attention.scale"),
    "n_layer": ("F3", "block_count"),
    "n_head": ("F3", "attention.head_count"),
    "n_kv_head": ("F3", "attention.head_count_kv"),
    "head_dim": ("F3", "attention.key_length"),
    "n_embd": ("F3", "embedding_length"),
    "n_ff": ("F3", "feed_forward_length"),
    "rope_dim": ("F3", "rope.dimension_count"),
    "max_seq_len": ("F3", "context_length"),
}
WHY = {
    "L4": "fine on short texts, worse with every token beyond the context of the pretraining",
    "L5": "every position is turned by another angle than in training",
    "P2": "attention reaches further, or less far, than in training",
    "G4": "small activations are normalised to another size",
    "G12": "logits are capped at another height: probabilities are wrong without a crash",
    "G13": "attention is sharper or flatter than in training",
    "F3": "the reader builds another model than the weights are of",
}
SOURCES = {
    "L4": "https://github.com/ggml-org/llama.cpp/issues/8650",
    "L5": "https://github.com/ggml-org/llama.cpp/issues/3364",
    "P2": "https://github.com/ggml-org/llama.cpp/issues/7709",
    "G4": "https://github.com/ggml-org/llama.cpp/issues/2711",
    "G12": "https://unsloth.ai/blog/gemma2",
    "F3": "https://github.com/ggml-org/llama.cpp/issues/3364",
}


def finding(code: str, where: str, expected: str, got: str, why: str, fix: str, proof: str, **how: Any) -> Finding:
    """A finding with a counter-example: an error unless `how` says less."""
    level: dict[str, Any] = {"severity": "error", "confidence": "proven"} | how
    source = SOURCES.get(code, "")
    return Finding(
        code, **level, where=where, expected=expected, got=got, why=why, fix=fix, counterexample=proof, source=source
    )


# -- settings and shapes -------------------------------------------------------------------------------------------


def _slots(s: GgufSubject, config: ModelConfig) -> list[Slot]:
    """Where the weights lie; biases that a family may leave out only where the file has them."""
    layout = layout_of(s.arch, gguf=True)
    return slots(config, layout, names=s.gguf.tensors if layout.loose else None)


def tensors_fit_settings(s: GgufSubject) -> Iterator[Finding]:
    """Every tensor that the settings ask for is there, of the shape they give, and none is of a block beyond the last."""
    tensors, said = s.gguf.tensors, s.gguf.metadata
    if not tensors:
        raise Skip("the file has no tensors, a vocabulary alone")
    heads, groups = (said.get(f"{s.arch}.attention.{key}") for key in ("head_count", "head_count_kv"))
    if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
        proof = f"{s.arch}.attention.head_count is {heads} and head_count_kv {groups}"
        why, fix = "no reader can share so many heads out", "set it to the rows of attn_k.weight / key_length"
        yield finding("F3", f"{s.arch}.attention.head_count_kv", f"a divisor of {heads}", str(groups), why, fix, proof)
        return
    config = _config(s)
    sizes = shapes(config)
    for slot in _slots(s, config):
        name, shape = slot.theirs, _joined(slot, sizes)
        if name not in tensors:
            proof = f"{s.arch}.block_count is {config.n_layer} and {name} is not among {len(tensors)} tensors"
            yield finding("F3", name, f"a tensor {shape}", "none", "readers refuse the file", "convert again", proof)
            return
        if tensors[name].shape != shape:
            keys = f"{config.n_head} heads, {config.n_kv_head} for k and v, of {config.head_dim}, width {config.n_embd}"
            proof = f"{name} is {tensors[name].shape}; by the settings ({keys}) it must be {shape}"
            why = "readers refuse the file, or give each head another's rows"
            fix = f"correct {s.arch}.attention.head_count, head_count_kv, key_length or the widths"
            yield finding("F3", name, str(shape), str(tensors[name].shape), why, fix, proof)
            return
    beyond = [name for name in tensors if (match := BLOCK.match(name)) and int(match[1]) >= config.n_layer]
    if beyond:
        proof = f"{s.arch}.block_count is {config.n_layer} and the file has {beyond[0]}; {len(beyond)} such tensors"
        why = "readers stop at block_count: the model is cut short"
        yield finding("F3", beyond[0], f"blocks below {config.n_layer}", beyond[0], why, "convert again", proof)


def settings_are_the_folders(s: GgufSubject) -> Iterator[Finding]:
    """The file's settings make the model that config.json makes."""
    theirs, mine = s.hf_config, _config(s)
    differ = {f.name for f in fields(ModelConfig) if not _same(getattr(theirs, f.name), getattr(mine, f.name))}
    if "tied" in differ:
        differ -= {"tied"}
        yield from _tied(s, theirs.tied)
    if theirs.rope_scaling == "llama3" or "rope_freqs.weight" in s.gguf.tensors:
        differ -= {"rope_scaling", "rope_factor", "rope_original_len"}
        yield from _slowed(s, theirs)
    for name in (f.name for f in fields(ModelConfig) if f.name in differ):
        code, key = SETTINGS.get(name, ("F3", f"({name})"))
        full = f"{s.arch}.{key}"
        wanted, now = getattr(theirs, name), getattr(mine, name)
        said = s.gguf.metadata.get(full)
        got = f"{now!r}" + (f" ({full} is absent)" if said is None else "")
        proof = f"config.json makes {name} {wanted!r}, the file {now!r}"
        why = WHY[code] if name != "max_seq_len" else "the reader's context is another than the model's"
        yield finding(code, full, repr(wanted), got, why, f"convert again, or set {full}", proof)


def _slowed(s: GgufSubject, theirs: ModelConfig) -> Iterator[Finding]:
    """Llama 3's scaling: a GGUF file keeps what each frequency is divided by."""
    llama3 = theirs.rope_scaling == "llama3"
    wanted = llama3_slowdown(theirs) if llama3 else [1.0] * (theirs.head_dim // 2)
    said = f"config.json has rope type {theirs.rope_scaling}" + (f", factor {theirs.rope_factor:g}" if llama3 else "")
    if "rope_freqs.weight" not in s.gguf.tensors:
        proof = f"{said}; the file has no tensor rope_freqs.weight"
        fix = "convert again: Llama 3's factors go into rope_freqs.weight"
        yield finding("F3", "rope_freqs.weight", "Llama 3's factors", "none", WHY["L4"], fix, proof)
        return
    given = load_tensor(s.gguf, "rope_freqs.weight").ravel().tolist()
    if len(given) != len(wanted) or not all(
        math.isclose(a, b, rel_tol=1e-4) for a, b in zip(wanted, given, strict=True)
    ):
        i = next(
            (i for i, (a, b) in enumerate(zip(wanted, given, strict=False)) if not math.isclose(a, b, rel_tol=1e-4)), 0
        )
        proof = f"{said}: pair {i} is divided by {wanted[i]:.6g} there and by {given[i]:.6g} in the file"
        expected, got = (", ".join(f"{x:.4g}" for x in values[i : i + 4]) for values in (wanted, given))
        yield finding("L4", "rope_freqs.weight", expected, got, WHY["L4"], "convert again from this config.json", proof)


def _config(s: GgufSubject) -> ModelConfig:
    try:
        return s.config
    except InputError as error:
        raise Skip(f"the file's settings make no model: {error}") from None


def _same(a: Any, b: Any) -> bool:
    """Equal, floats as float32 keeps them."""
    return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) and isinstance(b, float) else a == b


def _tied(s: GgufSubject, tied: bool) -> Iterator[Finding]:
    """One has a head of its own and the other has not."""
    if not tied:
        proof = "config.json has tie_word_embeddings false, the file no output.weight"
        why = "readers take the embedding for the head: every probability is wrong"
        yield finding("F3", "output.weight", "the head", "none", why, "convert again", proof)
        return
    size = s.gguf.tensors["output.weight"].n_bytes
    proof = (
        f"config.json has tie_word_embeddings true, the file token_embd.weight and an output.weight of {size:,} bytes"
    )
    why = "the file and the memory it takes are larger for nothing"
    fix = "leave output.weight out: readers then take the embedding"
    yield finding("F3", "output.weight", "no head of its own", f"{size:,} bytes", why, fix, proof, severity="info")


# -- types and numbers ---------------------------------------------------------------------------------------------


def rows_fill_blocks(s: GgufSubject) -> Iterator[Finding]:
    """A row is whole blocks of its type."""
    for name, tensor in s.gguf.tensors.items():
        values, _ = BLOCKS[tensor.type]
        if tensor.shape and tensor.shape[-1] % values:
            yield finding(
                "Q3",
                name,
                f"rows of a multiple of {values} values for {tensor.type}",
                f"rows of {tensor.shape[-1]}",
                "blocks run across rows: readers refuse the file or mix a row's end with the next one",
                f"store {name} in F16, Q8_0 or another type whose block divides {tensor.shape[-1]}",
                f"{name} {tensor.shape}: row 1 would begin inside block {tensor.shape[-1] // values} of row 0",
            )


SAMPLE = 2048  # blocks of a tensor
INFINITE = {  # the exponent's bits: all set, the value is infinite or NaN
    "F32": ("<u4", np.uint32(0x7F800000)),
    "F16": ("<u2", np.uint16(0x7C00)),
    "BF16": ("<u2", np.uint16(0x7F80)),
    "F64": ("<u8", np.uint64(0x7FF0000000000000)),
}
BLOCK = re.compile(r"blk\.(\d{1,9})\.")
FLOATS = ("F32", "F16", "BF16", "F64")
ROUGH = ("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "TQ1_0", "TQ2_0", "Q1_0")


def small_tensors_keep_floats(s: GgufSubject) -> Iterator[Finding]:
    """Norms and biases are in F32, routers in floats, and an embedding that is also the head is not in two bits."""
    for name, tensor in s.gguf.tensors.items():
        vector = len(tensor.shape) < 2 or "norm" in name or name.endswith(".bias")
        router = "ffn_gate_inp" in name and tensor.type not in FLOATS
        if router or vector and tensor.type not in ("F32", "F64", "I8", "I16", "I32", "I64"):
            proof = f"{name} {tensor.shape} is {tensor.type}, {BLOCKS[tensor.type][1]} bytes for {BLOCKS[tensor.type][0]} values"
            # seen with llama.cpp: "binary_op: unsupported types: dst: f32, src0: f32, src1: f16", and the process ends
            crash = "llama.cpp multiplies and adds vectors in F32 alone: on a CPU it ends at the first token"
            why = "the router's choice of experts turns on rounding" if router else crash
            level: dict[str, Any] = {"severity": "warn"} if router or tensor.type in FLOATS else {}
            yield finding("Q4", name, "F32", tensor.type, why, f"store {name} in F32", proof, **level)
            return
    embed = s.gguf.tensors.get("token_embd.weight")
    if embed is not None and "output.weight" not in s.gguf.tensors and embed.type in ROUGH:
        proof = f"token_embd.weight is {embed.type} and there is no output.weight"
        why = "the head decides every probability, and has four levels a weight or fewer"
        fix = "quantise again with --token-embedding-type q6_k"
        yield finding("Q4", "token_embd.weight", "Q6_K or better", embed.type, why, fix, proof, severity="warn")


def _sample(s: GgufSubject, name: str) -> np.ndarray:
    """The numbers of SAMPLE blocks spread evenly over a tensor, or of all."""
    tensor = s.gguf.tensors[name]
    values, size = BLOCKS[tensor.type]
    blocks = np.asarray(tensor_bytes(s.gguf, name)).reshape(-1, size)
    some = blocks[:: max(1, len(blocks) // SAMPLE)]
    return dequantize(some, tensor.type, (len(some) * values,))


def numbers_are_numbers(s: GgufSubject) -> Iterator[Finding]:
    """No NaN, no infinity, no matrix of zeros."""
    unread = Counter(t.type for t in s.gguf.tensors.values() if t.type not in READABLE)
    seen: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, tensor in s.gguf.tensors.items():
        if tensor.type not in READABLE or not _whole(tensor):
            continue
        if bad := _bad_value(s, name):
            seen["bad"].append((name, bad))
        elif len(tensor.shape) > 1 and not _sample(s, name).any():  # a vector may be 0, such as a bias that never moved
            seen["zero"].append((name, f"its values are 0, of {math.prod(tensor.shape):,}"))
    for kind, why in (("bad", "one NaN in a weight makes every logit NaN"), ("zero", "the layer adds nothing")):
        if found := seen[kind]:
            name, what = found[0]
            more = f", and {len(found) - 1} more tensors" if len(found) > 1 else ""
            sure: dict[str, Any] = {} if kind == "bad" else {"severity": "warn"}
            proof = f"{name}: {what}"
            yield finding(
                "Q1", name + more, "finite numbers that are not all 0", what, why, "convert again", proof, **sure
            )
    if unread and not seen and sum(unread.values()) == len(s.gguf.tensors):
        raise Skip(f"none of the types can be read here: {', '.join(unread)}")


def _whole(tensor: GgufTensor) -> bool:
    return not tensor.shape or tensor.shape[-1] % BLOCKS[tensor.type][0] == 0


def _bad_value(s: GgufSubject, name: str) -> str:
    """The first value that is NaN or infinite, in words; "" where there is none."""
    tensor, data = s.gguf.tensors[name], np.asarray(tensor_bytes(s.gguf, name))
    if tensor.type in STRUCTS:  # its scales tell, an eighth of the work
        blocks = data.view(STRUCTS[tensor.type])
        for scale in sorted({"d", "m"} & set(blocks.dtype.names or ())):
            wrong = blocks[scale].view("<u2") & 0x7C00 == 0x7C00  # the bits: numpy is slow with float16
            if wrong.any():
                i = int(wrong.argmax())
                start = tensor.start + i * BLOCKS[tensor.type][1]
                return (
                    f"block {i:,} (byte {start:,}) has the scale {blocks[scale][i]}; {int(wrong.sum()):,} such blocks"
                )
        return ""
    if tensor.type not in INFINITE:
        return ""
    dtype, infinite = INFINITE[tensor.type]
    bits = data.view(dtype)
    for at in range(0, len(bits), AT_ONCE):
        wrong = bits[at : at + AT_ONCE] & infinite == infinite
        if wrong.any():
            i = at + int(wrong.argmax())
            value = dequantize(bits[i : i + 1].view(np.uint8), tensor.type, (1,))[0]
            return f"value {i:,} is {value}"
    return ""


# Share of runs of 32 in which over half the values fell on one level though they are not all equal, in types of 4 and 5 bits.
# Seen: 0 on the controls; 0.0011 at most in a tensor of SmolLM2-135M-Instruct Q4_1 (0.0014 by the sample).
COLLAPSED = 0.05
COARSE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K")


def collapsed_share(numbers: np.ndarray) -> float:
    """Share of runs of 32 values of which more than half are one value, and not all. numbers (n * 32,)"""
    runs = np.sort(numbers.reshape(-1, PIECE), axis=-1)
    half = PIECE // 2
    flat = (runs[:, half:] == runs[:, :-half]).any(-1)  # 17 equal neighbours in order
    return float((flat & (runs[:, 0] != runs[:, -1])).mean())


def outliers(s: GgufSubject) -> Iterator[Finding]:
    """No block spends its levels on one value and drops the others."""
    coarse = [name for name, tensor in s.gguf.tensors.items() if tensor.type in COARSE and _whole(tensor)]
    if not coarse:
        raise Skip(f"no tensor of {', '.join(COARSE)}")
    found = [(share, name) for name in coarse if (share := collapsed_share(_sample(s, name))) > COLLAPSED]
    if found:
        share, name = max(found)
        tensor = s.gguf.tensors[name]
        more = f", and {len(found) - 1} more tensors" if len(found) > 1 else ""
        yield finding(
            "Q2",
            name + more,
            f"at most {COLLAPSED:.0%} of the blocks",
            f"{share:.1%} of the blocks of {name} have one large value and hardly another level",
            "the other weights of those blocks are rounded to one value",
            f"store {name} in Q8_0 or F16",
            f"{name} ({tensor.type}): {share:.1%} of its runs of 32, by a sample",
            severity="info",
        )


# -- values beside the folder's ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """One weight of ours as both files have it, both put into our order."""

    name: str
    theirs: str
    type: str
    file: np.ndarray
    folder: np.ndarray
    slot: Slot
    others: Callable[[], Iterator[tuple[str, np.ndarray]]]
    """the folder's other weights of the same block and shape"""


def halves(rows: np.ndarray, n: int) -> np.ndarray:
    """Rows of n heads from neighbouring pairs to halves: 0 1 2 3 -> 0 2 1 3."""
    return rows.reshape(n, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def pairs(rows: np.ndarray, n: int) -> np.ndarray:
    """The inverse of `halves`."""
    return rows.reshape(n, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def ours(slot: Slot, stored: np.ndarray, sizes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The weights of ours that a tensor holds, in our order: fused ones split, permuted rows put back, the shift taken off."""
    array = stored.T if slot.transposed else stored
    array = array - np.float32(slot.shift) if slot.shift else array
    array = halves(array, slot.n_heads) if slot.n_heads else array
    cuts = np.cumsum([sizes[name][0] for name in slot.ours])[:-1]
    return dict(zip(slot.ours, np.split(array, cuts) if len(cuts) else [array], strict=True))


def comparisons(s: GgufSubject) -> Iterator[Pair]:
    """Every weight that both files have in the shape that the settings give."""
    config, tensors = _config(s), s.hf_tensors
    layout = layout_by_names(s.hf_config, tensors)
    prefix = prefix_of(layout, tensors)
    folder = {name: slot for slot in slots(s.hf_config, layout, prefix, tensors) for name in slot.ours}
    sizes, theirs = shapes(config), shapes(s.hf_config)
    if "lm_head.weight" in sizes and "lm_head.weight" not in folder:  # tied there, of its own here
        head = next((name for name in head_names(layout, prefix) if name in tensors), folder["embed.weight"].theirs)
        folder["lm_head.weight"] = Slot(head, ("lm_head.weight",))
        theirs |= {"lm_head.weight": theirs["embed.weight"]}

    def read(name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        path, info = tensors[folder[name].theirs]
        array = np.asarray(read_numpy(path, info, rows), np.float32)
        return ours(folder[name], array, theirs)[name] if rows is None else array

    def others(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
        block = name.rpartition(".attn")[0] or name.rpartition(".mlp")[0]
        for other in theirs:
            if block and other.startswith(f"{block}.") and other != name and theirs[other] == shape:
                yield other, read(other)

    for slot in _slots(s, config):
        tensor = s.gguf.tensors.get(slot.theirs)
        known = all(
            name in folder and folder[name].theirs in tensors and sizes[name] == theirs[name] for name in slot.ours
        )
        if tensor is None or tensor.type not in READABLE or not _whole(tensor) or not known:
            continue
        rows = _rows(tensor.shape, slot, [folder[name] for name in slot.ours])
        stored = _stored(s, slot.theirs, rows)
        if rows == tensor.shape[0]:
            if tensor.shape == _joined(slot, sizes):
                for name, array in ours(slot, stored, sizes).items():
                    yield Pair(
                        name, slot.theirs, tensor.type, array, read(name), slot, partial(others, name, array.shape)
                    )
        else:
            name = slot.ours[0]
            folder_rows = read(name, (0, rows))
            if folder_rows.shape == stored.shape:
                yield Pair(name, slot.theirs, tensor.type, stored, folder_rows, slot, lambda: iter(()))


def _joined(slot: Slot, sizes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a slot's tensor in a GGUF file."""
    return (sum(sizes[name][0] for name in slot.ours), *sizes[slot.ours[0]][1:])


def _rows(shape: tuple[int, ...], slot: Slot, others: list[Slot]) -> int:
    """Rows to compare: all of a small tensor, and of one whose rows are moved; else as many as have MOST_VALUES."""
    plain = len(slot.ours) == 1 and not slot.n_heads and not slot.transposed
    plain = plain and all(len(o.ours) == 1 and not o.n_heads and not o.transposed for o in others)
    moved = slot.ours[0].rsplit(".", 2)[-2] in ("q_proj", "k_proj")
    most = max(1, MOST_VALUES // math.prod(shape[1:]))
    return min(shape[0], most) if plain and not moved and len(shape) > 1 else shape[0]


def _stored(s: GgufSubject, name: str, rows: int) -> np.ndarray:
    """The first rows of a tensor."""
    tensor = s.gguf.tensors[name]
    values, size = BLOCKS[tensor.type]
    shape = (rows, *tensor.shape[1:])
    return dequantize(tensor_bytes(s.gguf, name)[: math.prod(shape) // values * size], tensor.type, shape)


def distance(file: np.ndarray, folder: np.ndarray, shift: float = 0.0) -> float:
    """Relative L2 error, of the numbers as they are stored: with the shift."""
    size = float(np.linalg.norm(folder.astype(np.float64) + shift))
    apart = float(np.linalg.norm(file.astype(np.float64) - folder))
    return apart / size if size else (math.inf if apart else 0.0)


def values_are_the_folders(s: GgufSubject) -> Iterator[Finding]:
    """Every tensor, dequantised and put back into the folder's order, is the folder's within the step of its type."""
    wrong: dict[tuple[str, str], list[tuple[Pair, float]]] = defaultdict(list)
    n = 0
    for pair in comparisons(s):
        n += 1
        error = distance(pair.file, pair.folder, pair.slot.shift)
        s.worst[pair.type] = max(s.worst.get(pair.type, 0.0), error)
        if error <= LIMITS[pair.type] and abs(_factor(pair) - 1) <= SCALE:
            continue
        wrong[_reason(s, pair)].append((pair, error))
    if not n:
        raise Skip("no tensor that both have in one shape")
    for (code, reason), found in wrong.items():
        pair, error = found[0]
        at = np.unravel_index(int(np.abs(pair.file - pair.folder).argmax()), pair.file.shape)
        place = f"[{', '.join(str(int(i)) for i in at)}]"
        more = f", and {len(found) - 1} more tensors" if len(found) > 1 else ""
        yield finding(
            code,
            pair.theirs + more,
            f"{pair.name} of the folder within {LIMITS[pair.type]:g} (relative L2, {pair.type})",
            f"{error:.3g}: {reason}",
            "the weights are not the model's: text is bad or nonsense, and nothing fails",
            "convert again with a converter that knows the architecture",
            f"{pair.name}{place} is {float(pair.folder[at]):.6g} in the folder and {float(pair.file[at]):.6g} in the file",
        )


def _reason(s: GgufSubject, pair: Pair) -> tuple[str, str]:
    """(code, what was done to the tensor): the first transform that makes it the folder's."""
    limit = LIMITS[pair.type]
    for reason, undo in _suspects(s, pair):
        tried = undo(pair.file)
        if tried.shape == pair.folder.shape and distance(tried, pair.folder, pair.slot.shift) <= limit:
            return "F3", reason
    for name, other in pair.others():
        if distance(pair.file, other) <= limit:
            return "F3", f"it is the folder's {name}"
    if pair.type not in STRUCTS:
        return "F3", "no known transform of the folder's tensor fits"
    nibbles = pair.file.reshape(-1, 2, PIECE // 2).swapaxes(1, 2).reshape(pair.file.shape)
    if distance(nibbles, pair.folder) <= limit:
        return "Q1", "neighbouring values share a byte; the type's order is values 0-15 low, 16-31 high"
    factor = _factor(pair)
    if distance(factor * pair.file, pair.folder) <= 2 * limit:  # a scale that is wrong also clips
        return "Q1", f"its scales are {1 / factor:.3g} times what they must be" if factor else "it is all 0"
    return "Q1", "the values are not those that its type would round to"


def _factor(pair: Pair) -> float:
    """The one factor that brings a tensor in blocks nearest to the folder's; 1 where there is too little to tell."""
    if pair.type not in STRUCTS or pair.file.size < 1024:
        return 1.0
    a, b = pair.file.ravel().astype(np.float64), pair.folder.ravel().astype(np.float64)
    return float(a @ b / max(1e-30, a @ a))


def _suspects(s: GgufSubject, pair: Pair) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """What converters forget or make twice, and how it is undone."""
    config, name, shift = s.config, pair.name, pair.slot.shift
    head = {"q_proj": config.n_head, "k_proj": config.n_kv_head}.get(name.rsplit(".", 2)[-2], 0)
    others = {config.n_head, config.n_kv_head} - {head}
    if head and pair.slot.n_heads:
        yield "its rows are in the folder's order, not permuted for this architecture's rope", lambda x: pairs(x, head)
        for other in sorted(n for n in others if len(pair.file) % (2 * n) == 0):
            yield (
                f"its rows are permuted for {other} heads instead of {head}",
                lambda x, n=other: halves(pairs(x, head), n),
            )
        yield "its rows are permuted twice", lambda x: halves(x, head)
    elif head:
        for other in (head, *sorted(n for n in others if len(pair.file) % (2 * n) == 0)):
            yield (
                f"its rows are permuted for {other} heads, as only the llama architecture wants",
                lambda x, n=other: halves(x, n),
            )
    if name.rsplit(".", 2)[-2].endswith("norm"):
        yield "the 1 that this architecture's norms contain is not added", lambda x: x + np.float32(shift or 1)
        yield "1 is added to it" + (" twice" if shift else ""), lambda x: x - np.float32(1)
    if pair.file.ndim == 2 and pair.file.shape[0] == pair.file.shape[1]:
        yield "it is transposed", lambda x: x.T
    if pair.file.ndim == 2:
        yield "it is written in the order of its transpose", lambda x: x.reshape(x.shape[::-1]).T


WEIGHT_CHECKS = (
    Check("F3", "every tensor that the settings ask for is there in its shape", tensors_fit_settings),
    Check("F3 L4 L5 P2 G4 G12 G13", "the settings are the folder's", settings_are_the_folders),
    Check("Q3", "a row is whole blocks of its type", rows_fill_blocks),
    Check("Q4", "norms and biases are in F32, routers in floats", small_tensors_keep_floats),
    Check("Q1", "all numbers are finite", numbers_are_numbers),
    Check("Q2", "no block spends its levels on one value", outliers),
    Check("F3 Q1", "every tensor is the folder's within the step of its type", values_are_the_folders),
)


def facts(s: GgufSubject) -> dict[str, list[list[str]]]:
    """Types of the tensors with their sizes, and how far each is from the folder once the checks have compared them."""
    rows: dict[str, list[int]] = {}
    for tensor in s.gguf.tensors.values():
        row = rows.setdefault(tensor.type, [0, 0, 0])
        for i, value in enumerate((1, math.prod(tensor.shape), tensor.n_bytes)):
            row[i] += value
    head = ["type", "tensors", "values", "bytes", "bits a value"]
    head += ["largest relative L2 from the folder"] if s.worst else []
    table = [head]
    for type, (n, values, size) in sorted(rows.items(), key=lambda item: -item[1][2]):
        row = [type, f"{n:,}", f"{values:,}", f"{size:,}", f"{8 * size / values:.2f}"]
        shown = [f"{s.worst[type]:.3g}" if type in s.worst else "-"]
        table.append(row + (shown if s.worst else []))
    return {"tensors by type": table}

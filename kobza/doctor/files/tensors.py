"""Tensor headers against the config: shapes, layers, tying, ids (G8, G9, L9), and the few numbers worth reading (G3, G14, L1).

Only the norms' weights and some rows of the embedding are read; the rest is known from the headers alone, so a model of any size
takes a moment. The shapes are those of the architectures in SHAPES, by the ends of the tensors' names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from kobza.doctor.files.folder import Folder, as_ids, token_text
from kobza.doctor.finding import Check, Finding, Skip

# name's end -> shape in: C width, q = H D, kv = K D, D head dim, F feed-forward, V vocabulary, T positions
_LLAMA = {
    "self_attn.q_proj.weight": "q C",
    "self_attn.k_proj.weight": "kv C",
    "self_attn.v_proj.weight": "kv C",
    "self_attn.q_proj.bias": "q",
    "self_attn.k_proj.bias": "kv",
    "self_attn.v_proj.bias": "kv",
    "self_attn.o_proj.weight": "C q",
    "self_attn.q_norm.weight": "D",
    "self_attn.k_norm.weight": "D",
    "self_attn.qkv_proj.weight": "q+2kv C",
    "mlp.gate_proj.weight": "F C",
    "mlp.up_proj.weight": "F C",
    "mlp.gate_up_proj.weight": "2F C",
    "mlp.down_proj.weight": "C F",
    "input_layernorm.weight": "C",
    "post_attention_layernorm.weight": "C",
    "pre_feedforward_layernorm.weight": "C",
    "post_feedforward_layernorm.weight": "C",
    "embed_tokens.weight": "V C",
    "lm_head.weight": "V C",
}
_GPT2 = {
    "attn.c_attn.weight": "C 3C",
    "attn.c_attn.bias": "3C",
    "attn.c_proj.weight": "C C",
    "attn.c_proj.bias": "C",
    "mlp.c_fc.weight": "C F",
    "mlp.c_fc.bias": "F",
    "mlp.c_proj.weight": "F C",
    "mlp.c_proj.bias": "C",
    "ln_1.weight": "C",
    "ln_1.bias": "C",
    "ln_2.weight": "C",
    "ln_2.bias": "C",
    "wte.weight": "V C",
    "wpe.weight": "T C",
    "lm_head.weight": "V C",
}
SHAPES = dict.fromkeys("llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3".split(), _LLAMA) | {"gpt2": _GPT2}
_LAYER = re.compile(r"(?:^|(.*)\.)(?:layers|h)\.(\d{1,9})\.(.+)$")
_NORM = re.compile(r"(?:layernorm|layer_norm|norm|ln_1|ln_2|ln_f)\.weight$")
HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
SAMPLE = 1024  # rows that stand for the embedding's usual ones


def layers(folder: Folder) -> dict[int, set[str]]:
    """Number of a layer -> the ends of its tensors' names, for the tower that the token embedding belongs to."""
    home = folder.embedding().removesuffix("embed_tokens.weight").removesuffix("wte.weight").rstrip(".")
    found: dict[int, set[str]] = {}
    for name in folder.need_tensors():
        match = _LAYER.match(name)
        if match and (match[1] or "") == home:
            found.setdefault(int(match[2]), set()).add(match[3])
    return found


def _number(name: str, sizes: dict[str, int]) -> int:
    """The size a letter stands for. _number("q+2kv", sizes) -> (H + 2 K) D"""
    q, kv = sizes["H"] * sizes["D"], sizes["K"] * sizes["D"]
    known = {"q": q, "kv": kv, "q+2kv": q + 2 * kv, "3C": 3 * sizes["C"], "2F": 2 * sizes["F"]}
    return known[name] if name in known else sizes[name]


def check_numbers(folder: Folder) -> Iterator[Finding]:
    """G9: the config's sizes are positive whole numbers that divide as they must."""
    wrong = False
    names = (
        "hidden_size num_attention_heads num_hidden_layers num_key_value_heads head_dim intermediate_size vocab_size "
    )
    for name in (names + "max_position_embeddings").split():
        given = folder.text.get(folder.key(name))
        if given is not None and folder.whole(name) is None:
            wrong = True
            proof = f"{folder.key(name)} = {given!r}"[:120]
            yield _g9(folder.where(name), "a positive whole number", proof, proof)
    given = folder.text.get("num_hidden_layers")
    if wrong:
        return
    if not folder.tensors and type(given) is int and given > 1000:
        yield Finding(
            "G9",
            "warn",
            "heuristic",
            folder.where("num_hidden_layers"),
            "at most a few hundred",
            f"{given:,}",
            "a reader that believes it asks for all memory before it reads a single tensor",
            "take the config of the original release",
        )
    sizes = folder.sizes()
    if sizes["H"] % sizes["K"]:
        proof = f"{sizes['H']} query heads cannot share {sizes['K']} key/value heads evenly"
        yield _g9(folder.where("num_key_value_heads"), f"a divisor of {sizes['H']}", str(sizes["K"]), proof)
    if not folder.whole("head_dim") and sizes["C"] % sizes["H"]:
        proof = f"no head_dim, and {sizes['C']} / {sizes['H']} is not whole"
        yield _g9(folder.where("head_dim"), "a value", "absent", proof)
    if folder.kind != "gpt2" and folder.kind in SHAPES and sizes["D"] % 2:
        proof = f"head_dim {sizes['D']} is odd: rotary angles turn pairs of dimensions"
        yield _g9(folder.where("head_dim"), "an even number", str(sizes["D"]), proof)


def _g9(where: str, expected: str, got: str, proof: str, fix: str = "", **more: Any) -> Finding:
    why = "the model cannot be built from these files, or is built with other shapes than it was trained with"
    fix = fix or "take the config that was saved with these tensors"
    return Finding("G9", "error", "proven", where, expected, got, why, fix, counterexample=proof, **more)


def check_shapes(folder: Folder) -> Iterator[Finding]:
    """G9: every tensor has the shape that the config gives it."""
    tensors, table = folder.need_tensors(), SHAPES.get(folder.kind)
    if table is None:
        raise Skip(f"model_type {folder.kind or 'absent'}: its shapes are not known here")
    sizes = folder.sizes() | {"T": folder.whole("max_position_embeddings") or 0}
    wrong: dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = {}
    home = folder.embedding().removesuffix("embed_tokens.weight").removesuffix("wte.weight").rstrip(".")
    for name, (_, info) in tensors.items():
        layer = _LAYER.match(name)
        if layer and (layer[1] or "") != home:
            continue
        end = layer[3] if layer else ".".join(name.split(".")[-2:])
        if end not in table:
            continue
        expected = tuple(_number(part, sizes) for part in table[end].split())
        if info.shape != expected and 0 not in expected:
            wrong.setdefault(end, []).append((name, info.shape, expected))
    head_dim = _head_dim(folder, wrong, sizes)
    for part in dict.fromkeys(end.split(".")[0] for end in wrong):  # one cause spoils all of a layer's attention
        ends = [end for end in wrong if end.split(".")[0] == part]
        end, (name, shape, expected) = ends[0], wrong[ends[0]][0]
        more = sum(len(wrong[e]) for e in ends) - 1
        proof = f"{name} is {shape}; by the config ({_reason(table[end], sizes)}) it is {expected}"
        fix, patch = "", None
        if head_dim and part == "self_attn":
            fix, patch = f"write head_dim {head_dim}", folder.patch("head_dim", head_dim)
        elif table[end] == "V C" and shape[1:] == expected[1:]:
            fix, patch = f"write vocab_size {shape[0]}, if the tokenizer agrees", folder.patch("vocab_size", shape[0])
        got = f"{shape}" + (f", and {more} more tensors of {part} alike" if more else "")
        yield _g9(name, str(expected), got, proof, fix, patch=patch)


def _reason(letters: str, sizes: dict[str, int]) -> str:
    """The sizes that a shape is made of: "H 8, K 4, D 8, C 32"."""
    used = [
        size for size in "HKDCFVT" if size in letters or size in "HKD" and {"q", "kv", "q+2kv"} & set(letters.split())
    ]
    return ", ".join(f"{size} {sizes[size]}" for size in used)


def _head_dim(folder: Folder, wrong: dict[str, list], sizes: dict[str, int]) -> int:
    """The head_dim with which the wrong q, k and v fit, 0 if there is none."""
    q = wrong.get("self_attn.q_proj.weight")
    if not q or len(q[0][1]) != 2 or q[0][1][0] % sizes["H"]:
        return 0
    D = q[0][1][0] // sizes["H"]
    k = wrong.get("self_attn.k_proj.weight", [("", (sizes["K"] * D,), ())])
    return D if D and D % 2 == 0 and k[0][1][0] == sizes["K"] * D else 0


def check_layers(folder: Folder) -> Iterator[Finding]:
    """G9: the layers in the file are those the config counts, and each has all its tensors."""
    found, count = layers(folder), folder.whole("num_hidden_layers")
    if not found or not count:
        raise Skip("no numbered layers in the file, or no count in the config")
    extra = folder.text.get("num_nextn_predict_layers")
    most = count + (extra if type(extra) is int and 0 < extra < 100 else 0)  # layers for predicting further ahead
    highest = max(found)
    key = folder.key("num_hidden_layers")
    if highest >= most or len([i for i in found if i < count]) < count:
        missing = next((i for i in range(count) if i not in found), None)
        proof = f"{key} is {count:,}; " + (
            f"the file has no tensor of layer {missing}" if missing is not None else f"the file has layer {highest}"
        )
        yield _g9(
            folder.where("num_hidden_layers"),
            f"layers 0 to {count - 1}",
            f"{len(found)} layers, up to {highest}",
            proof,
        )
    if folder.kind not in SHAPES:
        return
    usual: set[str] = {end for end in set().union(*found.values()) if end in SHAPES[folder.kind]}
    for i in sorted(found):
        lacking = sorted(usual - found[i])
        if lacking:
            proof = f"layer {i} has no {lacking[0]}, other layers have it"
            yield _g9(
                f"layers.{i}.{lacking[0]}", "a tensor", "absent", proof, "download the file again, it is not whole"
            )
            return
    if not folder.embedding():
        yield _g9(
            "model.safetensors",
            "a token embedding",
            "none",
            "no tensor's name ends in embed_tokens.weight or wte.weight",
        )


def check_tying(folder: Folder) -> Iterator[Finding]:
    """G8: the head is there when it is not tied, and is the embedding when it is."""
    tensors, embedding = folder.need_tensors(), folder.embedding()
    names = folder.config.get("architectures")
    headed = isinstance(names, list) and any(str(name).endswith(HEADED) for name in names)
    if not embedding or not headed:
        raise Skip("no token embedding in the file" if headed else "the architecture has no language-model head")
    tied, head = folder.value("tie_word_embeddings"), next((n for n in tensors if n.endswith("lm_head.weight")), "")
    if not isinstance(tied, bool):
        raise Skip(f"tie_word_embeddings is {tied!r}, and no default is known for {folder.kind!r}")
    said = "" if "tie_word_embeddings" in folder.text else f" (absent: the default of {folder.kind})"
    where, source = folder.where("tie_word_embeddings"), "https://github.com/huggingface/transformers/issues/43159"
    if not tied and not head:
        yield Finding(
            "G8",
            "error",
            "proven",
            where,
            "an lm_head.weight, as the head is not tied",
            "no such tensor",
            "the reader fills the head with random numbers, and the model speaks noise",
            "write tie_word_embeddings true if the embedding is the head; else save the head with the model",
            counterexample=f"tie_word_embeddings false{said}; {len(tensors)} tensors, none ends in lm_head.weight",
            source=source,
            patch=folder.patch("tie_word_embeddings", True),
        )
    elif tied and head:
        proof = difference(folder, embedding, head)
        if proof:
            yield Finding(
                "G8",
                "error",
                "proven",
                where,
                f"{head} equal to {embedding}, as they are tied",
                "another tensor",
                "one reader drops the head in the file, another takes it: two different models",
                "write tie_word_embeddings false if the head in the file is the trained one",
                counterexample=f"tie_word_embeddings true{said}; {proof}",
                source=source,
                patch=folder.patch("tie_word_embeddings", False),
            )


def difference(folder: Folder, a: str, b: str) -> str:
    """The first number in which two tables differ, as a sentence; "" if the rows looked at are equal (64 blocks at most)."""
    shapes = [folder.tensors[name][1].shape for name in (a, b)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2:
        return f"{a} is {shapes[0]}, {b} is {shapes[1]}"
    n, width = shapes[0]
    step = max(1, min(n, (1 << 18) // max(1, width)))  # a megabyte at a time
    blocks = -(-n // step)
    for block in sorted({blocks * i // 64 for i in range(64)} if blocks > 64 else range(blocks)):
        first, last = block * step, min(n, block * step + step)
        left, right = (np.asarray(folder.rows(name, first, last), dtype=np.float32) for name in (a, b))
        if not np.array_equal(left, right, equal_nan=True):
            row, col = np.argwhere(~((left == right) | np.isnan(left) & np.isnan(right)))[0]
            return (
                f"{a}[{first + row}, {col}] = {left[row, col]:.6g}, {b}[{first + row}, {col}] = {right[row, col]:.6g}"
            )
    return ""


def norms(folder: Folder) -> dict[str, np.ndarray]:
    """The weights of the norms of width C, by name, float32; at most 1,000 of them."""
    width, found = folder.sizes()["C"], {}
    for name, (_, info) in folder.need_tensors().items():
        if _NORM.search(name) and info.shape == (width,) and info.dtype in ("F32", "F16", "BF16") and len(found) < 1000:
            if "visual" not in name and "vision" not in name:
                found[name] = np.asarray(folder.rows(name, 0, width), dtype=np.float32)
    return found


def check_offset(folder: Folder) -> Iterator[Finding]:
    """G3: norm weights lie round 0 where the factor is 1 + weight, and are no such weights where the factor is the weight."""
    if folder.kind not in SHAPES:
        raise Skip(f"model_type {folder.kind or 'absent'}: not known which factor its norms have")
    found = {name: w for name, w in norms(folder).items() if np.isfinite(w).all()}
    if not found:
        raise Skip("no norm weights in the file")
    offset = folder.kind.startswith("gemma")
    means = {name: float(w.mean()) for name, w in found.items()}
    negative = float(np.mean(np.concatenate(list(found.values())) < 0))
    # A trained factor hardly ever changes its sign, and one stored less 1 does in about half its channels. The other way:
    # Gemma's stored weights spread far from 1 in some norm, plain ones stored for Gemma lie round 1 in all.
    if not offset and negative > 0.2 and max(abs(mean) for mean in means.values()) < 0.5:
        expected, got = "weights that are the factor itself", f"means near 0, {negative:.0%} of all weights negative"
        fix = "add 1 to every norm weight: they look stored as factor - 1"
    elif offset and all(0.5 < mean < 1.5 for mean in means.values()) and negative < 0.01:
        expected, got = "factor - 1, as the model computes 1 + weight", "means near 1 in every norm"
        fix = "subtract 1 from every norm weight: they look stored as the factor"
    else:
        return
    name = next(iter(means))
    yield Finding(
        "G3",
        "warn",
        "likely",
        name,
        expected,
        f"{got}; mean of {name}: {means[name]:.3f}",
        "every norm scales its channels wrongly, and errors grow layer by layer",
        fix,
        counterexample=f"{name}: mean {means[name]:.4f}, first weights {np.round(found[name][:4], 3).tolist()}",
        source="https://github.com/huggingface/transformers/pull/29402",
    )


def check_finite(folder: Folder) -> Iterator[Finding]:
    """G14: no weight that was looked at is infinite or no number; no family known to overflow is stored in float16."""
    read = dict(norms(folder))
    name = folder.embedding()
    if name and folder.tensors[name][1].dtype in ("F32", "F16", "BF16"):
        n = folder.tensors[name][1].shape[0]
        read[name] = np.asarray(folder.rows(name, 0, min(n, SAMPLE)), dtype=np.float32)
    for name, weights in read.items():
        if not np.isfinite(weights).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(weights))[0])
            shown = f"{name}{list(place)} = {weights[place]}"
            why = "everything behind it is no number"
            fix = "take the weights from before the overflow; train in bfloat16 or with a loss scale"
            yield Finding("G14", "error", "proven", name, "finite weights", shown, why, fix, counterexample=shown)
            return


def check_dtype(folder: Folder) -> Iterator[Finding]:
    """G14: a family whose activations leave float16 is not told to run in it."""
    said = folder.text.get("torch_dtype", folder.text.get("dtype"))
    if folder.kind in ("gemma2", "gemma3", "gemma3_text") and said == "float16":
        yield Finding(
            "G14",
            "warn",
            "heuristic",
            folder.where("torch_dtype" if "torch_dtype" in folder.text else "dtype"),
            "bfloat16 or float32",
            "float16",
            "the residual stream of this family was seen to leave float16, whose largest number is 65,504: NaN or empty answers",
            "write bfloat16",
            source="https://github.com/huggingface/transformers/issues/36822",
            patch=folder.patch("torch_dtype" if "torch_dtype" in folder.text else "dtype", "bfloat16"),
        )


def n_rows(folder: Folder) -> tuple[int, str]:
    """(rows of the embedding, where that is known from)."""
    name = folder.embedding()
    if name and folder.tensors[name][1].shape:
        return folder.tensors[name][1].shape[0], name
    rows = folder.whole("vocab_size")
    if not rows:
        raise Skip("no embedding in the folder and no vocab_size in the config")
    return rows, folder.where("vocab_size")


def check_ids(folder: Folder) -> Iterator[Finding]:
    """L9: every id that the tokenizer or the configs can name is a row of the embedding."""
    rows, source = n_rows(folder)
    ids = folder.ids()
    beyond = sorted((i, token) for token, i in ids.items() if not 0 <= i < rows)
    if beyond:
        i, token = beyond[0]
        got = f"{len(beyond)} tokens beyond, first {token!r} with id {i}"
        yield _l9("tokenizer.json", rows, got, f"{token!r} has id {i}; {source} has {rows} rows")
    places = [("generation_config.json", folder.generation), ("config.json", folder.text)]
    for file, values in places:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            bad = [i for i in as_ids(values.get(key)) if i >= rows or i < -1]
            if bad:
                yield _l9(f"{file}:{key}", rows, str(bad[0]), f"{key} {bad[0]}; {source} has {rows} rows")
            elif -1 in as_ids(values.get(key)):
                yield Finding(
                    "L9",
                    "warn",
                    "likely",
                    f"{file}:{key}",
                    "an id, or null for none",
                    "-1",
                    "indexes the last row of the embedding in some readers, fails in others",
                    "write null",
                    patch={"file": file, "key": [key], "value": None},
                )


def _l9(where: str, rows: int, got: str, proof: str) -> Finding:
    why = "looking the id up reads past the embedding: a crash on a CPU, garbage or a device assert elsewhere"
    fix = "resize the embedding before the token is used, or take the token out"
    source = "https://github.com/ggml-org/llama.cpp/issues/3583"
    return Finding("L9", "error", "proven", where, f"ids below {rows}", got, why, fix, proof, source)


def check_trained(folder: Folder) -> Iterator[Finding]:
    """L1: the special tokens that a chat needs have trained rows."""
    folder.need_tensors()
    name, ids = folder.embedding(), folder.ids()
    if not name or not ids or folder.tensors[name][1].dtype not in ("F32", "F16", "BF16"):
        raise Skip("no embedding of floats beside a tokenizer.json")
    rows = folder.tensors[name][1].shape[0]
    used = {token: i for token, i in _in_use(folder, ids).items() if i < rows}
    if not used:
        raise Skip("no special token in the template or the configs")
    starts = np.linspace(0, max(0, rows - 64), SAMPLE // 64).astype(int)
    usual = np.concatenate([_norms_of(folder, name, int(s), min(rows, int(s) + 64)) for s in starts])
    median = float(np.median(usual))
    dead = {}
    for token, i in used.items():
        norm = float(_norms_of(folder, name, i, i + 1)[0])
        if norm < 0.01 * median or norm <= 1e-16:
            dead[token] = (i, norm)
    if dead:
        token, (i, norm) = next(iter(dead.items()))
        yield Finding(
            "L1",
            "warn",
            "likely",
            f"{name}[{i}]",
            f"a row of length near {median:.3g}, the median",
            f"{norm:.3g} for {token!r}" + (f" and {len(dead) - 1} more tokens" if len(dead) > 1 else ""),
            "the token was never trained: with frozen embeddings a fine-tune on this template cannot learn it",
            "set the row to the mean of the trained ones and train embedding and head with it",
            counterexample=f"{token!r}: |{name}[{i}]| = {norm:.4g}, median of {len(usual)} rows {median:.4g}",
            source="https://github.com/meta-llama/llama3/issues/77",
        )


def _norms_of(folder: Folder, name: str, first: int, last: int) -> np.ndarray:
    return np.linalg.norm(np.asarray(folder.rows(name, first, last), dtype=np.float32), axis=-1)


def _in_use(folder: Folder, ids: dict[str, int]) -> dict[str, int]:
    """The special tokens that the template writes or the configs name. What only pads is never looked up with a gradient."""
    written = set(re.findall(r"<[^<>\s]{1,80}>", folder.template))
    used = {token: ids[token] for token in written if token in ids}
    for key in ("bos_token", "eos_token"):
        token = token_text(folder.tokenizer_config.get(key))
        used |= {token: ids[token]} if token in ids and folder.template else {}
    return dict(sorted(used.items(), key=lambda item: item[1]))


CHECKS = (
    Check("G9", "the config's sizes are whole and divide", check_numbers),
    Check("G9", "every tensor has the shape the config gives it", check_shapes),
    Check("G9", "the layers in the file are those the config counts", check_layers),
    Check("G8", "the head is tied or there, as the config says", check_tying),
    Check("L9", "every id is a row of the embedding", check_ids),
    Check("L1", "the special tokens in use have trained rows", check_trained),
    Check("G3", "the norms' weights are stored as the architecture adds them", check_offset),
    Check("G14", "the weights looked at are finite", check_finite),
    Check("G14", "the dtype holds the family's activations", check_dtype),
)

"""GGUF metadata as ModelConfig and back: the words of llama.cpp for what families.py reads.

Reading puts the metadata into the words of config.json. Writing drafts the metadata of each architecture and reads it back, as
stock.py does, so a key is spelled twice here and its meaning nowhere. What llama.cpp's own code fixes beside the metadata (its
GELU is the tanh one, an output that some architectures do not load) stands in `_as_llama_cpp_computes`, by src/models/*.cpp.

    config_to_gguf(config) -> ("llama", {"general.architecture": ("string", "llama"), "llama.block_count": ("uint32", 30), ...})
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from kobza.config import InputError, ModelConfig, nearest, require
from kobza.formats.families import FAMILIES, Family, brief, config_from_hf, is_size
from kobza.formats.layouts import GGUF_LAYOUTS
from kobza.formats.stock import Found, canonical, chosen, raised, share_of

Metadata = dict[str, tuple[str, Any]]

GGUF_KEYS = {
    "max_seq_len": "context_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_kv_head": "attention.head_count_kv",
    "n_embd": "embedding_length",
    "n_ff": "feed_forward_length",
    "head_dim": "attention.key_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
EPS_KEYS = dict.fromkeys(("gpt2", "nemotron"), "attention.layer_norm_epsilon")  # no RMSNorm
GGUF_REFUSED: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
}
GGUF_FAMILIES = {arch: arch for arch in GGUF_LAYOUTS} | {"gemma3": "gemma3_text"}


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    rope_freqs: list[float] | None = None,
) -> ModelConfig:
    """GGUF metadata -> ModelConfig. Three things stand in the tensors alone, so give their `shapes` by name and the values of
    rope_freqs.weight: whether the head is tied (no output.weight), the rows of the vocabulary, and Llama 3's slowed angles."""
    try:
        config = config_from_hf(hf_from_gguf(metadata, shapes))
    except InputError as error:
        raise InputError(f"GGUF metadata, as {error}") from None
    return config if rope_freqs is None else with_rope_freqs(config, rope_freqs)


def shortest(value: float) -> float:
    """The decimal of few digits that is the same float32, if there is one. shortest(9.999999747378752e-06) -> 1e-05"""
    try:
        raw = struct.pack("<f", value)
        return next((short for n in range(1, 7) if struct.pack("<f", short := float(f"{value:.{n}g}")) == raw), value)
    except OverflowError:  # no float32
        return value


def hf_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    """GGUF metadata in the words of config.json."""
    arch = metadata.get("general.architecture")
    require(isinstance(arch, str), f"general.architecture is {brief(arch)}; it must name the family, e.g. llama")
    known = list(GGUF_LAYOUTS)
    require(arch in known, f"general.architecture {arch!r} is none that kobza computes{nearest(arch, known)}")
    kind = GGUF_FAMILIES[arch]
    family = FAMILIES[kind]

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        value = shortest(value) if isinstance(value, float) else value
        many = isinstance(value, Collection) and not isinstance(value, str)
        return list(value)[:10_001] if many else value  # an array is a list, here as in a config

    names = GGUF_KEYS | {"norm_eps": EPS_KEYS.get(arch, GGUF_KEYS["norm_eps"])}
    hf: dict[str, Any] = {"model_type": kind}
    for ours, theirs in family.keys.items():
        if ours in names:
            value = get(names[ours])
            needed = ours not in ("n_kv_head", "n_ff", "head_dim")
            require(value is not None or not needed, f"{arch}.{names[ours]} is not there; the file is not whole")
            hf[theirs] = value
    tokens = metadata.get("tokenizer.ggml.tokens")
    said = get("vocab_size") or (len(tokens) if isinstance(tokens, Collection) else None)
    rows = (shapes or {}).get("token_embd.weight", (said,))
    tied = shapes is None or "output.weight" not in shapes
    hf |= {"vocab_size": rows[0] if rows else None, "tie_word_embeddings": tied}
    if arch == "llama":
        biased = "blk.0.attn_q.bias" in (shapes or {})
        hf |= {"attention_bias": biased, "mlp_bias": biased}
    if arch == "gpt2":
        return hf
    for key, plain in GGUF_REFUSED.items():
        fine = get(key) is None or get(key) in plain
        require(fine, f"{arch}.{key} is {brief(get(key))}, which kobza's {kind} does not compute")
    long = "rope_factors_long.weight" in (shapes or {})
    require(not long, "rope_factors_long.weight is there: longrope, which kobza does not compute")
    hf |= {"rope_theta": get("rope.freq_base", family.defaults["rope_theta"]), "rope_scaling": _gguf_scaling(get, arch)}
    turned, width, heads = get("rope.dimension_count"), hf["hidden_size"], hf["num_attention_heads"]
    if hf["head_dim"] is None and is_size(width) and is_size(heads):
        hf["head_dim"] = width // heads or None
    if "partial_rotary_factor" in family.defaults:
        hf["partial_rotary_factor"] = 1.0
    if turned is not None and turned != hf["head_dim"] and hf["head_dim"] is not None:
        whole = is_size(turned) and is_size(hf["head_dim"])
        require(whole, f"{arch}.rope.dimension_count is {brief(turned)} of key_length {brief(hf['head_dim'])}")
        hf["partial_rotary_factor"] = share_of(turned, hf["head_dim"])
    return hf | _gguf_attention(get, kind, family, hf)


def _gguf_attention(get: Any, kind: str, family: Family, hf: dict[str, Any]) -> dict[str, Any]:
    """Windows, caps and scale. What llama.cpp keeps in its code stands here: the pattern of windows, Gemma's largest models."""
    found: dict[str, Any] = {}
    if family.windows:
        usual = 4096 if kind == "gemma2" else None  # llama.cpp's own default; elsewhere an absent one is none
        window, pattern = get("attention.sliding_window") or usual, get("attention.sliding_window_pattern")
        found["sliding_window"] = window
        if family.windows == "upper":
            found |= {"use_sliding_window": window is not None, "max_window_layers": 0}
        if isinstance(pattern, list):  # True: local
            found["layer_types"] = ["sliding_attention" if local else "full_attention" for local in pattern]
        elif pattern is not None:
            found["sliding_window_pattern"] = pattern
    if "query_pre_attn_scalar" in family.defaults:
        largest = {"gemma2": 46, "gemma3_text": 62}[kind]  # layers of the 27B models, whose scale is not by head_dim
        width, heads = hf["hidden_size"], hf["num_attention_heads"]
        narrow = hf["num_hidden_layers"] == largest and is_size(width) and is_size(heads)
        found["query_pre_attn_scalar"] = width // heads if narrow else hf["head_dim"]
        capped = kind == "gemma2"
        found["attn_logit_softcapping"] = get("attn_logit_softcapping", 50.0 if capped else None)
        found["final_logit_softcapping"] = get("final_logit_softcapping", 30.0 if capped else None)
    if kind == "gemma3_text":
        found["rope_local_base_freq"] = get("rope.freq_base_swa", 10_000.0)
    return found


def _gguf_scaling(get: Any, arch: str) -> dict[str, Any] | None:
    """rope.scaling.* as rope_scaling."""
    sort = get("rope.scaling.type")
    if sort in (None, "none"):
        return None
    found = {"rope_type": sort, "factor": get("rope.scaling.factor")}
    original = get("rope.scaling.original_context_length")
    return found | ({"original_max_position_embeddings": original} if original is not None else {})


def with_rope_freqs(config: ModelConfig, divide: list[float]) -> ModelConfig:
    """The config with Llama 3's scaling, of which a GGUF file keeps only what each frequency is divided by, (D/2,)."""
    pairs = (config.rope_dim or config.head_dim) // 2
    require(len(divide) == pairs, f"rope_freqs.weight has {len(divide)} values; {pairs} pairs are turned")
    factor = round(float(max(divide)), 4)
    if factor == 1 and min(divide) == 1:
        return config
    for length in _lengths(config, divide) if config.rope_scaling == "none" and 1 < factor < math.inf else ():
        found = replace(config, rope_scaling="llama3", rope_factor=factor, rope_original_len=length)
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(llama3_slowdown(found), divide, strict=True)):
            return found
    raise InputError(
        f"rope_freqs.weight divides by up to {factor:g} in a way that is not Llama 3's; kobza has no other"
    )


def _lengths(config: ModelConfig, divide: list[float]) -> Iterator[int]:
    """Contexts before scaling that the divisors may come from: those of the pairs on the ramp, then the usual ones."""
    factor, pairs = max(divide), len(divide)
    for i, d in enumerate(divide):
        if 1 < d < factor:  # 1/d = k + (1 - k)/factor, and the pair turns 1 + 3 k times over the length
            turns = 1 + 3 * (1 / d - 1 / factor) / (1 - 1 / factor)
            yield max(1, round(min(2 * math.pi * turns * config.rope_theta ** (i / pairs), 2.0**30)))
    yield from (8192, *(2**n for n in range(20, -1, -1)))  # Llama 3's first


def llama3_slowdown(config: ModelConfig) -> list[float]:
    """`rope_slowdown` of layers.py for llama3, without torch."""
    pairs, s, length = (config.rope_dim or config.head_dim) // 2, config.rope_factor, config.rope_original_len
    turns = [length / (2 * math.pi) * config.rope_theta ** (-i / pairs) for i in range(pairs)]
    kept = [min(1.0, max(0.0, (t - 1) / (4 - 1))) for t in turns]
    return [1 / (k + (1 - k) / s) for k in kept]


# ---- writing -------------------------------------------------------------------------------------------------------

SQUARE = ("gpt2", "nemotron", "phi3", "qwen2")  # their heads together are as wide as the model
PLAIN_WINDOWS = {"gemma2": 2, "gemma3": 6}  # every n-th attention is global, which the file need not say


def config_to_gguf(config: ModelConfig) -> tuple[str, Metadata]:
    """The architecture of llama.cpp that computes the same function and its metadata, all but the tokenizer's and the file's own;
    InputError names the switch in the way."""
    wanted = canonical(config)
    arch = chosen(wanted, list(gguf_candidates(wanted)), "llama.cpp has no architecture that computes this model")
    return arch, _metadata(gguf_target(wanted, arch), arch)


def gguf_target(config: ModelConfig, arch: str) -> ModelConfig:
    """The model as an architecture has it: with the weights that it fills in, a head of its own where llama.cpp asks for one."""
    family = FAMILIES[GGUF_FAMILIES[arch]]
    cast = family.fixed.get("norm_cast", "before")  # llama.cpp computes in float32: no difference
    full = raised(canonical(config), family)
    return replace(full, norm_cast=cast, tied=full.tied and arch != "nemotron")


def gguf_candidates(wanted: ModelConfig) -> Iterator[Found]:
    """(architecture, the model raised to it, what llama.cpp would compute) of each architecture that can be drafted at all."""
    for arch in GGUF_LAYOUTS:
        try:
            full = gguf_target(wanted, arch)
            yield arch, full, _as_llama_cpp_computes(full, arch)
        except InputError:
            continue


def _as_llama_cpp_computes(config: ModelConfig, arch: str) -> ModelConfig:
    """The metadata drafted for a model, read back, with what the architecture's code fixes beside it."""
    table = (config.vocab_size, config.n_embd)
    own_head = not config.tied and arch not in ("gemma", "gemma2")
    stored = {"token_embd.weight": table} | ({"output.weight": table} if own_head else {})
    stored |= {"blk.0.attn_q.bias": ()} if config.bias else {}
    slowed = config.rope_scaling == "llama3" and arch in ("llama", "arcee")  # the others do not look for rope_freqs
    plain = {name: value for name, (_, value) in _metadata(config, arch).items()}
    found = canonical(config_from_gguf(plain, stored))
    if slowed:
        names = ("rope_scaling", "rope_factor", "rope_original_len")
        found = replace(found, **{name: getattr(config, name) for name in names})
    if arch in SQUARE:
        even = f"{arch} has no n_embd {config.n_embd} that n_head {config.n_head} does not divide"
        require(config.n_embd % config.n_head == 0, even)
        found = replace(found, head_dim=config.n_embd // config.n_head)
    return replace(found, n_layer=min(found.n_layer, 512))  # LLAMA_MAX_LAYERS


def _metadata(config: ModelConfig, arch: str) -> Metadata:
    """An architecture's metadata with all that it can say of a model."""
    kind = GGUF_FAMILIES[arch]
    found: Metadata = {
        "vocab_size": ("uint32", config.vocab_size),
        "context_length": ("uint32", config.max_seq_len),
        "embedding_length": ("uint32", config.n_embd),
        "block_count": ("uint32", config.n_layer),
        "feed_forward_length": ("uint32", config.n_ff),
        "attention.head_count": ("uint32", config.n_head),
        EPS_KEYS.get(arch, GGUF_KEYS["norm_eps"]): ("float32", config.norm_eps),
    }
    if arch != "gpt2":
        partial = "partial_rotary_factor" in FAMILIES[kind].defaults
        turned = config.rope_dim if partial and config.rope_dim else config.head_dim
        found |= {"attention.head_count_kv": ("uint32", config.n_kv_head)}
        found |= {f"attention.{x}_length": ("uint32", config.head_dim) for x in ("key", "value")}
        found |= {"rope.dimension_count": ("uint32", turned), "rope.freq_base": ("float32", config.rope_theta)}
    if config.rope_scaling in ("linear", "yarn"):
        found["rope.scaling.type"] = ("string", config.rope_scaling)
        found["rope.scaling.factor"] = ("float32", config.rope_factor)
    if config.rope_scaling == "yarn":
        found["rope.scaling.original_context_length"] = ("uint32", config.rope_original_len)
    found |= _gemma_metadata(config, arch) if arch in PLAIN_WINDOWS else {}
    return {"general.architecture": ("string", arch)} | {f"{arch}.{name}": value for name, value in found.items()}


def _gemma_metadata(config: ModelConfig, arch: str) -> Metadata:
    """Caps and windows of Gemma 2 and 3, the only architectures here whose code reads them."""
    found: Metadata = {"final_logit_softcapping": ("float32", config.softcap)} if config.softcap else {}
    if arch == "gemma2":  # without a key it takes Gemma's own; a window as wide as the context hides nothing
        found |= {"attn_logit_softcapping": ("float32", config.attn_softcap)} if config.attn_softcap else {}
        found["attention.sliding_window"] = ("uint32", config.window or config.max_seq_len)
    elif config.window:
        found["attention.sliding_window"] = ("uint32", config.window)
        found["rope.freq_base_swa"] = ("float32", config.rope_local_theta or config.rope_theta)
    local = [config.is_windowed(i) for i in range(config.n_attention)]
    if config.window and local != [bool((i + 1) % PLAIN_WINDOWS[arch]) for i in range(config.n_attention)]:
        found["attention.sliding_window_pattern"] = ("array:bool", local)
    return found

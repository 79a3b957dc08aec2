"""Other people's config.json as ModelConfig: one table of families, read here and written back by stock.py.

A family is a row of data: which fields of ModelConfig its code fixes, which keys of config.json hold the rest (with the value
that `transformers` 5 takes where a key is absent), and how its tensors are named and laid out (layouts.py). There is no class of
a family. What a row cannot say is refused with the key and its value. GGUF metadata is put into the words of config.json first
(gguf_families.py), so that there is one reader. This file loads no torch.

    config_from_hf({"model_type": "llama", "hidden_size": 64, ...}) -> ModelConfig(n_embd=64, mlp="swiglu", ...)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kobza.config import InputError, ModelConfig, require
from kobza.formats.layouts import FUSED, GGUF_LAYOUTS, GPT2, LLAMA, NEMOTRON, SANDWICH, Layout

MOST = 2**31  # no size of a real model reaches it


# ---- families ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A row: `fixed` fields of ModelConfig, `keys` ours -> theirs, `defaults` of every key of theirs that is read."""

    architecture: str
    layout: Layout
    fixed: dict[str, Any]
    defaults: dict[str, Any]
    keys: dict[str, str] = field(default_factory=lambda: LLAMA_KEYS)
    act: str = "hidden_act"
    gated: bool = True
    windows: str = ""
    """which attentions have the window: none, all, upper (from max_window_layers on) or every n-th not"""


LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "n_ff": "intermediate_size",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
}
NEMOTRON_KEYS = LLAMA_KEYS | {"norm_eps": "norm_eps"}
GPT2_KEYS = {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
GPT2_KEYS |= {"max_seq_len": "n_positions", "n_ff": "n_inner", "norm_eps": "layer_norm_epsilon"}
GPT2_ALIASES = {"hidden_size": "n_embd", "max_position_embeddings": "n_positions"}
GPT2_ALIASES |= {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}

# Defaults: the classes of transformers 5.23, models/<family>/configuration_<family>.py. None: derived from the others.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
}
QWEN2_DEFAULTS = DEFAULTS | {"vocab_size": 151_936, "intermediate_size": 22016, "num_key_value_heads": 32}
QWEN2_DEFAULTS |= {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096}
QWEN2_DEFAULTS |= {"max_window_layers": 28, "layer_types": None}
GEMMA_DEFAULTS = DEFAULTS | {"vocab_size": 256_000, "hidden_size": 3072, "intermediate_size": 24576, "head_dim": 256}
GEMMA_DEFAULTS |= {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16}
GEMMA_DEFAULTS |= {"hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "tie_word_embeddings": True}
GEMMA2_DEFAULTS = {name: value for name, value in GEMMA_DEFAULTS.items() if name != "hidden_act"}
GEMMA2_DEFAULTS |= {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
GEMMA2_DEFAULTS |= {"num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
GEMMA2_DEFAULTS |= {"sliding_window": 4096, "layer_types": None, "final_logit_softcapping": 30.0}
GEMMA2_DEFAULTS |= {"attn_logit_softcapping": 50.0}
GEMMA3_DEFAULTS = GEMMA2_DEFAULTS | {"vocab_size": 262_208, "max_position_embeddings": 131_072, "rope_theta": 1e6}
GEMMA3_DEFAULTS |= {"rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
GEMMA3_DEFAULTS |= {"final_logit_softcapping": None, "attn_logit_softcapping": None}
PHI3_DEFAULTS = DEFAULTS | {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "rms_norm_eps": 1e-5}
PHI3_DEFAULTS |= {"max_position_embeddings": 4096, "sliding_window": None, "partial_rotary_factor": 1.0}
ARCEE_DEFAULTS = DEFAULTS | {
    "hidden_size": 2560,
    "intermediate_size": 18432,
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
}
ARCEE_DEFAULTS |= {"max_position_embeddings": 4096, "attention_bias": False, "mlp_bias": False}
NEMOTRON_DEFAULTS = {name: value for name, value in ARCEE_DEFAULTS.items() if name != "rms_norm_eps"}
NEMOTRON_DEFAULTS |= {"vocab_size": 256_000, "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 48}
NEMOTRON_DEFAULTS |= {"norm_eps": 1e-5, "partial_rotary_factor": 0.5}
GPT2_DEFAULTS = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None}
GPT2_DEFAULTS |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}

PLAIN = {"norm": "rmsnorm", "qk_norm": False}
OFFSET = PLAIN | {"norm_offset": True, "norm_cast": "after"}
FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        GPT2,
        {"position": "learned", "norm": "layernorm", "qk_norm": False, "bias": True},
        GPT2_DEFAULTS,
        GPT2_KEYS,
        "activation_function",
        gated=False,
    ),
    "llama": Family("LlamaForCausalLM", LLAMA, PLAIN, DEFAULTS | {"attention_bias": False, "mlp_bias": False}),
    "mistral": Family(
        "MistralForCausalLM",
        LLAMA,
        PLAIN,
        DEFAULTS
        | {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        },
        windows="all",
    ),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA, PLAIN | {"qkv_bias": True}, QWEN2_DEFAULTS, windows="upper"),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        LLAMA,
        PLAIN | {"qk_norm": True, "qk_norm_weight": True},
        QWEN2_DEFAULTS | {"head_dim": 128},
        windows="upper",
    ),
    "phi3": Family("Phi3ForCausalLM", FUSED, PLAIN, PHI3_DEFAULTS, windows="all"),
    "gemma": Family("GemmaForCausalLM", LLAMA, OFFSET, GEMMA_DEFAULTS),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        SANDWICH,
        OFFSET | {"norm_place": "both"},
        GEMMA2_DEFAULTS,
        act="hidden_activation",
        windows="every 2",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        SANDWICH,
        OFFSET | {"norm_place": "both", "qk_norm": True, "qk_norm_weight": True},
        GEMMA3_DEFAULTS,
        act="hidden_activation",
        windows="every 6",
    ),
    "arcee": Family("ArceeForCausalLM", LLAMA, PLAIN, ARCEE_DEFAULTS, gated=False),
    # its norms have biases whether its linear layers have or not
    "nemotron": Family(
        "NemotronForCausalLM",
        NEMOTRON,
        {"norm": "layernorm", "qk_norm": False, "norm_offset": True, "bias": True},
        NEMOTRON_DEFAULTS,
        NEMOTRON_KEYS,
        gated=False,
    ),
}
ACTS = {"silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu2", "gelu": "gelu"}
ACTS |= {name: "gelu_tanh" for name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")}
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}
# key -> the values that mean "not there"; any other changes the function in a way that the row does not say
REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "scale_attn_weights": (True, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "use_bidirectional_attention": (False, None),
    "pruned_heads": (None, {}),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_qk_norm": (False, None),
    "use_mrope": (False, None),
    "rope_interleaved": (False, None),
}
DIVISIBLE = (
    "llama",
    "gemma2",
    "gemma3_text",
    "arcee",
)  # their stock configs refuse a width that the heads do not divide
KNOWN_BIAS = dict.fromkeys(("llama", "arcee", "nemotron"), ("attention_bias", "mlp_bias"))
KNOWN_BIAS |= {"qwen2": ("attention_bias",)}  # read, or on in the code anyway
LONG_WORDS = {  # why a near relative is not here
    "olmo2": "its QK-norm is over all heads at once; kobza's is over each head",
    "mixtral": "it has experts; kobza's blocks have one feed-forward",
    "phi": "its attention and feed-forward run side by side; kobza's one after the other",
}


def text_part(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the text model: those of text_config in a multimodal config, else the whole."""
    require(isinstance(hf, Mapping), f"config.json: holds {type(hf).__name__}; a config is an object {{...}}")
    inner = hf.get("text_config")
    if inner is None:
        return dict(hf)
    require(isinstance(inner, Mapping), f"config.json: text_config is {brief(inner)}; it must be an object")
    kept = {"tie_word_embeddings", "quantization_config", "dtype", "torch_dtype"} & set(hf)
    text = dict(inner) | {key: hf[key] for key in kept}
    default = f"{hf.get('model_type')}_text"  # gemma-3-4b names no model_type within
    return text | {"model_type": text.get("model_type") or default}


def family_of(hf: Mapping[str, Any]) -> tuple[str, Family]:
    """The row of a config by its model_type; custom code and other heads are refused."""
    kind = hf.get("model_type")
    require(isinstance(kind, str), f"config.json: model_type is {brief(kind)}; name the family, e.g. llama")
    known = ", ".join(FAMILIES)
    why = f": {LONG_WORDS[kind]}" if kind in LONG_WORDS else f" (known: {known})"
    require(kind in FAMILIES, f"config.json: model_type {kind!r} is none that kobza computes{why}")
    family = FAMILIES[kind]
    names = hf.get("architectures") or []
    stem = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    stock = {family.architecture, f"{stem}Model", f"{stem}TextModel", f"{stem}ForConditionalGeneration"}
    good = isinstance(names, list) and all(isinstance(n, str) for n in names)
    require(good, f"config.json: architectures is {brief(names)}; it must be a list of names")
    own = "; its code is its own, which kobza never runs" if hf.get("auto_map") else ""
    strange = [name for name in names if name not in stock]
    require(not strange, f"config.json: architectures {strange} is not {family.architecture}{own}")
    return kind, family


def defaults_used(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a config leaves out, with the value that is taken: {"rope_theta": 10000.0, ...}; derived ones are None."""
    text = text_part(hf)
    kind, family = family_of(text)
    text = _with_aliases(text, kind)
    ropes = [value for key in ("rope_parameters", "rope_scaling") if isinstance(value := text.get(key), Mapping)]
    said = set(text) | {key for rope in ropes for key in rope}
    said |= {"rope_theta"} if any("full_attention" in rope for rope in ropes) else set()
    said |= {"rope_local_base_freq"} if any("sliding_attention" in rope for rope in ropes) else set()
    said |= {"rope_scaling"} if ropes else set()
    said |= {"sliding_window_pattern"} if text.get("layer_types") else set()
    return {key: value for key, value in family.defaults.items() if key not in said}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """A config.json -> the model that computes the same function. Absent keys take what `transformers` takes."""
    text = text_part(hf)
    kind, family = family_of(text)
    text = _with_aliases(text, kind)
    for key, plain in REFUSED.items():
        value = text.get(key, plain[0])
        fine = value in plain or key in KNOWN_BIAS.get(kind, ())
        require(fine, f"config.json: {key} is {brief(value)}, which kobza's {kind} does not compute")
    said = family.defaults | text
    fields = dict(family.fixed) | _sizes(said, family)
    fields["tied"] = _flag(said, "tie_word_embeddings")
    fields["mlp"] = _activation(said, family)
    if "attention_bias" in family.defaults:
        both = (_flag(said, "attention_bias"), _flag(said, "mlp_bias"))
        fine = both[0] == both[1] or family.layout.loose
        alone = f"config.json: attention_bias is {both[0]} and mlp_bias {both[1]}; kobza has both or none"
        require(fine, alone)
        fields.setdefault("bias", both[0])
    if family.fixed.get("norm_cast") == "after":  # Gemma
        fields["embed_scale"] = fields["n_embd"] ** 0.5
    if "query_pre_attn_scalar" in family.defaults:
        scalar = _number(said, "query_pre_attn_scalar")
        fields["attn_scale"] = 0.0 if scalar == fields["head_dim"] else scalar**-0.5
        caps = {"softcap": "final_logit_softcapping", "attn_softcap": "attn_logit_softcapping"}
        fields |= {ours: 0.0 if said[theirs] is None else _number(said, theirs) for ours, theirs in caps.items()}
        lost = "config.json: attn_logit_softcapping is set, which gemma3_text's stock code does not read; remove it"
        require(kind != "gemma3_text" or not fields["attn_softcap"], lost)
    letters, fields["window"] = _windows(said, family, fields["n_layer"])
    if family.fixed.get("position") != "learned":
        fields |= _rope(said, kind, fields["head_dim"] or fields["n_embd"] // fields["n_head"], letters)
    try:
        return _windowed(fields, letters)
    except InputError as error:
        raise InputError(f"config.json: {error}") from None


def _with_aliases(hf: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """GPT-2's keys by the names of the others, which `transformers` reads too."""
    return {GPT2_ALIASES.get(key, key) if kind == "gpt2" else key: value for key, value in hf.items()}


def brief(value: Any) -> str:
    """A value as it is shown in a message: one line, not long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shown(name: str) -> str:
    """A name out of a stranger's file as it is shown in a message: one line, no control characters, not long."""
    return brief(name).strip("'\"")


def _number(said: Mapping[str, Any], key: str, kind: tuple[type, ...] = (int, float)) -> Any:
    """A number above 0 and not absurd."""
    value = said[key]
    good = isinstance(value, kind) and not isinstance(value, bool) and 0 < value < MOST
    sort = "number" if float in kind else "whole number"
    require(good, f"config.json: {key} is {brief(value)}; it must be a {sort} above 0 and below {MOST:,}")
    return value


def is_size(value: Any) -> bool:
    """Whether a value is a whole number that a size may be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST


def _flag(said: Mapping[str, Any], key: str) -> bool:
    value = said[key]
    require(isinstance(value, bool), f"config.json: {key} is {brief(value)}; it must be true or false")
    return value


def _sizes(said: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields that are a number of the config's own; an absent or null one that is derived is left to ModelConfig."""
    sizes: dict[str, Any] = {"head_dim": 0}
    for ours, theirs in family.keys.items():
        if said[theirs] is None and ours in ("n_kv_head", "n_ff", "head_dim"):
            continue
        sizes[ours] = _number(said, theirs, (float, int) if ours == "norm_eps" else (int,))
    head_dim, n_embd, n_head = sizes["head_dim"], sizes["n_embd"], sizes["n_head"]
    if not head_dim:
        sizes["head_dim"] = max(1, n_embd // n_head)  # theirs rounds down; ours refuses what it cannot divide
        even = f"config.json: hidden_size is {n_embd}, not divisible by num_attention_heads {n_head}; give head_dim"
        require(n_embd % n_head == 0, even)
    return sizes


def _activation(said: Mapping[str, Any], family: Family) -> str:
    """The mlp that an activation's name means in a family."""
    key, act = family.act, said[family.act]
    if family is FAMILIES["gemma"]:  # "gelu" was written and tanh meant; transformers reads it so since 4.39
        act = "gelu_pytorch_tanh" if said.get("hidden_activation") is None and act == "gelu" else act
        act = said.get("hidden_activation") or act
    known = ACTS if not family.gated else {name: ours for name, ours in ACTS.items() if ours in GATED}
    good = isinstance(act, str) and act in known
    require(good, f"config.json: {key} is {brief(act)}; kobza has {', '.join(known)} here")
    return GATED[ACTS[act]] if family.gated else ACTS[act]


def _windows(said: Mapping[str, Any], family: Family, n_layer: int) -> tuple[str, int]:
    """A letter an attention, L local or G global, and the window; no window: ("", 0)."""
    require(n_layer <= 10_000, f"config.json: num_hidden_layers is {n_layer:,}; it must be at most 10,000")
    if not family.windows or said["sliding_window"] is None:
        return "", 0
    if family.windows == "upper" and not _flag(said, "use_sliding_window"):
        types = said["layer_types"]
        lost = "config.json: layer_types has sliding_attention and use_sliding_window is false; make one agree"
        require(not isinstance(types, list) or "sliding_attention" not in types, lost)
        return "", 0
    window, types = _number(said, "sliding_window", (int,)), said.get("layer_types")
    if types is not None:
        kinds = {"sliding_attention": "L", "full_attention": "G"}
        good = isinstance(types, list) and len(types) == n_layer
        require(good, f"config.json: layer_types is {brief(types)}; give {n_layer} names, one a layer")
        bad = next((kind for kind in types if not isinstance(kind, str) or kind not in kinds), None)
        require(bad is None, f"config.json: layer_types has {brief(bad)}; kobza has {', '.join(kinds)}")
        letters = "".join(kinds[kind] for kind in types)
        whole = family.windows != "all" or "G" not in letters
        require(whole, "config.json: layer_types has full_attention, which this family's stock code does not read")
    elif family.windows == "all":
        letters = "L" * n_layer
    elif family.windows == "upper":
        first = said["max_window_layers"]
        good = isinstance(first, int) and not isinstance(first, bool) and first >= 0
        require(good, f"config.json: max_window_layers is {brief(first)}; it must be a whole number")
        letters = "".join("L" if i >= first else "G" for i in range(n_layer))
    else:
        given = "sliding_window_pattern" in family.defaults
        nth = _number(said, "sliding_window_pattern", (int,)) if given else int(family.windows.split()[1])
        letters = "".join("L" if (i + 1) % nth else "G" for i in range(n_layer))
    return letters, window if "L" in letters else 0


def period(letters: str) -> str:
    """The shortest word that, repeated, begins with `letters`. period("LGLGL") -> "LG" """
    n = len(letters)
    return next(letters[:i] for i in range(1, n + 1) if letters[i:] == letters[: n - i])


def _windowed(fields: dict[str, Any], letters: str) -> ModelConfig:
    """ModelConfig of the fields, less a window that hides nothing."""
    local = fields.get("rope_local_theta", 0.0)
    if fields["window"] >= fields["max_seq_len"] and not local:
        fields["window"] = 0
    return ModelConfig(**fields, **({"window_pattern": period(letters)} if fields["window"] else {}))


def _rope(said: Mapping[str, Any], kind: str, head_dim: int, letters: str) -> dict[str, Any]:
    """The fields of the rotary angles. Old configs say rope_theta and rope_scaling, new ones rope_parameters."""
    key = "rope_scaling" if said.get("rope_scaling") else "rope_parameters"
    rope = said.get(key) or {}
    require(isinstance(rope, Mapping), f"config.json: {key} is {brief(rope)}; it must be an object")
    local: Any = {}
    if kind == "gemma3_text":  # two sorts of angles
        local = {"rope_theta": said["rope_local_base_freq"]}
        nested = "full_attention" in rope or "sliding_attention" in rope
        flat = not nested and key == "rope_parameters" and bool(rope)
        require(not flat, f"config.json: {key} needs full_attention and sliding_attention")
        if nested:
            rope, near = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
            good = isinstance(rope, Mapping) and isinstance(near, Mapping)
            require(good, f"config.json: {key} is {brief(said[key])}; full_attention and sliding_attention are objects")
            local |= dict(near)
        plain = local.get("rope_type", local.get("type", "default")) == "default"
        require(plain, f"config.json: {key} sliding_attention is {brief(local)}; kobza scales no local angles")
    usual = {"rope_theta": said["rope_theta"], "partial_rotary_factor": said.get("partial_rotary_factor", 1.0)}
    rope = usual | dict(rope)
    fields = {"rope_theta": float(_number(rope, "rope_theta"))} | _scaling(said, kind, rope)
    share = 1.0 if rope["partial_rotary_factor"] is None else _number(rope, "partial_rotary_factor")
    stock = share == 1 or ("partial_rotary_factor" in FAMILIES[kind].defaults and share < 1)
    require(stock, f"config.json: partial_rotary_factor is {brief(share)}, which {kind}'s stock code does not read")
    if share != 1:
        turned = int(head_dim * share)
        require(turned > 0, f"config.json: partial_rotary_factor {share} leaves no channel of head_dim {head_dim}")
        fields["rope_dim"] = turned
    if kind == "gemma3_text" and "L" in letters:
        theta = float(_number(local, "rope_theta"))
        if "G" not in letters:
            return {"rope_theta": theta}
        same = theta == fields["rope_theta"] and "rope_scaling" not in fields
        fields |= {} if same else {"rope_local_theta": theta}
    return fields


def _scaling(said: Mapping[str, Any], kind: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of rope_scaling; none where the angles are plain within the context."""
    sort = rope.get("rope_type", rope.get("type", "default"))
    sort = "longrope" if kind == "phi3" and sort in ("su", "yarn") else sort  # what the first Phi-3 files called it
    if sort in (None, "default", "dynamic"):  # dynamic scales beyond max_position_embeddings alone, which is our limit
        return {}
    known = (
        ["linear", "yarn", "llama3"] if kind != "phi3" else []
    )  # Phi-3's stock code knows longrope besides, kobza not
    more = ", ".join(["default", "dynamic", *known])
    require(sort in known, f"config.json: rope type {brief(sort)} is not computed; kobza has {more} in {kind}")
    require("factor" in rope, f"config.json: rope type {sort} has no factor; say how many times as far")
    factor = float(_number(rope, "factor"))
    require(factor >= 1, f"config.json: rope factor is {factor}; it must be at least 1")
    usual = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}, "yarn": {"beta_fast": 32, "beta_slow": 1}}
    gain = 0.1 * math.log(factor) + 1
    usual["yarn"] |= {"truncate": True, "attention_factor": gain, "mscale": None, "mscale_all_dim": None}
    for key, value in usual.get(sort, {}).items():
        given = rope.get(key, value if sort == "yarn" else None)
        close = isinstance(given, int | float) and value is not None and math.isclose(given, value, rel_tol=1e-6)
        fine = close or (given is None and sort == "yarn")
        require(fine, f"config.json: rope {sort} {key} is {brief(given)}; kobza computes {key} {brief(value)}")
    if factor == 1:
        return {}
    fields: dict[str, Any] = {"rope_scaling": sort, "rope_factor": factor}
    if sort != "linear":
        key = "original_max_position_embeddings"  # one beside the others counts more, as in transformers
        lengths = {key: said["max_position_embeddings"]} | dict(rope) | ({key: said[key]} if key in said else {})
        fields["rope_original_len"] = _number(lengths, key, (int,))
    return fields


def layout_of(kind: str, gguf: bool = False) -> Layout:
    """The layout of a family by model_type, or of a GGUF architecture."""
    return GGUF_LAYOUTS[kind] if gguf else FAMILIES[kind].layout

"""Other people's models as ours: one table from their settings and names to ModelConfig and our tensors, read both ways.

A family is a row of data: which fields of ModelConfig its code fixes, which keys of config.json hold the rest (with the value
that `transformers` 5 takes where a key is absent), and how its tensors are named and laid out. There is no class of a family.
What a row cannot say is refused with the key and its value. GGUF metadata is put into the words of config.json first, so that
there is one reader. This file loads no torch and touches no weights: weights.py moves the tensors along the slots made here.

    config_from_hf({"model_type": "llama", "hidden_size": 64, ...}) -> ModelConfig(n_embd=64, mlp="swiglu", ...)
    config_to_hf(that) -> {"model_type": "llama", ...}      the stock architecture that computes the same function
    slots(config, layout_of("llama")) -> [Slot("model.embed_tokens.weight", ("embed.weight",)), ...]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from kobza.config import InputError, ModelConfig, nearest, require

MOST = 2**31  # no size of a real model reaches it


# ---- names ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a family names its modules, theirs -> ours; ours with spaces between them are joined along the rows in theirs."""

    top: dict[str, str]
    layer: dict[str, str]
    block: str
    """their name of block {}"""
    prefixes: tuple[str, ...] = ("",)
    """what may stand before all but the head; the first is what is written"""
    head: str = "lm_head"
    conv1d: bool = False
    """matrices of the blocks are stored (in, out), as GPT-2's Conv1D does"""
    interleaved: bool = False
    """rope turns neighbouring channels, so the rows of q and k are in another order than in our halves"""
    norm_shift: float = 0.0
    """what is added to every norm's weight in the file"""
    ignored: tuple[str, ...] = ()
    """ends of names in the file that are no weights"""


LLAMA_LAYER = {f"self_attn.{x}_proj": f"attn.{x}_proj" for x in "qkvo"}
LLAMA_LAYER |= {f"self_attn.{x}_norm": f"attn.{x}_norm" for x in "qk"}
LLAMA_LAYER |= {f"mlp.{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
LLAMA_LAYER |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
SANDWICH_LAYER = LLAMA_LAYER | {
    "post_attention_layernorm": "attn_out_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_out_norm",
}
FUSED_LAYER = {name: ours for name, ours in LLAMA_LAYER.items() if ours[-6:] in ("o_proj", "n_proj") or "norm" in ours}
FUSED_LAYER |= {"self_attn.qkv_proj": "attn.q_proj attn.k_proj attn.v_proj"}
FUSED_LAYER |= {"mlp.gate_up_proj": "mlp.gate_proj mlp.up_proj"}
GPT2_LAYER = {"ln_1": "attn_norm", "attn.c_attn": "attn.q_proj attn.k_proj attn.v_proj", "attn.c_proj": "attn.o_proj"}
GPT2_LAYER |= {"ln_2": "mlp_norm", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
# multimodal files put the text model under a name of its own; both orders were released
PREFIXES = ("model.", "", "language_model.model.", "model.language_model.", "model.language_model.model.")
LLAMA_TOP = {"embed_tokens": "embed", "norm": "norm"}
GPT2_TOP = {"wte": "embed", "wpe": "position", "ln_f": "norm"}
LLAMA = Layout(LLAMA_TOP, LLAMA_LAYER, "layers.{}", PREFIXES, ignored=("rotary_emb.inv_freq",))
SANDWICH = replace(LLAMA, layer=SANDWICH_LAYER)
FUSED = replace(LLAMA, layer=FUSED_LAYER)
# attn.bias and attn.masked_bias are the causal mask, which old files keep
GPT2 = Layout(
    GPT2_TOP, GPT2_LAYER, "h.{}", ("transformer.", ""), "lm_head", True, ignored=(".attn.bias", ".masked_bias")
)

GGUF_LAYER = {f"attn_{x}": f"attn.{x}_proj" for x in "qkv"} | {f"attn_{x}_norm": f"attn.{x}_norm" for x in "qk"}
GGUF_LAYER |= {"attn_output": "attn.o_proj", "attn_norm": "attn_norm", "ffn_norm": "mlp_norm"}
GGUF_LAYER |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
GGUF_SANDWICH = GGUF_LAYER | {"post_attention_norm": "attn_out_norm", "post_ffw_norm": "mlp_out_norm"}
GGUF_QKV = {name: ours for name, ours in GGUF_LAYER.items() if name not in ("attn_q", "attn_k", "attn_v")}
GGUF_QKV |= {"attn_qkv": "attn.q_proj attn.k_proj attn.v_proj"}
GGUF_FUSED = {name: ours for name, ours in GGUF_QKV.items() if name not in ("ffn_gate", "ffn_up")}
GGUF_FUSED |= {"ffn_up": "mlp.gate_proj mlp.up_proj"}
GGUF_TOP = {"token_embd": "embed", "position_embd": "position", "output_norm": "norm"}
GGUF = Layout(GGUF_TOP, GGUF_LAYER, "blk.{}", head="output", ignored=("rope_freqs.weight", "attn_rot_embd.weight"))
# what llama.cpp's convert_hf_to_gguf.py writes: rows of q and k permuted for `llama` alone, 1 added to every norm of Gemma
GGUF_LAYOUTS = {
    "llama": replace(GGUF, interleaved=True),
    "qwen2": GGUF,
    "qwen3": GGUF,
    "gemma": replace(GGUF, norm_shift=1.0),
    "gemma2": replace(GGUF, layer=GGUF_SANDWICH, norm_shift=1.0),
    "gemma3": replace(GGUF, layer=GGUF_SANDWICH, norm_shift=1.0),
    "phi3": replace(GGUF, layer=GGUF_FUSED),
    "gpt2": replace(GGUF, layer=GGUF_QKV),
}


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
DIVISIBLE = ("llama", "gemma2", "gemma3_text")  # their stock configs refuse a width that the heads do not divide
KNOWN_BIAS = {"llama": ("attention_bias", "mlp_bias"), "qwen2": ("attention_bias",)}  # read, or on in the code anyway
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
    require(isinstance(inner, Mapping), f"config.json: text_config is {_short(inner)}; it must be an object")
    kept = {"tie_word_embeddings", "quantization_config", "dtype", "torch_dtype"} & set(hf)
    text = dict(inner) | {key: hf[key] for key in kept}
    default = f"{hf.get('model_type')}_text"  # gemma-3-4b names no model_type within
    return text | {"model_type": text.get("model_type") or default}


def family_of(hf: Mapping[str, Any]) -> tuple[str, Family]:
    """The row of a config by its model_type; custom code and other heads are refused."""
    kind = hf.get("model_type")
    require(isinstance(kind, str), f"config.json: model_type is {_short(kind)}; name the family, e.g. llama")
    known = ", ".join(FAMILIES)
    why = f": {LONG_WORDS[kind]}" if kind in LONG_WORDS else f" (known: {known})"
    require(kind in FAMILIES, f"config.json: model_type {kind!r} is none that kobza computes{why}")
    family = FAMILIES[kind]
    names = hf.get("architectures") or []
    stem = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    stock = {family.architecture, f"{stem}Model", f"{stem}TextModel", f"{stem}ForConditionalGeneration"}
    good = isinstance(names, list) and all(isinstance(n, str) for n in names)
    require(good, f"config.json: architectures is {_short(names)}; it must be a list of names")
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
        require(fine, f"config.json: {key} is {_short(value)}, which kobza's {kind} does not compute")
    said = family.defaults | text
    fields = dict(family.fixed) | _sizes(said, family)
    fields["tied"] = _flag(said, "tie_word_embeddings")
    fields["mlp"] = _activation(said, family)
    if "attention_bias" in family.defaults:
        both = (_flag(said, "attention_bias"), _flag(said, "mlp_bias"))
        alone = f"config.json: attention_bias is {both[0]} and mlp_bias {both[1]}; kobza has both or none"
        require(both[0] == both[1], alone)
        fields["bias"] = both[0]
    if family.fixed.get("norm_offset"):
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


def _short(value: Any) -> str:
    """A value as it is shown in a message: one line, not long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shown(name: str) -> str:
    """A name out of a stranger's file as it is shown in a message: one line, no control characters, not long."""
    return _short(name).strip("'\"")


def _number(said: Mapping[str, Any], key: str, kind: tuple[type, ...] = (int, float)) -> Any:
    """A number above 0 and not absurd."""
    value = said[key]
    good = isinstance(value, kind) and not isinstance(value, bool) and 0 < value < MOST
    sort = "number" if float in kind else "whole number"
    require(good, f"config.json: {key} is {_short(value)}; it must be a {sort} above 0 and below {MOST:,}")
    return value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST


def _flag(said: Mapping[str, Any], key: str) -> bool:
    value = said[key]
    require(isinstance(value, bool), f"config.json: {key} is {_short(value)}; it must be true or false")
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
    require(good, f"config.json: {key} is {_short(act)}; kobza has {', '.join(known)} here")
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
        require(good, f"config.json: layer_types is {_short(types)}; give {n_layer} names, one a layer")
        bad = next((kind for kind in types if not isinstance(kind, str) or kind not in kinds), None)
        require(bad is None, f"config.json: layer_types has {_short(bad)}; kobza has {', '.join(kinds)}")
        letters = "".join(kinds[kind] for kind in types)
        whole = family.windows != "all" or "G" not in letters
        require(whole, "config.json: layer_types has full_attention, which this family's stock code does not read")
    elif family.windows == "all":
        letters = "L" * n_layer
    elif family.windows == "upper":
        first = said["max_window_layers"]
        good = isinstance(first, int) and not isinstance(first, bool) and first >= 0
        require(good, f"config.json: max_window_layers is {_short(first)}; it must be a whole number")
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
    require(isinstance(rope, Mapping), f"config.json: {key} is {_short(rope)}; it must be an object")
    local: Any = {}
    if kind == "gemma3_text":  # two sorts of angles
        local = {"rope_theta": said["rope_local_base_freq"]}
        nested = "full_attention" in rope or "sliding_attention" in rope
        flat = not nested and key == "rope_parameters" and bool(rope)
        require(not flat, f"config.json: {key} needs full_attention and sliding_attention")
        if nested:
            rope, near = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
            good = isinstance(rope, Mapping) and isinstance(near, Mapping)
            require(
                good, f"config.json: {key} is {_short(said[key])}; full_attention and sliding_attention are objects"
            )
            local |= dict(near)
        plain = local.get("rope_type", local.get("type", "default")) == "default"
        require(plain, f"config.json: {key} sliding_attention is {_short(local)}; kobza scales no local angles")
    usual = {"rope_theta": said["rope_theta"], "partial_rotary_factor": said.get("partial_rotary_factor", 1.0)}
    rope = usual | dict(rope)
    fields = {"rope_theta": float(_number(rope, "rope_theta"))} | _scaling(said, kind, rope)
    share = 1.0 if rope["partial_rotary_factor"] is None else _number(rope, "partial_rotary_factor")
    stock = share == 1 or (kind == "phi3" and share < 1)
    require(stock, f"config.json: partial_rotary_factor is {_short(share)}, which {kind}'s stock code does not read")
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
    require(sort in known, f"config.json: rope type {_short(sort)} is not computed; kobza has {more} in {kind}")
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
        require(fine, f"config.json: rope {sort} {key} is {_short(given)}; kobza computes {key} {_short(value)}")
    if factor == 1:
        return {}
    fields: dict[str, Any] = {"rope_scaling": sort, "rope_factor": factor}
    if sort != "linear":
        key = "original_max_position_embeddings"  # one beside the others counts more, as in transformers
        lengths = {key: said["max_position_embeddings"]} | dict(rope) | ({key: said[key]} if key in said else {})
        fields["rope_original_len"] = _number(lengths, key, (int,))
    return fields


# ---- back ----------------------------------------------------------------------------------------------------------


def canonical(config: ModelConfig) -> ModelConfig:
    """The same function in the words that `config_from_hf` uses: no training, no padding, no alias of another setting."""
    start = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    values = dataclasses.asdict(config) | {name: start[name] for name in ("init", "dropout", "n_ahead", "pad_vocab")}
    if config.rope_scaling == "ntk":  # is a larger theta
        pairs = (config.rope_dim or config.head_dim) // 2
        grown = config.rope_factor ** (pairs / (pairs - 1)) if pairs > 1 else 1.0
        values |= {"rope_theta": config.rope_theta * grown, "rope_scaling": "none", "rope_factor": 1.0}
    if config.ff_widths and len(set(config.ff_widths.split(","))) == 1:
        values |= {"n_ff": config.ff_width(0), "ff_widths": ""}
    if config.attn_scale and math.isclose(config.attn_scale, config.head_dim**-0.5, rel_tol=1e-12):
        values["attn_scale"] = 0.0
    if config.window:
        letters = "".join("L" if config.is_windowed(i) else "G" for i in range(config.n_attention))
        values["window_pattern"] = period(letters)
        if config.window >= config.max_seq_len and not config.rope_local_theta:
            values |= {"window": 0, "window_pattern": "L"}
    return ModelConfig(**values)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json of the stock architecture that computes the same function; InputError names the switch in the way.

    What a family has and this model lacks without a difference is taken along: weights of 1 in a norm, biases of 0.
    """
    wanted, differences = canonical(config), {}
    for kind, family in FAMILIES.items():
        try:
            raised = _raised(wanted, family)
            hf = _draft(raised, kind, family)
            found = canonical(config_from_hf(hf))
        except InputError:
            continue
        differ = [f.name for f in dataclasses.fields(ModelConfig) if getattr(found, f.name) != getattr(raised, f.name)]
        if not differ:
            return hf
        differences[kind] = (differ, found)
    lone = f"no stock architecture computes this model: model.pattern is {wanted.pattern!r} and theirs 'AF'"
    require(bool(differences), lone)
    kind = min(differences, key=lambda name: len(differences[name][0]))
    names, found = differences[kind]
    words = [f"model.{name} is {getattr(wanted, name)!r} and theirs {getattr(found, name)!r}" for name in names[:3]]
    near = FAMILIES[kind].architecture
    raise InputError(f"no stock architecture computes this model; the nearest is {near}: {'; '.join(words)}")


def _raised(config: ModelConfig, family: Family) -> ModelConfig:
    """The config with the weights that the family has and that can be filled so as to change nothing."""
    new: dict[str, Any] = {}
    if config.norm != "none" and not config.norm_weight:
        new |= {"norm_weight": True, "norm_offset": bool(family.fixed.get("norm_offset"))}
    if config.qk_norm and not config.qk_norm_weight and family.fixed.get("qk_norm_weight"):
        new["qk_norm_weight"] = True
    if family.fixed.get("bias") and not config.bias:
        new |= {"bias": True, "qkv_bias": False}
    if family.fixed.get("qkv_bias") and not config.bias:
        new["qkv_bias"] = True
    return replace(config, **new)


def _draft(config: ModelConfig, kind: str, family: Family) -> dict[str, Any]:
    """A family's config.json with all that it can say of a model; whether that is all is seen by reading it back."""
    whole = kind not in DIVISIBLE or config.n_embd % config.n_head == 0
    require(
        whole, f"{kind} refuses n_embd {config.n_embd} that n_head {config.n_head} does not divide, head_dim or not"
    )
    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": kind} | dict(family.defaults)
    hf |= {theirs: getattr(config, ours) for ours, theirs in family.keys.items()}
    hf["tie_word_embeddings"] = config.tied
    acts = {GATED.get(ours, "") if family.gated else ours: name for name, ours in reversed(ACTS.items())}
    hf[family.act] = acts.get(config.mlp, hf[family.act])
    if kind == "gpt2":
        return hf | {f"{part}_pdrop": config.dropout for part in ("resid", "embd", "attn")}
    hf |= {f"{name}_token_id": None for name in ("bos", "eos", "pad")}  # their defaults may not be in the vocabulary
    if "attention_bias" in hf:
        hf |= {"attention_bias": config.bias, "mlp_bias": config.bias}
    if "query_pre_attn_scalar" in hf:
        scalar = config.attn_scale**-2 if config.attn_scale else config.head_dim
        hf["query_pre_attn_scalar"] = round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-9) else scalar
        hf |= {"final_logit_softcapping": config.softcap or None, "attn_logit_softcapping": config.attn_softcap or None}
    if family.windows:
        hf |= _draft_windows(config, family)
    hf["rope_theta"] = config.rope_theta
    if config.rope_scaling != "none":
        hf["rope_scaling"] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
        length = {"original_max_position_embeddings": config.rope_original_len}
        hf["rope_scaling"] |= length if config.rope_original_len else {}
        if config.rope_scaling == "llama3":
            hf["rope_scaling"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if "rope_local_base_freq" in hf:
        hf["rope_local_base_freq"] = config.rope_local_theta or config.rope_theta
    if "partial_rotary_factor" in hf and config.rope_dim:
        hf["partial_rotary_factor"] = share_of(config.rope_dim, config.head_dim)
    return hf


def share_of(turned: int, head_dim: int) -> float:
    """The partial_rotary_factor that gives so many channels once multiplied and rounded down."""
    share = turned / head_dim
    return share if int(head_dim * share) == turned else math.nextafter(share, 1)


def _draft_windows(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys of the window."""
    if family.windows == "all":
        return {"sliding_window": config.window or None}
    kinds = ["sliding_attention" if config.is_windowed(i) else "full_attention" for i in range(config.n_attention)]
    found = {"layer_types": kinds, "sliding_window": config.window or family.defaults["sliding_window"]}
    return found | ({"use_sliding_window": config.window > 0} if family.windows == "upper" else {})


# ---- GGUF ----------------------------------------------------------------------------------------------------------

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


def hf_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    """GGUF metadata in the words of config.json."""
    arch = metadata.get("general.architecture")
    require(isinstance(arch, str), f"general.architecture is {_short(arch)}; it must name the family, e.g. llama")
    known = list(GGUF_LAYOUTS)
    require(arch in known, f"general.architecture {arch!r} is none that kobza computes{nearest(arch, known)}")
    kind = GGUF_FAMILIES[arch]
    family = FAMILIES[kind]

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        many = isinstance(value, Collection) and not isinstance(value, str)
        return list(value)[:10_001] if many else value  # an array is a list, here as in a config

    names = GGUF_KEYS | ({"norm_eps": "attention.layer_norm_epsilon"} if arch == "gpt2" else {})
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
    if arch == "gpt2":
        return hf
    for key, plain in GGUF_REFUSED.items():
        fine = get(key) is None or get(key) in plain
        require(fine, f"{arch}.{key} is {_short(get(key))}, which kobza's {kind} does not compute")
    long = "rope_factors_long.weight" in (shapes or {})
    require(not long, "rope_factors_long.weight is there: longrope, which kobza does not compute")
    hf |= {"rope_theta": get("rope.freq_base", family.defaults["rope_theta"]), "rope_scaling": _gguf_scaling(get, arch)}
    turned, width, heads = get("rope.dimension_count"), hf["hidden_size"], hf["num_attention_heads"]
    if hf["head_dim"] is None and _whole(width) and _whole(heads):
        hf["head_dim"] = width // heads or None
    if turned is not None and turned != hf["head_dim"] and hf["head_dim"] is not None:
        whole = _whole(turned) and _whole(hf["head_dim"])
        require(whole, f"{arch}.rope.dimension_count is {_short(turned)} of key_length {_short(hf['head_dim'])}")
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
        narrow = hf["num_hidden_layers"] == largest and _whole(width) and _whole(heads)
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
    factor = float(max(divide))
    if factor == 1 and min(divide) == 1:
        return config
    lengths = [8192, *(2**n for n in range(8, 21))]  # Llama 3's first
    for length in lengths if config.rope_scaling == "none" and math.isfinite(factor) and factor > 1 else ():
        found = replace(config, rope_scaling="llama3", rope_factor=round(factor, 4), rope_original_len=length)
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(llama3_slowdown(found), divide, strict=True)):
            return found
    raise InputError(
        f"rope_freqs.weight divides by up to {factor:g} in a way that is not Llama 3's; kobza has no other"
    )


def llama3_slowdown(config: ModelConfig) -> list[float]:
    """`rope_slowdown` of layers.py for llama3, without torch."""
    pairs, s, length = (config.rope_dim or config.head_dim) // 2, config.rope_factor, config.rope_original_len
    turns = [length / (2 * math.pi) * config.rope_theta ** (-i / pairs) for i in range(pairs)]
    kept = [min(1.0, max(0.0, (t - 1) / (4 - 1))) for t in turns]
    return [1 / (k + (1 - k) / s) for k in kept]


# ---- tensors -------------------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """A tensor of theirs and those of ours that it holds, joined along the rows in this order."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    """stored (in, out)"""
    n_heads: int = 0
    """heads whose rows are interleaved pairs in theirs, halves in ours; 0: as ours"""
    shift: float = 0.0
    """theirs is ours + shift"""


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of GPT(config) by name, counted without building it; a tied head has none of its own."""
    C, D, found = config.n_embd, config.head_dim, {}

    def norm(name: str, *places: str) -> None:
        if config.norm != "none" and config.norm_place in places:
            found.update({f"{name}.weight": (C,)} if config.norm_weight else {})
            found.update({f"{name}.bias": (C,)} if config.norm == "layernorm" and config.bias else {})

    def linear(name: str, n_out: int, n_in: int, bias: bool) -> None:
        found.update({f"{name}.weight": (n_out, n_in)} | ({f"{name}.bias": (n_out,)} if bias else {}))

    found["embed.weight"] = (config.n_rows, C)
    if config.position == "learned":
        found["position.weight"] = (config.max_seq_len, C)
    norm("embed_norm", "everywhere")
    for index in range(config.n_layer):
        for i, letter in enumerate(config.pattern):
            nth = config.pattern[:i].count(letter)
            part = f"blocks.{index}." + {"A": "attn", "F": "mlp"}[letter] + (str(nth + 1) if nth else "")
            place = index * config.pattern.count(letter) + nth
            norm(f"{part}_norm", "before", "both", "everywhere")
            norm(f"{part}_out_norm", "output", "both", "everywhere")
            norm(f"{part}_sum_norm", "after")
            if letter == "A":
                heads = dict(zip("qkv", (config.heads(place)[n] for n in (0, 1, 1)), strict=True))
                for x, n in heads.items():
                    linear(f"{part}.{x}_proj", n * D, C, config.bias or config.qkv_bias)
                linear(f"{part}.o_proj", C, heads["q"] * D, config.bias)
                found |= {f"{part}.{x}_norm.weight": (D,) for x in "qk"} if config.qk_norm_weight else {}
            else:
                width = config.ff_width(place)
                for x in ("gate", "up") if config.mlp in GATED.values() else ("up",):
                    linear(f"{part}.{x}_proj", width, C, config.bias)
                linear(f"{part}.down_proj", C, width, config.bias)
    norm("norm", "before", "output", "both", "everywhere")
    found |= {} if config.tied else {"lm_head.weight": (config.n_rows, C)}
    found |= {f"ahead.{i}.proj.weight": (C, C) for i in range(config.n_ahead - 1)}
    return found


def layout_of(kind: str, gguf: bool = False) -> Layout:
    """The layout of a family by model_type, or of a GGUF architecture."""
    return GGUF_LAYOUTS[kind] if gguf else FAMILIES[kind].layout


def layout_by_names(config: ModelConfig, names: Collection[str]) -> Layout:
    """The layout of a Hugging Face file by what is in it; families that compute the same may be stored differently."""
    if any(name.endswith("self_attn.qkv_proj.weight") for name in names):
        return FUSED
    if config.position == "learned":
        return GPT2
    return SANDWICH if config.norm_place == "both" else LLAMA


def prefix_of(layout: Layout, names: Collection[str]) -> str:
    """What stands before the names in a file."""
    embed = f"{next(iter(layout.top))}.weight"
    found = [prefix for prefix in layout.prefixes if prefix + embed in names]
    places = ", ".join(prefix + embed for prefix in layout.prefixes)
    require(bool(found), f"no embedding among {len(names)} tensors; looked for {places}")
    return found[0]


def head_names(layout: Layout, prefix: str) -> tuple[str, ...]:
    """Where the head may stand, usual place first."""
    outer = prefix.removesuffix("model.")
    names = (f"{layout.head}.weight", f"{outer}{layout.head}.weight", f"{prefix}{layout.head}.weight")
    return tuple(dict.fromkeys(names))


def slots(
    config: ModelConfig, layout: Layout, prefix: str | None = None, names: Collection[str] | None = None
) -> list[Slot]:
    """Where each weight of ours is found in theirs, in the order of theirs. names: those of the file, to find the head by."""
    prefix = layout.prefixes[0] if prefix is None else prefix
    few = names is not None and len(names) < config.n_layer  # said before as many layers are gone through
    require(
        not few, f"the config has {config.n_layer:,} layers and the file {len(names or ())} tensors; one of them is cut"
    )
    ours, found = shapes(config), []

    def add(theirs: str, mine: str, inner: bool) -> None:
        for kind in ("weight", "bias"):
            full = tuple(f"{name}.{kind}" for name in mine.split(" "))
            if any(name in ours for name in full):
                transposed = inner and layout.conv1d and kind == "weight" and mine.endswith("_proj")
                heads = {"q_proj": config.n_head, "k_proj": config.n_kv_head}.get(mine[-6:], 0)
                shift = layout.norm_shift if mine.endswith("norm") else 0.0
                found.append(Slot(f"{theirs}.{kind}", full, transposed, heads if layout.interleaved else 0, shift))

    for theirs, mine in layout.top.items():
        add(prefix + theirs, mine, False)
    for index in range(config.n_layer):
        for theirs, mine in layout.layer.items():
            block = " ".join(f"blocks.{index}.{name}" for name in mine.split(" "))
            add(f"{prefix}{layout.block.format(index)}.{theirs}", block, True)
    head = next((name for name in head_names(layout, prefix) if names and name in names), f"{layout.head}.weight")
    add(head.removesuffix(".weight"), "lm_head", False)
    covered = {name for slot in found for name in slot.ours}
    lost = [name for name in ours if name not in covered]
    require(not lost, f"this layout has no place for {', '.join(lost[:3])}; {len(lost)} tensors in all")
    return found

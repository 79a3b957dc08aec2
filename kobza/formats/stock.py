"""The way back: a model of ours as the config.json of the stock architecture that computes the same function.

Each family is drafted, with what it has and the model lacks raised to what changes nothing (weights of 1 in a norm, biases of 0),
and read back by families.py: what comes out must be the model again, else the switches that differ are named. So nothing here
knows what a family computes. gguf_families.py goes the same way for llama.cpp.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from kobza.config import InputError, ModelConfig, require, without_idle
from kobza.formats.families import ACTS, DIVISIBLE, FAMILIES, GATED, Family, config_from_hf, period

Found = tuple[str, ModelConfig, ModelConfig]  # a target's name, the model with what it fills in, what it computes


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
    """The config.json of the stock architecture that computes the same function; InputError names the switch in the way."""
    wanted = canonical(config)
    kind = chosen(wanted, list(hf_candidates(wanted)), "no stock architecture computes this model")
    hf = draft(raised(wanted, FAMILIES[kind]), kind)
    linear = wanted.bias or wanted.qkv_bias
    return hf | ({"attention_bias": linear, "mlp_bias": linear} if FAMILIES[kind].layout.loose else {})


def hf_candidates(wanted: ModelConfig) -> Iterator[Found]:
    """(model_type, the model raised to it, what its config.json would compute) of each family that can be drafted at all."""
    for kind, family in FAMILIES.items():
        try:
            full = raised(wanted, family)
            yield kind, full, canonical(config_from_hf(draft(full, kind)))
        except InputError:
            continue


def why_not_exportable(config: ModelConfig, to: str) -> str:
    """Nothing where a model can be written as `to` (hf, gguf, ollama); else the switches in its way and the options of
    `kobza train` for the nearest that can. A vocabulary that is not known yet counts as any."""
    from kobza.formats.gguf_families import config_to_gguf, gguf_candidates  # it reads by what is here

    config = config if config.vocab_size else replace(config, vocab_size=256)
    ways = {"hf": (config_to_hf, hf_candidates), "gguf": (config_to_gguf, gguf_candidates)}
    ways["ollama"] = ways["gguf"]
    require(to in ways, f"to is {to!r}; one of {', '.join(ways)}")
    convert, candidates = ways[to]
    why = _failure(convert, config)
    changed = [_mend(config, full, found) for _, full, found in candidates(canonical(config))] if why else []
    good = [changes for changes, mended in changed if mended and not _failure(convert, mended)]
    fewest = [changes for changes in good if len(changes) == min(map(len, good))]
    options = dict.fromkeys(" ".join(_option(k, v) for k, v in changes.items()) for changes in fewest)
    return why + (f"; train with {' or with '.join(list(options)[:3])}" if options else "")


def _failure(convert: Callable[[ModelConfig], Any], config: ModelConfig) -> str:
    """Why a model cannot be converted; "" where it can."""
    try:
        convert(config)
    except InputError as error:
        return str(error)
    return ""


def _mend(config: ModelConfig, full: ModelConfig, found: ModelConfig) -> tuple[dict[str, Any], ModelConfig | None]:
    """(the settings in which a model is not what a candidate computes, the model with them), None where they contradict."""
    changes = {name: getattr(found, name) for name in differing(full, found)}
    given = {f.name: v for f in dataclasses.fields(config) if (v := getattr(config, f.name)) != f.default}
    try:
        return changes, ModelConfig(**without_idle("model", given, changes) | changes)
    except InputError:
        return changes, None


def _option(name: str, value: Any) -> str:
    """A setting as `kobza train` takes it: --model.no-qk-norm, --model.mlp swiglu."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--model.{name if value else f'no-{name}'}"
    return f'--model.{name} "{value}"' if value == "" else f"--model.{name} {value}"


def differing(one: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields in which two models are not the same; numbers that are one in float32, as files keep them, are."""
    pairs = ((f.name, getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(ModelConfig))
    return [name for name, a, b in pairs if not (math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else a == b)]


def chosen(wanted: ModelConfig, candidates: list[Found], none: str) -> str:
    """The first candidate that computes the model; else InputError with the switches in which the nearest differs."""
    require(wanted.vocab_size > 0, f"{none}: model.vocab_size is 0; give the tokenizer's")
    require(bool(candidates), f"{none}: no candidate has its sizes")
    differences = {name: differing(full, found) for name, full, found in candidates}
    name, _, found = min(candidates, key=lambda candidate: len(differences[candidate[0]]))
    words = [f"model.{f} is {getattr(wanted, f)!r} and theirs {getattr(found, f)!r}" for f in differences[name][:3]]
    require(not words, f"{none}; the nearest is {name}: {'; '.join(words)}")
    return name


def raised(config: ModelConfig, family: Family) -> ModelConfig:
    """The config with the weights that the family has and that can be filled so as to change nothing."""
    new: dict[str, Any] = {}
    if config.norm != "none":  # a weight of 1 + w can be written as one of w, and the other way round
        new |= {"norm_weight": True, "norm_offset": family.fixed.get("norm_offset", False)}
    if config.qk_norm and not config.qk_norm_weight and family.fixed.get("qk_norm_weight"):
        new["qk_norm_weight"] = True
    if family.fixed.get("bias") and not config.bias:
        new |= {"bias": True, "qkv_bias": False}
    if family.fixed.get("qkv_bias") and not config.bias:
        new["qkv_bias"] = True
    return replace(config, **new)


def draft(config: ModelConfig, kind: str) -> dict[str, Any]:
    """A family's config.json with all that it can say of a model; whether that is all is seen by reading it back."""
    family = FAMILIES[kind]
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
    if "partial_rotary_factor" in hf:
        hf["partial_rotary_factor"] = share_of(config.rope_dim or config.head_dim, config.head_dim)
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

"""The toggles that the solver of search.py tries: one change each of a kobza model's config, of the layout of its weights, or of
its rotary tables. `toggles(base)` lists them; `rebuilt(base, chosen)` makes the model.

A toggle knows the bug that it mends and the kinds of station it can move, no more. Values come from what the field uses,
from what was measured of the reference, and from the config that the reference declares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kobza.config import InputError, ModelConfig
from kobza.layers import GATES, Rope
from kobza.model import GPT

Tensors = dict[str, Tensor]
NORMED = frozenset(
    {"in", "norm", "stream", "attn", "mlp"}
)  # where a norm may stand: attn has those of queries and keys


@dataclass(frozen=True)
class Toggle:
    """One change. Of two with one `slot` only one is taken; `kinds`: the stations it can move; `code` of the bug it mends."""

    slot: str
    label: str
    code: str
    kinds: frozenset[str]
    changes: tuple[tuple[str, Any], ...] = ()
    tensors: Callable[[ModelConfig, Tensors], Tensors] | None = None
    tables: Callable[[GPT], None] | None = None


@dataclass(frozen=True)
class Base:
    """What the toggles change: a config, weights under our names, and rotary tables where they are not what the config says."""

    config: ModelConfig
    tensors: Tensors
    tables: dict[str, Tensor] = field(default_factory=dict)


def base_of(model: GPT, dtype: str) -> Base:
    """Of a model as it is. In bf16 the weights are rounded once, here."""
    tensors = {name: value.detach().float() for name, value in model.state_dict().items()}
    if dtype == "bf16":
        tensors = {name: value.bfloat16().float() for name, value in tensors.items()}
    fresh = dict(GPT(model.config).named_buffers())
    mine = {name: value.float() for name, value in model.named_buffers() if name in fresh}
    odd = {
        n: v
        for n, v in mine.items()
        if v.shape == fresh[n].shape and not torch.allclose(v, fresh[n], rtol=0, atol=1e-6)
    }
    return Base(model.config, tensors, odd)


def rebuilt(base: Base, chosen: tuple[Toggle, ...]) -> GPT | None:
    """The model after the toggles; None where they do not go together or want weights that are not there."""
    try:
        config = replace(base.config, **dict(pair for toggle in chosen for pair in toggle.changes))
        model = GPT(config).eval()
    except InputError:
        return None
    tensors = base.tensors
    for toggle in chosen:
        tensors = toggle.tensors(base.config, tensors) if toggle.tensors else tensors
    if not filled(model, tensors):
        return None
    if config.tied:
        model.lm_head.weight = model.embed.weight
    buffers = dict(model.named_buffers())
    for name, value in base.tables.items():
        if name in buffers and buffers[name].shape == value.shape:
            buffers[name].copy_(value)
    for toggle in chosen:
        if toggle.tables:
            toggle.tables(model)
    return model


def filled(model: GPT, tensors: Tensors) -> bool:
    """Put the tensors themselves, not copies, in the place of the model's weights -> whether each was there, in its shape."""
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            value = tensors.get(f"{name}.{leaf}")
            if value is None or value.shape != parameter.shape:
                return False
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    return True


# ---- the toggles ---------------------------------------------------------------------------------------------------


def toggles(base: Base, hints: ModelConfig | None = None, found: dict[str, Any] | None = None) -> list[Toggle]:
    """All single changes worth a try. `hints`: the config that the reference declares; `found`: what was measured of it."""
    rows = [
        *_embedding(base, found or {}),
        *_norms(base),
        *_feed_forward(base),
        *_rope(base),
        *_attention(base, found or {}),
    ]
    rows += [*_head(base, found or {}), *_declared(base, hints)]
    seen, kept = {base.config}, []
    for toggle in rows:
        try:
            config = replace(base.config, **dict(toggle.changes))
        except InputError:
            continue
        if toggle.tensors or toggle.tables or config not in seen:  # equal configs: one of them is enough
            kept.append(toggle)
        if not (toggle.tensors or toggle.tables):
            seen.add(config)
    return kept


def one(field_name: str, value: Any, code: str, kinds: str | frozenset[str]) -> Toggle:
    """A change of one field of the config."""
    shown = f"{value:.6g}" if isinstance(value, float) else value
    places = kinds if isinstance(kinds, frozenset) else frozenset(kinds.split())
    return Toggle(field_name, f"{field_name}={shown}", code, places, ((field_name, value),))


def _embedding(base: Base, found: dict[str, Any]) -> Iterator[Toggle]:
    root = base.config.n_embd**0.5
    values = [1.0, root, float(torch.tensor(root).bfloat16())]
    fitted = found.get("embed_scale")
    if fitted and all(abs(fitted / value - 1) > 1e-5 for value in values):
        values.append(fitted)
    for value in values:
        if abs(value / base.config.embed_scale - 1) > 1e-9:
            yield one("embed_scale", value, "G2", "embed")


def _norms(base: Base) -> Iterator[Toggle]:
    config = base.config
    for eps in (1e-5, 1e-6, 5e-6, 1e-8, 1e-12, 1e-3):
        yield one("norm_eps", eps, "G4", NORMED)
    yield one("norm_offset", not config.norm_offset, "G3", NORMED)
    yield one("norm_cast", "before" if config.norm_cast == "after" else "after", "G3", NORMED)
    if config.norm_place in MOVES:
        for there in MOVES.keys() - {config.norm_place}:
            yield replace(one("norm_place", there, "D2", NORMED | {"logits"}), tensors=moved(there))


MOVES = {"before": "_norm", "output": "_out_norm", "after": "_sum_norm"}  # what the norm of a sub-layer is called there


def moved(there: str) -> Callable[[ModelConfig, Tensors], Tensors]:
    """The weights of the norms under the names of another placement."""

    def rename(config: ModelConfig, tensors: Tensors) -> Tensors:
        here, goal = MOVES[config.norm_place], MOVES[there]
        renamed = {}
        for name, value in tensors.items():
            stem, _, leaf = name.rpartition(".")
            inner = stem.startswith("blocks.") and stem.count(".") == 2 and stem.endswith(here)
            renamed[f"{stem.removesuffix(here)}{goal}.{leaf}" if inner else name] = value
        return renamed

    return rename


def _feed_forward(base: Base) -> Iterator[Toggle]:
    gated = base.config.mlp in GATES
    for name in GATES if gated else ("gelu_tanh", "gelu", "relu", "silu", "relu2"):
        if name != base.config.mlp:
            yield one("mlp", name, "G7", "mlp")


def _rope(base: Base) -> Iterator[Toggle]:
    config = base.config
    if config.position != "rope" or "A" not in config.pattern:
        return
    for theta in (10_000.0, 100_000.0, 500_000.0, 1_000_000.0, 5_000_000.0):
        yield one("rope_theta", theta, "L5", "attn")
    if config.rope_scaling != "none":
        yield scaling("none", 1.0, 0)
    for factor in (8.0, 16.0, 32.0):
        yield scaling("llama3", factor, 8192)
    for factor in (2.0, 4.0, 8.0):
        yield scaling("linear", factor, 0)
    if config.window:
        for theta in (0.0, 10_000.0):
            yield one("rope_local_theta", theta, "L5", "attn")
    yield from _layouts()
    if any("cos" in name for name in base.tables):
        # bf16 has no 257: where positions were rounded, neighbours share a row of the table
        cos = next(value for name, value in base.tables.items() if "cos" in name)
        twins = len(torch.unique(cos, dim=0)) < len(cos)
        yield Toggle(
            "tables", "rotary tables recomputed in float32", "G5" if twins else "G6", frozenset({"attn"}), tables=smooth
        )
    yield Toggle(
        "tables", "rotary positions rounded to bf16", "G5", frozenset({"attn"}), tables=lambda m: rough(m, "positions")
    )
    yield Toggle(
        "tables",
        "rotary frequencies rounded to bf16",
        "G6",
        frozenset({"attn"}),
        tables=lambda m: rough(m, "frequencies"),
    )
    yield replace(one("position", "none", "D2", "attn embed"), changes=_no_rope())


def _no_rope() -> tuple[tuple[str, Any], ...]:
    plain = ModelConfig(n_embd=128, position="none")
    names = ("rope_theta", "rope_dim", "rope_local_theta", "rope_scaling", "rope_factor", "rope_original_len")
    return (("position", "none"), *((name, getattr(plain, name)) for name in names))


def scaling(name: str, factor: float, length: int) -> Toggle:
    """rope_scaling with its numbers."""
    changes = (("rope_scaling", name), ("rope_factor", factor), ("rope_original_len", length))
    words = name if name == "none" else f"{name} x{factor:g}" + (f" of {length}" if length else "")
    return Toggle("rope_scaling", f"rope_scaling={words}", "L4", frozenset({"attn"}), changes)


def _layouts() -> Iterator[Toggle]:
    """Rows of Wq and Wk between the two orders of a rotary pair: next to each other, and a half apart."""
    for label, q_way, k_way in (
        ("q and k rows: pairs side by side -> halves", "halve", "halve"),
        ("q and k rows: halves -> pairs side by side", "pair", "pair"),
        ("k rows: permuted with n_head -> with n_kv_head", "", "recount"),
        ("k rows: pairs side by side -> halves", "", "halve"),
        ("k rows: halves -> pairs side by side", "", "pair"),
        ("q rows: pairs side by side -> halves", "halve", ""),
        ("q rows: halves -> pairs side by side", "pair", ""),
    ):
        ways = {"q_proj": q_way, "k_proj": k_way}
        yield Toggle(
            "rope layout", label, "L6", frozenset({"attn"}), tensors=lambda c, t, ways=ways: laid_out(c, t, ways)
        )


def halve(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head, pairs side by side (0 0' 1 1' ...) -> halves (0 1 ... 0' 1' ...): as a conversion from Meta's does."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def pair(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `halve`."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def laid_out(config: ModelConfig, tensors: Tensors, ways: dict[str, str]) -> Tensors:
    """Weights and biases of q_proj and k_proj with rows in another order."""
    counts = {"q_proj": config.n_head, "k_proj": config.n_kv_head}
    changed = dict(tensors)
    for name, value in tensors.items():
        part = name.split(".")[-2]
        way = ways.get(part, "")
        if way == "recount" and value.shape[0] % (2 * config.n_head) == 0:
            changed[name] = halve(pair(value, config.n_head), config.n_kv_head)
        elif way in ("halve", "pair"):
            changed[name] = (halve if way == "halve" else pair)(value, counts[part])
    return changed


def smooth(model: GPT) -> None:
    """Rotary tables as the config says."""
    fresh = dict(GPT(model.config).named_buffers())
    for name, value in model.named_buffers():
        value.copy_(fresh[name])


def rough(model: GPT, what: str) -> None:
    """Rotary tables whose positions or frequencies went through bf16."""
    for rope in {model.rope, model.local_rope}:
        if isinstance(rope, Rope):
            gain, frequency = rope.cos[0, 0].clone(), torch.atan2(rope.sin[1], rope.cos[1])  # at most 1 radian a token
            positions = torch.arange(len(rope.cos), dtype=torch.float32)
            if what == "positions":
                positions = positions.bfloat16().float()
            else:
                frequency = frequency.bfloat16().float()
            angles = torch.outer(positions, frequency)
            rope.cos.copy_(angles.cos() * gain), rope.sin.copy_(angles.sin() * gain)


def _attention(base: Base, found: dict[str, Any]) -> Iterator[Toggle]:
    config = base.config
    if "A" not in config.pattern:
        return
    for cap in (0.0, 50.0, 30.0, 20.0):
        yield one("attn_softcap", cap, "G12", "attn")
    own = config.attn_scale or config.head_dim**-0.5
    scalars = (config.head_dim, config.n_embd / config.n_head, 64, 96, 128, 144, 168, 224, 256, 1)
    for scale in dict.fromkeys([*(float(scalar) ** -0.5 for scalar in scalars), 1 / config.head_dim]):
        if abs(scale / own - 1) > 1e-6:
            value = 0.0 if abs(scale * config.head_dim**0.5 - 1) < 1e-9 else scale
            toggle = one("attn_scale", value, "G13", "attn")
            yield toggle if value else replace(toggle, label="attn_scale=1/sqrt(head_dim)")
    yield from _windows(config, found.get("windows"))
    if config.qk_norm:
        off = (("qk_norm", False), ("qk_norm_weight", False))
        yield replace(one("qk_norm", False, "D2", "attn"), changes=off)
    else:
        yield one("qk_norm", True, "D2", "attn")


def _windows(config: ModelConfig, measured: list[int] | None) -> Iterator[Toggle]:
    """A token more or less, none, the other layers, and what the reference was measured to see (0: all)."""
    none = (("window", 0), ("window_pattern", "L"), ("rope_local_theta", 0.0))
    if config.window:
        for width in (config.window - 1, config.window + 1):
            yield one("window", width, "P1", "attn")
        yield Toggle("window", "window=0", "P2", frozenset({"attn"}), none)
        for turn in range(1, len(config.window_pattern)):
            pattern = config.window_pattern[turn:] + config.window_pattern[:turn]
            yield replace(one("window_pattern", pattern, "G11", "attn"), slot="window")
    widths = {width for width in measured or [] if width}
    if len(widths) == 1:
        pattern = shortest("".join("L" if width else "G" for width in measured or []))
        width = widths.pop()
        mine = "".join("L" if config.is_windowed(layer) else "G" for layer in range(config.n_attention))
        swapped = width == config.window and mine.count("L") == sum(bool(w) for w in measured or [])
        code = "G11" if swapped else "P1" if config.window and abs(width - config.window) == 1 else "P2"
        changes = (("window", width), ("window_pattern", pattern))
        label = f"window={width}" + (f" in layers {pattern}" if "G" in pattern else "")
        yield Toggle("window", label, code, frozenset({"attn"}), changes)


def shortest(pattern: str) -> str:
    """The shortest word that gives a pattern when repeated. "LGLG" -> "LG"; "LLL" -> "L"."""
    sizes = range(1, len(pattern) + 1)
    return next(pattern[:n] for n in sizes if (pattern[:n] * len(pattern))[: len(pattern)] == pattern)


def _head(base: Base, found: dict[str, Any]) -> Iterator[Toggle]:
    for cap in (0.0, 30.0, 50.0, 20.0):
        yield one("softcap", cap, "G12", "logits")
    if not base.config.tied:
        yield one("tied", True, "G8", "logits")
    elif found.get("head") is not None:  # a head of its own was dropped; only the reference has it still
        yield Toggle(
            "tied",
            "tied=False, with the reference's head",
            "G8",
            frozenset({"logits"}),
            (("tied", False),),
            tensors=lambda _, tensors: tensors | {"lm_head.weight": found["head"]},
        )


CODES = {"embed_scale": "G2", "norm_eps": "G4", "norm_offset": "G3", "norm_cast": "G3", "mlp": "G7", "rope_theta": "L5"}
CODES |= {"rope_local_theta": "L5", "attn_softcap": "G12", "softcap": "G12", "attn_scale": "G13", "tied": "G8"}
KINDS = {"embed_scale": "embed", "mlp": "mlp", "softcap": "logits", "tied": "logits"}
GROUPS = {
    "rope_scaling": ("rope_scaling", "rope_factor", "rope_original_len"),
    "window": ("window", "window_pattern", "rope_local_theta"),
    "qk_norm": ("qk_norm", "qk_norm_weight"),
}


def _declared(base: Base, hints: ModelConfig | None) -> Iterator[Toggle]:
    """What the reference's own config says otherwise: values that no list would have."""
    if hints is None:
        return
    grouped = {name for names in GROUPS.values() for name in names} - {"rope_local_theta"}
    for name in (
        "embed_scale",
        "norm_eps",
        "mlp",
        "rope_theta",
        "rope_local_theta",
        "rope_dim",
        "attn_softcap",
        "softcap",
        "attn_scale",
    ):
        if name not in grouped and getattr(hints, name) != getattr(base.config, name):
            kinds = NORMED if name == "norm_eps" else KINDS.get(name, "attn")
            yield one(name, getattr(hints, name), CODES.get(name, "D2"), kinds)
    for slot, names in GROUPS.items():
        if any(getattr(hints, name) != getattr(base.config, name) for name in names):
            changes = tuple((name, getattr(hints, name)) for name in names)
            label = " ".join(f"{name}={value}" for name, value in changes if value != getattr(base.config, name))
            code = {"rope_scaling": "L4", "window": "P2", "qk_norm": "D2"}[slot]
            yield Toggle(slot, label, code, frozenset({"attn"}), changes)

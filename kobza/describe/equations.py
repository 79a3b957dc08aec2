"""ModelConfig -> the equations that it stands for, in plain mathematics, each beside the shapes of what it names.

Its neighbour parts.py counts; this file says what is computed. Only what the config has appears, and every field that changes
the function changes the text: a test holds that. Nothing here needs torch.

Reading: x is the vector of one token, i its place, t its id; W y a matrix times a vector, rows x columns; ⊙ by components;
x ← f(x) puts the new in the old's place. q, k, v are of one head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from kobza.config import ModelConfig, TrainConfig

GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu"}  # as in layers.py, which needs torch
ACTIVATIONS = {
    "relu": "relu(u) = max(u, 0)",
    "relu2": "relu²(u) = max(u, 0)²",
    "silu": "silu(u) = u / (1 + e⁻ᵘ)",
    "gelu": "gelu(u) = u·Φ(u), Φ the normal distribution",
    "gelu_tanh": "gelu(u) = u/2·(1 + tanh(√(2/π)·(u + 0.044715·u³)))",
}
STARTS = {  # layers in the manner of the table in model.py, init_weights
    "zero": "Wq Wk Wv{ups} ~ U(±√(3 / columns)); {outs} = 0; {tables}",
    "gpt2": "matrices ~ N(0, 0.02), {outs0} ~ N(0, {residual:.2g}); {tables}",
    "xavier": "matrices ~ U(±√(6 / (rows + columns))); {tables}",
    "torch": "matrices ~ U(±√(1 / columns)); tables ~ N(0, 1)",
    "unit": "every matrix and table ~ N(0, 1): far too large, to learn from",
}


class Equation(NamedTuple):
    """One line: the part it belongs to, the equation, and the shapes of what it names."""

    what: str
    equation: str
    shapes: str = ""


def equations(c: ModelConfig, train: TrainConfig | None = None) -> list[Equation]:
    """The network from a token's id to its loss. equations(c)[0] -> ("embedding", "x = E[t]", "E 65 × 160")"""
    return [
        *embedding(c),
        *block(c),
        *(attention(c) if "A" in c.pattern else []),
        *(feed_forward(c) if "F" in c.pattern else []),
        *norm(c),
        *head(c),
        *loss(c, train or TrainConfig()),
        start(c),
    ]


def embedding(c: ModelConfig) -> list[Equation]:
    """From the id to the first x."""
    scale = f"{c.embed_scale:g}·" if c.embed_scale != 1 else ""
    place = {"learned": " + P[i]", "sinusoidal": " + S[i]"}.get(c.position, "")
    rows = f" of {c.n_rows} rows {c.vocab_size} are tokens," if c.n_rows != c.vocab_size else ""
    shapes = f"E {c.n_rows} × {c.n_embd},{rows} i < {c.max_seq_len}"
    lines = [Equation("embedding", f"x = {scale}E[t]{place}", shapes)]
    if c.position == "learned":
        lines.append(Equation("", "P learned: a vector a place", f"P {c.max_seq_len} × {c.n_embd}"))
    if c.position == "sinusoidal":
        wave = f"10000^(2m/{c.n_embd + c.n_embd % 2})"
        sines = f"S[i] = sin(i/{wave}), cos(i/{wave}), m = 0, 1, …"
        lines.append(Equation("", sines, f"S {c.max_seq_len} × {c.n_embd}"))
    if c.norm != "none" and c.norm_place == "everywhere":
        lines.append(Equation("", f"x ← {normed(c, 'x')}"))
    if c.dropout:
        kept = f"drop, in training: {c.dropout:g} of all become 0, the rest are divided by {1 - c.dropout:g}"
        lines += [Equation("", "x ← drop(x)"), Equation("", kept)]
    return lines


def normed(c: ModelConfig, inside: str) -> str:
    """normed(c, "x") -> "RMS(x)"."""
    return f"{ {'rmsnorm': 'RMS', 'layernorm': 'LN'}[c.norm] }({inside})"


def block(c: ModelConfig) -> list[Equation]:
    """The sub-layers with their residual stream and norms."""
    lines = []
    inner, outer, summed = (
        c.norm != "none" and c.norm_place in places
        for places in (("before", "both", "everywhere"), ("output", "both", "everywhere"), ("after",))
    )
    for letter in c.pattern:
        y = f"{ {'A': 'attn', 'F': 'mlp'}[letter] }({normed(c, 'x') if inner else 'x'})"
        y = normed(c, y) if outer else y
        y = f"x + {f'drop({y})' if c.dropout else y}"
        what = f"block, × {c.n_layer}" if not lines else ""
        shapes = f"x {c.n_embd}" if not lines else ""
        lines.append(Equation(what, f"x ← {normed(c, y) if summed else y}", shapes))
    return lines


def attention(c: ModelConfig) -> list[Equation]:
    """attn(x), the same in every attention but for what the shapes say."""
    biased, layers = c.bias or c.qkv_bias, range(c.n_attention)
    add = [f" + b{name}" if biased else "" for name in "qkv"]
    project = ", ".join(f"W{name} x{bias}" for name, bias in zip("qkv", add, strict=True))
    lines = [Equation("attention", f"q, k, v = {project}", by_layer(layers, lambda layer: projections(c, layer)))]
    if c.omit_heads:
        left = "; ".join(f"attention {layer} has no head {', '.join(map(str, o))}" for layer, o in c.omitted().items())
        lines.append(Equation("", left))
    if c.n_kv_head != c.n_head:
        lines.append(Equation("", f"every {c.n_head // c.n_kv_head} heads of q share one of k and v"))
    if c.qk_norm:
        for name in "qk":
            gain = f" ⊙ (1 + g{name})" if c.norm_offset else f" ⊙ g{name}"
            late = ", cast down last" if c.norm_cast == "after" else ""
            tail, shapes = (gain + late, f"g{name} {c.head_dim}") if c.qk_norm_weight else ("", "")
            lines.append(Equation("", f"{name} ← {name} / √(mean({name}²) + {c.norm_eps:g}){tail}", shapes))
    lines += rope(c) if c.position == "rope" else []
    scale = f"{c.attn_scale:g}·(q·k)" if c.attn_scale else f"(q·k) / √{c.head_dim}"
    lines.append(Equation("", f"s = {scale}", f"q k v {c.head_dim}"))
    if c.attn_softcap:
        lines.append(Equation("", f"s ← {c.attn_softcap:g}·tanh(s / {c.attn_softcap:g})"))
    p = "softmax(s over all j that i sees)"
    lines.append(
        Equation("", f"p = {f'drop({p})' if c.dropout else p}", by_layer(layers, lambda layer: sight(c, layer)))
    )
    lines.append(
        Equation(
            "",
            f"attn(x) = Wo [Σⱼ p v of each head]{' + bo' if c.bias else ''}",
            by_layer(layers, lambda layer: f"Wo {c.n_embd} × {c.heads(layer)[0] * c.head_dim}"),
        )
    )
    return lines


def projections(c: ModelConfig, layer: int) -> str:
    """Shapes of q, k and v of the layer-th attention."""
    n_head, n_kv_head = c.heads(layer)
    kv, heads = f"{n_kv_head * c.head_dim} × {c.n_embd}", f"{n_head} heads of {c.head_dim}"
    if n_head == n_kv_head:
        return f"Wq Wk Wv {kv}, {heads}"
    return f"Wq {n_head * c.head_dim} × {c.n_embd}, Wk Wv {kv}, {heads}"


def sight(c: ModelConfig, layer: int) -> str:
    """What the layer-th attention sees."""
    return f"i sees i − {c.window} < j ≤ i" if c.is_windowed(layer) else "i sees j ≤ i"


def by_layer(layers: range, shape: Callable[[int], str]) -> str:
    """One text where all agree, or each with the layers it is true of, counted from 0: "Wo 8 × 8 (0, 2); Wo 8 × 4 (1)"."""
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(shape(layer), []).append(str(layer))
    return next(iter(kinds)) if len(kinds) == 1 else "; ".join(f"{k} ({', '.join(v)})" for k, v in kinds.items())


def rope(c: ModelConfig) -> list[Equation]:
    """The rotary angles and their scaling."""
    D, s, L = c.rope_dim or c.head_dim, c.rope_factor, c.rope_original_len
    gain = f"{0.1 * math.log(s) + 1:.4g}·" if c.rope_scaling == "yarn" else ""
    theta = f"({c.rope_theta:g}·{s:g}^({D}/{D - 2}))" if c.rope_scaling == "ntk" and D > 2 else f"{c.rope_theta:g}"
    turns = f"rot turns the pair (m, m + {D // 2}) by i·f" if D > 2 else "rot turns the pair (0, 1) by i·f"
    turns += f"; channels from {D} on stay" if c.rope_dim else ""
    lines = [
        Equation("", f"q, k ← {gain}rot(q), {gain}rot(k)", turns),
        Equation("", f"f = {theta}^(−2m/{D}), m < {D // 2}", f"rope scaling {c.rope_scaling}, {s:g}" if s != 1 else ""),
    ]
    slowed = {
        "linear": f"f ← f / {s:g}",
        "llama3": f"f ← f·(r + (1 − r)/{s:g}), r = ({L}·f/2π − 1)/3, in [0, 1]",
        "yarn": f"f ← f·(r + (1 − r)/{s:g}), r linear in m from 1 at {L}·f/2π = 32 to 0 at 1",
    }
    lines += [Equation("", slowed[c.rope_scaling])] if c.rope_scaling in slowed else []
    if c.rope_local_theta:
        plain = ", and no scaling," if c.rope_scaling != "none" else ""
        lines.append(Equation("", f"f = {c.rope_local_theta:g}^(−2m/{D}){plain} where there is a window"))
    return lines


def feed_forward(c: ModelConfig) -> list[Equation]:
    """mlp(x) and its activation."""
    names, act = ("gate", "up") if c.mlp in GATES else ("up",), GATES.get(c.mlp, c.mlp)
    inside = [f"W{name} x{f' + b{name}' if c.bias else ''}" for name in names]
    symbol = {"relu2": "relu²"}.get(act, act).removesuffix("_tanh")
    y = f"({symbol}({inside[0]}) ⊙ ({inside[1]}))" if c.mlp in GATES and c.bias else ""
    y = y or (f"({symbol}({inside[0]}) ⊙ {inside[1]})" if c.mlp in GATES else f"{symbol}({inside[0]})")

    def shape(place: int) -> str:
        width = c.ff_width(place)
        return f"{' '.join(f'W{name}' for name in names)} {width} × {c.n_embd}, Wdown {c.n_embd} × {width}"

    places = range(c.n_layer * c.pattern.count("F"))
    kind = "gelu_tanh" if c.mlp.endswith("tanh") else act
    return [
        Equation("feed-forward", f"mlp(x) = Wdown {y}{' + bdown' if c.bias else ''}", by_layer(places, shape)),
        Equation("", ACTIVATIONS[kind]),
    ]


def norm(c: ModelConfig) -> list[Equation]:
    """The norm over n_embd; none where there is none."""
    if c.norm == "none":
        return []
    over = "x / √(mean(x²) + {eps:g})" if c.norm == "rmsnorm" else "(x − mean(x)) / √(var(x) + {eps:g})"
    bias, weight = c.norm == "layernorm" and c.bias, c.norm_weight
    gain = (" ⊙ (1 + g)" if c.norm_offset else " ⊙ g") if weight else ""
    late = ", cast down last" if weight and c.norm == "rmsnorm" and c.norm_cast == "after" else ""
    names = " ".join(["g"] * weight + ["b"] * bias)
    line = f"{normed(c, 'x')} = {over.format(eps=c.norm_eps)}{gain}{' + b' if bias else ''}{late}"
    return [Equation("norm", line, f"{names} {c.n_embd}, of each norm its own" if names else "")]


def head(c: ModelConfig) -> list[Equation]:
    """From the last x to the probabilities."""
    matrix, last = "E" if c.tied else "U", c.norm != "none" and c.norm_place != "after"
    lines = [Equation("head", f"x ← {normed(c, 'x')}")] if last else []
    shapes = f"{matrix} {c.n_rows} × {c.n_embd}{', the embedding' if c.tied else ''}"
    lines.append(Equation("" if lines else "head", f"z = {matrix} x", shapes))
    if c.softcap:
        lines.append(Equation("", f"z ← {c.softcap:g}·tanh(z / {c.softcap:g})"))
    lines.append(Equation("", "P(t at i + 1) = softmax(z)", f"z P {c.vocab_size}"))
    if c.n_ahead > 1:
        n = f"n = 1..{c.n_ahead - 1}" if c.n_ahead > 2 else "n = 1"
        ahead = f"P(t at i + 1 + n): x + silu(Wn x) in place of x, {n}"
        lines.append(Equation("", ahead, f"Wn {c.n_embd} × {c.n_embd}, in training alone"))
    return lines


def loss(c: ModelConfig, train: TrainConfig) -> list[Equation]:
    """What training minimises, with its terms."""
    target = "−ln P(t at i + 1)"
    if train.label_smoothing:
        s = train.label_smoothing
        target = f"{1 - s:g}·({target}) − {s:g}·mean over t of ln P(t)"
    if train.z_loss:
        target += f" + {train.z_loss:g}·(ln Σ e^z)²"
    where = f", of each i ≥ {train.min_context - 1}" if train.min_context else ""
    name = "ℓ" if c.n_ahead > 1 else "loss"
    lines = [Equation("loss", f"{name} = mean of {target}{where}")]
    if c.n_ahead > 1:
        weight = f"{train.ahead_weight:g}·" if train.ahead_weight != 1 else ""
        lines.append(Equation("", f"loss = ℓ + {weight}mean over n of ℓ at i + 1 + n"))
    return lines


def start(c: ModelConfig) -> Equation:
    """How the weights are drawn."""
    table = "0.5" if c.init == "zero" and not c.tied else "0.02"
    positions = ", P ~ N(0, 0.02)" if c.position == "learned" else ""
    outs = [name for name, there in (("Wo", "A" in c.pattern), ("Wdown", "F" in c.pattern)) if there]
    heads = [] if c.tied else ["U"]
    ahead = ["Wn"] if c.n_ahead > 1 else []
    words: dict[str, Any] = {
        "ups": "".join(f" W{n}" for n in (("gate", "up") if c.mlp in GATES else ("up",)) if "F" in c.pattern),
        "outs": " ".join([*outs, *heads, *ahead]),
        "outs0": " ".join(outs),
        "residual": 0.02 / (c.n_layer * len(c.pattern)) ** 0.5,
        "tables": f"E ~ N(0, {table}){positions}",
    }
    text = STARTS[c.init].format(**words)
    return Equation("start", text.removeprefix("Wq Wk Wv ") if "A" not in c.pattern else text)

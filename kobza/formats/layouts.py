"""Where each weight of ours lies in other people's files: a layout is a row of names and of what is stored otherwise, and `slots`
goes along it. Nothing here reads a config.json (families.py) or GGUF metadata (gguf_families.py), and no weight is touched:
weights.py moves the tensors along the slots made here.

    slots(config, LLAMA) -> [Slot("model.embed_tokens.weight", ("embed.weight",)), ...]
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from kobza.config import ModelConfig, require


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
    loose: bool = False
    """biases of the linear layers may be absent where those of the norms are there"""
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
NEMOTRON = replace(LLAMA, loose=True)
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
# what llama.cpp's convert_hf_to_gguf.py writes: rows of q and k permuted where its rope turns neighbours, 1 added to every norm's
# weight where the stock norm adds it itself
GGUF_LAYOUTS = {
    "llama": replace(GGUF, interleaved=True),
    "qwen2": GGUF,
    "qwen3": GGUF,
    "gemma": replace(GGUF, norm_shift=1.0),
    "gemma2": replace(GGUF, layer=GGUF_SANDWICH, norm_shift=1.0),
    "gemma3": replace(GGUF, layer=GGUF_SANDWICH, norm_shift=1.0),
    "phi3": replace(GGUF, layer=GGUF_FUSED),
    "gpt2": replace(GGUF, layer=GGUF_QKV),
    "nemotron": replace(GGUF, norm_shift=1.0, loose=True),
    "arcee": replace(GGUF, interleaved=True),
}


# ---- slots ---------------------------------------------------------------------------------------------------------


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
                for x in ("gate", "up") if "glu" in config.mlp else ("up",):
                    linear(f"{part}.{x}_proj", width, C, config.bias)
                linear(f"{part}.down_proj", C, width, config.bias)
    norm("norm", "before", "output", "both", "everywhere")
    found |= {} if config.tied else {"lm_head.weight": (config.n_rows, C)}
    found |= {f"ahead.{i}.proj.weight": (C, C) for i in range(config.n_ahead - 1)}
    return found


def layout_by_names(config: ModelConfig, names: Collection[str]) -> Layout:
    """The layout of a Hugging Face file by what is in it; families that compute the same may be stored differently."""
    if any(name.endswith("self_attn.qkv_proj.weight") for name in names):
        return FUSED
    if config.position == "learned":
        return GPT2
    if config.norm == "layernorm":
        return NEMOTRON
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


def is_linear_bias(name: str) -> bool:
    """Whether a weight of ours is the bias of a linear layer, which a loose layout may leave out."""
    return name.endswith("_proj.bias")


def slots(
    config: ModelConfig, layout: Layout, prefix: str | None = None, names: Collection[str] | None = None
) -> list[Slot]:
    """Where each weight of ours is found in theirs, in the order of theirs. names: those of the file, to find the head by and the
    biases left out."""
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
                shift = layout.norm_shift if full[0].endswith("norm.weight") else 0.0
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
    if names is None or not layout.loose:
        return found
    there = {
        name.split(".")[-2] for name in names if name.endswith(".bias")
    }  # a leaf's biases: in all layers or in none
    return [slot for slot in found if not is_linear_bias(slot.ours[0]) or slot.theirs.split(".")[-2] in there]

"""The nouns of a run as frozen dataclasses: ModelConfig, TrainConfig, DataConfig, SampleConfig.

A field is a number or an equation, never a model family. Every value is checked when the object is made, and a key that
nobody knows is refused with the nearest one that exists. The text under a field is its help on the command line.
This file imports nothing heavy: `kobza --help` reads it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

PRESETS = Path(__file__).parent / "configs"
LEARNED = ("char", "byte", "bpe")  # the tokenizers that come out of the text itself


class InputError(ValueError):
    """What a user can cause and mend. One line: what, the value, the limit, the remedy. The command line exits 2."""


def require(ok: bool, message: str) -> None:
    """Raise InputError(message) unless `ok`."""
    if not ok:
        raise InputError(message)


def nearest(word: str, known: list[str]) -> str:
    """A hint for a mistyped word. nearest("n_heed", ["n_head", "n_layer"]) -> "; did you mean n_head?" """
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def check_types(config: Any, prefix: str) -> None:
    """Raise InputError unless every field of a dataclass holds what its annotation (a string, or Literal[...]) says."""
    for f in dataclasses.fields(config):
        _check_type(f"{prefix}{f.name}", getattr(config, f.name), f.type)


def _check_type(what: str, value: Any, annotation: Any) -> None:
    annotation = str(annotation)
    if annotation.startswith("Literal"):
        choices = [c.strip(" \"'") for c in annotation[annotation.index("[") + 1 : -1].split(",")]
        require(value in choices, f"{what} is {value!r}; one of {', '.join(choices)}")
        return
    allowed = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}[annotation]
    good = isinstance(value, allowed) and (annotation == "bool" or not isinstance(value, bool))
    require(good, f"{what} is {value!r}; it must be of type {annotation}")
    require(annotation != "float" or math.isfinite(value), f"{what} is {value}; it must be a finite number")


class Effect(NamedTuple):
    """Fields, parted by spaces, that change nothing unless `where` holds of their section; `why` ends the sentence about it."""

    fields: str
    where: Callable[[Any], bool]
    why: str


# One table for two uses: a field set in vain is refused (`check_effects`), and a preset's field that the command line has taken
# the effect from is dropped (`without_idle`): `--preset demo --model.norm none` drops the preset's norm_weight.
MODEL_EFFECTS = (
    Effect(
        "n_head n_kv_head head_dim omit_heads rope_theta rope_dim rope_local_theta rope_scaling qk_norm qk_norm_weight "
        "attn_scale attn_softcap window qkv_bias",
        lambda c: "A" in c.pattern,
        ": pattern {c.pattern!r} has no A, no attention",
    ),
    Effect("n_ff ff_widths mlp", lambda c: "F" in c.pattern, ": pattern {c.pattern!r} has no F, no feed-forward"),
    Effect("n_ff", lambda c: not c.ff_widths, ": ff_widths gives each width"),
    Effect(
        "rope_theta rope_dim rope_local_theta rope_scaling",
        lambda c: c.position == "rope",
        " with position={c.position}; leave it out or take position rope",
    ),
    Effect("rope_factor", lambda c: c.rope_scaling != "none", " with rope_scaling=none; give model.rope_scaling"),
    Effect(
        "rope_original_len",
        lambda c: c.rope_scaling in ("yarn", "llama3"),
        " with rope_scaling={c.rope_scaling}; leave it out or take yarn or llama3",
    ),
    Effect("window_pattern rope_local_theta", lambda c: c.window > 0, " with window=0; give model.window"),
    Effect("norm_place norm_weight", lambda c: c.norm != "none", " with norm=none; leave it out or take norm rmsnorm"),
    Effect(
        "norm_eps", lambda c: c.norm != "none" or c.qk_norm, " with no norm anywhere; leave it out or take norm rmsnorm"
    ),
    Effect("qk_norm_weight", lambda c: c.qk_norm, " with qk_norm off; set model.qk_norm"),
    Effect(
        "norm_offset",
        lambda c: c.norm != "none" and c.norm_weight or c.qk_norm and c.qk_norm_weight,
        " with no norm that has weights; leave it out or set model.norm_weight",
    ),
    Effect(
        "norm_cast",
        lambda c: c.norm == "rmsnorm" and c.norm_weight or c.qk_norm and c.qk_norm_weight,
        " with no RMSNorm that has weights; leave it out or take norm rmsnorm",
    ),
    Effect("qkv_bias", lambda c: not c.bias, " with model.bias, which is on everywhere; leave one out"),
)
TRAIN_EFFECTS = (
    Effect(
        "muon_lr", lambda c: c.optimizer == "muon", " with optimizer={c.optimizer}; leave it out or take optimizer muon"
    ),
    Effect(
        "momentum", lambda c: c.optimizer in ("muon", "sgd"), " with optimizer={c.optimizer}; it is for muon and sgd"
    ),
    Effect("beta1 beta2", lambda c: c.optimizer != "sgd", " with optimizer=sgd; leave it out or take optimizer adamw"),
    Effect(
        "decay_fraction",
        lambda c: c.schedule == "wsd",
        " with schedule={c.schedule}; leave it out or take schedule wsd",
    ),
    Effect("lr_floor", lambda c: c.schedule != "constant", " with schedule=constant, which never falls; leave it out"),
    Effect(
        "fp32_parts", lambda c: c.precision not in ("fp32", "tf32"), " with precision={c.precision}; take bf16 or fp16"
    ),
)
EFFECTS = {"model": MODEL_EFFECTS, "train": TRAIN_EFFECTS}


def idle(section: str, values: Any) -> Iterator[tuple[str, str]]:
    """(field, why) of each field of a section that is not at its default and changes nothing. values: a config or the like."""
    defaults = {f.name: (f.default,) for f in dataclasses.fields(SECTIONS[section])}
    if section == "model":  # a default that was filled in is no setting
        derived = {
            "head_dim": values.n_embd // max(1, values.n_head),
            "n_kv_head": values.n_head,
            "n_ff": 4 * values.n_embd,
        }
        defaults |= {name: (*defaults[name], value) for name, value in derived.items()}
    for effect in EFFECTS.get(section, ()):
        for name in () if effect.where(values) else effect.fields.split():
            if getattr(values, name) not in defaults[name]:
                yield name, effect.why.format(c=values)


def check_effects(section: str, config: Any) -> None:
    """Refuse the first field that is set in vain."""
    for name, why in idle(section, config):
        raise InputError(f"{section}.{name} {getattr(config, name)} has no effect{why}")


def without_idle(section: str, weak: dict[str, Any], strong: dict[str, Any]) -> dict[str, Any]:
    """`weak` less the fields that had an effect beside its own values and have none beside those of `strong`.

    without_idle("train", {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adamw"}) -> {"optimizer": "sgd"}
    """
    start = {f.name: f.default for f in dataclasses.fields(SECTIONS[section])}
    in_vain = {name for name, _ in idle(section, SimpleNamespace(**start | weak))}
    while True:
        now = {name for name, _ in idle(section, SimpleNamespace(**start | weak | strong))} - in_vain - set(strong)
        if not now & set(weak):
            return weak
        weak = {name: value for name, value in weak.items() if name not in now}


@dataclass(frozen=True)
class ModelConfig:
    """What the network computes. Defaults are the modern small model (Transformer++ with ReLU^2)."""

    vocab_size: int = 0
    """tokens of the vocabulary; 0 takes the tokenizer's"""
    pad_vocab: int = 0
    """round the rows of embedding and head up to a multiple (64: faster products); the rest are never sampled; 0: off"""
    max_seq_len: int = 64
    """context: the most tokens the model sees at once"""
    n_layer: int = 4
    """blocks"""
    pattern: str = "AF"
    """sub-layers of a block in order: A attention, F feed-forward; AF is the usual one, also AFAF, AAF, A, F"""
    n_head: int = 4
    """query heads an attention"""
    n_kv_head: int = 0
    """key/value heads shared by groups of query heads (1: multi-query, Shazeer 2019; GQA, Ainslie et al. 2023); 0: n_head"""
    n_embd: int = 128
    """width of the residual stream"""
    head_dim: int = 0
    """width of a head, free of n_embd; 0 takes n_embd / n_head"""
    omit_heads: str = ""
    """query heads left out (Michel et al. 2019) as attention:head,head ...; "0:1,3 2:0" leaves three out"""
    n_ff: int = 0
    """width inside a feed-forward; 0 takes 4 n_embd"""
    ff_widths: str = ""
    """widths of the feed-forwards one by one, in place of n_ff: "256,512,512,256" for four"""
    position: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    """rotary angles on queries and keys (Su et al. 2021), a learned vector a place (GPT-2), sines (Vaswani et al. 2017), none"""
    rope_theta: float = 10_000.0
    """base of the rotary frequencies; only with position=rope"""
    rope_dim: int = 0
    """channels of a head that rope turns, the first ones (Phi 4 mini: 3/4 of them); 0: all"""
    rope_local_theta: float = 0.0
    """base in windowed attentions (Gemma 3); 0: rope_theta"""
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """how the angles are slowed to read further than rope_original_len (layers.py, rope_slowdown)"""
    rope_factor: float = 1.0
    """how many times as far; only with rope_scaling"""
    rope_original_len: int = 0
    """the context before scaling; for yarn and llama3"""
    norm: Literal["rmsnorm", "layernorm", "none"] = "rmsnorm"
    """RMSNorm (Zhang & Sennrich 2019), LayerNorm (Ba et al. 2016), or none"""
    norm_place: Literal["before", "after", "output", "both", "everywhere"] = "before"
    """x + f(n(x)); n(x + f(x)) as in 2017; x + n(f(x)) as OLMo 2; x + n(f(n(x))) as Gemma 2; everywhere: both, and embedding"""
    norm_weight: bool = True
    """a learned factor a channel in each norm"""
    norm_eps: float = 1e-5
    """added to the variance"""
    norm_offset: bool = False
    """the factor is 1 + weight (Gemma)"""
    norm_cast: Literal["before", "after"] = "before"
    """cast RMSNorm to the compute dtype before its factor (Llama) or after (Gemma)"""
    qk_norm: bool = True
    """RMS-normalise queries and keys per head (Henry et al. 2020)"""
    qk_norm_weight: bool = False
    """a learned factor a channel in QK-norm (Qwen 3)"""
    attn_scale: float = 0.0
    """scores are multiplied by it; 0: 1 / sqrt(head_dim)"""
    attn_softcap: float = 0.0
    """scores are cap * tanh(scores / cap) (Gemma 2); 0: off"""
    window: int = 0
    """tokens a windowed attention sees, itself included (Beltagy et al. 2020); 0: off"""
    window_pattern: str = "L"
    """which attentions have the window, repeated: L local, G global; LLLLLG is Gemma 3; only with window"""
    mlp: Literal["relu2", "relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "geglu_tanh"] = "relu2"
    """activation: ReLU squared (So et al. 2021), ReLU, exact GELU or its tanh form (GPT-2), SiLU; gated (Shazeer 2020): *glu"""
    bias: bool = False
    """bias in the linear layers and in LayerNorm"""
    qkv_bias: bool = False
    """bias in the query, key and value layers alone (Qwen 2)"""
    tied: bool = False
    """the head uses the embedding's weights (Press & Wolf 2017)"""
    embed_scale: float = 1.0
    """embeddings are multiplied by it (Gemma: the root of n_embd)"""
    init: Literal["zero", "gpt2", "xavier", "torch", "unit"] = "zero"
    """blocks and head at zero; GPT-2's normals; Glorot & Bengio 2010; torch's own; N(0, 1) everywhere, which is bad (model.py)"""
    softcap: float = 0.0
    """logits are softcap * tanh(logits / softcap) (Gemma 2); 0: off"""
    n_ahead: int = 1
    """tokens predicted at each place, by extra heads used in training alone (Gloeckle et al. 2024)"""
    dropout: float = 0.0
    """share of activations dropped in training: of embedding, attention weights, attention output and MLP output"""

    def __post_init__(self) -> None:
        check_types(self, "model.")
        set_ = object.__setattr__  # frozen: the zeros that mean "derived" are filled in once, here
        for name in ("n_layer", "n_head", "n_embd", "max_seq_len", "n_ahead"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be at least 1")
        blocks = f"model.n_layer is {self.n_layer}; it must be at most 10,000"
        require(self.n_layer <= 10_000, blocks)  # they are counted one by one before memory is asked for
        far = f"model.n_ahead is {self.n_ahead}: no target is so far ahead at model.max_seq_len {self.max_seq_len}; lower it"
        require(self.n_ahead <= self.max_seq_len, far)
        at_least_0 = "vocab_size pad_vocab n_kv_head head_dim n_ff softcap attn_softcap attn_scale window"
        for name in (*at_least_0.split(), "rope_original_len", "rope_local_theta", "rope_dim"):
            require(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("norm_eps", "rope_theta", "embed_scale"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be above 0")
        require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; it must be in [0, 1)")
        self._check_pattern()
        check_effects("model", self)
        if self.head_dim == 0:
            require(
                self.n_embd % self.n_head == 0 or "A" not in self.pattern,
                f"model.n_embd is {self.n_embd}, not divisible by model.n_head {self.n_head}; "
                f"take n_embd {self.n_head * max(1, round(self.n_embd / self.n_head))} or give model.head_dim",
            )
            set_(self, "head_dim", self.n_embd // self.n_head)
        set_(self, "n_kv_head", self.n_kv_head or self.n_head)
        set_(self, "n_ff", self.n_ff or 4 * self.n_embd)
        require(
            self.n_head % self.n_kv_head == 0,
            f"model.n_head is {self.n_head}, not divisible by model.n_kv_head {self.n_kv_head}; "
            f"take n_kv_head {nearest_divisor(self.n_head, self.n_kv_head)}",
        )
        self._check_omitted()
        if "A" in self.pattern and self.position == "rope":
            self._check_rope()
        self._check_window()
        everywhere = "model.norm_place everywhere normalises queries and keys too, and model.qk_norm is off; "
        good = self.norm_place != "everywhere" or self.qk_norm or "A" not in self.pattern
        require(good, everywhere + "set model.qk_norm or take norm_place both")
        require(self.pad_vocab != 1, "model.pad_vocab 1 has no effect; 0 turns it off, 64 is usual")

    def _check_pattern(self) -> None:
        """The strings that say what stands where."""
        bad = next((letter for letter in self.pattern if letter not in "AF"), "")
        require(not bad, f"model.pattern {self.pattern!r} has the letter {bad!r}; A is an attention, F a feed-forward")
        require(bool(self.pattern), "model.pattern is empty; AF is the usual block, F alone has no attention")
        bad = next((letter for letter in self.window_pattern if letter not in "LG"), "")
        require(not bad, f"model.window_pattern {self.window_pattern!r} has the letter {bad!r}; L is local, G global")
        require(bool(self.window_pattern), "model.window_pattern is empty; L gives every attention the window")
        widths = whole_numbers(self.ff_widths, "model.ff_widths")
        n = self.n_layer * self.pattern.count("F")
        require(
            len(widths) in (0, n) and min(widths, default=1) > 0,
            f"model.ff_widths {self.ff_widths!r} gives {len(widths)} widths; give {n}, each at least 1: one a feed-forward",
        )

    def _check_omitted(self) -> None:
        """The heads left out are there, and not all of them."""
        for attention, heads in self.omitted().items():
            where = f"model.omit_heads {self.omit_heads!r}"
            most = f"{self.n_attention} attentions of {self.n_head} heads, counted from 0"
            fits = attention < self.n_attention and max(heads) < self.n_head
            require(fits, f"{where}: attention {attention}, head {max(heads)} is not there; the model has {most}")
            require(len(heads) < self.n_head, f"{where} leaves none; drop the attention with model.pattern instead")
            group = self.n_head // self.n_kv_head
            whole = len({h // group for h in heads}) * group == len(heads)
            require(whole, f"{where}: {group} query heads share a key/value head; leave out whole groups of {group}")

    def _check_rope(self) -> None:
        """Rotary angles: pairs to turn, frequencies that differ, and a scaling with its numbers."""
        name, turned = ("rope_dim", self.rope_dim) if self.rope_dim else ("head_dim", self.head_dim)
        odd = f"model.{name} is {turned}; rope turns pairs, so it must be even: take model.{name} {turned + 1}"
        require(turned % 2 == 0, odd)
        whole = f"model.rope_dim {self.rope_dim} has no effect: model.head_dim is {self.head_dim}; take less or leave it out"
        require(self.rope_dim < self.head_dim, whole)
        for name in ("rope_theta", "rope_local_theta"):
            require(getattr(self, name) != 1, f"model.{name} is 1: all frequencies would be equal; 10000 is usual")
        if self.rope_scaling != "none":
            require(self.rope_factor > 1, f"model.rope_factor is {self.rope_factor}; scaling needs more than 1")
            wants_length = self.rope_scaling in ("yarn", "llama3")
            missing = (
                f"model.rope_scaling {self.rope_scaling} needs model.rope_original_len, the context before scaling"
            )
            require(self.rope_original_len > 0 or not wants_length, missing)

    def _check_window(self) -> None:
        """A window is somewhere and hides something."""
        local = [self.is_windowed(layer) for layer in range(self.n_attention)] if self.window else []
        none = f"model.window {self.window} has no effect: model.window_pattern {self.window_pattern} gives it to no attention"
        require(not self.window or any(local), f"{none} of {self.n_attention}; take window_pattern L")
        wide = f"model.window {self.window} has no effect: model.max_seq_len is {self.max_seq_len}; take less"
        require(self.window < self.max_seq_len or bool(self.rope_local_theta), wide)
        same = "model.rope_local_theta has no effect: "
        every = same + "all attentions have the window; give rope_theta alone"
        require(not self.rope_local_theta or not all(local), every)
        equal = self.rope_local_theta == self.rope_theta and self.rope_scaling == "none"
        require(not equal, f"{same}it is rope_theta; leave it out")

    @property
    def n_attention(self) -> int:
        """Attentions in the whole network."""
        return self.n_layer * self.pattern.count("A")

    @property
    def n_rows(self) -> int:
        """Rows of embedding and head: vocab_size, rounded up to a multiple of pad_vocab."""
        return -(-self.vocab_size // self.pad_vocab) * self.pad_vocab if self.pad_vocab else self.vocab_size

    def omitted(self) -> dict[int, list[int]]:
        """omit_heads read: "0:1,3 2:0" -> {0: [1, 3], 2: [0]}."""
        read: dict[int, list[int]] = {}
        for part in self.omit_heads.split():
            attention, colon, heads = part.partition(":")
            numbers = whole_numbers(heads, "model.omit_heads")
            good = bool(colon) and attention.isdecimal() and bool(numbers) and len(set(numbers)) == len(numbers)
            require(
                good and int(attention or 0) not in read, f"model.omit_heads has {part!r}; write attention:head,head"
            )
            read[int(attention)] = numbers
        return read

    def heads(self, layer: int) -> tuple[int, int]:
        """Query heads and key/value heads of the layer-th attention."""
        left_out = len(self.omitted().get(layer, ()))
        return self.n_head - left_out, self.n_kv_head - left_out * self.n_kv_head // self.n_head

    def is_windowed(self, layer: int) -> bool:
        """Whether the layer-th attention sees a window only."""
        return self.window > 0 and self.window_pattern[layer % len(self.window_pattern)] == "L"

    def span(self, layer: int) -> int:
        """The most tokens that the layer-th attention sees."""
        return min(self.window, self.max_seq_len) if self.is_windowed(layer) else self.max_seq_len

    def ff_width(self, place: int) -> int:
        """Width of the place-th feed-forward."""
        widths = whole_numbers(self.ff_widths, "model.ff_widths")
        return widths[place] if widths else self.n_ff


def whole_numbers(text: str, what: str) -> list[int]:
    """whole_numbers("1,3", ...) -> [1, 3]; "" -> []."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    bad = next((part for part in parts if not part.isdecimal()), None)
    require(bad is None, f"{what} {text!r} has {bad!r}; give whole numbers parted by commas, e.g. 1,3")
    return [int(part) for part in parts]


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n nearest to `wanted`. nearest_divisor(6, 4) -> 3"""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))


@dataclass(frozen=True)
class DataConfig:
    """Which tokens a text becomes and which of them are held out."""

    tokenizer: str = "char"
    """char, byte or bpe (byte-level byte-pair encoding), learned from the text; or a tokenizer.json, .model or .tiktoken file,
    an encoding (gpt2, cl100k_base, o200k_base, ...), or the folder of a run"""
    vocab_size: int = 0
    """tokens of the BPE vocabulary; 0 takes 4096; only with tokenizer=bpe"""
    unknown: Literal["error", "skip", "bytes"] = "error"
    """a character outside the character vocabulary: refuse, drop, or spell as UTF-8 bytes (256 more tokens)"""
    val_fraction: float = 0.1
    """share of the tokens, at the end, held out for validation"""
    text_field: str = "text"
    """field of a .jsonl object or column of a .csv that holds the text"""
    bos: bool = False
    """begin each document with a beginning-of-text token"""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        require(0 < self.val_fraction < 1, f"data.val_fraction is {self.val_fraction}; it must be between 0 and 1")
        kind = self.tokenizer
        require(
            bool(kind.strip()),
            f"data.tokenizer is {kind!r}; {', '.join(LEARNED)}, a file, an encoding or a run's folder",
        )
        if kind == "bpe":
            object.__setattr__(self, "vocab_size", self.vocab_size or 4096)
            require(self.vocab_size >= 257, f"data.vocab_size is {self.vocab_size}; bytes and end-of-text need 257")
            most = f"data.vocab_size is {self.vocab_size}; it must be at most 1,000,000"
            require(self.vocab_size <= 1_000_000, most)  # the library asks for its memory at once, and aborts
        else:
            why = f"data.vocab_size {self.vocab_size} has no effect with tokenizer={kind}; leave it out"
            require(self.vocab_size == 0, f"{why}, or give 0 where a preset names it")
        if kind in ("bpe", "byte"):
            require(
                self.unknown == "error", f"data.unknown has no effect with tokenizer={kind}: bytes spell everything"
            )


@dataclass(frozen=True)
class TrainConfig:
    """How the weights are found: batches, optimizer, schedule, precision, and what to keep."""

    steps: int = 1000
    """updates of the weights"""
    micro_batch: int = 32
    """sequences in one forward pass on one device"""
    accumulate: int = 1
    """forward passes an update"""
    optimizer: Literal["muon", "adamw", "lion", "sgd"] = "muon"
    """Muon (Jordan 2024) on the hidden matrices and AdamW on the rest, or on all weights AdamW, Lion (Chen et al. 2023) or SGD
    with Nesterov's momentum (Sutskever et al. 2013)"""
    lr: float = 3e-3
    """peak learning rate of AdamW, Lion or SGD; Lion wants a third to a tenth of AdamW's, SGD a hundred times as much"""
    embed_lr: float = 0.0
    """peak learning rate of the token and position tables; 0 takes lr"""
    head_lr: float = 0.0
    """peak learning rate of an untied head; 0 takes lr"""
    layer_lr_decay: float = 1.0
    """each block learns at this share of the rate of the block above it (Howard & Ruder 2018); 1: off"""
    muon_lr: float = 0.02
    """peak learning rate of Muon; only with optimizer=muon"""
    momentum: float = 0.95
    """decay of the momentum of Muon or SGD; only with those"""
    beta1: float = 0.9
    """AdamW: decay of the gradient's mean; Lion: of the mean within the update"""
    beta2: float = 0.95
    """AdamW: decay of the gradient's square; Lion: of the mean that is kept"""
    weight_decay: float = 0.0
    """decoupled decay of the matrices, in every optimizer; never of vectors"""
    embed_weight_decay: float = -1.0
    """decoupled decay of the tables and the head; -1 takes weight_decay"""
    label_smoothing: float = 0.0
    """share of each target spread evenly over the vocabulary (Szegedy et al. 2016); 0: off"""
    z_loss: float = 0.0
    """adds z_loss * log(Z)^2, Z the softmax's sum, so that logits do not drift (Chowdhery et al. 2022 take 1e-4); 0: off"""
    min_context: int = 0
    """learn only targets that at least so many tokens of their window come before; 0: all"""
    ahead_weight: float = 1.0
    """weight of the mean loss of the extra heads (DeepSeek-V3 2024; 1 at model.n_ahead=2 is the sum of Gloeckle et al. 2024)"""
    freeze: str = ""
    """modules that keep their weights, by commas: "embed,blocks.0"; `kobza describe` names them"""
    embeddings: str = ""
    """a .npy or .safetensors file (FILE:KEY names a tensor in it) with the token table to start from (vocab_size, n_embd)"""
    grad_clip: float = 1.0
    """largest norm of the gradient; 0: off"""
    warmup_steps: int = 20
    """updates in which the rate rises from 0"""
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "linear"
    """after warm-up: half a cosine, a line, constant then a line (warm-up-stable-decay), 1/sqrt(step) (Vaswani et al. 2017), or
    constant"""
    lr_floor: float = 0.0
    """the rate's last value as a share of its peak; of inverse_sqrt the least"""
    decay_fraction: float = 0.3
    """wsd: the share of the steps in which the rate falls"""
    eval_interval: int = 100
    """updates between evaluations, each printing losses and a sample"""
    eval_tokens: int = 0
    """validation tokens an evaluation reads; 0 reads all, at most 200,000"""
    checkpoint_interval: int = 0
    """updates between checkpoints; 0 saves at each evaluation"""
    keep: int = 2
    """checkpoints kept besides the best"""
    patience: int = 0
    """stop after so many evaluations without a better validation loss; 0: off"""
    stop_at: float = 0.0
    """stop once the validation loss is at or below this; 0: off"""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """number format of the matrix products; weights stay float32"""
    fp32_parts: str = ""
    """modules that compute in float32 beside a precision of bf16 or fp16, as patterns: "lm_head,blocks.*.attn", say"""
    kernels: Literal["auto", "off"] = "auto"
    """fused forms of the blocks where kobza has them for this device and model"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto compiles only where it will pay for itself"""

    def __post_init__(self) -> None:
        check_types(self, "train.")
        for name in ("steps", "micro_batch", "accumulate", "eval_interval", "keep"):
            require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "muon_lr", "ahead_weight"):
            require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; it must be above 0")
        at_least_0 = ("weight_decay", "grad_clip", "warmup_steps", "eval_tokens", "checkpoint_interval", "patience")
        for name in (*at_least_0, "embed_lr", "head_lr", "stop_at", "z_loss", "min_context"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("beta1", "beta2", "momentum", "label_smoothing"):
            require(0 <= getattr(self, name) < 1, f"train.{name} is {getattr(self, name)}; it must be in [0, 1)")
        require(0 <= self.lr_floor <= 1, f"train.lr_floor is {self.lr_floor}; it is a share of lr, in [0, 1]")
        for name in ("decay_fraction", "layer_lr_decay"):
            require(0 < getattr(self, name) <= 1, f"train.{name} is {getattr(self, name)}; it must be in (0, 1]")
        decay = self.embed_weight_decay
        good = decay == -1 or decay >= 0
        require(good, f"train.embed_weight_decay is {decay}; it must be 0 or above, or -1, which takes weight_decay")
        require(self.min_context != 1, "train.min_context 1 has no effect: each target has that much; leave it out")
        check_effects("train", self)


@dataclass(frozen=True)
class SampleConfig:
    """How the next token is chosen from the logits."""

    tokens: int = 256
    """tokens to generate at most"""
    temperature: float = 0.7
    """divides the logits: 0 always takes the likeliest token, 1 the model's own distribution"""
    top_k: int = 40
    """choose among the k likeliest; 0: all"""
    top_p: float = 1.0
    """choose among the likeliest that together hold this probability (Holtzman et al. 2020)"""
    min_p: float = 0.0
    """drop tokens less likely than this share of the likeliest (Nguyen et al. 2024)"""
    repetition_penalty: float = 1.0
    """divides the logit of tokens already there (Keskar et al. 2019); 1: off"""
    no_repeat_ngram: int = 0
    """never write the same n tokens in a row twice; 0: off"""
    min_tokens: int = 0
    """do not end before so many tokens"""
    alphabet: str = ""
    """write only in these scripts (Cyrillic), languages (uk) or characters ([abc]), joined by commas; spaces, digits and common
    punctuation always; empty: no limit"""
    seed: int = 0
    """of the draws; sample i uses seed + i"""

    def __post_init__(self) -> None:
        check_types(self, "--")
        require(self.tokens > 0, f"--tokens is {self.tokens}; it must be at least 1")
        require(self.temperature >= 0, f"--temperature is {self.temperature}; it must be 0 (greedy) or above")
        require(0 <= self.seed < 2**63, f"--seed is {self.seed}; it must be in [0, 2**63)")
        require(self.top_k >= 0, f"--top-k is {self.top_k}; it must be 0 (off) or above")
        require(0 < self.top_p <= 1, f"--top-p is {self.top_p}; it must be in (0, 1]")
        require(0 <= self.min_p <= 1, f"--min-p is {self.min_p}; it must be in [0, 1]")
        require(self.repetition_penalty > 0, f"--repetition-penalty is {self.repetition_penalty}; it must be above 0")
        require(self.no_repeat_ngram >= 0, f"--no-repeat-ngram is {self.no_repeat_ngram}; it must be 0 (off) or above")
        require(
            0 <= self.min_tokens <= self.tokens,
            f"--min-tokens is {self.min_tokens}; it must be between 0 and --tokens {self.tokens}",
        )


@dataclass(frozen=True)
class RunConfig:
    """One run: a section each for model, data and training, and the seed of everything random."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_type("--seed", self.seed, "int")
        require(0 <= self.seed < 2**63, f"--seed is {self.seed}; it must be in [0, 2**63)")
        check_together(self.model, self.train)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one update."""
        return self.train.micro_batch * self.train.accumulate * self.model.max_seq_len


def check_together(model: ModelConfig, train: TrainConfig) -> None:
    """Refuse what the model leaves without effect in training."""
    own_head = not (train.head_lr and model.tied)
    require(own_head, "train.head_lr has no effect with model.tied: the head is the table; take train.embed_lr")
    layered = train.layer_lr_decay == 1 or model.n_layer > 1
    require(layered, f"train.layer_lr_decay {train.layer_lr_decay} has no effect on a single block; leave it out")
    longest = model.max_seq_len
    require(
        train.min_context <= longest,
        f"train.min_context is {train.min_context}: no target has so much context at model.max_seq_len {longest}; lower it",
    )
    ahead = model.n_ahead > 1
    require(ahead or train.ahead_weight == 1, "train.ahead_weight has no effect with model.n_ahead=1; leave it out")
    require(not ahead or train.compile != "on", "train.compile=on has no effect with model.n_ahead > 1; leave it out")


SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}


def from_dict(cls: type, values: dict[str, Any], where: str) -> Any:
    """A dataclass from a dict; an unknown key or a value of the wrong type is refused. `where` names the source."""
    check_keys(cls, values, where)
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    for key, value in values.items():
        _check_type(f"{where}: {key}", value, types[key])
    return cls(**values)


def has_types(cls: type, values: dict[str, Any]) -> bool:
    """Whether every value is of its field's type. has_types(TrainConfig, {"steps": "x"}) -> False"""
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    try:
        for key, value in values.items():
            _check_type(key, value, types[key])
    except InputError:
        return False
    return True


def check_sections(values: dict[str, Any], where: str) -> None:
    """Refuse a name at the top of a run's settings that nobody knows, and a section that is no table."""
    known = [*SECTIONS, "seed"]
    for key, value in values.items():
        require(key in known, f"{where}: unknown section {key!r}{nearest(key, known)}")
        require(key == "seed" or isinstance(value, dict), f"{where}: {key} is {value!r}; it must be a table [{key}]")


def check_keys(cls: type, values: dict[str, Any], where: str) -> None:
    """Refuse a key that is no field of the dataclass, naming the nearest."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        require(key in known, "" if key in known else f"{where}: unknown key {key!r}{nearest(key, known)}")


def run_from_dict(values: dict[str, Any], where: str) -> RunConfig:
    """A RunConfig from {"model": {...}, "data": {...}, "train": {...}, "seed": n}; missing parts take defaults."""
    check_sections(values, where)
    values = upgraded(values)
    parts = {name: from_dict(cls, values.get(name, {}), f"{where} [{name}]") for name, cls in SECTIONS.items()}
    return RunConfig(**parts, seed=values.get("seed", 0))


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """A run's settings as an older kobza wrote them, under today's names."""
    model = dict(values.get("model", {}))
    if "zero_init" in model:
        model["init"] = "zero" if model.pop("zero_init") else "gpt2"
    sections = {"model": model, "train": migrate_train(values.get("train", {}))}
    return values | {name: section for name, section in sections.items() if section}


def migrate_train(values: dict[str, Any]) -> dict[str, Any]:
    """[train] of format 1 under today's names, less what was set in vain, which then was no error.
    migrate_train({"muon_momentum": 0.9}) -> {"momentum": 0.9}; with optimizer="adamw" beside it the momentum goes"""
    if "muon_momentum" not in values:
        return values
    values = {"momentum" if key == "muon_momentum" else key: value for key, value in values.items()}
    start = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    in_vain = {name for name, _ in idle("train", SimpleNamespace(**start | values))}
    return {name: value for name, value in values.items() if name not in in_vain}


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of any of these dataclasses."""
    return dataclasses.asdict(config)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names. flatten({"train": {"lr": 1}}) -> {"train.lr": 1}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def load_toml(path: Path) -> dict[str, Any]:
    """The nested dict of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from None


def preset_names() -> list[str]:
    """Names of the presets that come with kobza, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset(name: str) -> dict[str, Any]:
    """The nested dict of a preset by name."""
    names = preset_names()
    require(name in names, f"unknown preset {name!r}{nearest(name, names)} (presets: {', '.join(names)})")
    return load_toml(PRESETS / f"{name}.toml")

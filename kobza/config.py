"""The nouns of a run as frozen dataclasses: ModelConfig, TrainConfig, DataConfig, SampleConfig.

A field is a number or an equation, never a model family. Every value is checked when the object is made, and a key that
nobody knows is refused with the nearest one that exists. The text under a field is its help on the command line.
This file imports nothing heavy: `kobza --help` reads it.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

PRESETS = Path(__file__).parent / "configs"


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


@dataclass(frozen=True)
class ModelConfig:
    """What the network computes. Defaults are the modern small model (Transformer++ with ReLU^2)."""

    vocab_size: int = 0
    """rows of the embedding; 0 takes the tokenizer's"""
    max_seq_len: int = 64
    """context: the most tokens the model sees at once"""
    n_layer: int = 4
    """blocks, each an attention and an MLP"""
    n_head: int = 4
    """query heads a block"""
    n_kv_head: int = 0
    """key/value heads shared by groups of query heads (GQA, Ainslie et al. 2023); 0 takes n_head"""
    n_embd: int = 128
    """width of the residual stream"""
    head_dim: int = 0
    """width of a head; 0 takes n_embd / n_head"""
    n_ff: int = 0
    """width inside the MLP; 0 takes 4 n_embd"""
    position: Literal["rope", "learned"] = "rope"
    """rotary angles on queries and keys (Su et al. 2021), or a learned vector a position (GPT-2)"""
    rope_theta: float = 10_000.0
    """base of the rotary frequencies; only with position=rope"""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016), before each sub-layer and before the head"""
    norm_weight: bool = True
    """a learned factor a channel in each norm"""
    norm_eps: float = 1e-5
    """added to the variance"""
    qk_norm: bool = True
    """RMS-normalise queries and keys per head (Henry et al. 2020; no weights)"""
    mlp: Literal["relu2", "swiglu", "gelu", "gelu_tanh"] = "relu2"
    """ReLU squared (So et al. 2021), SwiGLU (Shazeer 2020), exact GELU, or its tanh form (GPT-2)"""
    bias: bool = False
    """bias in the linear layers and in LayerNorm"""
    tied: bool = False
    """the head uses the embedding's weights (Press & Wolf 2017)"""
    zero_init: bool = True
    """start o_proj, down_proj and an untied head at zero, so a block starts as the identity; else GPT-2's rule"""
    softcap: float = 0.0
    """logits are softcap * tanh(logits / softcap) (Gemma 2); 0: off"""
    dropout: float = 0.0
    """share of activations dropped in training, in embedding, attention output and MLP output"""

    def __post_init__(self) -> None:
        check_types(self, "model.")
        set_ = object.__setattr__  # frozen: the zeros that mean "derived" are filled in once, here
        for name in ("n_layer", "n_head", "n_embd", "max_seq_len"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("vocab_size", "n_kv_head", "head_dim", "n_ff", "softcap"):
            require(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; it must not be negative")
        if self.head_dim == 0:
            require(
                self.n_embd % self.n_head == 0,
                f"model.n_embd is {self.n_embd}, not divisible by model.n_head {self.n_head}; "
                f"take n_embd {self.n_head * max(1, round(self.n_embd / self.n_head))} or give model.head_dim",
            )
            set_(self, "head_dim", self.n_embd // self.n_head)
        set_(self, "n_kv_head", self.n_kv_head or self.n_head)
        set_(self, "n_ff", self.n_ff or 4 * self.n_embd)
        require(
            self.n_head % self.n_kv_head == 0,
            f"model.n_head is {self.n_head}, not divisible by model.n_kv_head {self.n_kv_head}; take a divisor of n_head",
        )
        if self.position == "rope":
            require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; rope turns pairs, so it must be even")
        else:
            require(self.rope_theta == 10_000.0, "model.rope_theta has no effect with position=learned; leave it out")
        require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; it must be in [0, 1)")
        require(self.norm_eps > 0, f"model.norm_eps is {self.norm_eps}; it must be above 0")
        require(self.rope_theta > 0, f"model.rope_theta is {self.rope_theta}; it must be above 0")


@dataclass(frozen=True)
class DataConfig:
    """Which tokens a text becomes and which of them are held out."""

    tokenizer: Literal["char", "bpe"] = "char"
    """one token a character, or byte-level byte-pair encoding trained on the text"""
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
        if self.tokenizer == "char":
            require(self.vocab_size == 0, f"data.vocab_size {self.vocab_size} has no effect with tokenizer=char")
        else:
            object.__setattr__(self, "vocab_size", self.vocab_size or 4096)
            require(self.vocab_size >= 257, f"data.vocab_size is {self.vocab_size}; bytes and end-of-text need 257")
            require(self.unknown == "error", "data.unknown has no effect with tokenizer=bpe: bytes spell everything")


@dataclass(frozen=True)
class TrainConfig:
    """How the weights are found: batches, optimizer, schedule, precision, and what to keep."""

    steps: int = 1000
    """updates of the weights"""
    micro_batch: int = 32
    """sequences in one forward pass on one device"""
    accumulate: int = 1
    """forward passes an update"""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon (Jordan 2024) on the hidden matrices and AdamW on the rest, or AdamW on all"""
    lr: float = 3e-3
    """peak learning rate of AdamW"""
    embed_lr: float = 0.0
    """peak learning rate of the token and position tables; 0 takes lr"""
    muon_lr: float = 0.02
    """peak learning rate of Muon; only with optimizer=muon"""
    muon_momentum: float = 0.95
    """decay of Muon's momentum; only with optimizer=muon"""
    beta1: float = 0.9
    """AdamW: decay of the gradient's mean"""
    beta2: float = 0.95
    """AdamW: decay of the gradient's square"""
    weight_decay: float = 0.0
    """decoupled decay of matrices and embeddings; never of vectors"""
    grad_clip: float = 1.0
    """largest norm of the gradient; 0: off"""
    warmup_steps: int = 20
    """updates in which the rate rises from 0"""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "linear"
    """after warm-up: half a cosine, a line, constant then a line (warm-up-stable-decay), or constant"""
    lr_floor: float = 0.0
    """the rate's last value as a share of its peak"""
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
    kernels: Literal["auto", "off"] = "auto"
    """fused forms of the blocks where kobza has them for this device and model"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto compiles only where it will pay for itself"""

    def __post_init__(self) -> None:
        check_types(self, "train.")
        for name in ("steps", "micro_batch", "accumulate", "eval_interval", "keep"):
            require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "muon_lr"):
            require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; it must be above 0")
        at_least_0 = ("weight_decay", "grad_clip", "warmup_steps", "eval_tokens", "checkpoint_interval", "patience")
        for name in (*at_least_0, "embed_lr", "stop_at"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("beta1", "beta2", "muon_momentum"):
            require(0 <= getattr(self, name) < 1, f"train.{name} is {getattr(self, name)}; it must be in [0, 1)")
        require(0 <= self.lr_floor <= 1, f"train.lr_floor is {self.lr_floor}; it is a share of lr, in [0, 1]")
        require(0 < self.decay_fraction <= 1, f"train.decay_fraction is {self.decay_fraction}; it must be in (0, 1]")


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


SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}


def from_dict(cls: type, values: dict[str, Any], where: str) -> Any:
    """A dataclass from a dict; an unknown key or a value of the wrong type is refused. `where` names the source."""
    check_keys(cls, values, where)
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    for key, value in values.items():
        _check_type(f"{where}: {key}", value, types[key])
    return cls(**values)


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
        require(key in known, f"{where}: unknown key {key!r}{nearest(key, known)}")


def run_from_dict(values: dict[str, Any], where: str) -> RunConfig:
    """A RunConfig from {"model": {...}, "data": {...}, "train": {...}, "seed": n}; missing parts take defaults."""
    check_sections(values, where)
    parts = {name: from_dict(cls, values.get(name, {}), f"{where} [{name}]") for name, cls in SECTIONS.items()}
    return RunConfig(**parts, seed=values.get("seed", 0))


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of any of these dataclasses."""
    return dataclasses.asdict(config)


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

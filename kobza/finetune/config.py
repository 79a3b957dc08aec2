"""The nouns of fine-tuning beside TrainConfig: what of the model learns (MethodConfig), of which rows (RowsConfig), towards what
(ObjectiveConfig), by which model and whose words (Source); together a TuneConfig.

Checked when made, as those of kobza/config.py; a setting without effect is refused. Nothing heavy is imported: `kobza --help`
reads this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from kobza.config import TrainConfig, check_keys, check_types, from_dict, require


@dataclass(frozen=True)
class MethodConfig:
    """What of the model learns, and how the rest of it is kept."""

    method: Literal["lora", "full", "head"] = "lora"
    """lora: small matrices beside weights that stay (Hu et al. 2021); full: every weight; head: the token table and the head"""
    rank: int = 16
    """inner width of LoRA's matrices"""
    alpha: float = 32.0
    """LoRA's matrices count alpha / rank times"""
    rslora: bool = False
    """alpha / sqrt(rank) in its place, so that ranks compare (Kalajdzievski 2023)"""
    dora: bool = False
    """learn the length of each matrix row apart from its direction (Liu et al. 2024)"""
    dropout: float = 0.0
    """share of a LoRA matrix's inputs left out while training"""
    targets: str = "*_proj"
    """modules that get LoRA matrices, patterns by commas: "q_proj,v_proj", "blocks.0.*" """
    embeddings: bool = False
    """learn the token table and the head besides, at train.embed_lr and train.head_lr"""
    quantize: Literal["none", "nf4"] = "none"
    """keep the weights that stay in 4 bits (Dettmers et al. 2023)"""
    checkpointing: Literal["off", "on", "offload"] = "off"
    """keep only each block's input for the backward pass and compute the rest again; offload: keep those in the host's memory"""
    eight_bit: bool = False
    """keep the optimizer's state in 8 bits (Dettmers et al. 2022)"""

    def __post_init__(self) -> None:
        check_types(self, "--")
        require(self.rank > 0, f"--rank is {self.rank}; it must be at least 1")
        require(self.alpha > 0, f"--alpha is {self.alpha}; it must be above 0, twice the rank is usual")
        require(0 <= self.dropout < 1, f"--dropout is {self.dropout}; it must be in [0, 1)")
        if self.method != "lora":
            for name in ("rank", "alpha", "rslora", "dora", "dropout", "targets", "embeddings", "quantize"):
                refuse_idle(self, name, f"with --method {self.method}")


@dataclass(frozen=True)
class RowsConfig:
    """How conversations become rows of ids, and which of them are held out."""

    max_len: int = 0
    """tokens of a row at most, what is longer is cut at its end; 0: the model's context, at most 1,024"""
    learn: Literal["answers", "last", "all"] = "answers"
    """targets: every answer, the last one, or all tokens"""
    reasoning: Literal["learned", "masked"] = "learned"
    """whether the reasoning within an answer is a target"""
    packing: bool = False
    """fill each line of a batch, of max_len tokens, with several rows, each blind to the others; off: a row a line, padded"""
    val_fraction: float = 0.1
    """share of the examples held out"""
    group: str = ""
    """a column: rows that share it stay on one side of the split"""
    stratify: str = ""
    """a column: its values keep their shares on both sides of the split"""
    epochs: float = 3.0
    """passes over the rows; 0: train.steps says how long"""
    turns: int = 1
    """questions and answers joined into one conversation"""

    def __post_init__(self) -> None:
        check_types(self, "--")
        good = self.max_len == 0 or self.max_len > 1
        require(good, f"--max-len is {self.max_len}; it must be at least 2, or 0 for the model's own")
        require(0 < self.val_fraction < 1, f"--val-fraction is {self.val_fraction}; it must be between 0 and 1")
        require(self.epochs >= 0, f"--epochs is {self.epochs}; it must not be negative")
        require(self.turns > 0, f"--turns is {self.turns}; it must be at least 1")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised over the rows."""

    objective: Literal["sft", "dpo", "orpo", "kto", "grpo", "distill"] = "sft"
    """sft: the answer's next tokens; dpo, orpo, kto: better answers over worse; grpo: a reward's; distill: a teacher's"""
    beta: float = 0.1
    """dpo, kto, grpo: how dearly moving away from the model as it was is paid for; orpo: weight of the preference"""
    teacher: str = ""
    """distill: the model whose distribution is learned"""
    temperature: float = 1.0
    """distill, grpo: of the distributions, or of the draws"""
    reward: str = ""
    """grpo: what an answer is measured by, e.g. "answer,format" """
    group_size: int = 8
    """grpo: answers drawn to each question"""
    answer_tokens: int = 64
    """grpo: tokens of a drawn answer at most"""

    def __post_init__(self) -> None:
        check_types(self, "--")
        what = f"with --objective {self.objective}"
        require(self.beta >= 0, f"--beta is {self.beta}; it must not be negative")
        require(self.temperature > 0, f"--temperature is {self.temperature}; it must be above 0")
        if self.objective in ("sft", "distill"):
            refuse_idle(self, "beta", what)
        if self.objective not in ("distill", "grpo"):
            refuse_idle(self, "temperature", what)
        if self.objective != "grpo":
            for name in ("reward", "group_size", "answer_tokens"):
                refuse_idle(self, name, what)
        if self.objective != "distill":
            refuse_idle(self, "teacher", what)
        require(
            self.objective != "distill" or bool(self.teacher), "--objective distill wants --teacher, a model's name"
        )
        require(self.objective != "grpo" or bool(self.reward), "--objective grpo wants --reward, e.g. answer,format")
        require(
            self.group_size > 1, f"--group-size is {self.group_size}; answers are compared, so it must be at least 2"
        )


@dataclass(frozen=True)
class Source:
    """Whose words are learned, and by which model."""

    model: str = ""
    """a pulled model's name, or a run's folder"""
    data: str = ""
    """the file"""
    prompt: str = ""
    """of a table: the question, with {column} in it"""
    answer: str = ""
    """of a table: the answer, with {column} in it"""
    system: str = ""
    """what the model is told before the first turn"""
    template: str = ""
    """a file with two turns of example, or a Jinja chat template, in place of the model's own"""
    add_tokens: str = ""
    """special tokens that the model had not, by commas"""


# Settings of a training from scratch that a tuning has no use for
IDLE = (
    "label_smoothing",
    "z_loss",
    "min_context",
    "ahead_weight",
    "embeddings",
    "eval_tokens",
    "fp32_parts",
    "compile",
)


@dataclass(frozen=True)
class TuneConfig:
    """Everything that decides a tuning: as config.toml of its folder has it."""

    source: Source = field(default_factory=Source)
    method: MethodConfig = field(default_factory=MethodConfig)
    rows: RowsConfig = field(default_factory=RowsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        require(type(self.seed) is int and 0 <= self.seed < 2**63, f"--seed is {self.seed!r}; it must be in [0, 2**63)")
        start = TrainConfig()
        for name in IDLE:
            value = getattr(self.train, name)
            idle = f"--train.{name.replace('_', '-')} {value} has no effect in a tuning; leave it out"
            require(value == getattr(start, name), idle)
        frozen = self.method.method == "lora" and not self.method.embeddings
        alike = (
            "--add-tokens: the table is frozen, so new tokens would stay alike; add --embeddings, or take --method full"
        )
        require(not (self.source.add_tokens and frozen), alike)
        paired = self.objective.objective not in ("sft", "distill")
        what = f"with --objective {self.objective.objective}"
        require(not (paired and self.rows.packing), f"--packing has no effect {what}; leave it out")


SECTIONS = {
    "source": Source,
    "method": MethodConfig,
    "rows": RowsConfig,
    "objective": ObjectiveConfig,
    "train": TrainConfig,
}


def tune_from_dict(values: dict[str, Any], where: str) -> TuneConfig:
    """A TuneConfig from {"source": {...}, "method": {...}, ..., "seed": n}; missing parts take defaults."""
    check_keys(TuneConfig, values, where)
    parts = {name: from_dict(cls, values.get(name, {}), f"{where} [{name}]") for name, cls in SECTIONS.items()}
    return TuneConfig(**parts, seed=values.get("seed", 0))


def refuse_idle(config: Any, name: str, what: str) -> None:
    """Refuse a setting that is not at its default where it has no effect."""
    default = next(f.default for f in fields(config) if f.name == name)
    value = getattr(config, name)
    require(value == default, f"--{name.replace('_', '-')} {value} has no effect {what}; leave it out")

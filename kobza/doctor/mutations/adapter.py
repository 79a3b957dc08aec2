"""Tiny base models with LoRA adapters and merges, clean and each with one bug, written as transformers and PEFT write them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kobza.doctor.files.adapter import Adapter, open_
from kobza.doctor.mutations.proof import Control, Mutation

Arrays = dict[str, np.ndarray]
WIDTH, INNER, VOCAB, LAYERS = 64, 96, 80, 2
SPLIT = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
JOINED = {"self_attn.qkv_proj": (3 * WIDTH, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
CONV = {"attn.c_attn": (3 * WIDTH, WIDTH), "attn.c_proj": (WIDTH, WIDTH), "mlp.c_fc": (INNER, WIDTH)}


@dataclass
class Case:
    """A base, its adapter and how they are merged; a bug changes one of them before they are written."""

    seed: int = 0
    dtype: str = "fp32"
    linears: dict[str, tuple[int, int]] = field(default_factory=lambda: SPLIT)
    layer: str = "model.layers.{}."
    targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")
    tied: bool = False
    turned: bool = False
    r: int = 8
    alpha: float = 24.0
    rslora: bool = False
    change: Callable[[Case], None] = lambda case: None  # to what is written
    times: Callable[[Case], float] = lambda case: case.scale  # R is added so many times
    grid: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    base: Arrays = field(default_factory=dict)
    factors: Arrays = field(default_factory=dict)
    merged: Arrays = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def write(self, folder: Path) -> Adapter:
        """The three folders, opened."""
        self.draw()
        self.merge()
        self.change(self)
        place = {name: folder / name for name in ("base", "adapter", "merged")}
        for path in place.values():
            path.mkdir()
        save(place["base"] / "model.safetensors", self.base, self.dtype)
        save(place["merged"] / "model.safetensors", self.merged, self.dtype)
        save(place["adapter"] / "adapter_model.safetensors", self.factors, "fp32")
        base = {"model_type": "llama", "hidden_size": WIDTH, "vocab_size": VOCAB, "tie_word_embeddings": self.tied}
        (place["base"] / "config.json").write_text(json.dumps(base))
        config = {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": self.alpha,
            "use_rslora": self.rslora,
            "target_modules": list(self.targets),
        }
        (place["adapter"] / "adapter_config.json").write_text(
            json.dumps(config | {"fan_in_fan_out": self.turned} | self.config)
        )
        for name, content in self.files.items():
            (place["adapter"] / name).write_text(json.dumps(content))
        return open_(place["base"], place["adapter"], place["merged"])

    def draw(self) -> None:
        """Weights of 0.05, a delta of about a tenth of that."""
        rng = np.random.default_rng(self.seed)
        draw = lambda *shape, size=0.05: (size * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
        self.base["model.embed_tokens.weight"] = draw(VOCAB, WIDTH)
        for i in range(LAYERS):
            self.base[f"{self.layer.format(i)}input_layernorm.weight"] = 1 + draw(WIDTH)
            for name, (out, width) in self.linears.items():
                key = self.layer.format(i) + name
                weight = draw(out, width)
                self.base[f"{key}.weight"] = weight.T.copy() if self.turned else weight
                if name.endswith(self.targets):
                    self.pair(key, draw(self.r, width, size=1 / math.sqrt(width)), draw(out, self.r, size=0.005))
        if not self.tied:
            self.base["lm_head.weight"] = draw(VOCAB, WIDTH)
        self.base = {name: rounded(x, self.dtype) for name, x in self.base.items()}

    def pair(self, module: str, a: np.ndarray, b: np.ndarray) -> None:
        """Put a pair into the adapter."""
        self.factors[f"base_model.model.{module}.lora_A.weight"] = a
        self.factors[f"base_model.model.{module}.lora_B.weight"] = b

    def merge(self) -> None:
        """merged = base + times * B @ A."""
        self.merged = {name: x.copy() for name, x in self.base.items()}
        for name, a in self.factors.items():
            if ".lora_A." in name:
                key = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
                delta = self.times(self) * (self.factors[name.replace("_A.", "_B.")] @ a)
                if key in self.merged:
                    self.merged[key] = self.merged[key] + (delta.T if self.turned else delta)
        if self.grid:
            self.merged = {name: four_bits(x) if x.ndim == 2 else x for name, x in self.merged.items()}


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x in float32, as bf16 would keep it (to nearest, ties to even)."""
    if dtype != "bf16":
        return x
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def save(path: Path, arrays: Arrays, dtype: str) -> None:
    """A safetensors file, floats as F32 or BF16, which numpy lacks."""
    header, parts, at = {}, [], 0
    for name, x in arrays.items():
        low = dtype == "bf16"
        raw = (rounded(x, dtype).view(np.uint32) >> 16).astype("<u2").tobytes() if low else x.astype("<f4").tobytes()
        header[name] = {"dtype": "BF16" if low else "F32", "shape": list(x.shape), "data_offsets": [at, at + len(raw)]}
        parts, at = [*parts, raw], at + len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def four_bits(x: np.ndarray) -> np.ndarray:
    """x on the grid of Q4_0: 16 steps a block of 32."""
    blocks = x.reshape(-1, 32)
    top = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    d = np.where(top == 0, 1, top / -8)
    return ((np.clip(np.floor(blocks / d + 8.5), 0, 15) - 8) * d).reshape(x.shape).astype(np.float32)


# ---- bugs ----------------------------------------------------------------------------------------------------------


def first(case: Case, half: str) -> str:
    """The name of the adapter's first factor A or B."""
    return next(name for name in case.factors if f"lora_{half}" in name)


def zero_both(case: Case) -> None:
    """A and B of one module are zero."""
    name = first(case, "A")
    for half in (name, name.replace("_A.", "_B.")):
        case.factors[half] = np.zeros_like(case.factors[half])


def zero_b(case: Case) -> None:
    """B is zero everywhere: saved before the first step."""
    for name in case.factors:
        if "lora_B" in name:
            case.factors[name] = np.zeros_like(case.factors[name])
    case.merged = {name: x.copy() for name, x in case.base.items()}


def with_nan(case: Case) -> None:
    """A factor has a nan."""
    case.factors[first(case, "B")][0, 0] = np.nan


def rename_key(case: Case) -> None:
    """Keys of another version of the model."""
    case.factors = {name.replace("self_attn", "attention"): x for name, x in case.factors.items()}


def other_width(case: Case) -> None:
    """The adapter is of a wider base."""
    name = first(case, "A")
    case.factors[name] = np.concatenate([case.factors[name]] * 2, axis=1)


def lose_b(case: Case) -> None:
    """One factor was not saved."""
    del case.factors[first(case, "B")]


def nothing_saved(case: Case) -> None:
    """The file has the norms and no pair."""
    case.factors = {"base_model.model.model.norm.weight": np.ones(WIDTH, np.float32)}


def head_not_saved(case: Case) -> None:
    """modules_to_save names what the file lacks."""
    case.config["modules_to_save"] = ["lm_head"]


def target_not_saved(case: Case) -> None:
    """target_modules names what the file lacks."""
    case.config["target_modules"] = [*case.targets, "up_proj"]


def token_beyond(case: Case) -> None:
    """A token was added, its row was not saved."""
    vocab = {f"t{i}": i for i in range(VOCAB)}
    case.files["tokenizer.json"] = {"model": {"vocab": vocab}, "added_tokens": [{"id": VOCAB, "content": "<|tool|>"}]}


def other_base(case: Case) -> None:
    """The merge was made from another base."""
    rng = np.random.default_rng(99)
    case.merged = {
        name: x + (0.02 * rng.standard_normal(x.shape)).astype(np.float32) for name, x in case.merged.items()
    }


def other_adapter(case: Case) -> None:
    """The merge of one module is of another adapter, on the right base."""
    rng = np.random.default_rng(5)
    name = next(name for name in case.merged if name.endswith("q_proj.weight"))
    case.merged[name] = case.merged[name] + (0.01 * rng.standard_normal(case.merged[name].shape)).astype(np.float32)


def wrong_rank(case: Case) -> None:
    """The config says half of the rank."""
    case.config["r"] = case.r // 2


def for_fused(case: Case) -> None:
    """Pairs for q and v, a base with qkv."""
    for i in range(LAYERS):
        for part in ("q_proj", "v_proj"):
            case.pair(
                f"model.layers.{i}.self_attn.{part}",
                np.ones((case.r, WIDTH), np.float32),
                np.ones((WIDTH, case.r), np.float32),
            )


def on_head(case: Case) -> None:
    """A pair on the head that is the table, merged into it."""
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((case.r, WIDTH)), 0.01 * rng.standard_normal((VOCAB, case.r))
    case.pair("lm_head", a.astype(np.float32), b.astype(np.float32))
    case.merged["model.embed_tokens.weight"] = (case.base["model.embed_tokens.weight"] + case.scale * b @ a).astype(
        np.float32
    )


def on_table(case: Case) -> None:
    """A pair on the embedding, whose factors lie the other way round."""
    rng = np.random.default_rng(case.seed)
    a, b = 0.1 * rng.standard_normal((case.r, VOCAB)), 0.01 * rng.standard_normal((WIDTH, case.r))
    name = "model.embed_tokens"
    case.factors[f"base_model.model.{name}.lora_embedding_A"] = a.astype(np.float32)
    case.factors[f"base_model.model.{name}.lora_embedding_B"] = b.astype(np.float32)
    case.merged[f"{name}.weight"] = (case.base[f"{name}.weight"] + case.scale * (b @ a).T).astype(np.float32)


def made(**settings: Any) -> Callable[[Path, int, str], Adapter]:
    """A maker of a case with those settings."""
    return lambda folder, seed, dtype: replace(Case(), seed=seed, dtype=dtype, **settings).write(folder)


FUSED_BASE = {"linears": JOINED, "targets": ("o_proj", "down_proj")}
GPT2 = {"linears": CONV, "layer": "h.{}.", "targets": ("c_proj", "c_fc"), "turned": True, "tied": True}
CONTROLS: tuple[Control, ...] = (
    Control("llama", made()),
    Control("gemma: tied", made(tied=True, alpha=16.0, r=16)),
    Control("qwen: rslora", made(rslora=True, r=4, alpha=6.0)),
    Control("phi: fused base, other targets", made(**FUSED_BASE)),
    Control("llama: a pair on the table", made(change=on_table)),
    Control("gpt2: Conv1D", made(**GPT2)),
)
MUTATIONS: tuple[Mutation, ...] = (
    Mutation("A1", "merged on a 4-bit grid", made(grid=True)),
    Mutation(
        "A1", "a delta lost in bf16", lambda folder, seed, _: Case(seed=seed, dtype="bf16", alpha=0.08).write(folder)
    ),
    Mutation("A2", "alpha, not alpha / r", made(times=lambda case: case.alpha)),
    Mutation("A2", "alpha / r for an rsLoRA adapter", made(rslora=True, r=16, times=lambda case: case.alpha / case.r)),
    Mutation("A2", "scale dropped", made(times=lambda case: 1.0)),
    Mutation("A2", "another rank in the config", made(change=wrong_rank)),
    Mutation("A3", "A and B zero", made(change=zero_both)),
    Mutation("A3", "never trained", made(change=zero_b)),
    Mutation("A3", "a nan", made(change=with_nan)),
    Mutation("A4", "merged twice", made(alpha=40.0, times=lambda case: 2 * case.scale)),
    Mutation("A4", "not merged", made(times=lambda case: 0.0)),
    Mutation("A5", "keys renamed", made(change=rename_key)),
    Mutation("A5", "no pairs", made(change=nothing_saved)),
    Mutation("A5", "a wider base", made(change=other_width)),
    Mutation("A5", "half a pair", made(change=lose_b)),
    Mutation("A5", "head not saved", made(change=head_not_saved)),
    Mutation("A5", "a target not saved", made(change=target_not_saved)),
    Mutation("A5", "a token beyond the table", made(change=token_beyond)),
    Mutation("A5", "merged from another base", made(change=other_base)),
    Mutation("A5", "merged with another adapter", made(change=other_adapter)),
    Mutation("A6", "split pairs on a fused base", made(**FUSED_BASE, change=for_fused)),
    Mutation("P3", "one pair on qkv_proj", made(linears=JOINED, targets=("qkv_proj", "o_proj"))),
    Mutation("A7", "a pair on the tied head", made(tied=True, change=on_head)),
)

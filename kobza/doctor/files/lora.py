"""A LoRA adapter in PEFT's files, its base and maybe a merge: opened, matched by name and measured.

adapter.py and merge.py judge.

Shapes: W (out, in), A (r, in), B (out, r); Conv1D of GPT-2 (fan_in_fan_out) keeps W as (in, out).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kobza.config import require
from kobza.doctor.finding import Skip
from kobza.formats.headers import TensorInfo, find_tensors, inside, read_header, read_json, read_numpy

Tensors = dict[str, tuple[Path, TensorInfo]]
PREFIX = "base_model.model."
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "Wqkv": ("q_proj", "k_proj", "v_proj"),
    "W_pack": ("q_proj", "k_proj", "v_proj"),
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
FLOATS = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8, "F64": 2.0**-53}  # half a unit in the last place, relative
ROUNDING = 0.42  # of it: the rms of rounding weights of any size; 0.0016 for bf16
GRID_VALUES = 16  # a block of 32 weights on a 4-bit grid has no more; free ones have 32 in float32, 28 or more in bf16
MOST_PAIRS = 48  # compared number by number; evenly over the layers where there are more


class Pair(NamedTuple):
    """The two factors of a module, and the base's weight that they change (None: none fits), which may be (B @ A) turned."""

    module: str
    a: TensorInfo
    b: TensorInfo
    weight: str | None
    turned: bool


@dataclass(frozen=True)
class Adapter:
    """What the checks take."""

    base: Path
    folder: Path
    merged: Path | None
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    base_tensors: Tensors
    merged_tensors: Tensors
    base_config: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """Where the factors are."""
        return self.folder / "adapter_model.safetensors"

    @cached_property
    def halves(self) -> dict[str, dict[str, str]]:
        """module -> {"A": name, "B": name} of its factors, as far as they are there."""
        found: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            for half in "AB":
                for mark in (f".lora_{half}.", f".lora_embedding_{half}"):
                    if mark in name:
                        module = name[: name.index(mark)].removeprefix(PREFIX)
                        found.setdefault(module, {})[half] = name
        return found

    @cached_property
    def pairs(self) -> list[Pair]:
        """Complete pairs, in the file's order."""
        made = []
        for module, halves in self.halves.items():
            if len(halves) == 2:
                a, b = self.tensors[halves["A"]], self.tensors[halves["B"]]
                table = "lora_embedding" in halves["A"]  # a table is (V, C), its A (r, V) and B (C, r)
                made.append(Pair(module, a, b, self.weight_of(module), self.turned or table))
        return made

    def weight_of(self, module: str) -> str | None:
        """The base's weight of a module, whatever stands before the name: files differ in "model." and "transformer."."""
        names = [f"{module}.weight", f"model.{module}.weight", f"transformer.{module}.weight"]
        parts = module.split(".")
        names += [".".join(parts[i:]) + ".weight" for i in (1, 2) if len(parts) > i + 1]
        return next((name for name in names if name in self.base_tensors), None)

    @property
    def turned(self) -> bool:
        """Whether the base's weights are (in, out)."""
        return self.config.get("fan_in_fan_out") is True

    def rank(self, module: str) -> float:
        """r of a module, by the config."""
        return self.setting(module, "r", "rank_pattern")

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r)."""
        r = self.rank(module)
        return self.setting(module, "lora_alpha", "alpha_pattern") / (
            math.sqrt(r) if self.config.get("use_rslora") is True else r
        )

    def setting(self, module: str, key: str, pattern: str) -> float:
        """A number of the config, or that of the first pattern which ends the module's name. Patterns are expressions of a
        stranger's: only plain names are followed."""
        patterns = self.config.get(pattern)
        for name, value in patterns.items() if isinstance(patterns, dict) else ():
            if not str(name).replace(".", "").replace("_", "").isalnum():
                raise Skip(f"{pattern} has an expression, {name[:40]!r}, which is not followed")
            if module == name or module.endswith(f".{name}"):
                require(
                    is_number(value),
                    f"{self.folder / 'adapter_config.json'}: {pattern} gives {name[:40]} {value!r:.40}; {NUMBER}",
                )
                return float(value)
        return float(self.config[key])

    def factors(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """A (r, in), B (out, r) in float32."""
        return read_numpy(self.file, pair.a).astype(np.float32), read_numpy(self.file, pair.b).astype(np.float32)

    def delta(self, pair: Pair) -> np.ndarray:
        """B @ A as the base keeps the weight."""
        a, b = self.factors(pair)
        product = b @ a
        return product.T if pair.turned else product

    @cached_property
    def fits(self) -> list[Fit]:
        """MERGED - BASE against scale * B @ A, for the pairs that fit. Measured once."""
        if self.merged is None:
            raise Skip("no merged model was named")
        if self.config.get("use_dora") is True:
            raise Skip("use_dora: the merge is more than scale * B @ A")
        pairs = [pair for pair in self.pairs if self.comparable(pair)]
        if not pairs:
            raise Skip("no pair has a float weight of its shape in both models")
        step = max(1, -(-len(pairs) // MOST_PAIRS))
        return [fit(self, pair) for pair in pairs[::step]]

    def comparable(self, pair: Pair) -> bool:
        """Whether base and merged have the weight, in floats and of the pair's shape."""
        if pair.weight is None or pair.weight not in self.merged_tensors or not whole(pair):
            return False
        base, merged = self.base_tensors[pair.weight][1], self.merged_tensors[pair.weight][1]
        return base.dtype in FLOATS and merged.dtype in FLOATS and base.shape == merged.shape == shape_of(pair)


def whole(pair: Pair) -> bool:
    """Whether A and B can be multiplied."""
    return len(pair.a.shape) == len(pair.b.shape) == 2 and pair.a.shape[0] == pair.b.shape[1]


def shape_of(pair: Pair) -> tuple[int, int]:
    """Shape of the weight that a pair changes."""
    shape = pair.b.shape[0], pair.a.shape[1]
    return (shape[1], shape[0]) if pair.turned else shape


NUMBER = "it must be a number above 0, at most a million"


def is_number(value: Any) -> bool:
    """Whether it can be a rank or an alpha."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e6


def open_(base: Path, adapter: Path, merged: Path | None = None) -> Adapter:
    """The folders of a base, an adapter and maybe a merge -> what the checks take."""
    for path, what in ((base, "base"), (adapter, "adapter"), *(((merged, "merged model"),) if merged else ())):
        require(path.is_dir(), f"{path}: no such folder; name the {what}'s")
    path = adapter / "adapter_config.json"
    require(path.is_file(), f"{adapter}: no adapter_config.json; name a folder that PEFT's save_pretrained wrote")
    config = read_json(inside(adapter, "adapter_config.json"))
    kind = config.get("peft_type")
    require(kind == "LORA", f"{path}: peft_type is {kind!r:.40}; only LORA is examined")
    for key in ("r", "lora_alpha"):
        require(is_number(config.get(key)), f"{path}: {key} is {config.get(key)!r:.40}; {NUMBER}")
    file = adapter / "adapter_model.safetensors"
    pickled = (adapter / "adapter_model.bin").exists() and not file.exists()
    require(
        not pickled,
        f"{adapter}: adapter_model.bin is a pickle, which runs code when read; save it again with "
        "safe_serialization=True",
    )
    require(file.is_file(), f"{adapter}: no adapter_model.safetensors; name a folder that PEFT's save_pretrained wrote")
    tensors = read_header(inside(adapter, file.name))
    base_config = read_json(inside(base, "config.json")) if (base / "config.json").is_file() else {}
    return Adapter(
        base, adapter, merged, config, tensors, find_tensors(base), find_tensors(merged) if merged else {}, base_config
    )


class Fit(NamedTuple):
    """MERGED - BASE = D beside R = B @ A. Sums add up over layers; `at`: where R is largest."""

    pair: Pair
    asked: float  # the config's scale
    dr: float
    rr: float
    rest: float  # |D - asked R| squared
    ww: float
    at: tuple[int, int]
    d_at: float
    r_at: float
    dtype: str
    on_grid: float  # share of blocks with few values

    @property
    def scale(self) -> float:
        """The least-squares s of D = s R."""
        return self.dr / self.rr if self.rr else 0.0

    @property
    def lost(self) -> float:
        """|D - asked R| / |asked R|."""
        return math.sqrt(self.rest / (self.asked**2 * self.rr)) if self.rr else 0.0

    @property
    def rounding(self) -> float:
        """What rounding the merged weight to its number format does to D, in parts of |asked R|."""
        return ROUNDING * FLOATS[self.dtype] * math.sqrt(self.ww / (self.asked**2 * self.rr)) if self.rr else 0.0


def fit(adapter: Adapter, pair: Pair) -> Fit:
    """The sums of one pair."""
    assert pair.weight is not None
    base, merged = (
        read_numpy(*t[pair.weight]).astype(np.float32) for t in (adapter.base_tensors, adapter.merged_tensors)
    )
    r, asked = adapter.delta(pair), adapter.scale(pair.module)
    d = merged - base
    at = tuple(int(i) for i in np.unravel_index(int(np.abs(r).argmax()), r.shape))
    formats = [t[pair.weight][1].dtype for t in (adapter.base_tensors, adapter.merged_tensors)]
    dtype = max(formats, key=lambda name: FLOATS[name])
    sums = dot(d, r), dot(r, r), dot(d - asked * r, d - asked * r), dot(base, base)
    return Fit(pair, asked, *sums, at, float(d[at]), float(r[at]), dtype, grid_share(merged))


def dot(x: np.ndarray, y: np.ndarray) -> float:
    """Sum of x * y; rows in float32, their sums in float64."""
    return float(np.einsum("ij,ij->i", x, y).sum(dtype=np.float64))


def grid_share(weight: np.ndarray) -> float:
    """Share of blocks of 32 neighbours in a row that take at most 16 values: what a 4-bit grid leaves."""
    rows, width = weight.shape
    if width < 32:
        return 0.0
    blocks = np.sort(weight[:: max(1, rows // 256), : width // 32 * 32].reshape(-1, 32), axis=1)
    return float(((np.diff(blocks, axis=1) != 0).sum(1) + 1 <= GRID_VALUES).mean())

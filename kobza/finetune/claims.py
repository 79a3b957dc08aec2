"""What the files of an adapter claim, held against the model they are to be put on, tensor by tensor and setting by setting.

They are a stranger's: what would change the function and is not computed here is refused by name, and so is each tensor without a
layer or of another shape. Nothing is loaded: names and shapes come out of the header.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from kobza.config import InputError, ModelConfig, require
from kobza.finetune.config import MethodConfig
from kobza.finetune.lora import TABLES
from kobza.finetune.places import Place
from kobza.formats.families import shown
from kobza.formats.headers import TensorInfo, inside, read_header, read_json
from kobza.model import GPT

SETTINGS, FILE, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}
FLOATS = ("F32", "F16", "BF16", "F64")
READ = "peft_type r lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora use_dora modules_to_save bias"
READ += " init_lora_weights ensure_weight_tying"
IDLE = (
    "auto_mapping peft_version base_model_name_or_path revision task_type inference_mode fan_in_fan_out target_modules"
)
IDLE += " exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size runtime_config eva_config"
DRAWN = (None, True, False, "gaussian", "orthogonal", "eva")  # the others, PiSSA's for one, start from a changed base


class Claims(NamedTuple):
    """An adapter's files, opened: adapter_config.json, and of the tensors their header and what stands in it besides."""

    path: Path
    said: dict[str, Any]
    header: dict[str, TensorInfo]
    own: dict[str, str]


def read_claims(folder: Path) -> Claims:
    """The files of a folder, which claim no more than they hold."""
    said = read_settings(folder)
    path = inside(folder, FILE)
    header = read_header(path)
    try:
        with safe_open(path, "pt") as file:
            return Claims(path, said, header, file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from None


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json, every setting either read here, without effect on a trained adapter, or at rest."""
    require(folder.is_dir(), f"{folder}: no such folder; name one that PEFT's save_pretrained or kobza wrote")
    require((folder / SETTINGS).is_file(), f"{folder}: no {SETTINGS}; name a folder that PEFT's save_pretrained wrote")
    path, said = folder / SETTINGS, read_json(inside(folder, SETTINGS), 4_000_000)
    pickled = (folder / "adapter_model.bin").exists() and not (folder / FILE).exists()
    require(not pickled, f"{folder}: adapter_model.bin is a pickle, which runs code when read; save it as safetensors")

    def check(key: str, good: bool, remedy: str) -> None:
        require(good, f"{path}: {key} is {said.get(key)!r:.60}; {remedy}")

    check("peft_type", said.get("peft_type") == "LORA", "kobza reads LORA alone")
    rank = said.get("r")
    check("r", isinstance(rank, int) and is_number(rank), "it must be a whole number above 0")
    check("lora_alpha", is_number(said.get("lora_alpha")), "it must be a number above 0, at most a million")
    check("bias", said.get("bias", "none") == "none", "kobza learns no biases beside an adapter; it must be none")
    dropout = said.get("lora_dropout", 0.0)
    check("lora_dropout", dropout == 0 or is_number(dropout), "it must be a number in [0, 1)")
    for key in ("use_rslora", "use_dora", "ensure_weight_tying"):
        check(key, said.get(key) in (None, True, False), "it must be true or false")
    drawn = said.get("init_lora_weights")
    plain = "its adapter belongs to a changed base; save it with path_initial_model_for_weight_conversion"
    check("init_lora_weights", isinstance(drawn, str | bool | None) and drawn in DRAWN, plain)
    kept = said.get("modules_to_save")
    check("modules_to_save", kept is None or strings(kept), "it must be a list of names")
    for key in ("rank_pattern", "alpha_pattern"):
        table = said.get(key) or {}
        check(
            key, isinstance(table, dict) and all(map(is_number, table.values())), "it must map names to numbers above 0"
        )
        odd = next((name for name in table if not name.replace(".", "").replace("_", "").isalnum()), None)
        require(odd is None, f"{path}: {key} has an expression, {odd!r:.60}; only plain names of modules are followed")
    for key, value in said.items():
        check(key, key in (*READ.split(), *IDLE.split()) or not value, "kobza does not compute that; leave it out")
    return said


def is_number(value: Any) -> bool:
    """Whether it can be a rank or an alpha."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e6


def strings(value: Any) -> bool:
    """Whether it is a list of names."""
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def check_base(claims: Claims, sha256: str) -> None:
    """Refuse an adapter that says it was trained on other weights than those of this hash."""
    theirs = claims.own.get("base_sha256")
    name, hash_ = shown(str(claims.said.get("base_model_name_or_path"))), shown(str(theirs)[:12])
    what = (
        f"{claims.path} was trained on {name}, whose weights have the sha256 {hash_}; this model's have {sha256[:12]}"
    )
    require(theirs is None or theirs == sha256, f"{what}; name the base it was trained on")


def sorted_names(claims: Claims) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """(module -> {"A", "B", "m": tensor}, module -> tensor of what is saved whole), by the names of the tensors."""
    pairs: dict[str, dict[str, str]] = {}
    tables: dict[str, str] = {}
    for name, info in claims.header.items():
        bare, where = name.removeprefix(PREFIX), f"{claims.path}: {bare_name(name)}"
        require(info.dtype in FLOATS, f"{where} is {info.dtype}; an adapter is {', '.join(FLOATS)}")
        end = next((end for end in PARTS if bare.endswith(end)), ".weight")
        good = bare.endswith(end) and (end in PARTS or ".lora_" not in bare)
        require(good, f"{where} has no place in an adapter as kobza computes it; is it another method's?")
        module = bare.removesuffix(end)
        kind, names = (PARTS[end], pairs.setdefault(module, {})) if end in PARTS else (module, tables)
        require(kind not in names, f"{where} is there twice, once as {shown(names.get(kind, ''))}; damaged or forged")
        names[kind] = name
    none = f"{claims.path}: no pair lora_A, lora_B among its {len(claims.header)} tensors; save the adapter again"
    require(bool(pairs), none)
    return pairs, tables


def bare_name(name: str) -> str:
    """A tensor's name as it is shown, without what PEFT puts before each."""
    return shown(name.removeprefix(PREFIX))


def check_pair(claims: Claims, model: GPT, config: ModelConfig, place: Place, names: Mapping[str, str]) -> None:
    """Refuse factors that are not of their module's widths or not of the config's rank. names: {"A", "B", "m": tensor}."""
    path, said, header, _ = claims
    where = f"{path}: {shown(place.theirs)}"
    for part in ("A", "B"):
        require(part in names, f"{where} has no lora_{part}; half an adapter, save it again")
    length, dora = "a" if "m" in names else "no", bool(said.get("use_dora"))
    require(
        (length == "a") == dora, f"{where} has {length} lora_magnitude_vector and use_dora is {dora}; save it again"
    )
    require(place.ours != ("embed",), f"{where} is a table; kobza learns tables whole (--embeddings)")
    tied = place.ours == ("lm_head",) and config.tied
    require(not tied, f"{where} is tied to the token table, which would change too; untie the base first")
    n_in = model.get_submodule(place.ours[0]).in_features
    n_out = sum(rows_of(model, config, name) for name in place.ours)
    a, b = header[names["A"]].shape, header[names["B"]].shape
    rank = a[0] if len(a) == 2 else 0
    wanted = {"A": (rank, n_in), "B": (n_out, b[1] if len(b) == 2 else rank), "m": (n_out,)}
    for part, name in names.items():
        shape = header[name].shape
        told = f"{path}: {bare_name(name)} is {shape} and this model wants {wanted[part]}"
        require(shape == wanted[part], f"{told}; name the base it was trained on")
    require(rank == b[1], f"{where}: lora_A has rank {rank} and its lora_B {b[1]}; damaged, save it again")
    given = setting(said, place.theirs, "r", "rank_pattern")
    require(rank == given, f"{where} has rank {rank} and {SETTINGS} says {given}; correct r or rank_pattern")


def rows_of(model: GPT, config: ModelConfig, name: str) -> int:
    """Outputs of a module as theirs has them, without rows of padding."""
    return config.vocab_size if name in TABLES else model.get_submodule(name).out_features


def check_tables(claims: Claims, config: ModelConfig, at: Mapping[str, Place], tables: Mapping[str, str]) -> None:
    """Refuse what is saved whole and is no table of this model's shape, and a table that is said to be there and is not."""
    path, said, header, _ = claims
    wanted = (config.vocab_size, config.n_embd)
    for module, name in tables.items():
        only = "kobza learns tables so, and layers by LoRA"
        require(at[module].ours[0] in TABLES, f"{path}: {shown(module)} is saved whole; {only}")
        shape = header[name].shape
        remedy = "add its tokens to the base first" if shape[1:] == wanted[1:] else "name the base it was trained on"
        require(shape == wanted, f"{path}: {bare_name(name)} is {shape} and this model's {wanted}; {remedy}")
    listed = said.get("modules_to_save") or []
    for word in listed:
        there = any(f".{module}".endswith(f".{word}") for module in tables)
        require(there, f"{path}: modules_to_save names {word!r:.60}, which is not in the file; save the adapter again")
    lone = next(iter(tables)) if config.tied and len(tables) == 1 and listed else ""
    own = not lone or at[lone].theirs == "embed"  # kobza's own names have a tied head once
    alone = f"{path}: it has {shown(lone)} alone, and the base's table and head are one"
    both = "train it with ensure_weight_tying=True, or with both in modules_to_save"
    require(own or bool(said.get("ensure_weight_tying")), f"{alone}; {both}")


def setting(said: Mapping[str, Any], module: str, key: str, pattern: str) -> float:
    """A number of the config, or that of the first of its patterns that ends the module's name."""
    table = said.get(pattern) or {}
    return next((value for name, value in table.items() if f".{module}".endswith(f".{name}")), said[key])


def scale_of(said: Mapping[str, Any], module: str) -> float:
    """alpha / r, or alpha / sqrt(r), of a module."""
    rank = setting(said, module, "r", "rank_pattern")
    return setting(said, module, "lora_alpha", "alpha_pattern") / (rank**0.5 if said.get("use_rslora") else rank)


def method_of(said: Mapping[str, Any], targets: str, embeddings: bool) -> MethodConfig:
    """The method that adapter_config.json describes."""
    return MethodConfig(
        rank=said["r"],
        alpha=float(said["lora_alpha"]),
        rslora=bool(said.get("use_rslora")),
        dora=bool(said.get("use_dora")),
        dropout=float(said.get("lora_dropout") or 0),
        targets=targets,
        embeddings=embeddings,
    )

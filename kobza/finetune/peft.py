"""Adapters as PEFT keeps them, both ways: adapter_config.json and adapter_model.safetensors under a family's own names.

Where a family joins q, k, v or gate, up in one matrix (Phi-3, GPT-2), ours are written as one adapter of that matrix: the A
stacked, the B as blocks on a diagonal, rank and alpha as many times as large, which rank_pattern and alpha_pattern say. One that
PEFT trained on the joined matrix comes apart the other way: each part gets all of A and its own rows of B. Both are exact, and so
are DoRA's lengths, which go by row. A model that no family computes is written under kobza's own names.

claims.py holds a file against the model before anything is loaded, places.py has the names. The hash of the base travels in the
header of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kobza.checkpoint import load_tensors, write_folder
from kobza.config import ModelConfig, require
from kobza.finetune.claims import (
    FILE,
    PREFIX,
    SETTINGS,
    check_base,
    check_pair,
    check_tables,
    method_of,
    read_claims,
    rows_of,
    scale_of,
    sorted_names,
)
from kobza.finetune.config import MethodConfig
from kobza.finetune.lora import TABLES, LoraLinear, adapters, row_lengths, targets_of, wrap
from kobza.finetune.places import Place, matched, places, shortest, stored_as, targets_by_name
from kobza.formats.layouts import Layout
from kobza.model import GPT


class Base(NamedTuple):
    """What an adapter was trained on: where it is from, `weights_hash` of it as it was, and its revision."""

    name: str
    sha256: str
    revision: str | None = None


class Factors(NamedTuple):
    """An adapter of one module: A (r, in), B (out, r), lengths (out,) or None, and the scale of B A."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    scale: float


def weights_hash(model: nn.Module) -> str:
    """sha256 over the names and the float32 bytes of the base's weights, in order of name: the same in whatever dtype they are
    kept, with an adapter or without. Take it before tables learn, rows are added or anything is rounded."""
    digest = hashlib.sha256()
    base = {name.replace(".base.", "."): p for name, p in model.named_parameters() if ".lora_" not in name}
    for name, parameter in sorted(base.items()):
        if not name.endswith(".magnitude"):
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            for piece in parameter.detach().flatten().split(2**24):  # no second model in float32
                digest.update(piece.float().cpu().numpy())
    return digest.hexdigest()


# ---- out -----------------------------------------------------------------------------------------------------------


def write_adapter(
    folder: Path,
    model: GPT,
    config: ModelConfig,
    method: MethodConfig,
    base: Base,
    hf: Mapping[str, Any] | None = None,
) -> None:
    """Write the two files of a model's adapter into a folder, such that PEFT puts it on the base in Hugging Face's files; tables
    that learn go along whole.

    hf: the base's config.json where it has one, since families that compute the same name their weights differently.
    """
    found = adapters(model)
    require(bool(found), "the model has no adapter to save; full weights are saved as a model")
    layout, prefix = stored_as(config, hf)
    known = places(config, layout, prefix)
    adapted = [place for place in known if any(name in found for name in place.ours)]
    pairs = {place.theirs: joined([model.get_submodule(name) for name in place.ours]) for place in adapted}
    tables = [place for place in known if place.ours[0] in TABLES] if method.embeddings else []
    tensors = {}
    for module, (a, b, magnitude, _) in pairs.items():
        rows = config.vocab_size if module.endswith("lm_head") else len(b)  # rows of padding are no tokens
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b[:rows]
        if magnitude is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude[:rows]
    for place in tables:
        weight = model.get_submodule(place.ours[0]).weight.detach()
        tensors[f"{PREFIX}{place.theirs}.weight"] = weight[: config.vocab_size].clone()  # a tied one is written twice
    said = settings_of(method, base, layout) | patterns(pairs, method)
    said["target_modules"] = shortest(pairs, [place.theirs for place in known if place.ours[0] != "embed"])
    said["modules_to_save"] = [place.theirs.rpartition(".")[2] for place in tables] or None

    own = {"format": "pt", "base_sha256": base.sha256, "targets": method.targets}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / FILE, own)
    (folder / SETTINGS).write_text(json.dumps(said, indent=1), encoding="utf-8")


def save_adapter(
    folder: Path,
    model: GPT,
    config: ModelConfig,
    method: MethodConfig,
    base: Base,
    hf: Mapping[str, Any] | None = None,
) -> None:
    """`write_adapter` into a new folder, which is there whole or not at all."""
    require(not folder.exists(), f"{folder} is there already; name another folder or remove it")
    write_folder(folder, lambda aside: write_adapter(aside, model, config, method, base, hf))


def settings_of(method: MethodConfig, base: Base, layout: Layout | None) -> dict[str, Any]:
    """adapter_config.json less what depends on the modules."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None if layout else {"base_model_class": "GPT", "parent_library": "kobza.model"},
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "r": method.rank,
        "lora_alpha": whole(method.alpha),
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "use_dora": method.dora,
        "fan_in_fan_out": layout is not None and layout.conv1d,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def joined(parts: list[nn.Module]) -> Factors:
    """The adapters of modules that lie under each other in one matrix as one adapter of it; a part may have none."""
    wrapped = [part for part in parts if isinstance(part, LoraLinear)]
    alike = len({(len(part.lora_a), part.scale) for part in wrapped}) == 1
    require(alike, "the base joins layers whose adapters differ in rank or alpha; give q, k, v (gate, up) the same")
    rank = sum(len(part.lora_a) for part in wrapped)
    a = torch.cat([part.lora_a.detach() for part in wrapped])
    rows, lengths, column = [], [], 0
    for part in parts:
        b = a.new_zeros(part.out_features, rank)
        if isinstance(part, LoraLinear):
            b[:, column : column + len(part.lora_a)] = part.lora_b.detach()
            column += len(part.lora_a)
        rows.append(b)
        if wrapped[0].magnitude is not None:  # a row that is not learned keeps the length it has
            lengths.append(
                part.magnitude.detach() if isinstance(part, LoraLinear) else row_lengths(part.weight.detach())
            )
    return Factors(a, torch.cat(rows), torch.cat(lengths) if lengths else None, wrapped[0].scale)


def patterns(pairs: Mapping[str, Factors], method: MethodConfig) -> dict[str, dict[str, float]]:
    """rank_pattern and alpha_pattern: what differs from the method's rank and alpha."""
    ranks, alphas = {}, {}
    for module, pair in pairs.items():
        rank = len(pair.a)
        alpha = pair.scale * (rank**0.5 if method.rslora else rank)
        ranks.setdefault(rank, []).append(module)
        same = math.isclose(alpha, method.alpha, rel_tol=1e-9)
        near = next((a for a in alphas if math.isclose(a, alpha, rel_tol=1e-9)), alpha)
        alphas.setdefault(method.alpha if same else near, []).append(module)
    return {
        f"{name}_pattern": {
            end: whole(value) for value in table if value != usual for end in shortest(table[value], pairs)
        }
        for name, table, usual in (("rank", ranks, method.rank), ("alpha", alphas, method.alpha))
    }


def whole(value: float) -> float:
    """A number as it is usually written: 16.0 -> 16; one off by the last bits of a division too."""
    near = round(value)
    return near if math.isclose(near, value, rel_tol=1e-9) else value


# ---- in ------------------------------------------------------------------------------------------------------------


def load_adapter(folder: Path, model: GPT, config: ModelConfig, sha256: str | None = None) -> MethodConfig:
    """Put an adapter of PEFT's files on its base -> the method that goes on training it. Nothing is touched before all fits.

    sha256: `weights_hash` of the base where the model is no longer it (quantised, with rows added); None: the model's.
    """
    claims = read_claims(Path(folder))
    path = claims.path
    check_base(claims, sha256 or weights_hash(model))
    pairs, tables = sorted_names(claims)
    at = matched(config, [*pairs, *tables], path)
    for module, names in pairs.items():
        check_pair(claims, model, config, at[module], names)
    check_tables(claims, config, at, tables)
    tensors = load_tensors(path)
    for name, tensor in tensors.items():
        require(bool(tensor.isfinite().all()), f"{path}: {name} holds what is not a finite number; take an earlier one")
    if config.tied and len(tables) == 2:
        same = torch.equal(*(tensors[name] for name in tables.values()))
        require(same, f"{path}: table and head differ and this base's are one; untie them first")
    learned = targets_of(model, claims.own["targets"]) if "targets" in claims.own else None
    found: dict[str, Factors] = {}
    for module, names in pairs.items():
        a, b, magnitude = (tensors.get(names.get(part, "")) for part in "ABm")
        outs = [rows_of(model, config, name) for name in at[module].ours]
        found |= parted(at[module], outs, Factors(a, b, magnitude, scale_of(claims.said, module)), learned)
    lost = ", ".join(sorted(set(found) ^ set(found if learned is None else learned))[:3])
    require(not lost, f"{path}: its tensors and its targets differ in {lost}; damaged, save it again")
    method = method_of(claims.said, claims.own.get("targets") or targets_by_name(config, found), bool(tables))
    fill(model, found, method, {at[module].ours[0]: tensors[name] for module, name in tables.items()})
    return method


def parted(
    place: Place, outs: list[int], pair: Factors, learned: Collection[str] | None
) -> Iterator[tuple[str, Factors]]:
    """The adapter of a matrix as those of its parts. learned: which parts we wrote as blocks; None: PEFT trained one for all."""
    lengths = [None] * len(outs) if pair.magnitude is None else pair.magnitude.split(outs)
    rows = dict(zip(place.ours, zip(pair.b.split(outs), lengths, strict=True), strict=True))
    if learned is None or len(place.ours) == 1:
        yield from ((name, Factors(pair.a, b, m, pair.scale)) for name, (b, m) in rows.items())
        return
    names = [name for name in place.ours if name in learned]
    other = f"{place.theirs}: its factors are not the blocks that its targets make; damaged, save the adapter again"
    require(bool(names) and len(pair.a) % len(names) == 0, other)
    rank = len(pair.a) // len(names)
    for name, (b, m) in rows.items():
        at = names.index(name) * rank if name in names else 0
        block = b[:, at : at + rank]
        require(b.count_nonzero() == (block.count_nonzero() if name in names else 0), other)
        if name in names:
            yield name, Factors(pair.a[at : at + rank], block, m, pair.scale)


@torch.no_grad()
def fill(model: GPT, found: Mapping[str, Factors], method: MethodConfig, tables: Mapping[str, Tensor]) -> None:
    """Wrap the model's modules and copy what is learned."""
    wrap(model, {name: (len(pair.a), pair.scale) for name, pair in found.items()}, method)
    for name, module in adapters(model).items():
        pair = found[name]
        module.lora_a.copy_(pair.a)
        module.lora_b[: len(pair.b)] = pair.b
        if module.magnitude is not None and pair.magnitude is not None:
            module.magnitude[: len(pair.b)] = pair.magnitude
    for name, table in tables.items():
        model.get_submodule(name).weight[: len(table)] = table

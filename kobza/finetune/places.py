"""Where a family's file has the linear layers and tables of a model, by module: what adapters are named by, and the patterns that
name several at once. The table itself is formats/families.py."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kobza.config import InputError, ModelConfig, nearest, require
from kobza.finetune.lora import TABLES
from kobza.formats.families import family_of, shown, text_part
from kobza.formats.layouts import FUSED, Layout, layout_by_names, shapes, slots
from kobza.formats.stock import config_to_hf


class Place(NamedTuple):
    """A module of theirs and those of ours that it holds, joined along the rows in this order."""

    theirs: str
    ours: tuple[str, ...]


def stored_as(config: ModelConfig, hf: Mapping[str, Any] | None) -> tuple[Layout | None, str]:
    """(layout, prefix) that a base's config.json means, else that of the stock model that computes the same, else (None, "")."""
    try:
        hf = config_to_hf(config) if hf is None else hf
    except InputError:
        return None, ""
    layout = family_of(text_part(hf))[1].layout
    return layout, "model.language_model." if "text_config" in hf else layout.prefixes[0]


def places(config: ModelConfig, layout: Layout | None, prefix: str) -> list[Place]:
    """The linear layers and tables of a model under a layout's names, or under our own; a tied head is a place of theirs too."""
    found = [Place(name, (name,)) for name in shapes(config)] if layout is None else slots(config, layout, prefix)
    made = []
    for theirs, ours, *_ in found:
        names = tuple(name.removesuffix(".weight") for name in ours)
        if theirs.endswith(".weight") and names[0].endswith(("_proj", *TABLES)):
            made.append(Place(theirs.removesuffix(".weight"), names))
    return made + ([Place(layout.head, ("lm_head",))] if config.tied and layout is not None else [])


def matched(config: ModelConfig, modules: list[str], path: Path) -> dict[str, Place]:
    """The place of each module of a file, whatever stands before its name."""
    own = any(module.startswith("blocks.") for module in modules)
    joined_ = any(module.endswith(("qkv_proj", "gate_up_proj")) for module in modules)
    layout = None if own else FUSED if joined_ else layout_by_names(config, ())
    known = [known_by(config, layout, prefix) for prefix in ([""] if layout is None else layout.prefixes)]
    best = max(known, key=lambda names: sum(module in names for module in modules))
    for module in modules:
        if module not in best:
            near = nearest(module, list(best))
            require(False, f"{path}: {shown(module)} is not in this model as a linear layer or a table{near}")
    return {module: best[module] for module in modules}


def known_by(config: ModelConfig, layout: Layout | None, prefix: str) -> dict[str, Place]:
    """The places by their names; none where the layout is that of another sort of model."""
    try:
        return {place.theirs: place for place in places(config, layout, prefix)}
    except InputError:
        return {}


def shortest(wanted: Collection[str], known: Collection[str]) -> list[str]:
    """Dotted ends that name all wanted modules and no other known. shortest({"h.0.attn.c", "h.1.attn.c"}, + {"h.0.mlp.c"}) ->
    ["attn.c"]"""
    ends: dict[str, bool] = {}  # whether all that end so are wanted
    for module in known:
        words = module.split(".")
        for i in range(len(words)):
            end = ".".join(words[i:])
            ends[end] = ends.get(end, True) and module in wanted
    found = set()
    for module in wanted:
        words = module.split(".")
        found.add(next(end for i in reversed(range(len(words))) if ends[end := ".".join(words[i:])]))
    return sorted(found)


def targets_by_name(config: ModelConfig, names: Collection[str]) -> str:
    """Patterns of --targets that mean these modules: leaves where all of a leaf are meant, else whole names."""
    linear = [name.removesuffix(".weight") for name in shapes(config) if name.endswith("_proj.weight")] + ["lm_head"]
    ends = shortest(names, linear)
    return ",".join(end if "." not in end or end in names else f"*.{end}" for end in ends)

"""Open a model that may be a tuning: generate, chat, eval and the rest read it by this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kobza.checkpoint import Loaded, find_checkpoint, load_checkpoint, read_config, verify
from kobza.config import InputError, require
from kobza.formats.template import ChatTemplate
from kobza.hub.store import find_model
from kobza.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from kobza.finetune.config import MethodConfig

ADAPTER = "adapter_model.safetensors"  # in a checkpoint that has it the weights are another's
QUANTISED = "quantised.safetensors"  # in a checkpoint that has it they are in few bits


def open_checkpoint(path: Path, device: torch.device | str = "cpu", unknown: str | None = None) -> Loaded:
    """The model behind a run, a checkpoint, a pulled model, or a tuning: its base with the adapter put into the weights. Of a
    quantised one the weights are plain again, of the numbers that were kept, so that all that works on a model works on it."""
    folder = find_checkpoint(find_model(path))
    if (folder / QUANTISED).exists():
        from kobza.quant.forms import dequantise
        from kobza.quant.saved import open_quantised

        loaded = open_quantised(folder, device, unknown)
        dequantise(loaded.model)
        return loaded
    if not (folder / ADAPTER).exists():
        return load_checkpoint(folder, device, unknown)
    from kobza.finetune.merge import dequantised, merge

    loaded, _ = open_adapter(folder, device, unknown)
    merge(loaded.model, weights=dequantised(loaded.model))
    return loaded


def open_adapter(folder: Path, device: torch.device | str, unknown: str | None = None) -> tuple[Loaded, MethodConfig]:
    """The base of an adapter's checkpoint with the adapter in place, not merged, and how it was made."""
    from kobza.finetune.peft import load_adapter
    from kobza.quant import nf4

    verify(folder, ADAPTER)
    run, provenance = read_config(folder / "config.json")
    place = find_base(provenance, folder)
    base = with_rows(load_checkpoint(place, device, unknown), provenance)
    tokenizer = load_tokenizer(folder / "tokenizer.json", unknown or run.data.unknown)
    if provenance.get("method", {}).get("quantize") == "nf4":  # beside those weights the adapter was learned
        nf4.use(base.model)
    method = load_adapter(folder, base.model, run.model, weights_digest(place))
    return Loaded(base.model.eval(), run, tokenizer, provenance, folder), method


def with_rows(base: Loaded, provenance: dict[str, Any]) -> Loaded:
    """A base with the token rows that a tuning began from: those never trained mended, those of new tokens added."""
    from kobza.finetune.tokens import add_tokens, mend_rows

    if provenance.get("mended"):
        mend_rows(base.model, provenance["mended"])
    added = provenance.get("added_tokens")
    return add_tokens(base, added) if added else base


def find_base(provenance: dict[str, Any], folder: Path) -> Path:
    """The checkpoint that an adapter was learned beside; another one of its name is refused."""
    base = provenance.get("base")
    base = base if isinstance(base, dict) else {}
    name, sha256 = str(base.get("name", "")), str(base.get("sha256", ""))
    require(bool(name and sha256), f"{folder}/config.json: it does not name its base; tune again")
    places = (Path(str(base.get("folder", ""))), find_model(Path(name)))
    path = next((place for place in places if (place / "manifest.json").is_file()), None)
    source = base.get("source") or name
    if path is None:
        raise InputError(f"{folder}: its base {name} is not here; bring it: kobza pull {source}")
    found = weights_digest(path)
    same = f"{folder}: learned beside a base of sha256 {sha256[:12]}, and {path} has {found[:12]}"
    require(found == sha256, f"{same}; bring the right one: kobza pull {source} --force, or tune again")
    return path


def check_whole(folder: Path) -> None:
    """Refuse a checkpoint whose weights are in few bits, where it is the weights that are wanted."""
    few = f"{folder}: its weights are in few bits (kobza quantize); take the model it was made from"
    require(not (folder / QUANTISED).exists(), few)


def weights_digest(folder: Path) -> str:
    """The sha256 of a checkpoint's weights, as its manifest has it."""
    check_whole(folder)
    try:
        return str(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["model.safetensors"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder}: not a checkpoint with weights of its own (manifest.json); name another") from None


def template_of(provenance: dict[str, Any], folder: Path) -> ChatTemplate | None:
    """The chat template that a model came with."""
    facts = provenance.get("chat_template")
    if facts is None:
        return None
    parts = [facts.get(key) for key in ("source", "bos", "eos")] if isinstance(facts, dict) else []
    specials = facts.get("specials", {}) if isinstance(facts, dict) else {}
    texts = [*parts, *specials.values()] if isinstance(specials, dict) else [None]
    good = bool(parts) and all(isinstance(text, str) for text in texts)
    require(good, f"{folder}/config.json: its chat_template is damaged; pull the model again with --force")
    return ChatTemplate(*parts, specials, name=f"{folder.name}'s chat template")

"""Pulled models by name: a checkpoint folder each under the user's cache. `find_model` lets every verb take such a name."""

import json
import re
from pathlib import Path
from typing import Any

from kobza.config import InputError, nearest, require
from kobza.hub.cache import default_cache

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
PLAIN = {
    "temperature": 0.0
}  # a model that names none is small here: its likeliest words make more sense than drawn ones
FILES = {".gguf": "llama.cpp's", ".pt": "nanoGPT's", ".bin": "llama2.c's"}  # files of weights
LISTED = 10_000  # models at most that are listed or looked through


def models_folder() -> Path:
    """Where pulled models lie."""
    return default_cache() / "models"


def check_name(name: str, why: str = "--name") -> str:
    """The name, if a folder may be called so on every system."""
    ok = NAME.fullmatch(name) is not None and ".." not in name and not name.endswith(".")
    require(ok, f"{why} {name!r}: take small letters, digits, . _ and -, a letter or digit first, at most 100")
    return name


def model_names(store: Path | None = None) -> list[str]:
    """Names of the whole models in the store, sorted."""
    folders = (store or models_folder()).glob("*/manifest.json")
    names = sorted(path.parent.name for path, _ in zip(folders, range(LISTED), strict=False))
    return [name for name in names if not name.startswith(".")]


def find_model(path: Path, store: Path | None = None) -> Path:
    """What a person names as a model: a run or checkpoint on disk is itself, a stored model's bare name is its folder.

    find_model(Path("smollm2")) -> ~/.cache/kobza/models/smollm2; a folder ./smollm2 wins over it.
    """
    name = str(path)
    require(not is_foreign(path), f"{path}: a model that is not kobza's yet; first: kobza pull {path}")
    if path.exists() or len(path.parts) != 1:
        return path
    folder = (store or models_folder()) / name
    if NAME.fullmatch(name) and (folder / "manifest.json").is_file():
        return folder
    close = nearest(name, model_names(store))
    require("did you mean" not in close, f"{name}: no such run, and no such pulled model{close}")
    return path


def is_foreign(path: Path) -> bool:
    """Whether a path is a model of others: a file of weights, or a folder in the Hugging Face layout."""
    if path.is_file():
        return path.suffix in FILES
    if not (path / "config.json").is_file() or (path / "manifest.json").exists():
        return False
    with open(path / "config.json", "rb") as file:
        return b'"model_type"' in file.read(1 << 20)


def provenance(folder: Path) -> dict[str, Any]:
    """What a checkpoint's config.json says of where the model comes from; nothing where it says nothing. No torch."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("provenance", {})
    except OSError:
        return {}
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{path}: not a kobza config; pull the model again with --force") from None
    return found if isinstance(found, dict) else {}


def sampling(folder: Path) -> dict[str, Any]:
    """How a chat with a model is sampled unless a person says otherwise; {} for a model without a chat template."""
    facts = provenance(folder) if (folder / "manifest.json").is_file() else {}
    return (facts.get("generation") or PLAIN) if facts.get("chat_template") else {}

"""A form -> a run: which settings there are and what they do, what a person chose, checked by kobza's own config.

The page and the command line share one truth: the fields are those of the dataclasses in config.py, their help is the text under
them there, and what is refused is refused by their checks, in their words. What is left is a line for `kobza train`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from kobza.config import (
    PRESETS,
    SECTIONS,
    InputError,
    RunConfig,
    preset,
    preset_names,
    require,
    run_from_dict,
    without_idle,
)
from kobza.run import free_folder
from kobza.studio.jobs import worker
from kobza.studio.runs_folder import preset_settings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LEFTOVERS = {".lock", "train.log", "job.json", "text.txt"}  # of a start that failed: its name is free again
FIRST = (  # the settings that a person turns first; the rest are folded away
    "train.steps model.n_layer model.n_embd model.n_head model.max_seq_len data.tokenizer train.lr train.micro_batch "
    "train.eval_interval"
).split()
CLAIM = Lock()  # two forms at the same moment must not take the same folder


@dataclass(frozen=True)
class Setting:
    """A field of a config, for a form: `kind` is int, float, str, bool or choice; `value` what the preset gives."""

    name: str
    kind: str
    choices: tuple[str, ...]
    help: str
    value: Any


@cache
def helps(cls: type) -> dict[str, str]:
    """The text under each field of a dataclass. helps(SampleConfig)["top_k"] -> "choose among the k likeliest; 0: all" """
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    found = {}
    for field, text in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[union-attr]
    return found


def settings(name: str) -> list[Setting]:
    """Every setting of a run, with the values of a preset; those that are turned first come first."""
    values, found = preset_settings(name), {}
    for section, cls in SECTIONS.items():
        for field in fields(cls):
            choices = tuple(re.findall(r'"([^"]*)"', str(field.type)))
            key, kind = f"{section}.{field.name}", "choice" if choices else str(field.type)
            found[key] = Setting(key, kind, choices, helps(cls)[field.name], values[key])
    return [found[key] for key in FIRST] + [setting for key, setting in found.items() if key not in FIRST]


def about(name: str) -> str:
    """What the head of a preset's file says of it."""
    lines = (PRESETS / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:end])


# ---- what was chosen -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """A run to be: its preset, the settings that differ from it, the config that comes of both."""

    preset: str
    changed: dict[str, Any]
    config: RunConfig

    def argv(self, text: Path | None, out: Path) -> list[str]:
        """The words after `kobza`; without a text it is the one that kobza brings."""
        words = ["train", *([str(text.absolute())] if text else []), "--preset", self.preset, "--out", str(out)]
        words += ["--seed", str(self.config.seed)] if self.config.seed else []
        for key, value in self.changed.items():
            said = str(value).lower() if isinstance(value, bool) else str(value)
            words.append(f"--{key.replace('_', '-')}={said}")
        return words


def read_start(form: Mapping[str, str]) -> Start:
    """The fields of a form -> the run that is meant. An empty field leaves what the preset gives."""
    name = form.get("preset", "")
    chosen = preset(name)
    known = {setting.name: setting for setting in settings(name)}
    given = {key: read_value(known[key], form[key].strip()) for key in known if form.get(key, "").strip()}
    changed = {key: value for key, value in given.items() if value != known[key].value}
    parts: dict[str, Any] = {}
    for section in SECTIONS:
        own = {key.partition(".")[2]: value for key, value in changed.items() if key.startswith(f"{section}.")}
        parts[section] = without_idle_of(section, chosen.get(section, {}), own) | own
    seed = form.get("seed", "").strip() or "0"
    require(seed.isdecimal() and len(seed) < 20, f"--seed is {seed[:40]!r}; it must be in [0, 2**63)")
    return Start(name, changed, run_from_dict(parts | {"seed": int(seed)}, f"preset {name}"))


def without_idle_of(section: str, weak: dict[str, Any], strong: dict[str, Any]) -> dict[str, Any]:
    """A preset's values less those that the given ones leave without effect; all of them where one is of the wrong type."""
    try:
        return without_idle(section, weak, strong)
    except (TypeError, ValueError):  # the config says which, under its name
        return weak


def read_value(setting: Setting, text: str) -> Any:
    """What was typed as the setting's type; text that is no such value stays text, and the config refuses it by name."""
    if setting.kind == "bool":
        return {"on": True, "off": False}.get(text, text)
    try:
        return {"int": int, "float": float}.get(setting.kind, str)(text)
    except (ValueError, OverflowError):
        return text[:80]


# ---- where it goes ---------------------------------------------------------------------------------------------------


def claim(root: Path, name: str, default: str) -> Path:
    """A new folder under the root for a run of this name; without a name the preset's, or preset-2, ..."""
    require(
        not name or bool(NAME.fullmatch(name)) and not name.endswith("."),
        f"the name {name[:80]!r} will not do; take letters, digits, . _ and -, at most 64, beginning with a letter or a digit",
    )
    with CLAIM:
        out = root / name if name else free_folder(root / default)
        try:
            taken = out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - LEFTOVERS)
            require(not taken and worker(out) is None, f"{out.name} is there already; take another name")
            for name in LEFTOVERS - {".lock"}:
                (out / name).unlink(missing_ok=True)
            out.mkdir(parents=True, exist_ok=True)
            (out / "train.log").touch(exist_ok=False)  # the second of two that came this far fails
        except OSError as error:
            raise InputError(f"{out}: cannot be made: {error.strerror}; see that {root} can be written") from None
    return out


def read_text(form: Mapping[str, str], upload: bytes | None, out: Path, most: int) -> Path | None:
    """The text that a form names, written into the run's folder where it came with the form; None: the one kobza brings."""
    source = form.get("source", "shakespeare")
    if source == "path":
        path = Path(form.get("path", "").strip()).expanduser()
        require(
            str(path) not in ("", ".") and path.exists(), f"no text at {str(path)[:200]!r}; give a file or a folder"
        )
        return path
    if source == "shakespeare":
        return None
    require(
        source in ("paste", "upload"), f"unknown source of text {source[:40]!r}; shakespeare, path, paste or upload"
    )
    content = (
        upload or b"" if source == "upload" else form.get("paste", "").replace("\r\n", "\n").encode("utf-8", "replace")
    )
    require(bool(content.strip()), "the text is empty; paste some, or choose a file")
    require(
        len(content) <= most,
        f"the text has {len(content):,} bytes and {most:,} is the most here; give its path instead",
    )
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the text is not UTF-8 (byte {error.start:,}); save it as UTF-8 plain text") from None
    path = out / "text.txt"
    path.write_bytes(content)
    return path


def presets() -> list[tuple[str, str]]:
    """(name, what it is) of every preset, the usual one first."""
    return [(name, about(name)) for name in sorted(preset_names(), key=lambda name: (name != "demo", name))]

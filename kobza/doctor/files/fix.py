"""`--fix`: a corrected copy of a folder's config and tokenizer files, for findings that carry a patch. The original is not
touched, and the weights are not copied: put them beside the copy once it convinces you."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kobza.config import require
from kobza.doctor.files.folder import TOKENIZER_BYTES
from kobza.doctor.finding import Finding
from kobza.formats.headers import inside, read_json

JSON = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
OTHERS = ("chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")
MOST_BYTES = 128_000_000


def write_fixed(folder: Path, findings: Iterable[Finding], out: Path) -> list[str]:
    """Write the copy into `out`, a new or empty folder -> a line a change: "config.json: head_dim 8, was absent (G9)".

    Nothing is written if no finding has a patch. Of two patches of one key the first counts, errors coming first.
    """
    folder, out = Path(folder), Path(out)
    require(folder.is_dir(), f"{folder} is not a folder; --fix mends the files of a folder")
    same = out.resolve().is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(out.resolve())
    require(not same, f"--fix {out} lies in the examined folder or holds it; give another: the original stays as it is")
    empty = not out.exists() or out.is_dir() and not any(out.iterdir())
    require(empty, f"--fix {out} exists and is not an empty folder; give a new one")
    changed: dict[str, dict[str, Any]] = {}
    lines, done = [], set()
    for finding in findings:
        patch = finding.patch
        if patch is None or patch["file"] not in JSON:
            continue
        file, key = patch["file"], tuple(patch["key"])
        if (file, key) in done:
            continue
        done.add((file, key))
        if file not in changed:
            there = (folder / file).exists()
            changed[file] = read_json(inside(folder, file), TOKENIZER_BYTES) if there else {}
        lines.append(f"{file}: {_apply(changed[file], key, patch)} ({finding.code})")
    if lines:
        _write(folder, changed, out)
    return lines


def _apply(content: dict[str, Any], key: tuple[str, ...], patch: dict[str, Any]) -> str:
    """Make one change in place; what was changed, in words."""
    for part in key[:-1]:
        inner = content.get(part)
        content[part] = content = inner if isinstance(inner, dict) else {}
    name = key[-1]
    before = _shown(content[name]) if name in content else "absent"
    if patch.get("drop"):
        content.pop(name, None)
        return f"{'.'.join(key)} taken out, was {before}"
    content[name] = patch["value"]
    return f"{'.'.join(key)} {_shown(patch['value'])}, was {before}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _write(folder: Path, changed: dict[str, dict[str, Any]], out: Path) -> None:
    """The changed files, and the others as they are."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (*JSON, *OTHERS):
        if name in changed:
            text = json.dumps(changed[name], indent=2, ensure_ascii=False) + "\n"
            (out / name).write_text(text, encoding="utf-8", newline="\n")
        elif (folder / name).is_file():
            source = inside(folder, name)
            size = source.stat().st_size
            require(size <= MOST_BYTES, f"{source} has {size:,} bytes, the limit is {MOST_BYTES:,}; not copied")
            shutil.copyfile(source, out / name)

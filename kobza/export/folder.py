"""A folder of artifacts that appears whole under its name, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from kobza.checkpoint import disk_error, sync
from kobza.config import InputError, require


@contextmanager
def whole_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """A new folder to fill, beside `out`. It is there under that name when the context ends well, and gone where it does not; a
    folder that `force` replaces stays until then. One that the context itself has moved away is left where it is."""
    there = out.exists() or out.is_symlink()
    require(force or not there, f"{out}: it is there already; name another --out, or give --force to replace it")
    ours = not there or (out.is_dir() and not out.is_symlink())
    require(ours, f"{out}: a file; --force replaces folders only, name another --out")
    own = there and ((out / "manifest.json").exists() or (out / "checkpoints").exists())
    require(not own, f"{out}: a run or a checkpoint of kobza, which --force does not replace; name another --out")
    aside, lock = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            shutil.rmtree(aside, ignore_errors=True)  # of one that was killed
            aside.mkdir()
            try:
                yield aside
                if aside.exists():
                    for path in [*aside.rglob("*"), aside]:
                        sync(path)
                    _replace(out, aside)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except Timeout:
        raise InputError(f"{out}: another export to it is under way; wait for it, or name another --out") from None
    except (OSError, SafetensorError) as error:
        raise disk_error(out, error, "nothing is left of it; free space") from error


def set_aside(aside: Path, out: Path) -> Path:
    """Keep a folder that must not have its name, with what tells why -> where: OUT.refused."""
    refused = out.with_name(f"{out.name}.refused")
    shutil.rmtree(refused, ignore_errors=True)
    os.rename(aside, refused)
    return refused


def _replace(out: Path, aside: Path) -> None:
    """Give the folder its name; an older one of that name goes away only after."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(aside, out)
    shutil.rmtree(old, ignore_errors=True)

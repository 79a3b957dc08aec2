"""The user's folder for what can be fetched or made again, and files in it that are whole or absent."""

import hashlib
import os
import tempfile
from pathlib import Path

import platformdirs

from kobza.hub.wheel import Unavailable


def default_cache() -> Path:
    """The folder for what can be fetched again, where this system keeps such things; the only place that asks."""
    return platformdirs.user_cache_path("kobza", appauthor=False)


def sha256(data: bytes) -> str:
    """Hexadecimal checksum of the data."""
    return hashlib.sha256(data).hexdigest()


def write_whole(path: Path, data: bytes) -> Path:
    """The path, holding all of the data or untouched: written aside, synced, renamed."""
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
            aside = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise Unavailable(f"cannot write {path}: {error.strerror}; free it or choose another cache folder") from None
    finally:
        if aside:
            aside.unlink(missing_ok=True)
    return path

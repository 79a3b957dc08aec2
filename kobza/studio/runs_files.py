"""Files that another process writes, or that anybody sent: opened without being held up, read up to a limit."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; a pipe, which would block for ever, and a device are an OSError."""
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is no file")
    return file


def read_some(path: Path, most: int) -> bytes:
    """The first bytes of a file, b"" where it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(most)
    except OSError:
        return b""


def written(path: Path) -> float:
    """A file's time of change; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

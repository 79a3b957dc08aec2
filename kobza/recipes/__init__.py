"""One file a verb, flat, top to bottom; the only place where rooms meet."""

import importlib
import os
from types import ModuleType


def recipe(name: str, spin: int = 1000) -> ModuleType:
    """The module kobza.recipes.<name>, imported now: a verb's heavy libraries come with it, and only when it is called.

    Threads that wait for each other spin so often. Beside a busy process the default makes a training step 7 times slower,
    1000 2 times; a server's steps are short, and 30000 makes them a fifth quicker (docs/LOG.md)."""
    os.environ.setdefault("GOMP_SPINCOUNT", str(spin))  # OpenMP reads it once, when torch is loaded
    return importlib.import_module(f"kobza.recipes.{name}")

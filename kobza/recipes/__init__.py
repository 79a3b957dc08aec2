"""One file a verb, flat, top to bottom; the only place where rooms meet."""

import importlib
import os
from types import ModuleType


def recipe(name: str) -> ModuleType:
    """The module kobza.recipes.<name>, imported now: a verb's heavy libraries come with it, and only when it is called."""
    # Waiting threads spin; beside a busy process the default spin makes a step 7 times slower, this one 2 times (docs/LOG.md).
    # The OpenMP library reads it once, when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    return importlib.import_module(f"kobza.recipes.{name}")

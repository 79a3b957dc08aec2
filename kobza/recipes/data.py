"""kobza data NAME: a known text or table -> its path on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from kobza.config import require
from kobza.hub.glosses import glosses
from kobza.hub.shakespeare import shakespeare
from kobza.hub.titanic import titanic


def main(name: str, out: Path | None, as_json: bool) -> int:
    """Fetch, clean and cache it, copy it if asked, print where it lies -> exit code."""
    require(out is None or not out.exists(), f"--out {out} is there; name a new file")
    path = shakespeare() if name == "shakespeare" else {"titanic": titanic, "glosses": glosses}[name]()[0]
    if out is not None:
        shutil.copyfile(path, out)
        path = out
    size = path.stat().st_size
    print(json.dumps({"name": name, "path": str(path), "bytes": size}) if as_json else f"{path}  {size:,} bytes")
    return 0

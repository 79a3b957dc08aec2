"""kobza data NAME: a known text -> its path on this machine."""

from __future__ import annotations

import json

from kobza.hub.shakespeare import shakespeare


def main(name: str, as_json: bool) -> int:
    """Fetch, clean and cache the text, print where it lies -> exit code."""
    path = {"shakespeare": shakespeare}[name]()
    size = path.stat().st_size
    print(json.dumps({"name": name, "path": str(path), "bytes": size}) if as_json else f"{path}  {size:,} bytes")
    return 0

"""kobza doctor run --live: a run that goes on -> what the doctor sees, as it first appears."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from kobza.doctor.training.run import follow
from kobza.recipes.doctor import print_finding


def main(path: Path, vocab_size: int, as_json: bool) -> int:
    """Print findings until the run ends or Ctrl-C -> exit code 1 where an error was proven."""
    console, proven = Console(highlight=False, markup=False), False
    if not as_json:
        console.print(f"kobza doctor run {path}: watching; Ctrl-C ends")
    try:
        for finding in follow(path, vocab_size=vocab_size):
            proven |= finding.severity == "error"
            if as_json:
                print(json.dumps(asdict(finding)), flush=True)  # one line each: a script reads as they come
            else:
                print_finding(console, finding)
    except KeyboardInterrupt:
        pass  # the one way to stop watching: what was found counts
    return int(proven)

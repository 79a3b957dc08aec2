"""kobza replay: the black box of a non-finite step -> the first bad tensor."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from kobza.doctor.training.blackbox import replay


def main(path: Path, as_json: bool) -> int:
    """Do the step again and name the first bad tensor -> exit code; 1 where it does not happen again."""
    told, finding = replay(path)
    if as_json:
        print(json.dumps({"told": told, "finding": asdict(finding)}))
    else:
        print(f"told      {told['what']} was {told['value']} at step {told['step']} in {told['precision']}")
        print(f"first bad {finding.kind} {finding.name}: {finding.text}")
    return 0 if finding.reproduced else 1

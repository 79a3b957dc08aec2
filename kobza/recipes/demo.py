"""kobza demo: train the default model unless it is there, then let it speak."""

from __future__ import annotations

from pathlib import Path

from kobza.config import RunConfig, SampleConfig
from kobza.recipes import generate, train
from kobza.run import is_finished

PROMPT = "ROMEO:"


def main(config: RunConfig, out: Path, device: str) -> int:
    """Make or finish the run in `out`, print a passage and what to try next -> exit code."""
    if is_finished(out, config.train.steps):
        print(f"{out}: trained already; delete the folder to train again\n")
    else:
        code = train.main([], config, out, "demo", resume=(out / "config.toml").exists(), device=device)
        if code:
            return code
    print()
    generate.main(out, PROMPT, 1, [], False, "skip", device, "auto", False, SampleConfig(tokens=400))
    print(f"\npicture   {out / 'loss.png'}\nreport    {out / 'report.html'}")
    print(f"next      kobza generate {out} --prompt 'JULIET:' --temperature 0.9 --seed 7\n          kobza chat {out}")
    print(f"          kobza describe {out}\n          kobza train YOUR_TEXT.txt --out runs/mine")
    return 0

"""kobza chat: lines from a person, continuations from a model, in one growing text."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from kobza.config import InputError, SampleConfig
from kobza.recipes.generate import check_stops, limits, open_model, write_text

PARAGRAPH = "\n\n"  # a model trained on plays ends a speech with an empty line


def main(path: Path, stop: list[str] | None, unknown: str, device: str, precision: str, config: SampleConfig) -> int:
    """Read lines until the input ends, writing a continuation after each -> exit code."""
    check_stops(stop or [])
    loaded = open_model(path, device, precision, unknown)
    limits(loaded, [], config)  # an alphabet that the model has not is refused before the first line
    stops = stop if stop else [PARAGRAPH]
    history, turn = "", 0
    print(f"{path}: {loaded.provenance.get('step', '?')} steps; your line is continued; an empty line or Ctrl-D ends")
    while True:
        line = ask()
        if not line:
            return 0
        history += line + "\n"
        try:
            ids = loaded.tokenizer.encode_prompt(history)
        except InputError as error:
            print(f"  {error}")
            continue
        answer = write_text(loaded, ids, stops, replace(config, seed=config.seed + turn), show)
        print()
        history, turn = f"{history}{answer}{stops[0]}", turn + 1


def ask() -> str:
    """A person's line; empty at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input: byte 0x{error.object[error.start]:02x} is not UTF-8; write in UTF-8"
        ) from None


def show(piece: str) -> None:
    """Print text as it comes."""
    sys.stdout.write(piece)
    sys.stdout.flush()

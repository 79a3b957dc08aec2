"""kobza chat: lines from a person, answers from a model.

A model with a chat template is talked to by turns: its template puts every message in place, its own tokens end an answer, and
when the context is full the oldest turns are forgotten. A model without one continues the text so far.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from kobza.checkpoint import Loaded
from kobza.config import InputError, SampleConfig, require
from kobza.formats.chat import ChatEncoder, Message
from kobza.recipes.generate import check_stops, limits, open_model, write_text
from kobza.recipes.tuned import template_of

PARAGRAPH = "\n\n"  # a model trained on plays ends a speech with an empty line


def main(
    path: Path,
    system: str | None,
    stop: list[str] | None,
    unknown: str,
    device: str,
    precision: str,
    config: SampleConfig,
) -> int:
    """Read lines until the input ends, writing an answer after each -> exit code."""
    check_stops(stop or [])
    loaded = open_model(path, device, precision, unknown)
    limits(loaded, [], config)  # an alphabet that the model has not is refused before the first line
    template = template_of(loaded.provenance, loaded.folder)
    if template is not None:
        return by_turns(loaded, path, ChatEncoder(template, loaded.tokenizer), system, stop or [], config)
    require(system is None, f"--system has no effect: {path} has no chat template; write it in your first line")
    return continued(loaded, path, stop or [PARAGRAPH], config)


# ---- by turns ------------------------------------------------------------------------------------------------------


def by_turns(
    loaded: Loaded, path: Path, encoder: ChatEncoder, system: str | None, stops: list[str], config: SampleConfig
) -> int:
    """Messages in the model's own template -> exit code."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    fitting(encoder, [*messages, {"role": "user", "content": "?"}], loaded, config)  # refused before the first line
    first, turn = len(messages), 0
    print(f"{path}: ask; an empty line or Ctrl-D ends")
    while True:
        line = ask()
        if not line:
            return 0
        asked = [*messages, {"role": "user", "content": line}]
        try:
            ids, asked, forgotten = fitting(encoder, asked, loaded, config)
        except InputError as error:
            print(f"  {error}")
            continue
        if forgotten:
            print(
                f"  (the context of {loaded.run.model.max_seq_len:,} tokens is full: {forgotten} oldest turns forgotten)"
            )
        answer = write_text(loaded, ids, stops, replace(config, seed=config.seed + turn), Trimmed())
        print()
        messages, turn = [*asked, {"role": "assistant", "content": answer.strip()}], turn + 1
        assert messages[:first] == asked[:first]


def fitting(
    encoder: ChatEncoder, messages: list[Message], loaded: Loaded, config: SampleConfig
) -> tuple[list[int], list[Message], int]:
    """Ids of a chat that leaves room for an answer, the messages left in it, and how many turns had to go: a turn is a person's
    message with the answer; the system's stays."""
    size = loaded.run.model.max_seq_len
    room = min(config.tokens, size // 4)
    head = [message for message in messages[:1] if message["role"] == "system"]
    rest, forgotten = messages[len(head) :], 0
    ids = encoder.encode(messages, add_generation_prompt=True)
    while len(ids) + room > size and len(rest) > 1:
        rest, forgotten = rest[2:], forgotten + 1
        ids = encoder.encode([*head, *rest], add_generation_prompt=True)
    fits = len(ids) + room <= size
    long = f"the chat has {len(ids):,} tokens with this line alone, and {size - room:,} fit beside an answer"
    require(fits, f"{long}; shorten the line{' or --system' if head else ''}")
    return ids, [*head, *rest], forgotten


class Trimmed:
    """Print an answer as it comes, less the white space before it."""

    def __init__(self) -> None:
        self.begun = False

    def __call__(self, piece: str) -> None:
        piece = piece if self.begun else piece.lstrip()
        self.begun = self.begun or bool(piece)
        show(piece)


# ---- one growing text ----------------------------------------------------------------------------------------------


def continued(loaded: Loaded, path: Path, stops: list[str], config: SampleConfig) -> int:
    """Lines that the model goes on from -> exit code."""
    history, turn = "", 0
    steps = loaded.provenance.get("step")
    trained = "" if steps is None else f"{steps} steps; "
    print(f"{path}: {trained}your line is continued; an empty line or Ctrl-D ends")
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

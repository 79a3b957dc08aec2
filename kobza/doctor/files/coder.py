"""A stranger's tokenizer.json in a process of its own, asked again and again: ids of a text, names of ids.

encoder.py is the other end; it can run away, ask for all memory or fall over, and this process only says so.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kobza.config import InputError, require

SECONDS = 20.0  # for an answer; Gemma 3's 33 MB are loaded in one


def command(library: str) -> list[str]:
    """What starts encoder.py with nothing but the library it needs."""
    spec = importlib.util.find_spec(library)
    require(spec is not None, f'{library} is not installed; pip install "kobza[sentencepiece]"')
    home = str(Path(str(spec.origin)).parents[1])  # type: ignore[union-attr]
    return [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("encoder.py")), home]


class Coder:
    """The tokenizer of a file. It begins to load at once; the first question waits for it."""

    def __init__(self, file: Path):
        self.file = file
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command("tokenizers"), **pipe)  # type: ignore[call-overload]
        weakref.finalize(self, self.process.kill)
        self._send({"file": str(file), "serve": True})

    def ids(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text, with the tokens its post-processor adds or without."""
        return self._ask({"text": text, "special": special})["ids"]

    def names(self, ids: Sequence[int]) -> list[str]:
        """What the vocabulary calls the ids."""
        return [name or f"id {i}" for name, i in zip(self._ask({"ids": list(ids)})["names"], ids, strict=True)]

    def _send(self, request: dict[str, Any]) -> None:
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise InputError(f"{self.file}: the tokenizer's process has ended; no released one does that") from None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; after SECONDS the process is killed, and that is the answer."""
        clock = threading.Timer(SECONDS, self.process.kill)
        clock.start()
        try:
            self._send(request)
            line = self.process.stdout.readline()
        finally:
            clock.cancel()
        require(bool(line), f"{self.file}: no answer within {SECONDS:g} s, or its process ended; a pattern runs away")
        answer = json.loads(line)
        require("error" not in answer, f"{self.file}: the tokenizers library refuses it: {answer.get('error')}")
        return answer

"""Chat templates of other people: found beside a model, and rendered where they can do no harm.

A chat template is a program from a stranger. `ChatTemplate.render` sends it to a worker process (jinja_worker.py: no files, no
sockets, little memory), waits for `seconds` by the clock and kills the worker that has not answered; the next call starts
another. All templates of a process share one worker. What a template does wrong is one line of InputError, what it refuses to
render by its own `raise_exception` is a Refused.

`find_template` reads the template of a model's folder, a .jinja file, a .gguf or a Modelfile. The last is a Go template and
read by gotemplate.py; its GoTemplate has the same `render`.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kobza.config import InputError, require
from kobza.formats import headers
from kobza.formats.gotemplate import GoTemplate, read_modelfile

SECONDS = 2.0
START_SECONDS = 60.0  # for the worker itself, on a busy machine
MOST_CHARACTERS = 4_000_000  # of a rendered conversation
MOST_SOURCE = 1 << 20  # characters of a template: the longest released ones have about 20,000
MOST_REQUEST = 64 << 20
MOST_FILE = 64 << 20  # tokenizer_config.json with all its added tokens
SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Refused(InputError):
    """The template itself will not render this conversation: its raise_exception."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the special tokens it may write. A token that is "" is not defined to it, as in transformers.

    `trim` are trim_blocks and lstrip_blocks, True wherever chat templates are served. `now` (ISO) fixes what strftime_now says.
    """

    source: str
    bos: str = ""
    eos: str = ""
    specials: Mapping[str, str] = field(default_factory=dict)
    trim: bool = True
    now: str = ""
    seconds: float = SECONDS
    name: str = "chat template"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        **extra: Any,
    ) -> str:
        """The text of a conversation. messages: [{"role": "user", "content": "Hi"}, ...]; `extra` are further variables."""
        size = len(self.source)
        require(size <= MOST_SOURCE, f"{self.name}: {size:,} characters; a chat template has at most {MOST_SOURCE:,}")
        tokens = {**self.specials, "bos_token": self.bos, "eos_token": self.eos}
        context = {name: token for name, token in tokens.items() if token}
        context |= {"messages": list(messages), "tools": tools, "documents": None} | extra
        context["add_generation_prompt"] = add_generation_prompt
        request = {"source": self.source, "trim": self.trim, "now": self.now, "context": context}
        return self._answer(_worker().ask(request, self.seconds, self.name))

    def _answer(self, answer: dict[str, Any]) -> str:
        if isinstance(answer.get("text"), str):
            return answer["text"]
        line = f" line {answer['line']}" if isinstance(answer.get("line"), int) else ""
        where, message = f"{self.name}{line}", str(answer.get("error"))
        says = {
            "refusal": f"refuses this conversation: {message}",
            "syntax": f"not a Jinja template: {message}",
            "security": f"reaches out of its sandbox: {message}; do not use it",
            "excess": f"stopped: {message}",
            "memory": f"stopped: it takes more memory than a chat template may ({message})",
            "recursion": "stopped: it calls itself without end",
        }
        kind = str(answer.get("kind"))
        raise (Refused if kind == "refusal" else InputError)(f"{where}: {says.get(kind, message)}")


class Alarm:
    """Calls a function when its time has come, unless it is off by then. One lasting thread, which sleeps to the earliest time it
    was ever given: a threading.Timer starts a thread each time, a millisecond where a render takes a tenth."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due, self._wakes, self._ring = math.inf, math.inf, lambda: None
        threading.Thread(target=self._watch, daemon=True).start()

    def set(self, seconds: float, ring: Callable[[], None]) -> None:
        """From now on."""
        with self._changed:
            self._due, self._ring = time.monotonic() + seconds, ring
            if self._due < self._wakes:
                self._changed.notify()

    def off(self) -> None:
        """No more; a call that has begun has ended when this returns."""
        with self._changed:
            self._due, self._ring = math.inf, lambda: None

    def _watch(self) -> None:
        with self._changed:
            while True:
                if self._due <= time.monotonic():
                    self._ring()
                    self._due = math.inf
                self._wakes = self._due
                left = self._due - time.monotonic()
                self._changed.wait(None if self._due == math.inf else max(0.0, left))


class Worker:
    """The process at the other end: started when first asked, killed when it is late, started again when asked again."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner, self._lock = 0, threading.Lock()

    def ask(self, request: dict[str, Any], seconds: float, name: str) -> dict[str, Any]:
        """The worker's answer to a request; InputError where none comes in time."""
        try:
            line = json.dumps(request | {"seconds": seconds, "characters": MOST_CHARACTERS})
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{name}: the messages are not plain JSON: {error}") from None
        require(
            len(line) <= MOST_REQUEST, f"{name}: {len(line):,} bytes of messages; at most {MOST_REQUEST:,} are rendered"
        )
        with self._lock:
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            text, late = self._exchange(line, seconds)
            try:
                answer = json.loads(text)
            except (ValueError, RecursionError):
                answer = None
            if late or not isinstance(answer, dict):
                self.close()
        if isinstance(answer, dict):
            return answer
        why = f"stopped after {seconds:g} s: it does not come to an end" if late else "it brought its process down"
        raise InputError(f"{name}: {why}; no released chat template does that")

    def _exchange(self, line: str, seconds: float) -> tuple[str, bool]:
        """A line there, a line back, and whether the clock ran out: killing the process is what ends a read on any system."""
        process, late = self._process, threading.Event()
        assert process is not None and process.stdin is not None and process.stdout is not None

        def end() -> None:
            late.set()
            process.kill()

        text = ""
        self._alarm.set(seconds, end)
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            text = process.stdout.readline(12 * MOST_CHARACTERS + 1000).decode("ascii", "replace")
        except (OSError, ValueError):
            pass  # it is dead: no text
        finally:
            self._alarm.off()  # from here on `late` tells
        return text, late.is_set()

    def _start(self) -> None:
        if self._owner == os.getpid():
            self.close()
        found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
        require(all(found), "chat templates are rendered with jinja2, which is not installed; pip install jinja2")
        folders = [str(Path(str(spec.origin)).parents[1]) for spec in found if spec is not None]
        script = str(Path(__file__).with_name("jinja_worker.py"))
        pipe = subprocess.PIPE
        command = [sys.executable, "-I", "-S", "-B", script, *dict.fromkeys(folders)]
        if self._owner != os.getpid():  # a thread does not live on in a forked process
            self._alarm = Alarm()
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self._owner = os.getpid()
        ready, late = self._exchange("", START_SECONDS)
        if "ready" not in ready:
            self.close()
            raise InputError(f"the process that renders chat templates did not start{' in time' if late else ''}")

    def close(self) -> None:
        """End the process, if it runs and is ours."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            try:
                stream.close()  # type: ignore[union-attr]
            except OSError:
                pass  # what was not yet written to a dead process


@functools.cache
def _worker() -> Worker:
    worker = Worker()
    atexit.register(worker.close)
    return worker


# ---- where templates are found ---------------------------------------------------------------------------------------


def find_template(path: Path) -> ChatTemplate | GoTemplate | None:
    """The chat template of a model's folder (chat_template.jinja before tokenizer_config.json), of a .jinja file, of a .gguf,
    or of a Modelfile; None where there is none."""
    require(path.exists(), f"{path}: no such file or folder")
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".gguf":
        return _of_gguf(path)
    if path.suffix in (".jinja", ".jinja2", ".j2"):
        return ChatTemplate(read_text(path, MOST_SOURCE * 4), name=path.name)
    if path.suffix == ".json":
        return _of_config(_object(path), path.name, {})
    return read_modelfile(path).template


def read_text(path: Path, most: int = MOST_FILE) -> str:
    """The text of a UTF-8 file of at most `most` bytes."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(most + 1)
        require(len(raw) <= most, f"{path}: more than {most:,} bytes; that is no file of this kind")
        return raw.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; convert it first") from None


def inside(folder: Path, name: str) -> Path | None:
    """The file `name` of a folder, None where there is none; a link that leads out of the folder is refused."""
    return headers.inside(folder, name) if (folder / name).exists() else None


def _object(path: Path | None) -> dict[str, Any]:
    """The object of a json file; {} where there is no file."""
    if path is None:
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON: {' '.join(str(error).split())}") from None
    require(isinstance(value, dict), f"{path}: a {type(value).__name__}, not an object")
    return value


def _of_folder(folder: Path) -> ChatTemplate | GoTemplate | None:
    config = _object(inside(folder, "tokenizer_config.json"))
    specials = _object(inside(folder, "special_tokens_map.json"))
    file = inside(folder, "chat_template.jinja")
    if file is not None:
        return _with_specials(read_text(file, MOST_SOURCE * 4), file.name, config, specials)
    found = _of_config(config, "tokenizer_config.json", specials)
    if found is None:
        found = _of_config(_object(inside(folder, "chat_template.json")), "chat_template.json", config | specials)
    if found is None and inside(folder, "Modelfile"):
        return read_modelfile(folder / "Modelfile").template
    return found


def _of_config(config: dict[str, Any], file: str, specials: dict[str, Any]) -> ChatTemplate | None:
    """The template of a tokenizer_config.json: a text, or a list of {"name", "template"} of which "default" is meant."""
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {str(t.get("name")): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default") or next(iter(named.values()), None)
    if source is None:
        return None
    require(isinstance(source, str), f"{file}:chat_template is a {type(source).__name__}; it must be a text")
    return _with_specials(source, f"{file}:chat_template", config, specials)


def _with_specials(source: str, name: str, config: dict[str, Any], specials: dict[str, Any]) -> ChatTemplate:
    tokens = {key: token_text(config.get(key) or specials.get(key)) for key in SPECIALS}
    rest = {key: token for key, token in tokens.items() if token}
    return ChatTemplate(source, tokens["bos_token"], tokens["eos_token"], rest, name=name)


def token_text(token: Any) -> str:
    """The text of a special token as a tokenizer_config.json has it: "<s>", {"content": "<s>", ...} or null."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _of_gguf(path: Path) -> ChatTemplate | None:
    from kobza.formats.gguf import read_gguf

    metadata = read_gguf(path).metadata
    source, tokens = metadata.get("tokenizer.chat_template"), metadata.get("tokenizer.ggml.tokens")
    if source is None:
        return None
    require(isinstance(source, str), f"{path}: tokenizer.chat_template is a {type(source).__name__}; it must be a text")

    def token(key: str) -> str:
        i = metadata.get(f"tokenizer.ggml.{key}_token_id")
        good = isinstance(i, int) and isinstance(tokens, list) and 0 <= i < len(tokens) and isinstance(tokens[i], str)
        return tokens[i] if good else ""

    return ChatTemplate(source, token("bos"), token("eos"), name=f"{path.name}:tokenizer.chat_template")

"""llama.cpp as an engine: its own server in a process of its own (llama_child.py), asked over the loopback.

A .gguf that is not what it says may abort llama.cpp or make it hang; whatever happens there is an EngineError here, with what
llama.cpp complained of. Nothing it prints reaches the terminal, and the process ends with this one.

Log-probabilities cost a request a position: the answer lists every token with the softmax of the raw logits (samplers and biases
act on a copy), and the prefix stays in llama.cpp's cache, so positions are asked in ascending order.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from kobza.export.proof.engine import EngineError, Message, check_ids, installed
from kobza.formats.gguf import read_gguf
from kobza.formats.template import Refused

START_SECONDS = 60.0  # on a busy machine; and the file is read
BYTES_PER_SECOND = 50e6  # of a slow disk
REQUEST_SECONDS = 120.0  # a thousand tokens of a 1B model on one slow core
FORCED = 1e6  # added to a logit: that token is said
STAMP = re.compile(r"^[\d.]+ [A-Z] ")
LISTED = re.compile(rb'"id":(\d+),.*?"logprob":(null|[-+.\de]+)')  # a third of the time that reading JSON takes
TELLING = re.compile("error|failed|abort|assert|invalid|unknown|missing", re.IGNORECASE)  # what went wrong


def open_llama_cpp(gguf: Path, n_ctx: int, lora: Path | None = None, seconds: float | None = None) -> LlamaCpp:
    """The engine of a .gguf, with an adapter beside it if one is given. EngineError where llama.cpp will not load them, or takes
    longer than `seconds` (by default what its size suggests)."""
    release, gguf = installed("xllamacpp"), Path(gguf)
    for path in (gguf, lora):
        if path is not None and not path.is_file():
            raise EngineError(f"{path}: no such file; name a .gguf")
    limit = START_SECONDS + gguf.stat().st_size / BYTES_PER_SECOND if seconds is None else seconds
    return LlamaCpp(gguf, _Child(gguf, n_ctx, lora, limit), f"llama.cpp of xllamacpp {release}")


class _Child:
    """The process, and questions to it: `ask("/tokenize", {...})`."""

    def __init__(self, gguf: Path, n_ctx: int, lora: Path | None, seconds: float) -> None:
        self._path, self._key = gguf, secrets.token_hex(16)
        asked = {"model": str(gguf.resolve()), "n_ctx": n_ctx, "n_threads": torch.get_num_threads(), "key": self._key}
        asked["lora"] = str(lora.resolve()) if lora else ""
        self._log = tempfile.TemporaryFile()
        script, pipe = str(Path(__file__).with_name("llama_child.py")), subprocess.PIPE
        command, environment = [sys.executable, "-P", script], os.environ | {"GGML_NO_BACKTRACE": "1"}
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, env=environment)
        try:
            ready = self._start(json.dumps(asked), seconds)
        except BaseException:
            self.close()
            raise
        self._address = ready["address"].removeprefix("http://")

    def _start(self, asked: str, seconds: float) -> dict[str, Any]:
        """The child's first line; killing it is what ends the wait for one on any system."""
        late = threading.Event()
        alarm = threading.Timer(seconds, lambda: (late.set(), self._process.kill()))
        alarm.start()
        line = b""
        try:
            self._process.stdin.write(asked.encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline(1 << 16)
        except OSError:
            pass  # it is dead: no line
        finally:
            alarm.cancel()
        if late.is_set():
            raise EngineError(f"llama.cpp had not loaded {self._path} after {seconds:g} s; it is damaged, or too large")
        if not line:
            raise EngineError(f"llama.cpp does not load {self._path}: {self._said()}")
        return json.loads(line)

    def ask(self, path: str, question: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the server answers."""
        return json.loads(self.raw(path, question))

    def raw(self, path: str, question: Mapping[str, Any] | None = None) -> bytes:
        """The same, not read. Refused where a template will not render, EngineError for any other refusal and for silence."""
        if self._log.closed:
            raise EngineError(f"{self._path}: llama.cpp runs no more")
        body = None if question is None else json.dumps(question)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        # a connection a question: it closes those that are silent for seconds, and takes a fifth of a millisecond
        connection = http.client.HTTPConnection(self._address, timeout=REQUEST_SECONDS)
        try:
            connection.request("GET" if body is None else "POST", path, body, headers)
            response = connection.getresponse()
            answer = response.read()
            said = None if response.status == 200 else json.loads(answer)
        except TimeoutError:
            self.close()
            why = f"llama.cpp did not answer within {REQUEST_SECONDS:g} s"
            raise EngineError(f"{self._path}: {why}; give it fewer or shorter texts") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            end = self._said()
            self.close()
            raise EngineError(f"{self._path}: llama.cpp broke off ({type(error).__name__}): {end}") from None
        finally:
            connection.close()
        if said is not None:
            message = said.get("error", {}).get("message", said) if isinstance(said, dict) else said
            kind = Refused if path == "/apply-template" else EngineError
            raise kind(f"{self._path}: llama.cpp refuses {path}: {' '.join(str(message).split())[:300]}")
        return answer

    def _said(self) -> str:
        """How it ended and what it complained of, in one line."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "it still runs, and says nothing that can be read"
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 65_536))
        text = self._log.read().decode("utf-8", "replace")
        lines = [" ".join(STAMP.sub("", line).split()) for line in text.splitlines()]
        telling = [line for line in lines if TELLING.search(line)] or lines[-1:]
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return f"{'; '.join(telling[:2])[:400] or 'it said nothing'} ({how})"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            try:
                stream.close()
            except OSError:
                pass  # what was not yet written to a dead process


class LlamaCpp:
    """A served file."""

    def __init__(self, gguf: Path, child: _Child, name: str) -> None:
        self._path, self._child, self.name = gguf, child, name
        try:
            self.vocab_size = int(child.ask("/v1/models")["data"][0]["meta"]["n_vocab"])
            self.n_ctx = int(child.ask("/props")["default_generation_settings"]["n_ctx"]) - 1  # one is for what follows
            self._calm = self.encode("a")[-1:]
        except BaseException:
            child.close()
            raise

    def encode(self, text: str) -> list[int]:
        return self._tokens(text)

    def begin(self, text: str) -> list[int]:
        return self._tokens(text, add_special=True)

    def _tokens(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        how = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return self._child.ask("/tokenize", how)["tokens"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._child.ask("/detokenize", {"tokens": list(ids)})["content"]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str | None:
        text = self._rendered(messages, add_generation_prompt)
        # where llama.cpp begins a text itself, it takes that token off the rendered one
        return text if text is None or not self._begins else self._bos + text

    def chat(self, messages: Sequence[Message]) -> list[int] | None:
        text = self._rendered(messages, True)
        return None if text is None else self._tokens(text, add_special=True, parse_special=True)

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str | None:
        if not self._has_template:
            return None
        said = {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        return self._child.ask("/apply-template", said)["prompt"]

    @cached_property
    def _has_template(self) -> bool:
        """Whether the file brings one; llama.cpp would render by one of its own."""
        return "tokenizer.chat_template" in read_gguf(self._path).metadata

    @cached_property
    def _begins(self) -> bool:
        return bool(self.begin(""))

    @cached_property
    def _bos(self) -> str:
        return str(self._child.ask("/props")["bos_token"])

    def logprobs(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        check_ids(ids, positions, self.vocab_size, self.n_ctx)
        ids, table = list(ids), torch.full((len(positions), self.vocab_size), torch.nan, dtype=torch.float64)
        for row, p in sorted(enumerate(positions), key=lambda item: item[1]):
            # the token it says must be whole characters, or it keeps the list back until they are
            answer = self._child.raw("/completion", _likeliest(ids[: p + 1], 1, self._calm, self.vocab_size))
            listed = {int(id): float(number) for id, number in LISTED.findall(answer) if number != b"null"}
            table[row, list(listed)] = torch.tensor(list(listed.values()), dtype=torch.float64)
        return table

    def stops_at(self, id: int) -> bool:
        check_ids([id], (), self.vocab_size, self.n_ctx)
        said = self._child.ask("/completion", _likeliest([0], 2, [id]))
        return said["stop_type"] == "eos" and said["tokens"] == [id]

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        check_ids(ids, (), self.vocab_size, self.n_ctx - n)
        return self._child.ask("/completion", _likeliest(list(ids), n))["tokens"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close()


def _likeliest(ids: list[int], n: int, forced: Sequence[int] = (), n_probs: int = 0) -> dict[str, Any]:
    """The question for the likeliest continuation, or for `forced` over and over. Without top_k 1 it would draw."""
    how = {"prompt": ids, "n_predict": n, "samplers": ["top_k"], "top_k": 1, "n_probs": n_probs}
    return how | {"logit_bias": [[id, FORCED] for id in forced], "cache_prompt": True, "return_tokens": True}

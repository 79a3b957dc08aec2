"""kobza serve beside llama.cpp's server and transformers' generate: the same weights, prompts and machine, in turn.

    kobza export smollm2 --to gguf --types BF16,Q8_0 --out gguf;  kobza export smollm2 --to hf --out hf
    python benchmarks/serve.py smollm2 --hf hf --gguf BF16=gguf/smollm2-BF16.gguf --gguf Q8_0=gguf/smollm2-Q8_0.gguf
        [--rounds 5] [--tokens 128] [--only NAME ...] [--note WORDS]

Every engine lives in a process of its own from the beginning, so that one round after the other meets the same machine; the
servers are spoken to over HTTP with streaming, as a user would, transformers is called directly. A round is:
one stream; sixteen prompts of unequal length at once; a prompt of 1,000 tokens, cold and again with another ending. Every text
runs to its full length (no end token). Tokens a second are new tokens over the wall time of all. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx

HERE = Path(__file__).parent
STREAMS = 16


class Round(NamedTuple):
    """What a batch of prompts took: new tokens a second of all together, and the median time to a first token in seconds."""

    tokens_per_second: float
    first_token: float


class Server:
    """A server in a process of its own that prints its address as JSON, and how to ask it for tokens as they come."""

    def __init__(self, command: list[str], path: str, body: Callable[[list[int], int], dict[str, Any]]):
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.path, self.body, self.address = path, body, ""

    def ready(self) -> None:
        """Wait for its address."""
        for line in self.child.stdout:
            if line.startswith("{") and "address" in line:
                self.address = json.loads(line)["address"]
                return
        raise SystemExit(f"{self.child.args} did not start")

    def run(self, prompts: list[list[int]], n: int) -> Round:
        """All prompts at once."""
        return asyncio.run(self._all(prompts, n))

    async def _all(self, prompts: list[list[int]], n: int) -> Round:
        async with httpx.AsyncClient(base_url=self.address, timeout=600) as client:
            start = time.perf_counter()
            found = await asyncio.gather(*(self._one(client, prompt, n, start) for prompt in prompts))
            seconds = time.perf_counter() - start
        tokens = sum(count for _, count in found)
        assert tokens == n * len(prompts), f"{tokens} tokens came where {n * len(prompts)} were asked for"
        return Round(tokens / seconds, statistics.median(first for first, _ in found))

    async def _one(self, client: httpx.AsyncClient, prompt: list[int], n: int, start: float) -> tuple[float, int]:
        first, count = 0.0, 0
        async with client.stream("POST", self.path, json=self.body(prompt, n)) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                first = first or (time.perf_counter() - start if line.startswith("data: {") else 0.0)
                if line.startswith("data: {"):
                    data = json.loads(line[6:])
                    told = (data.get("usage") or {}).get("completion_tokens") or data.get("tokens_predicted")
                    count = told or count
        return first, count

    def close(self) -> None:
        """End it."""
        self.child.terminate()
        self.child.wait()


class Transformers:
    """generate of transformers in a process of its own; one batch, padded at the left."""

    def __init__(self, folder: Path, dtype: str):
        command = [sys.executable, __file__, "--child-transformers", str(folder), dtype]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self) -> None:
        """Wait until the model is loaded."""
        assert self.child.stdout.readline().strip() == "ready"

    def run(self, prompts: list[list[int]], n: int) -> Round:
        """All prompts as one batch."""
        self.child.stdin.write(json.dumps({"prompts": prompts, "n": n}) + "\n")
        self.child.stdin.flush()
        return Round(*json.loads(self.child.stdout.readline()))

    def close(self) -> None:
        """End it."""
        self.child.kill()
        self.child.wait()


def serve_transformers(folder: str, dtype: str) -> None:
    """The child's side: a batch a line of stdin, (tokens a second, time to the first token) a line of stdout."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        longest = max(map(len, asked["prompts"]))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in asked["prompts"]])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked["prompts"]])
        times: list[float] = []

        def see(*_: Any, times: list[float] = times, **__: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)  # noqa: B023

        start = time.perf_counter()
        length = {"max_new_tokens": asked["n"], "min_new_tokens": asked["n"], "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, stopping_criteria=[see], **length)
        assert out.shape[1] == longest + asked["n"]
        print(json.dumps([len(ids) * asked["n"] / (time.perf_counter() - start), times[0] - start]), flush=True)


def serve_llama(gguf: str, threads: int) -> None:
    """The child's side of llama.cpp: its own server with a slot for each stream, its defaults otherwise."""
    import os
    import threading

    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path, wanted.n_ctx, wanted.n_parallel = gguf, STREAMS * 2048, STREAMS
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = threads
    wanted.n_gpu_layers, wanted.verbosity, wanted.ui = 0, 0, False
    server = xllamacpp.Server(wanted)
    print(json.dumps({"address": server.listening_address}), file=answer, flush=True)
    threading.Event().wait()


def engines(arguments: argparse.Namespace, open_ones: ExitStack) -> dict[str, Any]:
    """Every engine that was asked for, started."""

    def completion(prompt: list[int], n: int) -> dict[str, Any]:
        body = {"model": "it", "prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True}
        return body | {"stream": True, "stream_options": {"include_usage": True}}

    def llama(prompt: list[int], n: int) -> dict[str, Any]:
        return {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "stream": True}

    found: dict[str, Any] = {}
    for precision in arguments.precision:
        options = ["--port", "0", "--name", "it", "--json", "--precision", precision]
        command = [sys.executable, "-m", "kobza", "serve", arguments.model, *options]
        found[f"kobza {precision}"] = lambda c=command: Server(c, "/v1/completions", completion)
    for given in arguments.gguf:
        name, path = given.split("=", 1)
        command = [sys.executable, __file__, "--child-llama", path, str(arguments.threads)]
        found[f"llama.cpp {name}"] = lambda c=command: Server(c, "/completion", llama)
    for dtype in arguments.dtype if arguments.hf else []:
        found[f"transformers {dtype}"] = lambda d=dtype: Transformers(arguments.hf, d)
    chosen = {name: make() for name, make in found.items() if not arguments.only or name in arguments.only}
    for engine in chosen.values():
        open_ones.callback(engine.close)
    for engine in chosen.values():
        engine.ready()
    return chosen


def prompts_of(model: str, seed: int) -> Callable[[int], list[int]]:
    """prompt(n): n ids of prose, from a place that no other prompt of the run begins at."""
    from kobza.export.proof.corpus import PROSE
    from kobza.recipes.tuned import open_checkpoint

    ids = [int(i) for i in open_checkpoint(Path(model)).tokenizer.encode("\n\n".join(PROSE))]
    draw = random.Random(seed)
    shuffled = [ids[i : i + 16] for i in range(0, len(ids) - 16, 16)]

    def prompt(n: int) -> list[int]:
        draw.shuffle(shuffled)
        repeated = shuffled * (n // (16 * len(shuffled)) + 1)
        return [i for piece in repeated for i in piece][:n]

    return prompt


def one_round(engine: Any, prompt: Callable[[int], list[int]], n: int) -> dict[str, float]:
    """The figures of a round."""
    one = engine.run([prompt(64)], n)
    many = engine.run([prompt(32 + 12 * i) for i in range(STREAMS)], n)
    long = prompt(1000)
    cold, cached = engine.run([long + prompt(8)], 2), engine.run([long + prompt(8)], 2)
    return {
        "one_tokens_per_second": one.tokens_per_second,
        "one_first_token_ms": 1e3 * one.first_token,
        f"{STREAMS}_tokens_per_second": many.tokens_per_second,
        f"{STREAMS}_first_token_ms": 1e3 * many.first_token,
        "prefix_1000_cold_ms": 1e3 * cold.first_token,
        "prefix_1000_again_ms": 1e3 * cached.first_token,
    }


def main(arguments: argparse.Namespace) -> None:
    """Rounds in turn, a table, and rows of results.csv where there is a note."""
    with ExitStack() as open_ones:
        prompt, running = prompts_of(arguments.model, 0), engines(arguments, open_ones)
        figures: dict[str, dict[str, list[float]]] = {name: {} for name in running}
        for number in range(-1, arguments.rounds):  # the first only warms up
            for name, engine in running.items():
                for key, value in one_round(engine, prompt, arguments.tokens).items():
                    if number >= 0:
                        figures[name].setdefault(key, []).append(value)
    sys.path.insert(0, str(HERE))
    from speed import report

    for name, table in figures.items():
        if arguments.note:
            report(f"serve {name}", table, arguments.note)
        for key, values in table.items():
            print(f"{name:22} {key:24} {statistics.median(values):9.1f}   {min(values):.1f} .. {max(values):.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child-transformers"]:
        serve_transformers(*sys.argv[2:4])
    elif sys.argv[1:2] == ["--child-llama"]:
        serve_llama(sys.argv[2], int(sys.argv[3]))
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("model")
        parser.add_argument("--hf", type=Path)
        parser.add_argument("--gguf", action="append", default=[], metavar="NAME=FILE")
        parser.add_argument("--precision", nargs="*", default=["bf16", "int8"])
        parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
        parser.add_argument("--only", nargs="*", default=[])
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--tokens", type=int, default=128)
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--note", default="")
        main(parser.parse_args())

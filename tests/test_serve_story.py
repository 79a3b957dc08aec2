"""kobza serve as a user meets it: a process, real clients, a signal; and what it refuses in one line."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("fastapi", reason='needs the extra "serve"')

import httpx
from openai import OpenAI
from test_finetune import write_base

from kobza import cli
from kobza.recipes.generate import ends_of
from kobza.recipes.tuned import open_checkpoint

VERSE = "ROMEO:\nWhat light is this?\n\nJULIET:\nIt is the east, and I am here; so speak, JULIET says.\n\n" * 40
SHAPE = "--model.n_layer 1 --model.n_head 2 --model.n_embd 32 --model.n_ff 32 --model.max_seq_len 64".split()
STEPS = "--train.steps 6 --train.micro_batch 4 --train.eval_interval 3".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run, and a base with a tuning beside it."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "verse.txt").write_text(VERSE)
    assert cli.main(["train", str(folder / "verse.txt"), "--out", str(folder / "run"), *SHAPE, *STEPS]) == 0
    write_base(folder / "base")
    rows = "\n".join(json.dumps({"q": f"{i}?", "a": "yes" if i % 2 else "no"}) for i in range(20))
    (folder / "rows.jsonl").write_text(rows)
    tune = ["--prompt", "{q}", "--answer", "{a}", "--out", str(folder / "tuned"), "--train.steps", "3"]
    assert cli.main(["finetune", str(folder / "base"), str(folder / "rows.jsonl"), *tune]) == 0
    return folder


class Child:
    """kobza serve in a process of its own."""

    def __init__(self, *words):
        command = [sys.executable, "-m", "kobza", "serve", *map(str, words), "--port", "0", "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.said = []
        for line in self.process.stdout:
            self.said.append(json.loads(line))
            if "address" in self.said[-1]:
                self.address = self.said[-1]["address"]
                break
        else:
            raise AssertionError(self.process.stderr.read())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def test_a_server_proves_itself_serves_what_generate_writes_and_drains(place, capsys):
    words = ["--prompt", "ROMEO:", "--tokens", "30", "--seed", "5", "--temperature", "1", "--top-k", "0"]
    assert cli.main(["generate", str(place / "run"), *words]) == 0
    whole = capsys.readouterr().out
    with Child(place / "run", "--precision", "fp32") as server:
        assert all(check["ok"] for check in server.said[0]["selftest"]) and len(server.said[0]["selftest"]) >= 4
        client = OpenAI(base_url=f"{server.address}/v1", api_key="-")
        ask = {
            "model": "run",
            "prompt": "ROMEO:",
            "max_tokens": 30,
            "seed": 5,
            "temperature": 1,
            "extra_body": {"top_k": 0},
        }
        assert whole.strip("\n") == ("ROMEO:" + client.completions.create(**ask).choices[0].text).strip("\n")
        stream = client.completions.create(**ask | {"max_tokens": 58, "extra_body": {"ignore_eos": True}}, stream=True)
        first = next(iter(stream)).choices[0].text
        server.process.send_signal(signal.SIGTERM)
        text = first + "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
        assert len(text) > 20  # a text that was being written is written to its end
        assert server.process.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.address}/health")


def test_a_tuning_is_served_beside_its_base(place):
    with Child(place / "base", "--adapter", f"mine={place / 'tuned'}", "--precision", "fp32") as server:
        client = OpenAI(base_url=f"{server.address}/v1", api_key="-")
        assert [model.id for model in client.models.list()] == ["base", "mine"]
        merged = open_checkpoint(place / "tuned")
        ids = merged.tokenizer.encode("3?")
        ask = {"prompt": [int(i) for i in ids], "max_tokens": 1, "temperature": 0, "logprobs": 5}
        told = client.completions.create(model="mine", **ask).choices[0].logprobs.top_logprobs[0]
        import torch

        with torch.no_grad():
            wanted = merged.model(torch.tensor([[int(i) for i in ids]]))[0, -1].float().log_softmax(-1).topk(5).values
        assert max(told.values()) == pytest.approx(wanted[0].item(), abs=2e-3)
        assert ends_of(merged) is not None
        plain = client.completions.create(model="base", **ask).choices[0].logprobs.top_logprobs[0]
        assert plain != told


def test_a_second_signal_ends_at_once(place):
    with Child(place / "run", "--no-selftest") as server:
        with httpx.stream(
            "POST", f"{server.address}/v1/completions", json={"prompt": "R", "model": "run", "stream": True}
        ):
            server.process.send_signal(signal.SIGTERM)
            server.process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            server.process.wait(20)
        assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "words, told",
    [
        (["nowhere"], "nowhere"),
        (["{run}", "--host", "0.0.0.0"], "no key is set"),
        (["{run}", "--key", "short"], "shorter than 16"),
        (["{run}", "--guess", "4"], "no effect"),
        (["{run}", "--lookup"], "--guess 0"),
        (["{run}", "--draft", "{base}", "--guess", "2"], "its tokenizer is another one"),
        (["{run}", "--adapter", "mine"], "name it and say where"),
        (["{run}", "--adapter", "mine={tuned}"], "was learned beside"),
        (["{base}", "--adapter", "base={tuned}", "--name", "base"], "take another name"),
        (["{run}", "--selftest", "--no-selftest"], "exclude"),
        (["{run}", "--running", "0"], "--running is 0"),
        (["{run}", "--max-body", "-1"], "--max-body is -1"),
        (["{run}", "--key-file", "{run}/none"], "cannot be read"),
        (["{run}", "--cache", "0.0000001"], "the cache has 100 bytes"),
        (["{run}", "--port", "{busy}", "--no-selftest"], "in use"),
    ],
)
def test_what_it_refuses_is_one_line(place, words, told, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {name: place / name for name in ("run", "base", "tuned")} | {"busy": taken.getsockname()[1]}
        assert cli.main(["serve", *(word.format(**names) for word in words)]) == 2
    said = capsys.readouterr().err.strip()
    assert told in said and "\n" not in said, said

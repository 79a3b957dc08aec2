"""Every kobza command in the README and the docs runs, on a small text and a small model."""

import json
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from test_finetune import write_base

from kobza import cli
from kobza.doctor.mutations import specimens

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = "--model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.n_ff 32 --model.max_seq_len 16".split()
QUICK = "--train.steps 4 --train.micro_batch 4 --train.eval_interval 2".split()
TABLE = ("--prompt", "{name}, {sex}. Survived?", "--answer", "{survived}")
VERSE = "ROMEO:\nWhat light is this?\n\nJULIET:\nIt is the east, and I am here; so speak, JULIET says.\n\n" * 40


def commands(page: Path) -> list[str]:
    """The kobza lines of a page's sh blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("kobza ")]


ALL = [(page.name, command) for page in PAGES for command in commands(page)]


def test_the_readme_has_commands():
    assert sum(name == "README.md" for name, _ in ALL) >= 10


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the texts that the commands name, and a run in runs/demo and runs/mine."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "poems").mkdir()
    for name in ("poems.txt", "poems/a.txt", "poems/b.txt"):
        (folder / name).write_text(VERSE)
    design = [
        'base = "tiny"',
        "seeds = 2",
        "budget = { steps = 3 }",
        "evaluations = 1",
        "eval_bytes = 500",
        'text = ["poems.txt"]',
    ]
    settings = [
        '"model.n_layer" = 1',
        '"model.n_embd" = 16',
        '"model.n_head" = 2',
        '"model.max_seq_len" = 16',
        '"train.micro_batch" = 2',
    ]
    (folder / "norms.toml").write_text(
        "\n".join([*design, "[set]", *settings, "[factors]", '"model.norm" = ["rmsnorm", "none"]'])
    )
    specimens.folder(folder / "tinyllama", "llama")
    write_base(folder / "smollm2")
    columns = "name,sex,age,pclass,embarked,fare,survived"
    rows = [
        f"Passenger {i},{'fe' * (i % 2)}male,{i},{i % 3 + 1},Cork,{i}.5,{'yes' if i % 2 else 'no'}" for i in range(40)
    ]
    (folder / "titanic.csv").write_text("\n".join([columns, *rows]))
    tuned = ["--out", str(folder / "runs" / "titanic"), "--train.steps", "2"]
    assert cli.main(["finetune", str(folder / "smollm2"), str(folder / "titanic.csv"), *TABLE, *tuned]) == 0
    for seed, run in enumerate(("demo", "mine")):
        out = ["--out", str(folder / "runs" / run), "--seed", str(seed)]
        assert cli.main(["train", str(folder / "poems.txt"), *out, *TINY, *QUICK]) == 0
    exported = ["--to", "hf", "--out", str(folder / "exports" / "demo-hf")]
    assert cli.main(["export", str(folder / "runs" / "demo"), *exported]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["contest", "new", "spring", "--text", "poems.txt"]) == 0
        entry = ["runs/demo", "--who", "Ivan", "--prompt", "JULIET:", "--tokens", "20", "--seed", "1"]
        assert cli.main(["contest", "submit", "spring", *entry]) == 0
    return folder


def serve_until_ready(words: list[str], folder: Path) -> int:
    """A server in a process of its own: it listens, its health or first page is well, and it ends at a signal -> exit code."""
    child = subprocess.Popen(
        [sys.executable, "-m", "kobza", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        address = next(found["address"] for line in child.stdout if "address" in (found := json.loads(line)))
        place = "/health" if words[0] == "serve" else "/"
        assert urllib.request.urlopen(address + place, timeout=20).status == 200
        child.send_signal(signal.SIGTERM)
        return child.wait(30)
    finally:
        child.kill()


def smaller(words: list[str], instead: list[str]) -> list[str]:
    """The words of a command with some options and their values replaced."""
    kept = list(words)
    for option in instead[::2]:
        if option in kept:
            del kept[kept.index(option) : kept.index(option) + 2]
    return kept + instead


@pytest.mark.parametrize("page, command", ALL, ids=[command for _, command in ALL])
def test_command_runs(page, command, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("kobza.recipes.train.default_text", lambda: (workplace / "poems.txt", "a small text"))
    monkeypatch.setattr("kobza.recipes.data.shakespeare", lambda: workplace / "poems.txt")
    monkeypatch.setattr("builtins.input", lambda _="": "")
    _, verb, *rest = shlex.split(command)
    if verb == "train" and "--resume" in rest:
        rest += ["--train.steps", "6"]
    elif verb == "train":
        own = f"runs/{abs(hash((page, command)))}"  # the page's own --out is there already, from the fixture
        rest = smaller(rest, ["--out", own, *TINY, *QUICK] + (["--vocab-size", "260"] if "bpe" in rest else []))
    resumed = verb == "finetune" and "--resume" in rest
    if verb == "export" or (verb in ("finetune", "merge", "data", "quantize") and "--out" in rest and not resumed):
        rest = smaller(rest, ["--out", f"runs/{abs(hash((page, command)))}"])
    if verb == "finetune" and not resumed and "--dry-run" not in rest:
        rest = smaller(rest, ["--train.steps", "2", "--max-len", "128"])
    if verb == "generate":
        rest = smaller(rest, ["--tokens", "8"])
    if verb == "demo":
        monkeypatch.setattr("kobza.recipes.demo.is_finished", lambda out, steps: True)
    if verb in ("serve", "studio") and "--selftest" not in rest:
        assert serve_until_ready([verb, *rest], workplace) == 0
        return
    own = f"a{abs(hash((page, command)))}"
    if verb == "contest" and rest[0] == "new":
        rest[1] = own
    elif verb == "contest" and rest[0] == "submit":
        rest = smaller(rest, ["--who", own, "--seed", str(len(own)), "--tokens", "20"])
    assert cli.main([verb, *rest]) == 0, capsys.readouterr().err

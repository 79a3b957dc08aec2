"""kobza finetune, merge and plan as a person calls them: a tiny model, every method and objective; stopped and resumed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kobza.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint, load_tensors, save_checkpoint
from kobza.cli import main
from kobza.config import ModelConfig, RunConfig
from kobza.model import build
from kobza.recipes.tuned import open_adapter, open_checkpoint
from kobza.tokenizer import LibraryTokenizer

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = "user assistant system What colour is the of a red green blue yes no cat dog owl fox? 1 2 3 4 5 6 7 8 9 0 + =\n"
THINGS = [f"{kind} {i}" for kind in ("cat", "dog", "owl", "fox") for i in range(12)]


def colour(thing: str) -> str:
    return {"cat": "red", "dog": "green", "owl": "blue", "fox": "red"}[thing.split()[0]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model with a chat template, as `kobza pull` keeps one."""
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


def write_base(folder):
    tokenizer = LibraryTokenizer.train([WORDS * 20], 300, SPECIALS)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=256, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_ff=48, mlp="swiglu",
        norm="rmsnorm", tied=True, init="gpt2", qk_norm=False,
    )  # fmt: skip
    end = tokenizer.specials["<|im_end|>"]
    template = {"source": CHATML, "bos": "", "eos": "<|im_end|>", "specials": {}}
    about = {"source": "test", "ends": [end], "chat_template": template}
    save_checkpoint(folder, build(config, 0), RunConfig(config), tokenizer, about)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file for each objective."""
    folder = tmp_path_factory.mktemp("files")
    rows = [f"{thing},{colour(thing)},{i % 3}" for i, thing in enumerate(THINGS)]
    (folder / "things.csv").write_text("\n".join(["thing,colour,shelf", *rows]) + "\n")
    pairs = [{"prompt": f"What is {t}?", "chosen": colour(t), "rejected": "no"} for t in THINGS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rated = [
        {"prompt": f"What is {t}?", "completion": colour(t) if i % 2 else "no", "label": bool(i % 2)}
        for i, t in enumerate(THINGS)
    ]
    (folder / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    sums = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(5) for b in range(4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    return folder


TABLE = ("--prompt", "What colour is the {thing}?[[ shelf {shelf}]]", "--answer", "{colour}")
SHORT = (
    "--train.eval-interval",
    "3",
    "--train.lr",
    "0.01",
    "--train.warmup-steps",
    "1",
    "--max-len",
    "64",
    "--rank",
    "4",
)
FULL = tuple(word for word in SHORT if word not in ("--rank", "4"))


def call(base, file, out, *more, table=False):
    words = ["finetune", str(base), str(file), "--out", str(out), *(TABLE if table else ()), *more]
    return main(words)


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint of a tuning has learned."""
    folder = checkpoint_path(out, step)
    tensors = load_tensors(folder / "training.safetensors")
    whole = folder / "model.safetensors"
    return tensors | (load_tensors(whole) if whole.exists() else {})


def test_a_table_is_learned_and_the_tuned_model_says_so(base, files, tmp_path, capsys):
    out = tmp_path / "tuned"
    more = (
        "--method",
        "full",
        "--train.lr",
        "0.01",
        "--epochs",
        "50",
        "--train.eval-interval",
        "75",
        "--val-fraction",
        "0.25",
    )
    assert call(base, files / "things.csv", out, *more, "--json", table=True) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["after"]["val_loss"] < 0.2 * said["before"]["val_loss"]
    assert said["before"]["val_right"] == 0.0 and said["after"]["val_right"] >= 0.8
    assert {"xray.html", "loss.png", "config.toml", "metrics.jsonl", "best.json", "before.json"} <= {
        p.name for p in out.iterdir()
    }
    loaded = open_checkpoint(out)
    assert loaded.provenance["chat_template"]["source"] == CHATML
    assert main(["eval", str(out), str(files / "things.csv"), "--text-field", "thing", "--json"]) in (0, 2)


METHODS = {
    "lora": ("lora", ()),
    "dora": ("lora", ("--dora", "--dropout", "0.1")),
    "rslora": ("lora", ("--rslora", "--targets", "q_proj,v_proj")),
    "embeddings": ("lora", ("--embeddings", "--train.embed-lr", "0.001")),
    "nf4": ("lora", ("--quantize", "nf4")),
    "eight-bit": ("lora", ("--eight-bit",)),
    "checkpointing": ("lora", ("--checkpointing", "on", "--dropout", "0.1")),
    "packing": ("lora", ("--packing", "--train.micro-batch", "2")),
    "accumulate": ("lora", ("--train.accumulate", "2")),
    "full": ("full", ("--method", "full", "--train.layer-lr-decay", "0.5")),
    "head": ("head", ("--method", "head")),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_tuning_goes_on_to_the_same_weights(base, files, tmp_path, name):
    kind, more = METHODS[name]
    usual = SHORT if kind == "lora" else FULL
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert call(base, files / "things.csv", once, *usual, *more, "--train.steps", "6", table=True) == 0
    # a schedule knows its end, so the stopped run has the same steps and is cut short by hand
    assert (
        call(base, files / "things.csv", twice, *usual, *more, "--train.steps", "6", "--train.keep", "3", table=True)
        == 0
    )
    for step in list_checkpoints(twice):
        if step > 3:
            for path in checkpoint_path(twice, step).iterdir():
                path.unlink()
            checkpoint_path(twice, step).rmdir()
    (twice / "best.json").write_text('{"step": 3, "val_loss": 9.0}')
    assert main(["finetune", "--resume", "--out", str(twice)]) == 0
    expected, found = weights(once, 6), weights(twice, 6)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected), name


OBJECTIVES = {
    "dpo": ("pairs.jsonl", ()),
    "orpo": ("pairs.jsonl", ()),
    "kto": ("rated.jsonl", ()),
    "grpo": (
        "sums.jsonl",
        ("--reward", "answer,length", "--group-size", "3", "--answer-tokens", "4", "--train.micro-batch", "6"),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_runs_and_resumes(base, files, tmp_path, name):
    file, more = OBJECTIVES[name]
    once, twice = tmp_path / "once", tmp_path / "twice"
    words = (
        *SHORT,
        "--objective",
        name,
        *more,
        "--train.steps",
        "4",
        "--train.checkpoint-interval",
        "2",
        "--train.keep",
        "3",
    )
    assert call(base, files / file, once, *words) == 0
    assert call(base, files / file, twice, *words) == 0
    for path in checkpoint_path(twice, 4).iterdir():
        path.unlink()
    checkpoint_path(twice, 4).rmdir()
    (twice / "best.json").unlink(missing_ok=True)
    assert main(["finetune", "--resume", "--out", str(twice)]) == 0
    expected, found = weights(once, 4), weights(twice, 4)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_distillation_goes_towards_the_teacher(base, files, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    assert call(base, files / "things.csv", teacher, *FULL, "--method", "full", "--train.steps", "100", table=True) == 0
    out = tmp_path / "student"
    words = ("--objective", "distill", "--teacher", str(teacher), "--temperature", "2", "--method", "full", "--json")
    words += ("--train.steps", "60", "--train.lr", "0.01", "--train.eval-interval", "30")
    capsys.readouterr()
    assert call(base, files / "things.csv", out, *words, table=True) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["after"]["val_loss"] < 0.8 * said["before"]["val_loss"]


def test_killed_and_resumed_is_the_same(base, files, tmp_path):
    """SIGKILL in a real process, at whatever step it stands."""
    words = [*SHORT, "--train.steps", "60", "--train.checkpoint-interval", "2", "--train.keep", "60", "--seed", "5"]
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert call(base, files / "things.csv", once, *words, table=True) == 0
    command = [
        sys.executable,
        "-m",
        "kobza",
        "finetune",
        str(base),
        str(files / "things.csv"),
        "--out",
        str(twice),
        *TABLE,
        *words,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    while process.poll() is None and not (twice / "checkpoints" / "00000004").exists():
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(["finetune", "--resume", "--out", str(twice)]) == 0
    expected, found = weights(once, 60), weights(twice, 60)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_dry_run_leaves_the_page_alone(base, files, tmp_path, capsys):
    out = tmp_path / "dry"
    assert call(base, files / "things.csv", out, "--dry-run", table=True) == 0
    assert [path.name for path in out.iterdir() if path.name != ".lock"] == ["xray.html"]
    assert "learned" in capsys.readouterr().out


def test_merged_is_the_wrapped_one(base, files, tmp_path, capsys):
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert call(base, files / "things.csv", run, *SHORT, "--dora", "--train.steps", "20", table=True) == 0
    capsys.readouterr()
    assert main(["merge", str(run), "--out", str(merged), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["largest"] < 1e-4 and all(module["change"] > 0 for module in said["modules"])
    ids = torch.randint(0, 200, (2, 30), generator=torch.Generator().manual_seed(0))
    wrapped, _ = open_adapter(checkpoint_path(run, 20), "cpu")
    with torch.no_grad():
        expected, found = wrapped.model(ids), load_checkpoint(merged).model(ids)
    assert torch.allclose(expected, found, atol=1e-4)
    assert not torch.allclose(expected, load_checkpoint(base).model(ids), atol=1e-3)  # it learned something
    alone, again = tmp_path / "alone", tmp_path / "again"
    alone.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (alone / name).write_bytes((checkpoint_path(run, 20) / name).read_bytes())
    assert (
        main(["merge", str(alone), "--out", str(again)]) == 2
    )  # as PEFT leaves one: it does not say where its base is
    assert main(["merge", str(alone), "--base", str(base), "--out", str(again)]) == 0
    assert (again / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    assert main(["merge", str(run), "--out", str(merged)]) == 2
    assert main(["merge", str(run), "--out", str(tmp_path / "x"), "--precision", "nf4"]) == 2
    assert main(["merge", str(merged), "--out", str(tmp_path / "x")]) == 2


def test_an_adapter_knows_its_base(base, files, tmp_path, capsys):
    run = tmp_path / "run"
    own = tmp_path / "own"
    loaded = load_checkpoint(base)
    save_checkpoint(own, loaded.model, loaded.run, loaded.tokenizer, loaded.provenance)
    assert call(own, files / "things.csv", run, *SHORT, "--train.steps", "3", table=True) == 0
    for path in own.iterdir():
        path.unlink()
    own.rmdir()
    save_checkpoint(own, build(loaded.run.model, 9), loaded.run, loaded.tokenizer, loaded.provenance)
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "What"]) == 2
    said = capsys.readouterr().err
    assert said.count("sha256") >= 1 and "learned beside" in said


BAD = {
    "missing column": (("--prompt", "What is {thingg}?", "--answer", "{colour}"), "thing"),
    "no answer given": (("--prompt", "What is {thing}?"), "--answer"),
    "targets": ((*TABLE, "--targets", "q_prok"), "q_proj"),
    "rank": ((*TABLE, "--rank", "400"), "400"),
    "max len": ((*TABLE, "--max-len", "1000"), "256"),
    "nothing learned": ((*TABLE, "--max-len", "8"), "not one token"),
    "idle": ((*TABLE, "--beta", "0.2"), "no effect"),
    "idle rank": ((*TABLE, "--method", "full", "--rank", "4"), "no effect"),
    "offload": ((*TABLE, "--checkpointing", "offload"), "cpu"),
    "steps and epochs": ((*TABLE, "--epochs", "2", "--train.steps", "4"), "leave one out"),
    "group": ((*TABLE, "--group", "shelves"), "shelf"),
    "template": ((*TABLE, "--template", "nothing.txt"), "no such file"),
    "embed lr": ((*TABLE, "--train.embed-lr", "0.1"), "no effect"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(base, files, tmp_path, capsys, name):
    words, says = BAD[name]
    short = [] if name in ("max len", "nothing learned") else ["--max-len", "64"]
    assert main(["finetune", str(base), str(files / "things.csv"), "--out", str(tmp_path / "out"), *short, *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and says in said[0], said
    assert not (tmp_path / "out" / "config.toml").exists()


def test_a_template_of_two_turns_serves_what_it_taught(base, files, tmp_path, capsys):
    template = tmp_path / "turns.txt"
    template.write_text("Q: {USER}\nA: {ASSISTANT}<|endoftext|>\nQ: {USER}\nA: {ASSISTANT}<|endoftext|>\n")
    out = tmp_path / "out"
    assert (
        call(base, files / "things.csv", out, *SHORT, "--train.steps", "3", "--template", str(template), table=True)
        == 0
    )
    loaded = open_checkpoint(out)
    rows = np.fromfile(out / "rows" / "train" / "ids.bin", "<i4")
    from kobza.formats.chat import ChatEncoder
    from kobza.recipes.tuned import template_of

    encoder = ChatEncoder(template_of(loaded.provenance, loaded.folder), loaded.tokenizer)
    question = [{"role": "user", "content": "What colour is the cat 0? shelf 0"}]
    ids = encoder.encode(question, add_generation_prompt=True)
    text = loaded.tokenizer.decode(rows.tolist())
    assert loaded.tokenizer.decode(ids) in text
    one = tmp_path / "one.txt"
    one.write_text("Q: {USER}\nA: {ASSISTANT}<|endoftext|>\n")
    capsys.readouterr()
    assert call(base, files / "things.csv", tmp_path / "x", "--template", str(one), "--max-len", "64", table=True) == 2
    assert "two" in capsys.readouterr().err


def test_plan_tells_memory_and_time(base, files, capsys):
    words = ["plan", "finetune", str(base), str(files / "things.csv"), *TABLE, "--max-len", "64", "--json"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["peak_bytes"] > 0 and said["seconds"] > 0


def test_new_tokens_travel_with_the_adapter(base, files, tmp_path, capsys):
    out, merged = tmp_path / "out", tmp_path / "merged"
    words = (*SHORT, "--add-tokens", "<|tool|>,<|done|>", "--train.steps", "3")
    assert call(base, files / "things.csv", out, *words, table=True) == 2
    assert "--embeddings" in capsys.readouterr().err
    assert call(base, files / "things.csv", out, *words, "--embeddings", table=True) == 0
    assert main(["merge", str(out), "--out", str(merged)]) == 0
    before, loaded, whole = load_checkpoint(base), open_checkpoint(out), load_checkpoint(merged)
    assert loaded.model.config.vocab_size == before.model.config.vocab_size + 2
    assert loaded.tokenizer.specials["<|tool|>"] == before.tokenizer.vocab_size
    assert torch.equal(loaded.model.embed.weight, whole.model.embed.weight)
    wrapped, _ = open_adapter(checkpoint_path(out, 3), "cpu")
    ids = torch.arange(loaded.model.config.vocab_size)[None, :200]
    with torch.no_grad():
        assert torch.allclose(loaded.model(ids), wrapped.model(ids), atol=1e-5)
    assert main(["finetune", "--resume", "--out", str(out), "--train.steps", "5"]) == 0


def test_rows_that_were_never_trained_begin_at_the_mean(base, files, tmp_path, capsys):
    odd = tmp_path / "odd"
    loaded = load_checkpoint(base)
    i = loaded.tokenizer.specials["<|im_start|>"]
    with torch.no_grad():
        loaded.model.embed.weight[i] = 0
    save_checkpoint(odd, loaded.model, loaded.run, loaded.tokenizer, loaded.provenance)
    out = tmp_path / "out"
    assert call(odd, files / "things.csv", out, *SHORT, "--train.steps", "3", table=True) == 0
    assert "<|im_start|>" in capsys.readouterr().out
    table = open_checkpoint(out).model.embed.weight
    others = torch.cat((table[:i], table[i + 1 :]))
    assert torch.allclose(table[i], others.mean(0), atol=1e-6)


def test_a_model_from_scratch_learns_answers_too(files, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text((WORDS + "What colour is the cat 1? red\n") * 60)
    run, out = tmp_path / "run", tmp_path / "out"
    small = "--model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.n_ff 32 --model.max_seq_len 64".split()
    assert (
        main(["train", str(text), "--out", str(run), *small, "--train.steps", "5", "--train.eval_interval", "5"]) == 0
    )
    short = (
        "--prompt",
        "What colour is the {thing}?",
        "--answer",
        " {colour}",
        "--method",
        "full",
        "--train.steps",
        "3",
    )
    capsys.readouterr()
    assert main(["finetune", str(run), str(files / "things.csv"), "--out", str(out), *short]) == 2
    assert "end" in capsys.readouterr().err
    more = ("--add-tokens", "<|endoftext|>")
    assert main(["finetune", str(run), str(files / "things.csv"), "--out", str(out), *short, *more]) == 0
    assert open_checkpoint(out).tokenizer.ends
    assert main(["generate", str(out), "--prompt", "What colour is the cat 1?", "--tokens", "5"]) == 0


def test_out_of_memory_is_one_line(base, files, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr("kobza.recipes.finetune.train", full)
        assert call(base, files / "things.csv", tmp_path / "a", *SHORT, "--train.steps", "3", table=True) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "out of memory" in said[0] and "--max-len" in said[0]
    monkeypatch.setattr("kobza.recipes.base.free_memory", lambda _: 1000)
    assert call(base, files / "things.csv", tmp_path / "b", *SHORT, "--train.steps", "3", table=True) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "free" in said[0]
    assert not (tmp_path / "b" / "config.toml").exists()

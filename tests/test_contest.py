"""Submissions: honest ones pass, each way to cheat is refused in a line, hostile files do no harm; and what is exported."""

import csv
import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kobza.config import InputError, ModelConfig, RunConfig, SampleConfig
from kobza.contest.contest import Contest
from kobza.contest.draws import SLACK, is_near, replay
from kobza.contest.nouns import Duplicate
from kobza.contest.page import cell
from kobza.contest.rules import EXAMPLE, Rules
from kobza.contest.submission import (
    METRICS,
    SUBMISSION,
    Record,
    Submission,
    checkpoint_digest,
    collect,
    pack,
    read_submission,
    unpack,
)
from kobza.contest.verify import TrainingText, longest_copies, verify, whole_words
from kobza.generate import generate
from kobza.model import build
from kobza.recipes import contest as verbs
from kobza.recipes import contest_bench
from kobza.recipes.contest_bench import make_bench
from kobza.recipes.train import main as train

HOW = SampleConfig(tokens=60, temperature=0.9, top_k=12, seed=5)
MODEL = dict(max_seq_len=32, n_layer=2, n_head=2, n_embd=32, n_ff=64)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text):
    """Two short runs on the same text, of other seeds."""
    home = tmp_path_factory.mktemp("runs")
    values = {"steps": 8, "micro_batch": 4, "eval_interval": 8, "warmup_steps": 1}
    for seed in (0, 1):
        config = RunConfig(model=ModelConfig(**MODEL), train=replace(RunConfig().train, **values), seed=seed)
        assert train([text], config, home / f"run{seed}", "run") == 0
    return home


@pytest.fixture(scope="module")
def honest(tmp_path_factory, runs, text):
    """An honest submission of a contest whose host has the text: (submission, its folder, a Bench, rules)."""
    home = tmp_path_factory.mktemp("contests")
    verbs.new("c", None, [text], home)
    contest = Contest.open(home, "c")
    with verbs.submission_folder(runs / "run0", "tan ", "Ada", HOW) as (submission, folder):
        shutil.copytree(folder, home / "entry")
    loose = replace(contest.rules, most_copied_characters=0, most_copied_words=0)
    return submission, home / "entry", make_bench(contest), loose


@pytest.fixture
def entered(honest, tmp_path):
    """The same with a folder of the test's own."""
    submission, folder, bench, rules = honest
    return submission, Path(shutil.copytree(folder, tmp_path / "entry")), bench, rules


def refusal(entered, rules=None, **changes):
    """Why a submission with these changes is refused, in a line; the entry itself passes."""
    submission, folder, bench, loose = entered
    verdict = verify(folder, replace(submission, **changes), rules or loose, bench)
    assert not verdict.ok and all("\n" not in line and len(line) < 400 for line in verdict.lines)
    return " & ".join(verdict.lines)


# ---- honest ----


def test_an_honest_entry_passes_and_says_what_was_looked_at(entered):
    submission, folder, bench, rules = entered
    verdict = verify(folder, submission, rules, bench)
    assert verdict.ok, verdict.lines
    told = "\n".join(verdict.lines)
    for part in (
        "files:",
        "8 steps",
        "own record",
        f"the same, all {len(submission.ids)} tokens",
        "data:",
        "copies: at most",
    ):
        assert part in told


def test_replayed_beginnings_agree_and_another_seed_does_not(entered):
    submission, folder, bench, loose = entered
    rules = replace(loose, require_replay_steps=4)
    assert "beginning: 4 steps" in "\n".join(verify(folder, submission, rules, bench).lines)
    lines = (folder / METRICS).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records[2]["train_loss"] += 0.05
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "step 3 has a loss of" in refusal(entered, rules)
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records[1:]))
    assert "does not begin at its first step" in refusal(entered, rules)


@pytest.mark.parametrize(
    "knobs",
    [
        dict(temperature=0.0, top_k=0),
        dict(temperature=0.0, repetition_penalty=1.3, no_repeat_ngram=3),
        dict(temperature=1.7, top_k=0, seed=2**62),
        dict(temperature=0.8, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.2, min_tokens=20),
    ],
)
def test_draws_made_again_are_those_of_generate(knobs):
    """Over a context that fills and forgets; a change of any one token is seen."""
    model = build(ModelConfig(vocab_size=23, max_seq_len=16, n_layer=2, n_head=2, n_embd=32, init="gpt2"), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    config, ends = SampleConfig(**(dict(tokens=50) | knobs)), [0]
    ids = [choice.ids[0] for choice in generate(model, [[1, 2, 3]], config, ends)]
    found = replay(model, [1, 2, 3], ids, config, ends)
    assert (found.same, found.near, found.wrong) == (len(ids), 0, None)
    for n in (0, len(ids) // 2, len(ids) - 1):
        other = [*ids[:n], (ids[n] + 1) % 23, *ids[n + 1 :]]
        assert replay(model, [1, 2, 3], other, config, ends).wrong == n


def test_another_machines_rounding_passes_and_is_named(entered):
    """Weights moved in the seventh digit stand for another order of sums; a text made with them is still this model's."""
    submission, folder, bench, rules = entered
    from kobza.checkpoint import load_checkpoint

    loaded = load_checkpoint(folder)
    elsewhere = build(loaded.run.model)
    elsewhere.load_state_dict({k: v * (1 + 1e-6 * torch.randn(v.shape)) for k, v in loaded.model.state_dict().items()})
    prompt, near = loaded.tokenizer.encode_prompt("tan "), 0
    for seed in range(15):
        config = replace(HOW, seed=seed)
        ids = [choice.ids[0] for choice in generate(elsewhere, [prompt], config, ())]
        found = replay(loaded.model, prompt, ids, config, ())
        assert found.wrong is None and not found.too_many_near
        near += found.near
    assert near <= 3


def test_only_a_uniform_at_the_boundary_is_near():
    scores = torch.tensor([0.2, 0.5, 0.0, 0.3]).log()
    assert is_near(scores, 0, 0.2 + SLACK / 2, False) and is_near(scores, 1, 0.2 - SLACK / 2, False)
    assert not is_near(scores, 0, 0.2 + 2 * SLACK, False) and not is_near(scores, 3, 0.2, False)
    assert not is_near(scores, 2, 0.7, False)  # of no probability, though the boundary is there
    assert is_near(torch.tensor([1.0, 1.0005]), 0, 0.0, True) and not is_near(torch.tensor([1.0, 1.01]), 0, 0.0, True)


# ---- cheats ----


def test_an_edited_text_is_refused(entered):
    text = entered[0].text
    assert "edited: from character 3 on" in refusal(entered, text=text[:3] + "!" + text[4:])
    assert "edited" in refusal(entered, text=text + " and more") and "edited" in refusal(entered, text=text[:-1])


def test_a_text_of_other_tokens_seed_or_knobs_is_refused(entered):
    submission, folder, _, _ = entered
    from kobza.checkpoint import load_checkpoint

    tokenizer = load_checkpoint(folder).tokenizer
    ids = list(submission.ids)
    ids[7] = (ids[7] + 1) % tokenizer.vocab_size
    edited = refusal(entered, ids=tuple(ids), text=tokenizer.decode(ids, continues=True))
    assert "token 7" in edited and "probability" in edited
    for change in (dict(seed=6), dict(temperature=1.5, top_k=0), dict(top_k=1)):
        assert "does not write this text: token" in refusal(entered, sampling=replace(HOW, **change))
    assert "does not write this text" in refusal(entered, prompt="lot ")
    short = submission.ids[:20]
    assert "cut short" in refusal(entered, ids=short, text=tokenizer.decode(short, continues=True))
    assert "none of the tokenizer's" in refusal(entered, ids=(*submission.ids[:-1], 10**6))
    assert "where --tokens is" in refusal(entered, ids=submission.ids + (1,))


def test_weights_swapped_after_hashing_are_refused(entered, runs):
    _, folder, _, _ = entered
    best = sorted((runs / "run1" / "checkpoints").iterdir())[-1]
    shutil.copy(best / "model.safetensors", folder / "model.safetensors")
    assert "its files were changed since" in refusal(entered)
    mended = checkpoint_digest(folder)  # and when the cheat thinks of the hash
    assert "sha256 is not that of the manifest" in refusal(entered, checkpoint=mended)
    shutil.rmtree(folder)
    collect(best, None, folder)
    assert "does not write this text" in refusal(entered, checkpoint=checkpoint_digest(folder))


def test_claims_that_the_files_do_not_bear_out_are_refused(entered):
    submission = entered[0]
    assert "n_embd is 32, not 64" in refusal(entered, model=replace(submission.model, n_embd=64, head_dim=32))
    assert "and the submission says 5" in refusal(entered, n_parameters=5)
    assert "submission 0.5" in refusal(entered, record=replace(submission.record, seconds=0.5))
    assert "record of tokens" in refusal(entered, record=replace(submission.record, tokens=1))
    assert "record of text_sha256" in refusal(entered, record=replace(submission.record, text_sha256="0" * 64))


def test_a_model_outside_the_rules_is_refused(entered):
    submission, folder, _, loose = entered
    n = submission.n_parameters
    assert f"{n:,} parameters; at most {n - 1:,}" in refusal(entered, replace(loose, most_parameters=n - 1))
    assert "trained for" in refusal(entered, replace(loose, most_seconds=submission.record.seconds / 2))
    assert "another text" in refusal(entered, replace(loose, data="0" * 64))
    (folder / METRICS).unlink()
    without = replace(submission.record, seconds=None)
    assert "no record says how long" in refusal(entered, replace(loose, most_seconds=100.0), record=without)


def test_a_record_of_another_training_is_refused(entered):
    _, folder, _, _ = entered
    path = folder / METRICS
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert "no step 8 like this" in refusal(entered)


def test_a_text_that_the_host_does_not_have_is_not_taken_for_the_hosts(tmp_path, runs, text):
    """Found by hand: a text that only the entrant has was within any rules, since none of its files was forbidden."""
    other = tmp_path / "other.txt"
    other.write_text("something else entirely\n" * 50)
    verbs.new("c", None, [str(other)], tmp_path)
    assert verbs.submit("c", runs / "run0", "tan ", "Ada", HOW, False, tmp_path) == 1
    assert "another text" in Contest.open(tmp_path, "c").entries()[0].verdict.lines[0]


@pytest.mark.parametrize(
    "rules, says",
    [
        (dict(prompt="once "), "this contest's is 'once '"),
        (dict(most_prompt_characters=2), "has 4 characters; at most 2"),
        (dict(most_tokens=10), "60 tokens (--tokens); at most 10"),
        (dict(temperature_to=0.5), "temperature is 0.9; from 0 to 0.5"),
    ],
)
def test_prompt_and_sampling_outside_the_rules_are_refused(entered, rules, says):
    assert says in refusal(entered, replace(entered[3], **rules))


def test_endless_work_is_refused_before_it_is_begun(entered):
    began = time.perf_counter()
    assert "at most 256" in refusal(entered, sampling=replace(HOW, tokens=2**62))
    assert "no such limit" in refusal(entered, sampling=replace(HOW, alphabet="uk"))
    assert time.perf_counter() - began < 5


def test_a_copied_passage_is_refused_and_quoted(entered):
    submission, _, bench, loose = entered
    source = "never before. " + submission.text[10:45] + " never again"
    from kobza.evals.copies import TextIndex

    def known(_):
        return TrainingText(tuple(loose.texts), TextIndex(source).longest)

    copied = (submission, entered[1], replace(bench, text=known), loose)
    told = refusal(copied, replace(loose, most_copied_characters=30))
    assert (
        "35 characters of the training text in a row, at most 30" in told and repr(submission.text[10:45])[1:-1] in told
    )
    assert verify(entered[1], submission, replace(loose, most_copied_characters=35), copied[2]).ok


def test_the_longest_copies_are_found_in_characters_and_in_whole_words():
    from kobza.evals.copies import TextIndex

    source = TextIndex("to be or not to be that is the question whether tis nobler")
    text = "asked: not to be that is the quest; or supercalifragilistic, o be or n"
    characters, words = longest_copies(text, source.longest(text))
    assert characters == " not to be that is the quest" and words == "not to be that is the"
    assert whole_words("one two three", 1, 9) == "two" and whole_words("one", 1, 2) == ""
    assert longest_copies("xyz", np.zeros(3, int)) == ("", "")


def test_without_the_training_text_the_verdict_says_so(entered):
    submission, folder, bench, loose = entered
    verdict = verify(folder, submission, replace(loose, data=""), replace(bench, text=lambda _: None))
    assert verdict.ok and any("copies: not looked for" in line for line in verdict.lines)


def forge_config(folder, submission, **model):
    """Another model config in both places, hashed as if it were honest."""
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= model
    (folder / "config.json").write_text(json.dumps(config))
    entries = json.loads((folder / "manifest.json").read_text())
    from kobza.contest.submission import file_digest

    path = folder / "config.json"
    entries["config.json"] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    (folder / "manifest.json").write_text(json.dumps(entries))
    return dict(model=replace(submission.model, **model), checkpoint=checkpoint_digest(folder))


@pytest.mark.parametrize(
    "model, says",
    [
        (dict(n_layer=10_000), "layers"),
        (dict(n_ff=10**9), "parameters, the weights"),
        (dict(n_ff=10**17), "parameters, the weights"),
        (dict(max_seq_len=10**9), "GB to run"),
        (dict(pad_vocab=10**9), "parameters, the weights"),
    ],
)
def test_a_config_that_would_fill_the_memory_is_refused_at_once(entered, model, says):
    began = time.perf_counter()
    assert says in refusal(entered, **forge_config(entered[1], entered[0], **model))
    assert time.perf_counter() - began < 3


@pytest.mark.parametrize("config", ["[" * 100_000, "5", '{"format": 2, "provenance": 7}', "\x00", '{"format": 99}'])
def test_a_config_that_is_none_is_refused(entered, config):
    (entered[1] / "config.json").write_text(config)
    refusal(entered, checkpoint=checkpoint_digest(entered[1]))


# ---- hostile files ----


@pytest.fixture
def packed(tmp_path, entered):
    """The file of an honest submission, and where to unpack it."""
    return pack(entered[1], tmp_path / "x.kobza"), tmp_path / "out"


def repacked(path, change, method=zipfile.ZIP_STORED):
    """The members of a submission's file, changed, as another file."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    out = path.with_name("forged.kobza")
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in change(members):
            archive.writestr(name, content)
    return out


def refused_file(path, out, most=10**8):
    """Why a file is refused; nothing of it is left."""
    with pytest.raises(InputError) as error:
        unpack(path, out, most)
    assert not out.exists() and "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def swapped(name, content):
    return lambda members: [(n, content if n == name else c) for n, c in members]


def test_packing_and_unpacking_gives_the_same(packed, entered):
    path, out = packed
    assert unpack(path, out, 10**8) == entered[0]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in entered[1].iterdir())
    assert verify(out, entered[0], entered[3], entered[2]).ok


PATHS = ["../evil", "/etc/evil", "a/../../evil", "model.safetensors/../evil", "C:\\evil"]


@pytest.mark.parametrize("name", [*PATHS, "training.safetensors", "model.pkl"])
def test_other_members_are_refused_wherever_they_lead(packed, name, tmp_path):
    path, out = packed
    assert "no part of a submission" in refused_file(repacked(path, lambda m: [*m, (name, b"evil")]), out)
    assert not list(tmp_path.rglob("*evil*"))


def test_a_pickle_is_never_loaded(packed, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    path, out = packed
    for name in ("model.safetensors", "config.json", SUBMISSION):
        refused_file(repacked(path, swapped(name, pickle.dumps(Evil()))), out)
    assert not (tmp_path / "owned").exists()


def test_absurd_headers_sizes_and_bombs_are_refused(packed):
    path, out = packed
    for header in (struct.pack("<Q", 2**63), struct.pack("<Q", 10**9) + b"{}", b""):
        refused_file(repacked(path, swapped("model.safetensors", header)), out)
    shape = json.dumps({"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}).encode()
    refused_file(repacked(path, swapped("model.safetensors", struct.pack("<Q", len(shape)) + shape + b"1234")), out)
    assert "compressed" in refused_file(repacked(path, lambda m: m, zipfile.ZIP_DEFLATED), out)
    assert "the rules allow" in refused_file(path, out, 1000)
    assert "at most" in refused_file(repacked(path, swapped("config.json", b" " * 1_000_001)), out)


def test_a_forged_directory_that_claims_more_than_the_file_has_is_refused(packed):
    path, out = packed
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)  # sizes of the first member
    path.write_bytes(raw)
    refused_file(path, out, 2**33)


def test_damaged_doubled_and_missing_parts_are_refused(packed):
    path, out = packed
    raw = path.read_bytes()
    for cut in (0, 10, len(raw) // 2, len(raw) - 10):
        path.with_name("cut.kobza").write_bytes(raw[:cut])
        refused_file(path.with_name("cut.kobza"), out)
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 1
    path.with_name("flipped.kobza").write_bytes(flipped)
    refused_file(path.with_name("flipped.kobza"), out)
    with pytest.warns(UserWarning, match="Duplicate"):
        assert "twice" in refused_file(repacked(path, lambda m: [*m, m[0]]), out)
    assert "missing" in refused_file(repacked(path, lambda m: m[1:]), out)
    assert "no such file" in refused_file(path.with_name("none.kobza"), out)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"[" * 10_000, b"{}", b'{"format": 1}', b"null", b"1e999", b'{"format": {"a": 1}}', b"\x00" * 100],
)
def test_a_submission_that_is_none_is_refused(packed, content):
    path, out = packed
    refused_file(repacked(path, swapped(SUBMISSION, content)), out)


@pytest.mark.parametrize(
    "change",
    [
        dict(name=5),
        dict(name="<b>" * 100),
        dict(name=" Ada"),
        dict(prompt="x" * 10_000_000),
        dict(prompt="x" * 200_000),
        dict(prompt="\ud800"),
        dict(text=None),
        dict(ids="abc"),
        dict(ids=[]),
        dict(ids=[1.5]),
        dict(ids=[-1]),
        dict(ids=[2**70]),
        dict(ids=[True]),
        dict(n_parameters="5"),
        dict(sampling={"temprature": 1}),
        dict(sampling={"temperature": float("nan")}),
        dict(sampling={"seed": -1}),
        dict(sampling=[]),
        dict(model={"n_layer": 10**30}),
        dict(model={"n_head": 0}),
        dict(record={"seconds": float("inf")}),
        dict(record={"seconds": "0"}),
        dict(record={"steps": -3}),
        dict(record={"hours": 1}),
        dict(checkpoint="../../x"),
        dict(extra=1),
    ],
)
def test_a_value_of_a_submission_that_cannot_be_is_refused_or_does_not_fit(packed, entered, change):
    path, out = packed
    content = json.loads(entered[0].to_json()) | change
    refused_file(repacked(path, swapped(SUBMISSION, json.dumps(content).encode())), out)


def test_a_submission_comes_back_from_its_json(entered):
    assert read_submission(entered[0].to_json(), "here") == entered[0]


# ---- apart ----


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here to wait at")
def test_an_entry_that_hangs_or_kills_its_reader_is_refused_and_the_next_one_is_judged(
    tmp_path, runs, monkeypatch, capsys
):
    verbs.new("c", None, [], tmp_path)
    contest = Contest.open(tmp_path, "c")
    for run, who in (("run0", "Ada"), ("run1", "Bob")):
        verbs.pack(runs / run, "tan ", who, HOW, tmp_path / f"{who}.kobza")
        contest.receive(tmp_path / f"{who}.kobza")
    ada, bob = contest.entries()
    config = contest.checkpoint(ada) / "config.json"
    config.unlink()
    os.mkfifo(config)  # whoever reads it waits for ever
    monkeypatch.setattr(verbs, "verdicts", partial(contest_bench.verdicts, seconds=2))
    capsys.readouterr()
    assert verbs.verify("c", None, True, tmp_path) == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["status"] for one in found] == ["refused", "accepted"], found
    assert "took longer than 2 s" in found[0]["lines"][0]
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    assert contest_bench.ask(ours, ada, 1) is None  # dead


# ---- the verbs ----


def test_a_whole_contest_by_its_verbs(tmp_path, runs, text, capsys):
    rules = tmp_path / "rules.toml"
    free = EXAMPLE.replace("most_copied_characters = 60", "most_copied_characters = 0")
    rules.write_text(free.replace("most_copied_words = 12", "most_copied_words = 0").replace("?", " </title><script>?"))
    assert verbs.new("c", rules, [text], tmp_path) == 0
    hostile = "<script>alert(1)</script>"
    assert verbs.submit("c", runs / "run0", "tan ", hostile, HOW, False, tmp_path) == 0
    assert verbs.pack(runs / "run1", "tan ", "=HYPERLINK(1)", HOW, tmp_path / "x.kobza") == 0
    capsys.readouterr()
    assert verbs.submit("c", tmp_path / "x.kobza", None, None, SampleConfig(), True, tmp_path) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "accepted"
    assert verbs.state("c", "voting", tmp_path) == 0

    def nothing(_):
        raise EOFError

    answers = iter(["?", "l"])
    assert verbs.vote("c", "Vera", tmp_path, ask=nothing) == 0
    assert verbs.vote("c", "Vera", tmp_path, ask=lambda _: next(answers)) == 0
    said = capsys.readouterr().out
    assert "1 votes of Vera" in said and hostile not in said and "HYPERLINK" not in said  # blind
    assert verbs.standings("c", True, tmp_path) == 0
    assert [row["place"] for row in json.loads(capsys.readouterr().out)] == [1, 2]
    verbs.state("c", "closed", tmp_path)
    assert verbs.bracket("c", False, tmp_path) == 0 and verbs.standings("c", False, tmp_path) == 0
    assert "winner: " in capsys.readouterr().out
    assert verbs.bracket("c", True, tmp_path) == 0 and json.loads(capsys.readouterr().out)["champion"] in (1, 2)
    assert verbs.export("c", tmp_path / "out", tmp_path) == 0
    page = (tmp_path / "out" / "contest.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "http:" not in page and "https:" not in page
    for name in ("entries", "votes", "standings"):
        cells = [
            cell for row in csv.reader(io.StringIO((tmp_path / "out" / f"{name}.csv").read_text())) for cell in row
        ]
        assert not [c for c in cells if c.startswith("=")]


def test_what_a_person_gets_wrong_is_said_in_a_line(tmp_path, runs, text):
    verbs.new("c", None, [], tmp_path)
    for call, says in [
        (lambda: verbs.submit("d", runs / "run0", None, "Ada", HOW, False, tmp_path), "no contest 'd'"),
        (lambda: verbs.submit("c", runs / "run0", None, None, HOW, False, tmp_path), "give --who"),
        (lambda: verbs.submit("c", runs / "none", None, "Ada", HOW, False, tmp_path), "no such run"),
        (lambda: verbs.submit("c", runs / "run0", "ы", "Ada", HOW, False, tmp_path), "not in the vocabulary"),
        (lambda: verbs.verify("c", None, False, tmp_path), "no entries yet"),
        (lambda: verbs.verify("c", 7, False, tmp_path), "no entry 7"),
        (lambda: verbs.state("c", "voting", tmp_path), "takes two"),
        (lambda: verbs.new("c", None, [], tmp_path), "already"),
        (lambda: verbs.new("e", tmp_path / "none.toml", [], tmp_path), "cannot be read"),
        (lambda: verbs.new("e", None, [str(tmp_path / "none.txt")], tmp_path), "cannot be read"),
        (lambda: verbs.pack(runs / "run0", None, "Ada", HOW, Path(text)), "is there already"),
        (lambda: verbs.pack(runs / "run0", None, "Ada", HOW, tmp_path / "no" / "x.kobza"), "cannot be written"),
    ]:
        with pytest.raises(InputError, match=says) as error:
            call()
        assert "\n" not in str(error.value)
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b"title = '\xff'")
    with pytest.raises(InputError, match="0xff is not UTF-8"):
        verbs.new("e", bad, [], tmp_path)


def test_the_same_run_twice_is_a_duplicate(tmp_path, runs):
    verbs.new("c", None, [], tmp_path)
    verbs.submit("c", runs / "run0", "tan ", "Ada", HOW, False, tmp_path)
    with pytest.raises(Duplicate):
        verbs.submit("c", runs / "run0", "tan ", "Bob", HOW, False, tmp_path)


def test_texts_of_the_host_find_their_place_in_the_rules(tmp_path, text):
    verbs.new("one", None, [text], tmp_path)
    (digest,) = Contest.open(tmp_path, "one").rules.texts
    bare = tmp_path / "bare.toml"
    bare.write_text('title = "x"\n')
    verbs.new("two", bare, [text], tmp_path)
    assert Contest.open(tmp_path, "two").rules == Rules(title="x", data=digest)
    bare.write_text(f'data = "{"0" * 64}"\n')
    with pytest.raises(InputError, match="names others"):
        verbs.new("three", bare, [text], tmp_path)


@pytest.mark.parametrize(
    "text", ["=cmd|' /C calc'!A0", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "  =1", "\n=1", "＝1"]
)
def test_a_formula_in_a_text_is_no_formula_in_a_spreadsheet(text):
    assert cell(text).startswith("'") and cell("a=1") == "a=1" and cell(-1.5) == -1.5


def test_what_would_steer_a_terminal_is_shown(tmp_path):
    assert verbs.plain("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb\nc\\u202e" and verbs.plain("abcdef", 5) == "ab..."


def test_a_submission_is_frozen_and_checked():
    with pytest.raises(InputError, match="ids"):
        Submission("Ada", "", HOW, "t", (), "c", ModelConfig(vocab_size=5), 1, Record())

"""The whole story: text of any kind -> a trained run with its pictures -> verse, by the command line alone."""

import csv
import gzip
import io
import json

import pytest
from test_run import SMALL, verse

from kobza.cli import main
from kobza.recipes.generate import StopFinder

FEW = [word.replace("steps=40", "steps=4").replace("interval=10", "interval=2") for word in SMALL]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A run trained on verse, pictures and all."""
    folder = tmp_path_factory.mktemp("story")
    (folder / "verse.txt").write_text(verse())
    assert main(["train", str(folder / "verse.txt"), "--out", str(folder / "run"), *SMALL]) == 0
    return folder / "run"


def write(story, capsys, *options):
    """What `kobza generate` prints."""
    capsys.readouterr()
    assert main(["generate", str(story), *options]) == 0
    return capsys.readouterr().out


def texts(story, capsys, *options):
    """The texts of `kobza generate --json`."""
    return [sample["text"] for sample in json.loads(write(story, capsys, "--json", *options))["samples"]]


# ---- train ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_pictures_samples_and_checkpoints(story):
    assert (story / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (story / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>") and "://" not in page.replace("http://www.w3.org", "")
    samples = [json.loads(line) for line in (story / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [10, 20, 30, 40]
    assert all(len(sample["text"]) == 120 for sample in samples)


def test_what_training_says(tmp_path, capsys):
    (tmp_path / "verse.txt").write_text(verse())
    assert main(["train", str(tmp_path / "verse.txt"), "--out", str(tmp_path / "my run"), *FEW]) == 0
    said = capsys.readouterr().out
    for word in ("verse.txt", "parameters", "tokens of", "knows nothing", "fp32 on", "step 2 ", "step 4 ", "train ", "val ",
                 "bits/byte", "perplexity", "done in", "best validation loss", "loss.png", "report.html"):  # fmt: skip
        assert word in said, word
    assert f"kobza generate '{tmp_path / 'my run'}' --prompt " in said  # quoted for the shell
    shown = [line for line in said.splitlines() if line.startswith("  |")]
    assert shown and shown[0].strip("| ") and shown[-1].strip("| ")  # no blank lines around a sample


def test_report_draws_again_and_remarks(story, capsys):
    (story / "loss.png").unlink()
    assert main(["report", str(story)]) == 0
    said = capsys.readouterr().out
    assert "best validation loss" in said and "report.html" in said
    assert (story / "loss.png").exists()


def bodies(n):
    return [verse(3000, seed) for seed in range(n)]


def write_folder(folder):
    (folder / "in" / "deep").mkdir(parents=True)
    (folder / "in" / "a.txt").write_text(bodies(1)[0])
    (folder / "in" / "deep" / "b.md").write_text(bodies(2)[1])
    (folder / "in" / "skipped.py").write_text("x")
    return folder / "in", 2


def write_jsonl(folder):
    with open(folder / "in.jsonl", "w") as file:
        file.writelines(json.dumps({"text": body}) + "\n" for body in bodies(3))
    return folder / "in.jsonl", 3


def write_csv(folder):
    with open(folder / "in.csv", "w", newline="") as file:
        csv.writer(file).writerows([["title", "text"], *(["t", body] for body in bodies(3))])
    return folder / "in.csv", 3


def write_gzip(folder):
    (folder / "in.txt.gz").write_bytes(gzip.compress(verse().encode()))
    return folder / "in.txt.gz", 1


@pytest.mark.parametrize("make", [write_folder, write_jsonl, write_csv, write_gzip])
def test_every_kind_of_text_trains_and_speaks(make, tmp_path, capsys):
    path, n_documents = make(tmp_path)
    out = tmp_path / "run"
    assert main(["train", str(path), "--out", str(out), *FEW]) == 0
    index = json.loads((out / "tokens" / "index.json").read_text())
    assert index["n_documents"] == n_documents
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    assert [t["content"] for t in tokenizer["added_tokens"]] == ["<|endoftext|>"] * (n_documents > 1)
    assert write(out, capsys, "--tokens", "20")


def test_standard_input_trains(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(verse().encode())))
    assert main(["train", "-", "--out", str(tmp_path / "run"), *FEW]) == 0
    assert json.loads((tmp_path / "run" / "tokens" / "index.json").read_text())["n_bytes"] == len(verse())


def test_a_bpe_run_trains_and_speaks_of_what_it_never_saw(tmp_path, capsys):
    (tmp_path / "verse.txt").write_text(verse())
    options = ["--tokenizer", "bpe", "--vocab-size", "300", *FEW]
    assert main(["train", str(tmp_path / "verse.txt"), "--out", str(tmp_path / "run"), *options]) == 0
    assert "300" in (tmp_path / "run" / "config.toml").read_text()
    more = ["--resume", "--out", str(tmp_path / "run"), "--train.steps", "6", "--device", "cpu"]
    assert main(["train", *more]) == 0
    prompt = "\u043a\u043e\u0431\u0437\u0430 \U0001f3b6"
    assert write(tmp_path / "run", capsys, "--prompt", prompt, "--tokens", "9").startswith(prompt)


def test_a_character_run_with_bytes_takes_any_prompt(tmp_path, capsys):
    (tmp_path / "verse.txt").write_text(verse())
    assert main(["train", str(tmp_path / "verse.txt"), "--out", str(tmp_path / "run"), "--unknown", "bytes", *FEW]) == 0
    assert write(tmp_path / "run", capsys, "--prompt", "\u043a", "--tokens", "3").startswith("\u043a")


def test_a_text_of_one_long_line_trains_and_speaks(tmp_path, capsys):
    (tmp_path / "dna.txt").write_text("".join("ACGT"[ord(c) % 4] for c in verse(4000)))
    assert main(["train", str(tmp_path / "dna.txt"), "--out", str(tmp_path / "run"), *FEW]) == 0
    assert write(tmp_path / "run", capsys, "--tokens", "20").strip().strip("ACGT") == ""


# ---- generate ------------------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_text_and_another_another(story, capsys):
    one = write(story, capsys, "--seed", "3", "--tokens", "40")
    assert one == write(story, capsys, "--seed", "3", "--tokens", "40")
    assert one != write(story, capsys, "--seed", "4", "--tokens", "40")


def test_a_text_is_the_same_alone_in_a_batch_and_as_json(story, capsys):
    alone = [texts(story, capsys, "--seed", str(seed), "--tokens", "30")[0] for seed in (5, 6, 7)]
    assert texts(story, capsys, "--seed", "5", "--samples", "3", "--tokens", "30") == alone
    together = write(story, capsys, "--seed", "5", "--samples", "3", "--tokens", "30", "--prompt", "ba")
    for seed in (5, 6, 7):
        assert f"--- sample {seed - 4}, seed {seed}\nba" in together
        assert texts(story, capsys, "--seed", str(seed), "--tokens", "30", "--prompt", "ba")[0] in together
    assert write(story, capsys, "--seed", "5", "--tokens", "30").strip("\n") == alone[0].strip("\n")


def test_greedy_does_not_depend_on_the_seed(story, capsys):
    options = ["--temperature", "0", "--tokens", "30", "--seed"]
    assert texts(story, capsys, *options, "1") == texts(story, capsys, *options, "2")


def test_a_text_goes_on_far_beyond_the_context(story, capsys):
    assert len(texts(story, capsys, "--tokens", "100")[0]) == 100  # the context is 16


def test_a_prompt_longer_than_the_context_is_kept_whole_in_the_output(story, capsys):
    prompt = verse()[:60]
    assert write(story, capsys, "--prompt", prompt, "--tokens", "5").startswith(prompt)


def test_the_prompt_may_come_from_standard_input(story, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Bada"))
    assert write(story, capsys, "--prompt", "-", "--tokens", "5").startswith("Bada")


def test_a_text_ends_where_a_stop_string_stands(story, capsys):
    whole = texts(story, capsys, "--tokens", "80")[0]
    stop = whole[30:32]
    cut = texts(story, capsys, "--tokens", "80", "--stop", stop, "--stop", "-")[0]
    assert cut == whole[: whole.index(stop)]
    assert write(story, capsys, "--tokens", "80", "--stop", stop).rstrip("\n").endswith(cut)


@pytest.mark.parametrize(
    "pieces, stops, shown",
    [("a|b|c", ["bc"], "a"), ("ab|x", ["bc"], "abx"), ("abc", ["c", "b"], "a"), ("ab", [], "ab")],
)
def test_stop_strings_are_found_across_pieces(pieces, stops, shown):
    finder = StopFinder(stops)
    parts = [finder.feed(piece) for piece in pieces.split("|")]
    assert "".join(parts) + ("" if finder.found else finder.held) == shown


def test_probabilities_are_shown_at_each_step(story, capsys):
    said = write(story, capsys, "--show-probabilities", "--tokens", "3", "--prompt", "ba")
    rows = [line for line in said.splitlines() if "%" in line]
    assert len(rows) == 3 and all(row.count("%") == 6 for row in rows)
    assert said.splitlines()[-1].startswith("ba") or "\nba" in said


def test_text_comes_as_it_is_made(story, monkeypatch, capsys):
    """Each piece is written before the next is computed."""
    from kobza.recipes import generate as recipe

    seen = []
    plain = recipe.generate

    def watched(*args, **more):
        for choice in plain(*args, **more):
            seen.append(capsys.readouterr().out)
            yield choice

    monkeypatch.setattr(recipe, "generate", watched)
    assert main(["generate", str(story), "--tokens", "10", "--prompt", "ba"]) == 0
    assert seen[0] == "ba" and all(len(piece) == 1 for piece in seen[1:])


# ---- chat ----------------------------------------------------------------------------------------------------------


def chat(story, lines, monkeypatch, capsys, *options):
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(lines)))
    assert main(["chat", str(story), "--tokens", "20", *options]) == 0
    return capsys.readouterr()


def test_chat_answers_each_line_until_the_input_ends(story, monkeypatch, capsys):
    one = chat(story, ["Bada fo\n"], monkeypatch, capsys).out
    two = chat(story, ["Bada fo\n", "gimo\n"], monkeypatch, capsys).out
    assert len(two) > len(one)
    assert two.startswith(one.rstrip("\n> "))


def test_chat_goes_on_after_a_line_it_cannot_read(story, monkeypatch, capsys):
    said = chat(story, ["\u00fc\n", "Bada\n"], monkeypatch, capsys, "--unknown", "error")
    assert "not in the vocabulary" in said.out and "Traceback" not in said.err


def test_chat_takes_a_line_of_only_unknown_characters(story, monkeypatch, capsys):
    assert "Traceback" not in chat(story, ["\u00fc\u00fc\n", "Bada\n"], monkeypatch, capsys).err


# ---- demo ----------------------------------------------------------------------------------------------------------


def test_the_demo_trains_once_and_then_only_speaks(tmp_path, monkeypatch, capsys):
    (tmp_path / "verse.txt").write_text(verse() + "ROMEO:\n")
    small = {"n_layer": 1, "n_head": 2, "n_embd": 16, "max_seq_len": 16}
    tiny = {"model": small, "train": {"steps": 4, "micro_batch": 4, "eval_interval": 2, "precision": "fp32"}}
    monkeypatch.setattr("kobza.cli.preset", lambda _: tiny)
    monkeypatch.setattr("kobza.recipes.train.default_text", lambda: (tmp_path / "verse.txt", "text: verse"))
    for _ in range(2):
        assert main(["demo", "--out", str(tmp_path / "demo"), "--device", "cpu"]) == 0
        said = capsys.readouterr().out
        assert "ROMEO:" in said and "loss.png" in said and "kobza chat" in said
    assert "trained already" in said and "step 2" not in said

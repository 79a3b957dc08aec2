"""kobza export as a person calls it: from scratch, tuned, adapters; proven or refused, whole or absent."""

import json
import shutil

import pytest
import torch
from test_finetune import write_base

from kobza import cli
from kobza.export.proof.certificate import Certificate, verify

VERSE = "ROMEO:\nWhat light is this?\n\nJULIET:\nIt is the east, and I am here; so speak, JULIET says.\n\n" * 40
KOBZAR = (
    "Реве та стогне Дніпр широкий,\nСердитий вітер завива,\nДодолу верби гне високі,\nГорами хвилю підійма.\n\n" * 40
)
TINY = "--model.n_layer 2 --model.n_head 2 --model.n_embd 32 --model.n_ff 64 --model.max_seq_len 64".split()
QUICK = "--train.steps 4 --train.micro_batch 4 --train.eval_interval 4".split()
TABLE = ("--prompt", "{name}, {sex}. Survived?", "--answer", "{survived}")


def run_of(folder, text, *more):
    (folder / "text.txt").write_text(text, encoding="utf-8")
    out = str(folder / "run")
    assert cli.main(["train", str(folder / "text.txt"), "--out", out, *TINY, *QUICK, *more]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def verse(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("verse"), VERSE)


@pytest.fixture(scope="module")
def kobzar(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("kobzar"), KOBZAR, "--tokenizer", "bpe", "--vocab-size", "300")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    write_base(folder / "base")
    rows = [f"Passenger {i},{'fe' * (i % 2)}male,{'yes' if i % 2 else 'no'}" for i in range(40)]
    (folder / "table.csv").write_text("\n".join(["name,sex,survived", *rows]))
    out = ["--out", str(folder / "tuned"), "--train.steps", "3", "--train.lr", "0.01"]
    assert cli.main(["finetune", str(folder / "base"), str(folder / "table.csv"), *TABLE, *out]) == 0
    return folder / "tuned"


def export(capsys, run, out, *more):
    code = cli.main(["export", str(run), "--out", str(out), *more])
    seen = capsys.readouterr()
    return code, seen.out + seen.err


def certificates(out):
    return [Certificate.from_json(path.read_text()) for path in sorted(out.glob("*certificate.json"))]


FORMS = [("hf",), ("gguf", "--types", "F16,q8_0,Q4_K_M"), ("ollama", "--types", "Q5_0")]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[0])
@pytest.mark.parametrize("which", ["verse", "kobzar", "tuned"])
def test_what_is_exported_is_proven(which, form, request, tmp_path, capsys):
    out = tmp_path / "out"
    code, said = export(capsys, request.getfixturevalue(which), out, "--to", *form)
    assert code == 0, said
    found = certificates(out)
    assert len(found) == (3 if form[0] == "gguf" else 1) and all(one.ok for one in found)
    assert not any(verify(one, out) for one in found)
    assert (out / "certificate.html").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert "proven" in said and "next" in said


@pytest.mark.parity
def test_the_other_program_is_the_one_that_proves(verse, tmp_path, capsys):
    for package in ("transformers", "xllamacpp"):
        pytest.importorskip(package)
    for to, engine in (("hf", "transformers"), ("gguf", "llama.cpp")):
        assert export(capsys, verse, tmp_path / to, "--to", to)[0] == 0
        (found,) = certificates(tmp_path / to)
        assert found.independent and engine in found.engine


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_without_other_programs_our_own_reader_proves_and_says_so(to, verse, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kobza.recipes.export_form.available", lambda package: None)
    code, said = export(capsys, verse, tmp_path / "out", "--to", to)
    (found,) = certificates(tmp_path / "out")
    assert code == 0 and found.ok and not found.independent and "weaker proof" in said


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_what_comes_back_by_pull_is_the_run(to, verse, tmp_path, capsys, monkeypatch):
    from kobza.checkpoint import load_checkpoint

    more = ["--types", "F32"] if to == "gguf" else []
    assert export(capsys, verse, tmp_path / "out", "--to", to, "--name", "back", *more)[0] == 0
    source = tmp_path / "out" / ("back-F32.gguf" if to == "gguf" else "")
    ours, back = load_checkpoint(verse), pulled(source, monkeypatch, tmp_path)
    ids = torch.tensor([ours.tokenizer.encode("JULIET:\nIt is").tolist()])
    assert back.tokenizer.encode("JULIET:\nIt is").tolist() == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(back.model(ids), ours.model(ids), rtol=0, atol=1e-5)


def pulled(source, monkeypatch, folder):
    from kobza.checkpoint import load_checkpoint

    monkeypatch.setattr("kobza.hub.store.models_folder", lambda: folder / "store")
    assert cli.main(["pull", str(source), "--name", "back"]) == 0
    return load_checkpoint(folder / "store" / "back")


@pytest.mark.parity
@pytest.mark.parametrize("to", ["hf", "gguf", "ollama"])
def test_an_adapter_alone_on_its_base_is_the_tuned_model(to, tuned, tmp_path, capsys):
    for package in ("transformers", "peft", "xllamacpp"):
        pytest.importorskip(package)
    code, said = export(capsys, tuned, tmp_path / "out", "--to", to, "--adapter")
    assert code == 0, said
    (found,) = certificates(tmp_path / "out")
    assert found.ok and found.independent
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parity
def test_an_adapter_of_another_tuning_is_refused(tuned, tmp_path, capsys, monkeypatch):
    pytest.importorskip("xllamacpp")
    from kobza.recipes import export_adapter

    real = export_adapter.write_lora_gguf

    def half(path, config, pairs, *more):
        real(path, config, {name: pair._replace(scale=pair.scale / 2) for name, pair in pairs.items()}, *more)

    monkeypatch.setattr(export_adapter, "write_lora_gguf", half)
    code, said = export(capsys, tuned, tmp_path / "out", "--to", "gguf", "--adapter")
    assert code == 1 and "REFUSED" in said


def test_what_fails_is_set_aside_and_says_why(verse, tmp_path, capsys, monkeypatch):
    from kobza.export import hf

    real = hf.hf_pieces

    def swapped(config, hf_config, read, shapes):
        other = {"blocks.0.attn.q_proj.weight": "blocks.0.attn.k_proj.weight"}
        return real(config, hf_config, lambda name: read(other.get(name, name)), shapes)

    monkeypatch.setattr(hf, "hf_pieces", swapped)
    code, said = export(capsys, verse, tmp_path / "out", "--to", "hf")
    assert code == 1 and "weights" in said and "q_proj" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.refused"]
    (found,) = certificates(tmp_path / "out.refused")
    assert not found.ok and "weights" in found.failed and "\nnext " not in said


def test_no_certificate_says_so_in_the_artifact(verse, tmp_path, capsys):
    code, said = export(capsys, verse, tmp_path / "out", "--to", "hf", "--no-certificate")
    (found,) = certificates(tmp_path / "out")
    assert code == 0 and not found.ok and "--no-certificate" in found.why_not and "UNPROVEN" in said
    assert not json.loads((tmp_path / "out" / "certificate.json").read_text())["certified"]


def test_json_is_one_object(verse, tmp_path, capsys):
    assert cli.main(["export", str(verse), "--to", "gguf", "--out", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] and said["out"] == str(tmp_path / "out")
    (certificate,) = said["certificates"].values()
    assert certificate["certified"] and certificate["source"]["sha256"]


def test_importance_and_max_kl_reach_the_file(verse, tmp_path, capsys):
    from kobza.formats.gguf import read_gguf

    text = tmp_path / "text.txt"
    text.write_text(VERSE)
    plain = export(capsys, verse, tmp_path / "a", "--to", "gguf", "--types", "Q4_0")
    weighed = export(capsys, verse, tmp_path / "b", "--to", "gguf", "--types", "Q4_0", "--importance", str(text))
    near = export(capsys, verse, tmp_path / "c", "--to", "gguf", "--types", "Q4_0", "--max-kl", "1e-9")
    assert (plain[0], weighed[0], near[0]) == (0, 0, 0), plain[1] + weighed[1] + near[1]
    files = [next((tmp_path / name).glob("*.gguf")) for name in "abc"]
    assert files[0].read_bytes() != files[1].read_bytes()
    types = [{t.type for t in read_gguf(file).tensors.values()} for file in files]
    assert types[2] - types[0] and "kept wider" in near[1]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--to", "hf", "--types", "Q8_0"), "--types Q8_0 has no effect with --to hf"),
        (("--to", "gguf", "--name", "../elsewhere"), "it names files"),
        (("--to", "gguf", "--dtype", "float16"), "no effect with --to gguf"),
        (("--to", "gguf", "--types", "Q4_9"), "no such GGUF type: Q4_9"),
        (("--to", "gguf", "--types", "Q8_0,q8_0"), "given twice"),
        (("--to", "ollama", "--types", "Q8_0,F16"), "give one type"),
        (("--to", "ollama", "--num-ctx", "65"), "a context of 64"),
        (("--to", "ollama", "--go-template", "none.txt"), "no such file"),
        (("--to", "hf", "--base", "x"), "--base x has no effect without --adapter"),
        (("--to", "hf", "--adapter"), "--adapter has no effect"),
        (("--to", "gguf", "--max-kl", "0"), "--max-kl is 0"),
        (("--to", "gguf", "--types", "F32", "--importance", "text.txt"), "--importance has no effect on F32"),
        (("--to", "hf", "--no-certificate", "--held-out", "x"), "--held-out has no effect"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, why, verse, tmp_path, capsys):
    code, said = export(capsys, verse, tmp_path / "out", *words)
    assert code == 2 and why in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_other_program_computes_names_the_switch(tmp_path, capsys):
    run = run_of(tmp_path, VERSE, "--preset", "tiny")
    code, said = export(capsys, run, tmp_path / "out", "--to", "hf")
    assert code == 2 and "--model.mlp swiglu" in said and not (tmp_path / "out").exists()
    words = ["train", str(tmp_path / "text.txt"), "--preset", "tiny", "--exportable", "--out", str(tmp_path / "new")]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "--model.mlp swiglu" in said and not (tmp_path / "new" / "config.toml").exists()
    options = said.strip().split("; train with ")[1].split(" or with ")
    assert len(options) == 2
    for i, option in enumerate(options):  # what it says to do is what the command line takes
        words[-1] = str(tmp_path / f"new{i}")
        assert cli.main([*words, *option.split(), *TINY, *QUICK]) == 0


def test_exportable_refuses_a_vocabulary_before_training(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(KOBZAR, encoding="utf-8")
    out = tmp_path / "run"
    words = ["train", str(tmp_path / "text.txt"), "--exportable", "--out", str(out), *TINY, *QUICK]
    assert cli.main(words) == 2
    assert "--data.bos" in capsys.readouterr().err
    assert not any((out / name).exists() for name in ("config.toml", "tokens", "tokenizer.json"))
    assert cli.main([*words, "--data.bos"]) == 0
    assert export(capsys, out, tmp_path / "out", "--to", "gguf")[0] == 0


def test_a_damaged_checkpoint_is_refused(verse, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(verse, run)
    path = next(run.glob("checkpoints/*/model.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, said = export(capsys, run, tmp_path / "out", "--to", "hf")
    assert code == 2 and "sha256" in said and not (tmp_path / "out").exists()


def test_a_certificate_is_of_the_files_as_they_were(verse, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(capsys, verse, out, "--to", "hf")[0] == 0
    assert cli.main(["certificate", str(out)]) == 0
    assert "checks held in" in capsys.readouterr().out
    (out / "generation_config.json").write_text("{}")
    assert cli.main(["certificate", str(out), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["certificates"]["certificate.json"] == {
        "certified": True, "changed": ["generation_config.json has changed since"]
    }  # fmt: skip
    assert cli.main(["certificate", str(tmp_path)]) == 2


def test_a_modelfile_is_part_of_what_was_proven(tuned, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(capsys, tuned, out, "--to", "ollama")[0] == 0
    assert cli.main(["certificate", str(out)]) == 0
    (out / "Modelfile").write_text((out / "Modelfile").read_text().replace("<|im_end|>", "<|im_start|>"))
    assert cli.main(["certificate", str(out)]) == 1
    assert "CHANGED: Modelfile has changed since" in capsys.readouterr().out

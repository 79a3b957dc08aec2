"""doctor/template.py: each injected fault caught by its own code, no alarm on clean templates, no harm by hostile ones."""

import json
import subprocess
import sys
import time

import pytest

from kobza.config import InputError
from kobza.doctor import selftest
from kobza.doctor.files import template as area
from kobza.doctor.files.turns import chunks, conversations, dialogue, rest_after_common, take_apart
from kobza.doctor.finding import examine, exit_code
from kobza.doctor.mutations import template as proof
from kobza.doctor.mutations.specimens import edit, folder
from kobza.formats.template import find_template


@pytest.mark.parametrize("control", proof.CONTROLS, ids=lambda control: control.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_alarm_on_a_clean_template(control, seed):
    trial = selftest.run_trial("template", area.CHECKS, control, seed, "bf16" if seed == 1 else "fp32")
    assert trial.good, (trial.found, trial.broken)


@pytest.mark.parametrize("mutation", proof.MUTATIONS, ids=lambda mutation: f"{mutation.code} {mutation.name}")
def test_each_fault_is_caught_by_its_own_code(mutation):
    trial = selftest.run_trial("template", area.CHECKS, mutation, 0, "fp32")
    assert mutation.code in trial.found, trial.found
    assert not trial.broken


def test_every_code_has_its_mutation():
    assert selftest.unproven("template") == []


def codes(subject):
    return selftest.codes_found(examine(area.CHECKS, subject))


def test_against_the_family_own_template_nothing_else_is_reported(tmp_path):
    """A finding of C5 is the first conversation that differs, with the text and the token where it does."""
    one, two = folder(tmp_path / "one", "llama"), folder(tmp_path / "two", "llama")
    proof.swap("<|eot_id|>'", "<|eot_id|>\\n'")(two)
    (finding,) = [f for o in examine(area.CHECKS, area.open_(one, against=two)) for f in o.findings]
    assert finding.code == "C5" and finding.severity == "error"
    assert "Hello there" in finding.counterexample and "token " in finding.counterexample


def test_a_gguf_is_read_as_its_folder(tmp_path):
    from kobza.formats import gguf

    path = folder(tmp_path / "qwen", "qwen")
    config = json.loads((path / "tokenizer_config.json").read_text())
    listed = json.loads((path / "tokenizer.json").read_text())
    names = {i: name for name, i in listed["model"]["vocab"].items()}
    names |= {token["id"]: token["content"] for token in listed["added_tokens"]}
    special = {token["id"] for token in listed["added_tokens"]}
    ends = {name: i for i, name in names.items()}

    def write(file, eos):
        metadata = {
            "general.architecture": "qwen2",
            "tokenizer.chat_template": config["chat_template"],
            "tokenizer.ggml.tokens": [names[i] for i in sorted(names)],
            "tokenizer.ggml.token_type": [3 if i in special else 1 for i in sorted(names)],
            "tokenizer.ggml.eos_token_id": ends[eos],
            "tokenizer.ggml.add_bos_token": False,
        }
        _write_gguf(gguf, file, metadata)
        return file

    assert codes(area.open_(write(tmp_path / "good.gguf", "<|im_end|>"))) == ()
    assert codes(area.open_(write(tmp_path / "bad.gguf", "<|endoftext|>"))) == ("P5",)
    assert codes(area.open_(path, against=tmp_path / "good.gguf")) == ()
    (tmp_path / "Modelfile").write_text(proof.modelfile(proof.CHATML_GO).replace("./model.gguf", "good.gguf"))
    assert codes(area.open_(tmp_path / "Modelfile")) == ()  # the file it is from stops at <|im_end|>
    lies = {
        "tokenizer.chat_template": proof.MISTRAL,
        "tokenizer.ggml.tokens": ["a"],
        "tokenizer.ggml.token_type": ["x"],
    }
    _write_gguf(
        gguf, tmp_path / "lies.gguf", lies | {"tokenizer.ggml.eos_token_id": 99, "tokenizer.ggml.bos_token_id": 7}
    )
    assert codes(area.open_(tmp_path / "lies.gguf")) == ()


def _write_gguf(gguf, file, metadata):
    """A GGUF without tensors, by the format's own description."""
    import struct

    def text(value):
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw

    def value_of(value):
        if isinstance(value, bool):
            return struct.pack("<I?", 7, value)
        if isinstance(value, int):
            return struct.pack("<II", 4, value)
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        if isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)

    body = b"".join(text(key) + value_of(value) for key, value in metadata.items())
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata)) + body)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 'x' * 10**10 }}",
        "{% if %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_hostile_template_could_not_be_examined(tmp_path, source):
    (tmp_path / "bad.jinja").write_text(source)
    start = time.perf_counter()
    subject = area.open_(tmp_path / "bad.jinja")
    outcomes = examine(area.CHECKS, subject)
    assert exit_code(outcomes) == 2 and not any(outcome.findings for outcome in outcomes)
    assert sum(outcome.status == "failed" for outcome in outcomes) == 1  # the others are told why they were skipped
    assert "does not render" in " ".join(outcome.reason for outcome in outcomes)
    assert area.facts(subject)["What it writes"][1][0] == "nothing"
    assert time.perf_counter() - start < 30


def test_a_template_that_hides_its_loop_behind_a_long_chat(tmp_path):
    """Endless for three turns only: that is found, and the rest is not tried again."""
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    source = "{% if messages|length > 4 %}" + loop + "{% endif %}"
    (tmp_path / "bad.jinja").write_text(source + proof.MISTRAL)
    start = time.perf_counter()
    assert exit_code(examine(area.CHECKS, area.open_(tmp_path / "bad.jinja"))) == 2
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none", "no such file or folder"),
        (
            lambda path: edit(folder(path, "gpt2"), "tokenizer_config.json", lambda config: None),
            "a base model has none",
        ),
        (lambda path: proof.write(path, "Modelfile", "FROM x\n"), "no TEMPLATE in it"),
        (lambda path: proof.write(path, "Modelfile", "FROM x\nTEMPLATE {{ define }}\n"), "define is not understood"),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path, make, message):
    with pytest.raises(InputError) as caught:
        subject = area.open_(make(tmp_path))
        assert subject.template.render([]) is None
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_training_rows_are_counted_and_bad_ones_told(tmp_path):
    rows = [
        {"prompt": "Hi", "completion": "Hello"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x y"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    subject = area.open_(folder(tmp_path / "qwen", "qwen"), train_jsonl=tmp_path / "rows.jsonl")
    assert codes(subject) == ()
    table = dict(area.facts(subject)["Training rows"])
    assert table["rows"] == "2" and table["roles"] == "assistant 2, user 2"
    (tmp_path / "rows.jsonl").write_text('{"text": 1}')
    outcomes = examine(area.CHECKS, area.open_(tmp_path / "qwen", train_jsonl=tmp_path / "rows.jsonl"))
    assert [o.reason for o in outcomes if o.status == "failed"] == [
        "rows.jsonl line 1: neither messages nor prompt and completion; keys: text"
    ]


def test_what_is_a_fact_and_no_finding(tmp_path):
    table = dict(area.facts(area.open_(folder(tmp_path / "llama", "llama")))["What it writes"])
    assert table["white space around a content"] == "trimmed" and table["ends an answer"] == "<|eot_id|>"
    assert table["beginnings: apply_chat_template"] == "1"
    assert (
        table["beginnings: render, then encode with special tokens"] == "2"
    )  # as released: transformers encodes without
    table = dict(area.facts(area.open_(folder(tmp_path / "gemma", "gemma")))["What it writes"])
    assert table["a system message"] == "refused"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"added_tokens": 3, "eos_token_id": {}, "added_tokens_decoder": [1]}', "null", "[" * 100_000],
)
def test_damaged_files_around_a_template_end_no_check(tmp_path, name, content):
    path = folder(tmp_path / "llama", "llama")
    (path / "chat_template.jinja").write_text(find_template(path).source)
    (path / name).write_text(content)
    try:
        outcomes = examine(area.CHECKS, area.open_(path))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert not [outcome.reason for outcome in outcomes if outcome.status == "failed"]


def test_turns_are_taken_apart():
    text = "<s>" + "".join(f"[{m['role']}]{m['content']};" for m in dialogue(3))
    turns = take_apart(text, 3)
    assert (
        turns.head == "<s>[user]" and turns.to_answer == [";[assistant]"] * 3 and turns.to_question == [";[user]"] * 2
    )
    assert turns.tail == ";" and not turns.missing and not turns.repeated
    assert take_apart(text.replace("Zqa1x", "no"), 3).missing == ["Zqa1x says 1."]
    assert chunks("<|a|>x</s>") == ["<|a|>", "x", "</s>"]
    assert rest_after_common("<|end|>\n<|assistant|>", "<|end|>\n<|user|>") == "<|assistant|>"


def test_conversations_are_seeded_and_alternate():
    assert conversations(0, 20) == conversations(0, 20) != conversations(1, 20)
    for messages in conversations(0, 40):
        spoken = [m["role"] for m in messages if m["role"] != "system"]
        assert spoken[0] == spoken[-1] == "user" and all(a != b for a, b in zip(spoken, spoken[1:], strict=False))


def test_it_takes_no_torch_and_little_time(tmp_path):
    path = folder(tmp_path / "llama", "llama")
    code = (
        "import sys, pathlib\nfrom kobza.doctor.files import template as area\nfrom kobza.doctor.finding import examine\n"
        f"subject = area.open_(pathlib.Path({str(path)!r}))\nexamine(area.CHECKS, subject), area.facts(subject)\n"
        "assert not {'torch', 'transformers', 'jinja2'} & set(sys.modules)"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - start < 10  # 0.3 s on an idle machine; the issue asks for 2


# ---- models that reason or have channels open more, or less, than the history shows: no bug, and told from a wrong header

CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}HISTORY{% endif %}"
    "{{ '<|message|>' + m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistantPROMPT{% endif %}"
)


@pytest.mark.parametrize(
    "prompt, history, found",
    [
        ("<think>", "", []),  # the answer with a reasoning begins so
        ("", "<|channel|>final", [("C1", "info")]),  # the model writes the rest of the header itself
        ("<|thought|>", "", [("C1", "warn")]),  # another part than the history has
        ("<|message|>My steps:", "", [("C1", "warn")]),  # more than the history has
    ],
)
def test_parts_of_an_answer_are_told_from_a_wrong_header(prompt, history, found, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHANNELS.replace("PROMPT", prompt).replace("HISTORY", history))
    outcomes = examine([check for check in area.CHECKS if "C1" in check.codes], area.open_(path))
    assert [(f.code, f.severity) for o in outcomes for f in o.findings] == found


def test_a_tokenizer_that_runs_away_or_falls_over_does_not_take_the_template_with_it(tmp_path, monkeypatch):
    from kobza.doctor.files import coder

    path = folder(tmp_path / "qwen", "qwen")
    good = area.open_(path).tokens
    assert good.encode("<|im_end|>") and good.show(good.encode("<|im_end|>")) == ["<|im_end|>"]
    for code in ("import sys; [None for _ in sys.stdin]", "import os; os.abort()", "while True: pass"):
        (tmp_path / "encoder.py").write_text(code)
        monkeypatch.setattr(coder, "__file__", str(tmp_path / "coder.py"))
        monkeypatch.setattr(coder, "SECONDS", 0.5)
        start = time.perf_counter()
        subject = area.open_(path)
        assert subject.tokens.encode is None and time.perf_counter() - start < 10
        outcomes = examine(area.CHECKS, subject)
        assert "skipped" in {o.status for o in outcomes} and not any(o.findings for o in outcomes)

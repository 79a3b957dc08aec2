"""The GGUF doctor: each injected bug is found by its code, nothing on clean files, and clean files are so to llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kobza.config import InputError
from kobza.doctor.files.gguf import CHECKS, facts, open_
from kobza.doctor.files.gguf_pre import PRE, TEXTS, Speller, pieces, steps_of
from kobza.doctor.files.gguf_weights import collapsed_share, comparisons, halves, pairs
from kobza.doctor.finding import Skip, examine
from kobza.doctor.mutations.gguf import CONTROLS, MUTATIONS, make
from kobza.doctor.selftest import unproven
from kobza.formats.gguf import read_gguf, typed, write_gguf

REASONS = {  # what the weights' check says of each slip
    "q and k not permuted": "not permuted for this architecture's rope",
    "k permuted for the heads of q": "permuted for 4 heads instead of 2",
    "q permuted twice": "permuted twice",
    "permuted where it must not be": "as only the llama architecture wants",
    "Gemma's 1 not added": "is not added",
    "Gemma's 1 added twice": "1 is added to it twice",
    "transposed": "it is transposed",
    "stored in the order of its transpose": "in the order of its transpose",
    "gate and up swapped": "it is the folder's blocks.0.mlp.up_proj.weight",
    "neighbours share a byte": "neighbouring values share a byte",
    "scale by 7": "its scales are 1.1",
    "signed nibbles": "not those that its type would round to",
}


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_nothing_is_found_on_clean_files(control, tmp_path):
    for seed, dtype in ((0, "fp32"), (1, "bf16"), (2, "fp32")):
        outcomes = examine(CHECKS, control.make(tmp_path / str(seed), seed, dtype))
        assert [o for o in outcomes if o.findings or o.status == "failed"] == []
        ran = {o.name for o in outcomes if o.status == "ran"}
        assert {"the settings are the folder's", "special ids are the folder's"} <= ran


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.code} {m.name}")
def test_each_bug_is_found_by_its_code(mutation, tmp_path):
    outcomes = examine(CHECKS, mutation.make(tmp_path, 0, "fp32"))
    found = [finding for outcome in outcomes for finding in outcome.findings]
    assert mutation.code in {finding.code for finding in found}
    assert [o.reason for o in outcomes if o.status == "failed"] == []
    if words := REASONS.get(mutation.name):
        assert any(words in finding.got for finding in found), [finding.got for finding in found]


def test_every_code_has_a_mutation():
    assert unproven("gguf") == []
    assert set(REASONS) <= {mutation.name for mutation in MUTATIONS}


def test_comparison_covers_every_tensor(tmp_path):
    """36 weights of GPT-2 at 2 layers: nothing is silently left out."""
    for family in ("gpt2", "llama", "gemma", "gemma1", "qwen", "phi"):
        subject = make(tmp_path / family, 0, "fp32", family=family)
        compared = {pair.theirs for pair in comparisons(subject)}
        assert compared == set(subject.gguf.tensors) - {"rope_freqs.weight"}


def test_large_tensors_are_compared_in_part_and_still_found(tmp_path, monkeypatch):
    monkeypatch.setattr("kobza.doctor.files.gguf_weights.MOST_VALUES", 320)

    def change(arrays: dict) -> None:
        arrays["token_embd.weight"][:10] *= -1

    subject = make(tmp_path, 0, "fp32", arrays=change)
    assert min(len(pair.file) for pair in comparisons(subject) if "embd" in pair.theirs) == 10
    assert "F3" in {finding.code for outcome in examine(CHECKS, subject) for finding in outcome.findings}


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama", "gemma", "gemma1", "qwen", "phi", "gpt2"])
def test_clean_files_are_clean_to_llama_cpp(family, tmp_path):
    """What `make` writes, read by llama.cpp, is the folder's model in transformers; its cache is in float16, hence 0.005."""
    xllamacpp, transformers = pytest.importorskip("xllamacpp"), pytest.importorskip("transformers")
    import torch

    subject = make(tmp_path, 0, "fp32", family=family, type="F32")
    model = transformers.AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.float32)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads, params.warmup = str(subject.gguf.path), 64, 1, False
    server, seen = xllamacpp.Server(params), []
    for start in range(40, 60, 4):
        ids = list(range(start, start + 7))
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ask = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 8, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(ask)
        choice = (answer if isinstance(answer, dict) else json.loads(answer))["choices"][0]
        top = ((choice["logprobs"] or {}).get("content") or [{"top_logprobs": []}])[0]["top_logprobs"]
        seen += [(entry["logprob"], float(wanted[entry["id"]])) for entry in top if entry["logprob"] > -1e9]
    assert (
        len(seen) >= 5
    )  # of 40: it says nothing of a token that is part of a character, nor of the EOS it was told to ignore
    assert max(abs(a - b) for a, b in seen) < 0.005


def test_halves_and_pairs_are_inverse():
    rows = np.arange(24).reshape(12, 2)
    assert (pairs(halves(rows, 3), 3) == rows).all()
    assert halves(np.arange(4), 1).tolist() == [0, 2, 1, 3]


def test_pieces_are_those_of_tokenizers():
    """Our cutting is the tokenizers library's, for every form that is followed."""
    from tokenizers import Regex, pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    for name, steps in PRE.items():
        theirs = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(step), "isolated") for step in steps])
        for text in TEXTS:
            assert pieces(text, steps) == [piece for piece, _ in theirs.pre_tokenize_str(text)], (name, text)
    form = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]}
    assert steps_of(form) == PRE["smollm"]
    assert [p for p, _ in digits.pre_tokenize_str("a12")] == pieces("a12", (PRE["smollm"][0],))


def test_speller_makes_the_tokens_of_tokenizers(tmp_path):
    from tokenizers import Tokenizer

    for family in ("gpt2", "llama", "qwen"):
        subject = make(tmp_path / family, 0, "fp32", family=family)
        library = Tokenizer.from_file(str(subject.folder / "tokenizer.json"))
        speller = Speller(subject.get("merges"), set(subject.tokens) if family == "llama" else None)
        for text in TEXTS:
            wanted = library.encode(text, add_special_tokens=False).tokens
            assert speller.tokens(text, PRE[subject.get("pre")]) == wanted, (family, text)


def test_the_earliest_merge_comes_first():
    assert Speller(["b c", "a b"], None).merged("abc") == ["a", "bc"]
    assert Speller(["a b", "b c", "ab c"], None).merged("abcabc") == ["abc", "abc"]
    assert Speller(["a a"], None).merged("aaa") == ["aa", "a"]  # a joined pair takes no third in one round
    assert Speller(["a b"], {"abc"}).merged("abc") == ["abc"]  # ignore_merges


def test_pieces_without_a_merge_across_them_are_no_finding(tmp_path):
    """A vocabulary trained on single digits gives the same ids however digits are cut."""
    subject = make(tmp_path, 0, "fp32", family="qwen")
    whole = [m for m in subject.get("merges") if not any(c.isdigit() for c in m)]
    merges = [m for m in whole if all(part.isascii() and part.isalpha() for part in m.split(" "))]
    said = typed(subject.gguf) | {
        "tokenizer.ggml.pre": ("string", "llama-bpe"),
        "tokenizer.ggml.merges": ("array:string", merges),
    }
    write_gguf(tmp_path / "x.gguf", said, {})
    checks = [check for check in CHECKS if "pre-tokenizer makes" in check.name]
    (outcome,) = examine(checks, open_(tmp_path / "x.gguf", subject.folder))
    assert outcome.status == "ran" and outcome.findings == ()
    assert pieces(TEXTS[0], PRE["llama-bpe"]) != pieces(TEXTS[0], PRE["qwen2"])


def test_a_hostile_regex_is_given_up():
    hostile = {"type": "Split", "pattern": {"Regex": "(a|a|b|ab)*c"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(Skip, match="cannot be followed"):
        pieces("ab" * 3000, (*steps_of(hostile), "(a+a+)+b("))
    start = time.process_time()
    with pytest.raises(Skip, match="cannot be followed"):
        pieces("a" * 60 + "!", ("(a|aa)+$",))
    assert time.process_time() - start < 3
    with pytest.raises(Skip, match="not followed"):
        steps_of({"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": []}]})
    with pytest.raises(Skip, match="form Split"):
        steps_of({"type": "Split", "pattern": {"Regex": "x" * 5000}, "behavior": "Isolated", "invert": False})


def test_collapsed_blocks_are_counted():
    normal = np.random.default_rng(0).normal(size=(100, 32)).astype(np.float32)
    assert collapsed_share(normal) == 0
    one = np.zeros((4, 32), np.float32)
    one[0, 3] = 1  # one large value among equal ones
    one[1, :17] = np.arange(1, 18)  # less than half of them equal; the other two rows are all equal: padding
    assert collapsed_share(one) == 0.25


def test_facts_tell_types_and_errors(tmp_path):
    subject = make(tmp_path, 0, "fp32", type="Q8_0")
    assert len(facts(subject)["tensors by type"][0]) == 5
    examine(CHECKS, subject)
    rows = facts(subject)["tensors by type"]
    by_type = {row[0]: row for row in rows[1:]}
    assert by_type["Q8_0"][4] == "8.50" and 0.004 < float(by_type["Q8_0"][5]) < 0.008
    assert set(by_type) == {"Q8_0", "F16", "F32"}  # rows of 48 fall back to F16


def test_a_file_without_anything_is_skipped_not_failed(tmp_path):
    write_gguf(tmp_path / "x.gguf", {}, {})
    outcomes = examine(CHECKS, open_(tmp_path / "x.gguf"))
    assert not [o for o in outcomes if o.status == "failed" or o.findings]


def test_a_folder_that_is_none_is_refused(tmp_path):
    write_gguf(tmp_path / "x.gguf", {}, {})
    with pytest.raises(InputError, match="not a folder"):
        open_(tmp_path / "x.gguf", tmp_path / "x.gguf")


VALUES = st.sampled_from(
    [
        ("uint32", 0),
        ("uint32", 2**32 - 1),
        ("int64", -5),
        ("float32", float("nan")),
        ("bool", True),
        ("string", ""),
        ("string", "{% for x in y %}"),
        ("array:string", []),
        ("array:string", ["", "a", "\ufffd"]),
        ("array:int32", [1, 2, 3]),
        ("array:float32", []),
        ("array:array:uint8", [[1], []]),
    ]
)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return [make(tmp_path_factory.mktemp(f), 0, "fp32", family=f) for f in ("llama", "phi", "gemma")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_metadata_makes_a_check_break(clean, tmp_path, data):
    """A check may find, skip, or say in one line what is wrong with the file; it never falls over."""
    subject = clean[data.draw(st.integers(0, 2))]
    said = typed(subject.gguf)
    for key in data.draw(st.lists(st.sampled_from(sorted(said)), min_size=1, max_size=3)):
        said[key] = data.draw(VALUES)
    kept = {
        n: (t.type, t.shape, np.fromfile(subject.gguf.path, "u1", t.n_bytes, offset=t.start))
        for n, t in subject.gguf.tensors.items()
    }
    if data.draw(st.booleans()):
        kept.pop(data.draw(st.sampled_from(sorted(kept))))
    try:
        write_gguf(tmp_path / "x.gguf", said, kept)
        gguf = read_gguf(tmp_path / "x.gguf")
    except (InputError, TypeError):  # general.alignment is nothing here
        return
    outcomes = examine(CHECKS, replace(subject, gguf=gguf))
    fell = [
        o.reason for o in outcomes if o.status == "failed" and o.reason.split(":")[0].endswith(("Error", "Exception"))
    ]
    assert fell == [], (fell, {k: said[k] for k in said if k not in subject.gguf.metadata})


def test_it_is_quick_and_loads_no_torch(tmp_path):
    subject = make(tmp_path, 0, "fp32", family="gpt2")
    code = f"""
import sys, time
from pathlib import Path
from kobza.doctor.finding import Skip, examine
from kobza.doctor.files.gguf import CHECKS, open_
examine(CHECKS, open_(Path({str(subject.gguf.path)!r}), Path({str(subject.folder)!r})))
print(sorted({{"torch", "transformers", "jinja2"}} & set(sys.modules)), time.process_time() < 2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True", done.stdout + done.stderr

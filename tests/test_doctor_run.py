"""Runs and logs: each bug by its own code, nothing on clean ones, findings of a live run once each, odd files refused."""

import json
import math
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kobza.config import InputError
from kobza.doctor.finding import examine, exit_code
from kobza.doctor.mutations import run as proof
from kobza.doctor.training import run as doctor
from kobza.doctor.training.curves import read_log

MUTATIONS = {f"{m.code} {m.name}": m for m in proof.MUTATIONS}


def found(log):
    outcomes = examine(doctor.CHECKS, log)
    assert not [o.reason for o in outcomes if o.status == "failed"]
    return [finding for outcome in outcomes for finding in outcome.findings]


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """A function: the name of a mutation -> (its outcomes, its folder), made once."""
    done = {}

    def made(name):
        if name not in done:
            folder = tmp_path_factory.mktemp("case")
            done[name] = examine(doctor.CHECKS, MUTATIONS[name].make(folder, 0, "fp32")), folder
        return done[name]

    return made


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_bug_is_caught_by_its_own_code(name, examined):
    outcomes, _ = examined(name)
    assert not [o.reason for o in outcomes if o.status == "failed"]
    assert MUTATIONS[name].code in {f.code for o in outcomes for f in o.findings}


@pytest.mark.parametrize(
    "control", [c for c in proof.CONTROLS if "llama" not in c.name and "phi" not in c.name], ids=lambda c: c.name
)
def test_nothing_is_found_on_a_clean_run(control, tmp_path):
    """Selftest crosses all flavours, seeds and number formats."""
    seeds = range(10) if "curve" in control.name else range(1)
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        assert found(control.make(folder, seed, "fp32")) == [], seed


def test_nothing_is_found_in_bf16(tmp_path):
    assert found(proof.real(model=proof.FLAVOURS["gemma"])(tmp_path, 1, "bf16")) == []


def test_every_code_has_a_bug():
    declared = {code for check in doctor.CHECKS for code in check.codes.split()}
    assert declared == {mutation.code for mutation in proof.MUTATIONS}


def test_only_what_is_proven_is_an_error(examined):
    """Curves warn; a nan, a rate that the config does not say and batches read again are errors."""
    proven = {"nan", "nan in a jsonl", "a black box", "scheduler stepped twice from step 30", "batches again on resume"}
    for name, mutation in MUTATIONS.items():
        assert exit_code(examined(name)[0]) == (1 if mutation.name in proven else 0), name


# ---- what the findings say -----------------------------------------------------------------------------------------


def one(examined, name):
    """The first finding of a mutation's own code, and its folder."""
    outcomes, folder = examined(name)
    return next(f for o in outcomes for f in o.findings if f.code == MUTATIONS[name].code), folder


def test_the_first_nan_has_what_came_before(examined):
    finding, _ = one(examined, "R21 nan")
    assert finding.where == "step 261" and "the gradient norm had grown" in finding.counterexample


def test_spikes_tell_that_the_gradient_led(examined):
    assert "the gradient norm rises first" in one(examined, "R21 spikes")[0].got


def test_the_wrong_rate_has_both_numbers(examined):
    """The first wrong one from the end backwards is shown with what the config says."""
    finding, folder = one(examined, "R16 scheduler stepped twice from step 30")
    row = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[int(finding.where.split()[1]) - 1])
    assert float(finding.got) == pytest.approx(row["lr"], rel=1e-5) and float(
        finding.expected.split()[1]
    ) != pytest.approx(row["lr"])


def test_zeroed_head_is_named(examined):
    assert one(examined, "R22 a head of zeros")[0].where == "blocks.1 head 0"


def test_unread_rows_are_tokens_of_the_text(examined):
    finding, _ = one(examined, "L1 letters that only the validation text has")
    assert any(letter in finding.counterexample for letter in "жшґїє")


def test_facts_show_curves_and_layers(examined):
    made = doctor.facts(doctor.open_(examined("R22 a head of zeros")[1] / "run"))
    assert [row[0] for row in made["curves"][1:]] == ["train_loss", "val_loss", "lr", "grad_norm"]
    assert [row[0] for row in made["layers, on held-out text"]] == ["layer", "blocks.0", "blocks.1", "lm_head"]


def test_looking_inside_changes_nothing(tmp_path):
    """The model answers the same before and after, and with the recorders in."""
    import torch

    from kobza.doctor.training.internals import look_inside
    from kobza.model import build

    for config in (
        replace(proof.FLAVOURS["gemma"], vocab_size=40),
        replace(proof.FLAVOURS["phi"], vocab_size=40, window=8),
    ):
        model = build(config, 1).eval()
        ids = torch.randint(40, (2, 20))
        before = model(ids)
        layers, log_z = look_inside(model, [ids])
        assert torch.equal(model(ids), before) and log_z == pytest.approx(
            float(before.detach().logsumexp(-1).mean()), abs=1e-4
        )
        assert not any(m._forward_hooks for m in model.modules()) and len(layers) == 2


def test_head_outputs_add_up_to_attention(tmp_path):
    """With one head its share is the whole output of the attention."""
    import torch

    from kobza.doctor.training.internals import look_inside
    from kobza.model import build
    from kobza.surgery import watch

    model = build(replace(proof.PLAIN, vocab_size=40, n_head=1, n_kv_head=1, head_dim=32, bias=False), 1).eval()
    ids, seen = torch.randint(40, (2, 20)), {}
    with watch(model, lambda name, _: name.endswith(".attn"), seen.__setitem__):
        model(ids)
    layers, _ = look_inside(model, [ids])
    for i, layer in enumerate(layers):
        size = seen[f"blocks.{i}.attn"].float().square().sum(-1).mean().sqrt()
        assert float(layer.head_rms) == pytest.approx(float(size.detach()), rel=1e-4)


# ---- other trainers' files -----------------------------------------------------------------------------------------


def test_columns_are_known_by_many_names(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(
        "Iteration,train/loss,eval_loss,Learning Rate,grad norm,tok/s\n"
        + "".join(f"{i},{5 - i},{5 - i},1e-3,1,9\n" for i in range(3))
    )
    assert read_log(path).records[1] == {
        "step": 1.0,
        "train_loss": 4.0,
        "val_loss": 4.0,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_second": 9.0,
    }


def test_the_state_of_transformers_is_read_without_its_summary(tmp_path):
    log = proof.curve(proof.nothing, "state")(tmp_path, 0, "fp32")
    assert len(log.series("train_loss")[0]) == 400 and len(log.series("val_loss")[0]) == 16 and not log.restarts


def test_a_resumed_log_counts_the_later_writing(tmp_path):
    log = proof.curve(proof.resumed)(tmp_path, 0, "fp32")
    assert len(log.series("train_loss")[0]) == 400 and len(log.restarts) == 1


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "", "no record"),
        ("a.csv", "x,y\n1,2\n", "no column for the step"),
        ("a.csv", "step,y\n1,2\n", "no column for the loss"),
        ("a.jsonl", "{}\n", "no column for the step"),
        ("a.jsonl", "[1]\n{}\n", "not an object"),
        ("a.jsonl", "{\n}\n", "not JSON"),
        ("a.json", "{}", "no log_history"),
        ("a.json", '{"log_history": [1]}', "no log_history"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.jsonl", "[" * 100_000 + "\n{}", "not JSON"),
    ],
)
def test_a_file_that_is_no_log_is_refused_in_a_line(name, text, told, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=told) as error:
        read_log(tmp_path / name)
    assert "\n" not in str(error.value)


numbers = st.one_of(
    st.floats(),
    st.integers(-(10**30), 10**30),
    st.none(),
    st.text(max_size=5),
    st.booleans(),
    st.lists(st.integers(), max_size=2),
)
rows = st.dictionaries(
    st.sampled_from(["step", "loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "seconds", "x"]),
    numbers,
    max_size=8,
)


@settings(max_examples=60)
@given(st.lists(rows, max_size=60))
def test_no_log_breaks_a_rule(tmp_path_factory, made):
    """Whatever stands in the cells: an InputError in a line, or findings; a check never fails."""
    path = tmp_path_factory.mktemp("fuzz") / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    try:
        log = read_log(path, 50)
    except InputError as error:
        assert "\n" not in str(error)
        return
    with np.errstate(all="ignore"):
        assert [o.reason for o in examine(doctor.CHECKS, log) if o.status == "failed"] == []


def test_a_log_needs_no_torch(tmp_path):
    proof.curve(proof.nothing)(tmp_path, 0, "fp32")
    code = "import sys, pathlib; from kobza.doctor.training import run; from kobza.doctor.finding import examine; "
    code += (
        f"log = run.open_(pathlib.Path({str(tmp_path / 'log.csv')!r}), 512); examine(run.CHECKS, log); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- live ----------------------------------------------------------------------------------------------------------


def test_a_live_run_tells_each_kind_once_and_ends(tmp_path):
    """Lines come in while it is followed; the spikes are told when there are three, the nan when it comes."""
    lines = [json.dumps(r) for r in proof.breaks(proof.spiking(proof.clean_curve(0), None), None)]
    path = tmp_path / "log.jsonl"
    path.touch()

    def write():
        for i in range(0, 300, 50):
            with open(path, "a") as file:
                file.write("\n".join(lines[i : i + 50]) + "\n")
            time.sleep(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    findings = list(doctor.follow(path, poll=0.02, vocab_size=512, idle=lambda seconds: seconds > 1.0))
    writer.join()
    assert (
        [f.code for f in findings] == ["R21", "R21"]
        and findings[0].severity == "warn"
        and findings[1].severity == "error"
    )


def test_following_ends_with_the_run(tmp_path):
    run = proof.tiny_run(tmp_path, 0, "fp32", settings=replace(proof.BRIEF, steps=8, eval_interval=8))
    assert list(doctor.follow(run.out, poll=0.01)) == []


def test_the_clean_curve_is_what_it_says():
    """Its first loss is ln V and its rate a warm-up and a cosine."""
    rows = proof.clean_curve(3)
    assert rows[0]["train_loss"] == pytest.approx(math.log(proof.VOCAB)) and max(
        r["lr"] for r in rows
    ) == pytest.approx(3e-4, rel=1e-2)


def test_attention_that_sees_all_alike_has_full_entropy():
    """Queries of zero: entropy ln(tokens seen), score 0, and the first token gets 1 / tokens seen, of a window nothing."""
    import torch

    from kobza.doctor.training.internals import look_inside
    from kobza.model import build

    for window in (0, 6):
        model = build(replace(proof.PLAIN, vocab_size=40, window=window), 1).eval()
        for block in model.blocks:
            torch.nn.init.zeros_(block.attn.q_proj.weight)
        (layer, _), _ = look_inside(model, [torch.randint(40, (2, 20))])
        seen = np.arange(8, 21)
        entropy = np.mean(np.log(np.minimum(seen, window or 99)) / np.log(seen))
        assert layer.score == 0 and layer.entropy.tolist() == pytest.approx([entropy] * 2, rel=1e-4)
        assert layer.sink == pytest.approx(np.mean(1 / seen) if not window else 0.0, rel=1e-4)

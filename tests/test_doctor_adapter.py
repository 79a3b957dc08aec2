"""Adapters: each bug by its own code, nothing on clean ones; what PEFT itself writes and merges is clean."""

import json
import subprocess
import sys

import numpy as np
import pytest

from kobza.config import InputError
from kobza.doctor.files.adapter import CHECKS, facts, open_
from kobza.doctor.finding import examine, exit_code
from kobza.doctor.mutations.adapter import CONTROLS, MUTATIONS, Case, four_bits, made, rounded


def found(subject):
    outcomes = examine(CHECKS, subject)
    assert not [o.reason for o in outcomes if o.status == "failed"]
    return [finding for outcome in outcomes for finding in outcome.findings]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.code} {m.name}")
def test_each_bug_is_caught_by_its_own_code(mutation, tmp_path):
    findings = found(mutation.make(tmp_path, 0, "fp32"))
    assert mutation.code in {f.code for f in findings}, findings


@pytest.mark.parametrize("control", CONTROLS, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nothing_is_found_on_a_clean_one(control, dtype, tmp_path):
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        assert found(control.make(folder, seed, dtype)) == []


def test_every_code_has_a_bug():
    declared = {code for check in CHECKS for code in check.codes.split()}
    assert declared == {mutation.code for mutation in MUTATIONS}


def test_the_wrong_scale_is_named(tmp_path):
    """alpha 24 at r 8 is 3; the merge took 24."""
    finding = next(f for f in found(made(times=lambda case: case.alpha)(tmp_path, 0, "fp32")) if f.code == "A2")
    assert "24 = alpha, not divided by r" in finding.got and "scale 3" in finding.expected
    name, place = finding.counterexample.split("[")[0], finding.counterexample.split("[")[1].split("]")[0]
    adapter = open_(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    pair = next(pair for pair in adapter.pairs if pair.weight == name)
    i, j = (int(n) for n in place.split(","))
    assert f"{3 * adapter.delta(pair)[i, j]:.6g}" in finding.counterexample


@pytest.mark.parametrize("times", [2, 3])
def test_a_merge_done_again_is_counted(times, tmp_path):
    finding = next(
        f for f in found(made(alpha=40.0, times=lambda case: times * case.scale)(tmp_path, 0, "fp32")) if f.code == "A4"
    )
    assert f"the delta {times} times" in finding.got and finding.severity == "error"


def test_without_a_merge_the_files_alone_are_examined(tmp_path):
    made()(tmp_path, 0, "fp32")
    outcomes = examine(CHECKS, open_(tmp_path / "base", tmp_path / "adapter"))
    assert [o.status for o in outcomes if "A4" in o.codes] == ["skipped"] and exit_code(outcomes) == 0


def test_dora_is_skipped_not_judged(tmp_path):
    outcomes = examine(CHECKS, made(config={"use_dora": True}, times=lambda case: 9.0)(tmp_path, 0, "fp32"))
    assert [o.reason for o in outcomes if "A4" in o.codes] == ["use_dora: the merge is more than scale * B @ A"]


def test_patterns_of_rank_and_alpha_are_followed(tmp_path):
    """One module has its own alpha; the merge knows it."""

    def change(case):
        case.config["alpha_pattern"] = {"down_proj": 2 * case.alpha}
        for name in [n for n in case.merged if n.endswith("down_proj.weight")]:
            case.merged[name] = 2 * case.merged[name] - case.base[name]

    assert found(made(change=change)(tmp_path, 0, "fp32")) == []


def test_an_expression_in_a_pattern_is_not_run(tmp_path):
    outcomes = examine(CHECKS, made(config={"rank_pattern": {"(a+)+$": 4}})(tmp_path, 0, "fp32"))
    assert any("not followed" in o.reason for o in outcomes) and not [o for o in outcomes if o.status == "failed"]


def test_facts_tell_of_each_pair(tmp_path):
    table = facts(made()(tmp_path, 0, "fp32"))["merge"]
    assert len(table) == 1 + 6 and all(row[2] == row[3] == "3" for row in table[1:])


def test_helpers_agree_with_torch():
    """bf16 rounding, and a 4-bit grid that has 16 values a block at most."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)
    assert np.array_equal(rounded(x, "bf16"), torch.from_numpy(x).bfloat16().float().numpy())
    assert max(len(set(block)) for block in four_bits(x).reshape(-1, 32)) <= 16


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("adapter_config.json", {"peft_type": "IA3"}, "only LORA"),
        ("adapter_config.json", {"peft_type": "LORA", "r": 0, "lora_alpha": 1}, "r is 0"),
        ("adapter_config.json", {"peft_type": "LORA", "r": 8, "lora_alpha": "x"}, "lora_alpha is 'x'"),
    ],
)
def test_a_config_out_of_place_is_refused_in_a_line(name, content, told, tmp_path):
    made()(tmp_path, 0, "fp32")
    (tmp_path / "adapter" / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=told) as error:
        open_(tmp_path / "base", tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_a_pickle_is_refused(tmp_path):
    made()(tmp_path, 0, "fp32")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        open_(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("what", [None, 3, "x", [1], {"a": {}}])
def test_odd_values_in_the_config_break_nothing(what, tmp_path):
    odd = dict.fromkeys(("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora"), what)
    case = Case(config=odd)
    outcomes = examine(CHECKS, case.write(tmp_path))
    assert not [f for o in outcomes for f in o.findings if f.severity == "error"]
    assert not [o.reason for o in outcomes if o.status == "failed"]


def test_no_torch_is_loaded():
    code = "import sys, kobza.doctor.files.adapter; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parity
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_writes_and_merges_is_clean(rslora, tmp_path):
    torch = pytest.importorskip("torch")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1))
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj", "v_proj", "up_proj", "embed_tokens"], use_rslora=rslora
    )
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name or "embedding_A" in name:  # those that start at zero
                p.normal_(0, 0.02)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    subject = open_(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert found(subject) == [] and len(subject.fits) == 7

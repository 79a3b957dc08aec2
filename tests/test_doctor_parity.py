"""`doctor parity`: the cause is found where there is one, nothing where there is none; nothing is called equal that is not."""

import copy
import re
from dataclasses import replace

import pytest
import torch

from kobza.config import InputError, ModelConfig
from kobza.doctor.finding import examine, exit_code
from kobza.doctor.models.measure import compare, measure, pick_ids
from kobza.doctor.models.parity import CHECKS, ParitySubject, facts, open_, plots, tensors_apart
from kobza.doctor.models.stations import Input, Tap, distance, matched, place, prefix, run
from kobza.doctor.models.subject import subject_of
from kobza.doctor.mutations import parity as proof
from kobza.doctor.selftest import unproven
from kobza.model import GPT, build


def found(subject):
    """(findings, outcomes) of all checks; none of them broke."""
    outcomes = examine(CHECKS, subject)
    assert not [o.reason for o in outcomes if o.status == "failed"]
    return [finding for o in outcomes for finding in o.findings], outcomes


# ---- the stations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", proof.FAMILIES)
def test_both_codes_show_the_same_stations(family):
    ours = proof.clean(family, 0)
    here, there = matched(place(ours), place(proof.Plain(ours)))
    assert here.stations == there.stations and len(here.stations) == 3 + 5 * 2
    assert here.stations[:6] == [
        "embed",
        "blocks.0.attn.in",
        "blocks.0.attn",
        "blocks.0.mlp.in",
        "blocks.0.mlp",
        "blocks.0",
    ]


def test_a_forced_run_computes_each_stretch_from_what_is_forced():
    ours = proof.clean("llama", 0)
    where, what = place(ours), Input(pick_ids(61, 12, 0))
    free = run(ours, where, what, Tap())
    again = run(ours, where, what, Tap(free))
    assert all(torch.equal(free[name], again[name]) for name in where.stations)
    wrong = free | {"blocks.0.attn": free["blocks.0.attn"] + 1}
    moved = run(ours, where, what, Tap(wrong))
    changed = [name for name in where.stations if not torch.equal(free[name], moved[name])]
    assert changed == ["blocks.0.mlp.in", "blocks.0"]  # what reads it, and nothing behind that


def test_forcing_leaves_no_hook_behind():
    ours = proof.clean("gemma", 0)
    where, what = place(ours), Input(pick_ids(61, 12, 0))
    before = ours(what.ids)
    run(ours, where, what, Tap({name: torch.zeros_like(v) for name, v in run(ours, where, what, Tap()).items()}))
    assert torch.equal(before, ours(what.ids))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ours.modules())


def test_a_prefix_is_the_first_blocks_and_leaves_the_model_whole():
    ours = proof.clean("gemma", 0)
    short = prefix(ours, 1)
    ids = pick_ids(61, 12, 0)
    assert len(short.blocks) == 1 and len(ours.blocks) == 2 and short.config.n_layer == 1
    values, whole = (run(m, place(m), Input(ids), Tap()) for m in (short, ours))
    assert torch.equal(values["blocks.0"], whole["blocks.0"])


def test_error_upstream_is_not_counted_downstream():
    ours = proof.clean("llama", 0)
    broken = copy.deepcopy(ours)
    with torch.no_grad():
        broken.blocks[0].attn.o_proj.weight.mul_(1.5)
    reference = measure(ours, place(ours), Input(pick_ids(61, 16, 0)))
    rows = compare(broken, reference)
    assert [row.station for row in rows if row.local > row.local_limit] == ["blocks.0.attn"]
    assert (
        sum(row.running > row.running_limit for row in rows) == len(rows) - 2
    )  # free-running everything after it is off
    assert rows[-1].running > 1e-2


def test_vocabularies_padded_differently_are_compared_where_both_have_tokens():
    ours = proof.clean("llama", 0)
    padded = GPT(replace(ours.config, vocab_size=64)).eval()
    weights = {
        n: torch.cat((v, torch.ones(3, 32))) if n in ("embed.weight", "lm_head.weight") else v
        for n, v in ours.state_dict().items()
    }
    padded.load_state_dict(weights)
    assert found(proof.subject(padded, ours, 0, ("fp32",)))[0] == []


# ---- the proof -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutation", proof.MUTATIONS, ids=lambda m: f"{m.code} {m.name}")
def test_every_bug_is_found_by_its_own_code(mutation, tmp_path):
    """And nothing besides: the switch that was set wrong, not another that happens to help."""
    findings, outcomes = found(mutation.make(tmp_path, 0, "fp32"))
    codes = [f.code for f in findings]
    assert mutation.code in codes and exit_code(outcomes) == 1
    assert len(codes) == (1 if mutation in proof.MUTATIONS[: len(proof.SINGLES)] else 2)
    assert all(f.counterexample and f.confidence == "proven" for f in findings)


@pytest.mark.parametrize("control", proof.CONTROLS, ids=lambda c: c.name)
def test_nothing_is_found_in_two_right_codes(control, tmp_path):
    for seed, dtype in ((0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "autocast-bf16")):  # selftest has the whole matrix
        findings, outcomes = found(control.make(tmp_path, seed, dtype))
        assert findings == [] and sum(o.status == "ran" for o in outcomes) == 1


def test_every_code_has_a_bug_injected():
    assert unproven("parity") == []


# ---- nothing less than equal -----------------------------------------------------------------------------------------


def test_equal_logits_are_not_equal_models():
    """Two mistakes that cancel: the logits are right to three digits, and the layers are not."""
    clean = proof.clean("llama", 0)
    trap = proof.edited(clean, embed=2.0, o_proj=2.0, down_proj=2.0)
    ids = pick_ids(61, 40, 0)
    assert distance(trap(ids).detach(), clean(ids).detach()) < 1e-3  # what is left is the norms' epsilon
    subject = proof.subject(trap, clean, 0, ("fp32",))
    subject.seconds = 1.0  # the whole search is in the proof above
    findings, _ = found(subject)
    assert [f.code for f in findings] == ["D1"] and findings[0].where == "embed"
    assert "NOT equal" in findings[0].fix and "embed.weight" in findings[0].got


def test_bf16_hides_a_wrong_cast_from_the_free_run_and_not_from_the_forced_one():
    clean = proof.clean("gemma", 0)
    subject = proof.subject(proof.twin(clean, norm_cast="before"), clean, 0, ("fp32", "bf16"))
    findings, _ = found(subject)
    assert [f.code for f in findings] == ["G3"]
    rows = subject.notes["bf16"].steps[0].rows
    assert all(row.running <= row.running_limit for row in rows) and any(row.local > row.local_limit for row in rows)


@pytest.mark.parametrize(
    "family, factors, changes, code",
    [
        ("llama", dict(embed=100.0, o_proj=100.0, down_proj=100.0), dict(norm_eps=1e-6), "G4"),
        ("gemma", dict(q_proj=0.02), dict(attn_softcap=0.0), "G12"),
        ("gemma", dict(norm=0.01), dict(softcap=0.0), "G12"),
    ],
)
def test_what_is_silent_on_usual_inputs_is_found_by_a_probe(family, factors, changes, code):
    clean = proof.edited(proof.clean(family, 0), **factors)
    if family == "gemma" and "norm" in factors:
        with torch.no_grad():
            clean.norm.weight.copy_(-0.99 + clean.norm.weight)  # the factor is 1 + weight
    subject = proof.subject(proof.twin(clean, **changes), clean, 0, ("fp32",))
    findings, _ = found(subject)
    assert [f.code for f in findings] == [code]
    natural = subject.notes["fp32"].steps[0].rows
    assert all(row.running <= row.running_limit for row in natural)  # the plain comparison is blind to it


def test_weights_that_differ_are_named():
    clean = proof.clean("qwen", 0)
    findings, _ = found(proof.subject(proof.one_weight(clean), clean, 0, ("fp32",)))
    assert [f.code for f in findings] == ["D1"] and "blocks.1.mlp.down_proj.weight" in findings[0].got
    assert findings[0].where == "blocks.1.mlp"
    assert [name for name, _ in tensors_apart(proof.one_weight(clean), clean)] == ["blocks.1.mlp.down_proj.weight"]


def test_a_bug_in_a_deep_layer_is_not_solved_by_the_first_ones():
    """The search looks at the first blocks; what they cannot show is told as unsolved."""
    config = replace(proof.clean("llama", 0).config, n_layer=6)
    clean = build(config, 0).eval()
    with torch.no_grad():
        for p in clean.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) + (p.ndim == 1))
    broken = copy.deepcopy(clean)
    with torch.no_grad():
        broken.blocks[5].attn.q_proj.weight.mul_(1.1)
    findings, _ = found(proof.subject(broken, clean, 0, ("fp32",)))
    assert [(f.code, f.where) for f in findings] == [("D1", "blocks.5.attn")]
    findings, _ = found(proof.subject(proof.twin(clean, rope_theta=1e4), clean, 0, ("fp32",)))
    assert [(f.code, f.expected) for f in findings] == [("L5", "rope_theta=500000")]


def test_a_window_pattern_longer_than_two_blocks_is_found_in_a_deep_model():
    switches = dict(qk_norm=False, mlp="swiglu", n_ff=48, window=9)
    config = ModelConfig(**proof.SIZES | dict(n_layer=8, **switches), window_pattern="LLLG")
    clean = build(config, 0).eval()
    with torch.no_grad():
        for p in clean.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) + (p.ndim == 1))
    findings, _ = found(proof.subject(proof.twin(clean, window_pattern="L"), clean, 0, ("fp32",)))
    assert [(f.code, f.expected) for f in findings] == [("P2", "window=9 in layers LLLG")]


def test_other_gradients_behind_equal_values_are_found():
    clean = proof.clean("llama", 0)
    findings, _ = found(proof.subject(proof.Plain(clean, "keys detached").eval(), clean, 0, ("fp32",)))
    assert [f.code for f in findings] == ["D3"] and findings[0].where.startswith("blocks.1.attn.in")


def test_a_weight_that_learns_nothing_is_found_though_all_stations_are_equal():
    clean = proof.clean("llama", 0)
    frozen = copy.deepcopy(clean)
    linear = frozen.blocks[1].mlp.up_proj
    linear.forward = lambda x: torch.nn.functional.linear(x, linear.weight.detach())
    findings, _ = found(proof.subject(frozen, clean, 0, ("fp32",)))
    assert [(f.code, f.where) for f in findings] == [("D3", "blocks.1.mlp.up_proj.weight (gradient)")]


def test_without_explain_the_place_is_named_and_no_cause():
    clean = proof.clean("llama", 0)
    subject = proof.subject(proof.twin(clean, mlp="geglu"), clean, 0, ("fp32",))
    subject.explain = False
    findings, _ = found(subject)
    assert [(f.code, f.where) for f in findings] == [("D1", "blocks.0.mlp")] and "--explain" in findings[0].fix


def test_a_declared_value_that_no_list_has_is_tried():
    clean = proof.clean("llama", 0)
    clean = proof.twin(clean, rope_factor=5.0, rope_original_len=700)
    subject = proof.subject(proof.twin(clean, **proof.NO_SCALING), clean, 0, ("fp32",))
    subject.hints = True
    findings, _ = found(subject)
    assert [f.code for f in findings] == ["L4"] and "rope_factor=5.0" in findings[0].expected


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_the_picture_has_a_line_a_fix_and_stands_alone():
    clean = proof.clean("gemma", 0)
    subject = proof.subject(proof.twin(clean, embed_scale=1.0, norm_offset=False), clean, 0, ("fp32",))
    subject.a.name = "a $model <b>"
    found(subject)
    tables, drawn = facts(subject), plots(subject)
    fixes = tables["Fixes in fp32"]
    assert [row[0] for row in fixes[1:]] == ["as given", "+ embed_scale=5.65685", "+ norm_offset=True"]
    assert [row[3] for row in fixes[1:]] == ["not equal", "not equal", "equal"]
    assert len(next(iter(tables.values()))) == 1 + 13
    assert any("5.65685 times" in row[1] for row in tables["Signs in fp32"][1:])
    (svg,) = drawn.values()
    assert svg.startswith("<svg") and not re.search(r'(href|src)="(?!#)', svg) and "<b>" not in svg
    assert plots(subject) == drawn  # the same every time


# ---- errors of a user ------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line():
    clean, small = proof.clean("llama", 0), build(ModelConfig(vocab_size=61, n_layer=3, n_embd=32)).eval()
    for a, b, words in (
        (clean, small, "2 and 3 blocks"),
        (clean, build(ModelConfig(vocab_size=61, n_layer=2, n_embd=64, max_seq_len=512)).eval(), "equal sizes"),
        (torch.nn.Sequential(torch.nn.Embedding(61, 61)), clean, "no list of blocks"),
    ):
        outcomes = examine(CHECKS, proof.subject(a, b, 0, ("fp32",)))
        assert outcomes[0].status == "failed" and words in outcomes[0].reason and exit_code(outcomes) == 2
    with pytest.raises(InputError, match="fp16.*did you mean"):
        open_("a", "b", dtype="fp16")
    with pytest.raises(InputError, match="no such file"):
        open_("/nowhere", "/nowhere")


def test_a_plain_callable_is_skipped_with_the_reason():
    clean = proof.clean("llama", 0)
    subject = ParitySubject(subject_of(lambda ids: clean(ids)), subject_of(clean), ("fp32",))
    findings, outcomes = found(subject)
    assert findings == [] and outcomes[0].status == "skipped" and "callable" in outcomes[0].reason


# ---- beside transformers ---------------------------------------------------------------------------------------------

SHARED = dict(vocab_size=61, max_position_embeddings=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
SHARED |= dict(num_key_value_heads=2, intermediate_size=48, pad_token_id=None, bos_token_id=None, eos_token_id=None)
LAYERS = ["sliding_attention", "full_attention"]
GEMMA = dict(head_dim=16, query_pre_attn_scalar=144, sliding_window=9, layer_types=LAYERS, tie_word_embeddings=True)
GEMMA |= dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh")
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5)
THEIRS = {
    "gpt2": (
        "GPT2",
        dict(vocab_size=61, n_positions=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    ),
    "llama": ("Llama", SHARED | dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=64))),
    "gemma 2": ("Gemma2", SHARED | GEMMA),
    "qwen 3": ("Qwen3", SHARED | dict(head_dim=12)),
    "phi 3": ("Phi3", SHARED | dict(sliding_window=11)),
}


def pair(family, seed, folder):
    """(ours, read from the folder that theirs were saved in, theirs)."""
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'kobza[parity]'")
    from kobza.formats.load import load_model

    prefix_, settings = THEIRS[family]
    config = getattr(transformers, f"{prefix_}Config")(**settings)
    model_class = getattr(
        transformers, f"{prefix_}{'LMHead' if family == 'gpt2' else 'ForCausalLM'}" + "Model" * (family == "gpt2")
    )
    theirs = model_class._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            gain = name.endswith("weight") and ("ln_" in name or "norm" in name) and "gemma" not in family
            parameter.copy_(gain + 0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(folder)
    return load_model(folder).model, theirs


@pytest.mark.parity
@pytest.mark.parametrize("family", THEIRS)
def test_ours_and_transformers_are_equal(family, tmp_path):
    for seed in range(3):
        ours, theirs = pair(family, seed, tmp_path)
        a, b = (ours, theirs) if seed % 2 else (theirs, ours)
        findings, _ = found(ParitySubject(subject_of(a), subject_of(b), ("fp32", "bf16")))
        assert findings == []


@pytest.mark.parity
@pytest.mark.parametrize(
    "family, changes, codes",
    [
        ("gpt2", dict(mlp="gelu", norm_eps=1e-3), {"G7", "G4"}),
        ("llama", dict(rope_scaling="none", rope_factor=1.0, rope_original_len=0), {"L4"}),
        ("gemma 2", dict(attn_softcap=0.0, window_pattern="GL"), {"G12", "G11"}),
        ("gemma 2", dict(norm_cast="before", embed_scale=5.65625), {"G2", "G3"}),
        ("qwen 3", dict(rope_theta=1e4 * 3, norm_eps=1e-5), {"L5", "G4"}),
        ("phi 3", dict(window=12), {"P1"}),
    ],
)
def test_what_is_wrong_beside_transformers_is_found(family, changes, codes, tmp_path):
    ours, theirs = pair(family, 0, tmp_path)
    findings, _ = found(ParitySubject(subject_of(proof.twin(ours, **changes)), subject_of(theirs)))
    assert {f.code for f in findings} == codes


@pytest.mark.parity
def test_two_foreign_models_are_explained_through_ours(tmp_path):
    _, theirs = pair("qwen 3", 0, tmp_path)
    other = copy.deepcopy(theirs.config)
    other.rms_norm_eps, other.rope_parameters = 1e-5, {"rope_type": "default", "rope_theta": 2e5}
    wrong = type(theirs)(other).eval()
    wrong.load_state_dict(theirs.state_dict())
    findings, _ = found(ParitySubject(subject_of(wrong), subject_of(theirs), ("fp32",), hints=False))
    assert {(f.code, f.expected) for f in findings} == {("G4", "norm_eps=1e-06"), ("L5", "rope_theta=10000")}
    findings, _ = found(ParitySubject(subject_of(theirs), subject_of(wrong), ("fp32",)))
    assert {(f.code, f.expected) for f in findings} == {("G4", "norm_eps=1e-05"), ("L5", "rope_theta=200000")}


@pytest.mark.parity
@pytest.mark.parametrize("family", THEIRS)
def test_weights_and_their_gradients_meet_by_name(family, tmp_path):
    ours, theirs = pair(family, 0, tmp_path)
    subject = ParitySubject(subject_of(ours), subject_of(theirs), ("fp32",))
    found(subject)
    assert {name for name, _, _ in subject.notes["fp32"].weights} == {name for name, _ in ours.named_parameters()}
    with torch.no_grad():
        ours.blocks[0].mlp.down_proj.weight[0, 0] += 0.5
    findings, _ = found(ParitySubject(subject_of(ours), subject_of(theirs), ("fp32",)))
    assert [f.code for f in findings] == ["D1"] and "blocks.0.mlp.down_proj.weight" in findings[0].got

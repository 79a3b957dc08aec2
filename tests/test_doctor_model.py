"""The metamorphic battery: silent on clean models of five families, and each injected bug found by its own code."""

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kobza.doctor.explain import codes
from kobza.doctor.finding import examine
from kobza.doctor.models.battery import CHECKS, facts
from kobza.doctor.models.properties import decoding, positions, precision, reach
from kobza.doctor.models.properties.objective import judge_target
from kobza.doctor.models.properties.probe import block_moves, draw_ids
from kobza.doctor.models.subject import subject_of
from kobza.doctor.mutations import model as proof
from kobza.doctor.mutations.model import CONTROLS, FAMILIES, MUTATIONS, FloatScale, model


def asked(subject):
    """(findings, outcomes) of the whole battery; a check that breaks is a mistake of ours."""
    outcomes = examine(CHECKS, subject)
    broken = [f"{outcome.name}: {outcome.reason}" for outcome in outcomes if outcome.status == "failed"]
    assert not broken, broken
    return [finding for outcome in outcomes for finding in outcome.findings], outcomes


def only(subject, code):
    """The one finding of this code."""
    found = [finding for finding in asked(subject)[0] if finding.code == code]
    assert len(found) == 1, found
    return found[0]


def mutated(name):
    return next(mutation for mutation in MUTATIONS if mutation.name == name).make(Path(), 0, "fp32")


@cache
def outcomes_of(mutation):
    return examine(CHECKS, mutation.make(Path(), 0, "fp32"))


# ---- the proof -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_nothing_is_found_on_a_clean_model(control, dtype):
    for seed in range(3):
        found, outcomes = asked(control.make(Path(), seed, dtype))
        assert found == []
        assert (
            sum(outcome.status == "ran" for outcome in outcomes) >= len(CHECKS) - 4
        )  # silence is no proof when nothing ran


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.code}: {mutation.name}")
def test_each_bug_is_caught_by_its_own_code(mutation):
    outcomes = outcomes_of(mutation)
    assert not [outcome.reason for outcome in outcomes if outcome.status == "failed"]
    assert mutation.code in {finding.code for outcome in outcomes for finding in outcome.findings}


def test_every_code_is_injected_and_explained():
    declared = {code for check in CHECKS for code in check.codes.split()}
    assert declared == {mutation.code for mutation in MUTATIONS}
    assert declared <= set(codes())


def test_every_check_catches_something_by_itself():
    caught = set()
    for mutation in MUTATIONS:
        caught |= {
            outcome.name for outcome in outcomes_of(mutation) if any(f.code == mutation.code for f in outcome.findings)
        }
    assert caught == {check.name for check in CHECKS}


# ---- what the findings say ---------------------------------------------------------------------------------------------------


def test_the_leaking_block_is_named_and_so_is_the_way_it_was_called():
    leak = only(mutated("tril(diagonal=1) in one layer"), "R1")
    assert leak.where == "blocks.1" and "leaking by itself: blocks.1" in leak.got and "eval()" in leak.counterexample
    leak = only(mutated("mask dropped when dropout is on"), "R1")
    assert leak.where == "blocks.0" and "train()" in leak.counterexample


@pytest.mark.parametrize(
    "name, says",
    [
        ("new tokens one position too far", "positions of new tokens +1"),
        ("new tokens always at position 0", "positions of new tokens always 0"),
        ("count raised by the first layer", "blocks.0 is right and blocks.1 off"),
    ],
)
def test_the_offset_of_positions_is_found(name, says):
    assert says in only(mutated(name), "I1").got


def test_what_an_upper_layer_mixes_in_is_no_matter_of_positions():
    built = model("llama")
    proof.attended(proof.stale_slot, layer=1)(built)
    assert "blocks.1" in only(subject_of(built), "I2").got


def test_a_window_off_by_one_is_a_warning_and_one_of_half_the_size_an_error():
    assert {finding.severity for finding in asked(mutated("window one wider"))[0]} == {"warn"}
    found = [finding for finding in asked(mutated("window of half the size"))[0] if finding.code == "P1"]
    assert {finding.severity for finding in found} == {"error"} and {finding.got for finding in found} == {
        "5 tokens are seen"
    }


def test_swapped_windows_are_told_from_a_lost_one():
    assert {f.code for f in asked(mutated("window in the other layers"))[0]} == {"G11"}
    assert {f.code for f in asked(mutated("window dropped in one layer"))[0]} == {"P2"}


@pytest.mark.parametrize(
    "name, mode", [("positions in bf16 under autocast", "autocast"), ("positions always in bf16", "fp32")]
)
def test_the_shift_law_alone_sees_rounded_positions_in_the_format_that_rounds_them(name, mode):
    (finding,) = positions.shift(mutated(name))
    assert finding.code == "G5" and finding.where == f"rotary positions, {mode}"


def test_a_copying_loss_and_a_skipping_one_are_told_apart():
    assert "itself" in only(mutated("labels not shifted"), "R2").got
    assert "after the next" in only(mutated("labels shifted twice"), "R2").got


def test_the_facts_tell_what_was_measured():
    subject = subject_of(model("gemma"))
    asked(subject)
    tables = facts(subject)
    assert tables["Windows"][1:] == [["blocks.0", "", "7", "7"], ["blocks.1", "", "all", "all that was asked"]]
    assert len(tables["Relative error against float32"]) == 3 and len(tables["Largest values"]) == 11
    assert tables["Logits when all positions move"][0] == ["mode", "+100", "noise of the format"]


def test_every_finding_can_be_repeated():
    """A subject that is made anew gives the same findings to the last digit."""
    for name in ("tril(diagonal=1) in one layer", "positions in bf16 under autocast", "dropout live in eval()"):
        assert asked(mutated(name))[0] == asked(mutated(name))[0]


def test_the_battery_leaves_the_model_as_it_was():
    built = model("gpt2").eval()
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    state = torch.random.get_rng_state()
    asked(subject_of(built))
    assert all(torch.equal(before[name], tensor) for name, tensor in built.state_dict().items())
    assert not built.training and torch.equal(torch.random.get_rng_state(), state)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in built.modules())


# ---- laws of the probes --------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    window=st.integers(1, 30),
    layer=st.integers(0, 1),
    seed=st.integers(0, 99),
    pattern=st.sampled_from(["L", "LG", "GL"]),
)
def test_the_measured_window_is_the_one_built(window, layer, seed, pattern):
    built = model("llama", seed, window=window, window_pattern=pattern)
    subject = subject_of(built)
    ids = draw_ids(subject, 1, 80, seed)
    measured = reach.edge(block_moves(subject, layer, ids, reach.PLACE))
    assert measured == (window if built.config.is_windowed(layer) else None)


def test_a_wide_window_is_measured_at_its_width_and_its_edge_is_asked_narrow():
    """M1 and M2 set it to 48, where forgetting it while decoding still shows; M6 leaves it as declared."""
    wide = dict(window=600, window_pattern="L", max_seq_len=800)
    subject = subject_of(model("llama", **wide))
    assert asked(subject)[0] == [] and subject.windows == (600, 600) and subject.config.window == 600
    assert facts(subject)["Windows"][1] == ["blocks.0", "", "600", "600"]
    for bug, code in ((proof.WindowInPrefillOnly, "I2"), (proof.ForgetsCausality, "G11"), (proof.WindowOff, "P1")):
        built = model("llama", **wide)
        built.__class__ = bug
        assert code in {finding.code for finding in asked(subject_of(built))[0]}


def test_frozen_weights_are_asked_and_stay_frozen():
    built = model("llama").requires_grad_(False)
    assert asked(subject_of(built))[0] == []
    assert not any(weight.requires_grad for weight in built.parameters())


VARIANTS = {
    "yarn": ("llama", dict(rope_scaling="yarn", rope_factor=4.0, rope_original_len=32)),
    "llama 3": ("llama", dict(rope_scaling="llama3", rope_factor=8.0, rope_original_len=32)),
    "no positions": ("llama", dict(position="none")),
    "sines": ("llama", dict(position="sinusoidal")),
    "two attentions a block": ("llama", dict(pattern="AAF", window=5, window_pattern="L")),
    "no attention": ("llama", dict(pattern="F", n_kv_head=0, qk_norm=True, position="none")),
    "norms after": ("llama", dict(norm_place="after")),
    "gemma 3": (
        "gemma",
        dict(attn_softcap=0.0, softcap=0.0, qk_norm=True, qk_norm_weight=True, rope_local_theta=100.0),
    ),
    "tokens ahead": ("llama", dict(n_ahead=3, pad_vocab=64)),
    "dropout": ("phi", dict(dropout=0.2)),
    "heads left out": ("llama", dict(n_kv_head=4, omit_heads="0:1")),
    "one block": ("llama", dict(n_layer=1)),
    "context of 4": ("gpt2", dict(max_seq_len=4)),
    "two tokens": ("llama", dict(vocab_size=2)),
    "window of 1": ("phi", dict(window=1)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_found_on_other_designs(name):
    family, changes = VARIANTS[name]
    built = model(family, **changes)
    assert asked(subject_of(built))[0] == []
    assert asked(subject_of(built.to(torch.bfloat16)))[0] == []  # tables and all


def test_a_leak_is_one_finding_and_what_follows_from_it_is_not_asked():
    found, outcomes = asked(mutated("mean over all tokens added"))
    assert {finding.code for finding in found} == {"R1"}
    assert sum("mend that first" in outcome.reason for outcome in outcomes) == 3


def test_noise_in_eval_is_one_finding_and_not_ten():
    found, outcomes = asked(mutated("dropout live in eval()"))
    assert {finding.code for finding in found} == {"R17"}
    assert any("mend R17 first" in outcome.reason for outcome in outcomes)


@settings(max_examples=60)
@given(seed=st.integers(0, 999), shift=st.sampled_from([0, 1, 2]), edge=st.booleans(), padding=st.booleans())
def test_the_target_is_read_off_any_gradient(seed, shift, edge, padding):
    generator = torch.Generator().manual_seed(seed)
    T, V = 9, 40
    ids = torch.randperm(V, generator=generator)[: 2 * T].view(2, T)
    labels = ids.clone()
    labels[0, :2], labels[1, -2:] = -100, -100
    targets = torch.full((2, T), -100)
    taught = ids if padding else labels
    targets[:, : T - shift] = taught[:, shift:]
    if edge:
        targets[0, -1] = ids[1, 0]
    logits = torch.randn(2, T, V, generator=generator, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    found = {finding.code for finding in judge_target(ids, labels, torch.autograd.grad(loss, logits)[0])}
    want = {"R2"} if shift != 1 else ({"R6"} if edge else set()) | ({"R4"} if padding else set())
    assert found == want


@pytest.mark.parametrize("family", FAMILIES)
def test_the_thresholds_are_well_above_clean_models_and_below_the_bugs(family):
    """M2 and M3 ask for 1e-4; clean models stay below 1e-5 in float32. The ladder asks for 8; they stay below 3."""
    for seed in range(3):
        subject = subject_of(model(family, seed))
        ids = draw_ids(subject, 1, 40)
        feed, whole = subject.cache(), subject.hidden(ids)
        parts = torch.cat([feed(ids[:, :9])[-1], feed(ids[:, 9:10])[-1], feed(ids[:, 10:])[-1]], dim=1)
        assert decoding.apart(parts, whole[-1]) < decoding.TOLERANCE / 10
        for errors in precision.rungs(subject).values():
            worst = precision.NOISE
            for _, error in errors:
                assert error < 3 * worst and error < precision.LEVEL / 2
                worst = max(worst, error)


def test_a_float_scale_and_a_rounded_one_differ_where_the_release_says():
    table = FloatScale(9, 48, 48**0.5).bfloat16()
    rounded = model("gemma").embed.bfloat16()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        rounded.weight[:9] = table.weight.copy_(torch.randn(9, 48))
        assert not torch.equal(table(ids), rounded(ids))


# ---- transformers' own -------------------------------------------------------------------------------------------

SIZES = dict(vocab_size=67, max_position_embeddings=160, num_hidden_layers=2, num_attention_heads=4, hidden_size=48)
SIZES |= dict(num_key_value_heads=2, intermediate_size=64, pad_token_id=None, bos_token_id=None, eos_token_id=None)
HF = {
    "gpt2": ("GPT2", {}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma 2": ("Gemma2", {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16}),
    "gemma 3": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen 2": ("Qwen2", {}),
    "qwen 3": ("Qwen3", {"head_dim": 16}),
    "phi 3": ("Phi3", {"sliding_window": 9}),
}


def theirs(family, seed=0):
    """A tiny model of the family with every weight drawn."""
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'kobza[parity]'")
    prefix, settings_ = HF[family]
    config = getattr(transformers, f"{prefix}Config")(**SIZES | settings_)
    name = prefix.removesuffix("Text") + ("LMHeadModel" if family == "gpt2" else "ForCausalLM")
    built = getattr(transformers, name)._from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise * (0.3 if "emb" in name or "wte" in name or "wpe" in name else 0.15))
            else:
                one = 0 if family.startswith("gemma") or name.endswith("bias") else 1
                weight.copy_(0.15 * noise + one)
    return built


@pytest.mark.parity
@pytest.mark.parametrize("family", HF)
def test_nothing_is_found_on_transformers_own(family):
    for seed in range(3 if family in ("gpt2", "llama", "gemma 2", "qwen 3", "phi 3") else 1):
        subject = subject_of(theirs(family, seed), family)
        found, outcomes = asked(subject)
        assert found == [] and sum(outcome.status == "ran" for outcome in outcomes) >= len(CHECKS) - 4
    assert asked(subject.at("bf16"))[0] == []


@pytest.mark.parity
def test_positions_under_autocast_as_transformers_4_38_had_them():
    built = theirs("llama")
    built.config.max_position_embeddings = 1200

    def forward(x, position_ids):
        frequencies = built.model.rotary_emb.inv_freq[None, :, None].float()
        angles = (frequencies @ position_ids[:, None].float()).transpose(1, 2)  # a product: autocast makes it bf16
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    built.model.rotary_emb.forward = forward
    found = asked(subject_of(built))[0]
    assert {finding.code for finding in found} == {"G5"} and all("autocast" in finding.where for finding in found)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["GPTNeo", "Cohere", "Qwen3Moe"])
def test_nothing_is_found_on_families_with_ways_of_their_own(family):
    """Windows by other names, pairs of channels side by side, experts that bf16 chooses otherwise."""
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'kobza[parity]'")
    own = {
        "GPTNeo": dict(attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4, window_size=7),
        "Qwen3Moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=12),
    }.get(family, {})
    built = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**SIZES | own))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in built.parameters():
            if weight.ndim > 1:
                weight.copy_(0.15 * torch.randn(weight.shape, generator=generator))
    subject = subject_of(built)
    assert asked(subject)[0] == [] and subject.windows == ((None, 7) if family == "GPTNeo" else (None, None))


@pytest.mark.parity
def test_frequencies_that_went_through_to_bf16():
    found = asked(subject_of(theirs("qwen 3").to(torch.bfloat16)))[0]
    assert {finding.code for finding in found} == {"G6"}


@pytest.mark.parity
def test_labels_that_are_shifted_outside_and_inside():
    built = theirs("phi 3")
    right = built.loss_function

    def twice(logits, labels, **more):
        return right(logits=logits[:, :-1].contiguous(), labels=labels[:, 1:].contiguous(), **more)

    built.loss_function = twice
    assert {finding.code for finding in asked(subject_of(built))[0]} == {"R2"}


@pytest.mark.parity
def test_a_window_that_one_backend_loses():
    built = theirs("mistral")
    for block in built.model.layers:
        forward = block.self_attn.forward

        def without(*args, attention_mask=None, forward=forward, **more):
            if built.config._attn_implementation == "eager":
                T = args[0].shape[1] if args else more["hidden_states"].shape[1]
                attention_mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
            return forward(*args, attention_mask=attention_mask, **more)

        block.self_attn.forward = without
    found = list(reach.reach(subject_of(built)))  # alone: with a cache the mask above has the wrong width
    assert [finding.code for finding in found] == ["P2", "P2"] and all("eager" in finding.where for finding in found)

"""The lab without its runs: designs, matched budgets, names of runs, statistics against SciPy and statsmodels and on noise."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.power import TTestPower

from kobza.config import InputError
from kobza.lab.budget import cost, match_parameters, match_steps
from kobza.lab.debates import summarise
from kobza.lab.design import DESIGNS, Arm, Budget, arms_of, find_design, read_design
from kobza.lab.plan import seeds_of
from kobza.lab.statistics import (
    averaged,
    compare,
    detectable_effect,
    engineering,
    false_positives,
    judge,
    power_of,
    seeds_needed,
    trend,
)
from kobza.lab.store import TokenSet, trial_hash
from kobza.model import build, n_parameters

TINY = """
[set]
"model.n_layer" = 1
"model.n_embd" = 16
"model.n_head" = 2
"model.max_seq_len" = 16
"""
NORM = '[factors]\nnorm = [{"model.norm" = "rmsnorm"}, {"model.norm" = "layernorm"}]\n'


@pytest.fixture
def design(tmp_path):
    """design(text) -> the Design of a file with that content."""

    def make(content, name="d"):
        path = tmp_path / f"{name}.toml"
        path.write_text(content, encoding="utf-8")
        return read_design(path)

    return make


# ---- designs -------------------------------------------------------------------------------------------------------


def names(found):
    return [arm.name for arm in arms_of(found)]


def test_one_factor_names_its_levels_and_begins_with_the_baseline(design):
    arms = arms_of(design(NORM))
    assert [arm.name for arm in arms] == ["rmsnorm", "layernorm"]
    assert [arm.is_baseline for arm in arms] == [True, False]
    assert [arm.config().model.norm for arm in arms] == ["rmsnorm", "layernorm"]


def test_the_short_form_is_quoted_or_not(design):
    for line in ('"model.tied" = [false, true]', "model.tied = [false, true]"):
        found = arms_of(design(f"[factors]\n{line}\n"))
        assert [(arm.name, arm.config().model.tied) for arm in found] == [("tied no", False), ("tied yes", True)]


TWO = '[factors]\n"model.tied" = [false, true]\nmlp = [{"model.mlp" = "relu2"}, {"model.mlp" = "gelu"}, {"model.mlp" = "relu"}]\n'


def test_one_at_a_time_moves_one_factor_and_grid_all(design):
    assert names(design(TWO)) == ["baseline", "tied: yes", "mlp: gelu", "mlp: relu"]
    grid = arms_of(design('plan = "grid"\n' + TWO))
    assert [arm.levels for arm in grid] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert grid[4].name == "tied yes, mlp gelu"
    assert (grid[4].config().model.tied, grid[4].config().model.mlp) == (True, "gelu")


def test_sizes_repeat_the_arms_and_set_changes_every_arm(design):
    found = arms_of(design(TINY + NORM + '[sizes]\nsmall = {"model.n_layer" = 2}\nlarge = {"model.n_layer" = 3}\n'))
    assert [arm.label for arm in found] == [
        "rmsnorm (small)",
        "layernorm (small)",
        "rmsnorm (large)",
        "layernorm (large)",
    ]
    assert {arm.config().model.n_embd for arm in found} == {16}
    assert [arm.config().model.n_layer for arm in found] == [2, 2, 3, 3]


def test_base_and_text_lie_beside_the_design(design, tmp_path):
    (tmp_path / "base.toml").write_text("[model]\nn_layer = 7\n")
    found = design('base = "base.toml"\ntext = ["poems.txt"]\n' + NORM)
    assert arms_of(found)[0].config().model.n_layer == 7 and found.text == (str(tmp_path / "poems.txt"),)


def test_designs_that_come_with_kobza_read():
    found = [read_design(path) for path in sorted(DESIGNS.glob("*.toml"))]
    assert any(design.is_control for design in found) and all(arms_of(design) for design in found)


def test_an_a_a_control_has_equal_arms_with_seeds_of_their_own(design):
    found = design('control = "A/A"\nseeds = 3\nrepeats = 4\n')
    a, b = arms_of(found)
    assert a.values == b.values
    assert len(seeds_of(found, a)) == len(seeds_of(found, b)) == 12
    assert not set(seeds_of(found, a)) & set(seeds_of(found, b))


BAD = [
    ("", "no variation"),
    ("seeds = 1\n", "at least 2"),
    ("seeds = [3, 3]\n" + NORM, "seed 3 stands twice"),
    ("seeds = true\n" + NORM, "seeds is True"),
    ("sedes = 5\n" + NORM, "did you mean seeds?"),
    ('base = "tyni"\n' + NORM, "did you mean tiny?"),
    ('plan = "gird"\n' + NORM, "did you mean grid?"),
    ('measure = "loss"\n' + NORM, "did you mean val_loss?"),
    ('plan = "paired"\n' + TWO, "compares two arms"),
    ("budget = { epochs = 3 }\n" + NORM, "unknown key 'epochs'"),
    ("budget = { steps = 3, tokens = 5 }\n" + NORM, "names steps and tokens"),
    ("budget = { steps = 0 }\n" + NORM, "above 0"),
    ("budget = { steps = 2.5 }\n" + NORM, "whole"),
    ('budget = { flops = 1e9, match = "tokens" }\n' + NORM, "no effect beside flops"),
    ('budget = { steps = 9, parameters = "n_layer" }\n' + NORM, "n_ff or n_embd"),
    ('[factors]\n"model.tide" = [false, true]\n', "did you mean tied?"),
    ('[factors]\n"tied" = [false, true]\n', "no setting"),
    ('[factors]\n"model.tied" = [true]\nb = [{"model.bias" = false}, {"model.bias" = true}]\n', "one level"),
    ('[factors]\n"model.tied" = true\n', "list of levels"),
    ('[factors]\n"model.tied" = [true, true]\n', "two levels called 'yes', and they are the same: no effect"),
    ("seeds = 99999999999999999999\n" + NORM, "at most 10,000"),
    ("seeds = [0, 9223372036854775808]\n" + NORM, "seeds is"),
    ("evaluations = 99999999999\n" + NORM, "from 1 to 10,000"),
    ("budget = { flops = inf }\n" + NORM, "finite number above 0"),
    ('[factors]\n"train.keep" = [1, 2]\n', "no effect in the lab"),
    ('[factors]\n"train.steps" = [10, 20]\n', "the budget sets it"),
    (
        '[factors]\nn = [{"model.norm" = "rmsnorm"}, {name = "same", "model.norm" = "rmsnorm"}]\n',
        "have the same configuration",
    ),
    ('[factors]\n"model.n_head" = [4, 5]\n', "arm 'n_head 5': model.n_embd is 112, not divisible"),
    ('[factors]\n"model.n_layer" = [4, "many"]\n', "must be of type int"),
    (NORM + '[factors.b]\n"model.tied" = [false, true]\n', "no setting"),
    (
        '[factors]\na = [{"model.tied" = false}, {"model.tied" = true}]\n"model.tied" = [false, true]\n',
        "moved by the factors",
    ),
    (
        NORM + '[sizes]\nx = {"model.norm" = "none"}\ny = {"model.n_layer" = 2}\n',
        "moved by size 'x' and by factor 'norm'",
    ),
    (NORM + '[sizes]\nx = {"model.n_layer" = 2}\n', "no trend"),
    ('control = "AA"\n', 'the one control is "A/A"'),
    ('control = "A/A"\n' + NORM, "leave [factors] out"),
    ("repeats = 3\n" + NORM, "no effect without control"),
    ("alpha = 5\n" + NORM, "between 0 and 1"),
    ("text = 5\n" + NORM, "list of files"),
    ("not toml", "not a TOML file"),
]


@pytest.mark.parametrize("content, words", BAD, ids=[words for _, words in BAD])
def test_a_bad_design_is_refused_in_one_line(design, content, words):
    with pytest.raises(InputError) as caught:
        arms_of(design(content))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_design_names_the_nearest():
    with pytest.raises(InputError, match="aa"):
        find_design("ab")
    assert find_design("aa") == DESIGNS / "aa.toml"


# ---- budgets -------------------------------------------------------------------------------------------------------


def arms(*changes, **model):
    """Arms of a small model with a vocabulary; the first, unchanged, is the baseline."""
    base = {"vocab_size": 50, "n_layer": 2, "n_embd": 32, "n_head": 4, "max_seq_len": 16, **model}
    values = [{"model": {**base, **change}, "data": {}, "train": {"micro_batch": 4}} for change in ({}, *changes)]
    return [Arm(f"arm {i}", "", (i,), value) for i, value in enumerate(values)]


def test_counting_needs_no_weights_and_agrees_with_the_built_model():
    for change in ({}, {"mlp": "swiglu"}, {"tied": True}, {"position": "learned"}, {"n_kv_head": 1}):
        config = arms(change)[1].config().model
        assert cost(config).parameters == n_parameters(build(config))


@pytest.mark.parametrize(
    "change", [{"mlp": "swiglu"}, {"mlp": "geglu"}, {"pattern": "AAF"}, {"n_kv_head": 1}, {"tied": True}]
)
def test_solved_widths_are_the_nearest_to_the_baseline_s_parameters(change):
    base, arm = match_parameters(arms(change), "n_ff")
    target = cost(base.config().model).parameters

    def off(width):
        return abs(cost(replace(arm.config().model, n_ff=width)).parameters - target)

    width = arm.config().model.n_ff
    assert off(width) <= min(off(width - 1), off(width + 1)) and off(width) < 0.01 * target
    assert base.config().model.n_ff == 128  # the baseline stays as it was


def test_parameters_can_be_met_by_the_model_s_width():
    base, arm = match_parameters(arms({"pattern": "A", "mlp": "relu2"}), "n_embd")
    have, want = (cost(a.config().model).parameters for a in (arm, base))
    assert arm.config().model.n_embd > 32 and abs(have / want - 1) < 0.2


def test_a_width_without_effect_is_refused():
    with pytest.raises(InputError, match="arm 'arm 1': its pattern 'A' has no feed-forward.*n_embd"):
        match_parameters(arms({"pattern": "A", "mlp": "relu2"}), "n_ff")


def test_steps_are_what_the_budget_buys():
    wide = {"n_embd": 64}

    def steps(budget, seconds=lambda arm: 1.0):
        return [a.config().train.steps for a in match_steps(arms(wide), budget, seconds)]

    assert steps(Budget("steps", 100)) == [100, 100]
    tokens = arms()[0].config().batch_tokens
    assert steps(Budget("tokens", 50.2 * tokens, "tokens")) == [50, 50]
    flops = [tokens * cost(a.config().model).flops_per_token for a in arms(wide)]
    assert steps(Budget("flops", 30 * flops[1], "flops")) == [round(30 * flops[1] / flops[0]), 30]
    assert steps(Budget("steps", 300, "flops")) == [300, round(300 * flops[0] / flops[1])]
    clock = {"arm 0": 0.01, "arm 1": 0.03}
    assert steps(Budget("steps", 300, "seconds"), lambda arm: clock[arm.name]) == [300, 100]
    assert steps(Budget("seconds", 6, "seconds"), lambda arm: clock[arm.name]) == [600, 200]


def test_a_budget_that_buys_no_step_is_refused():
    with pytest.raises(InputError, match="gives 0 steps"):
        match_steps(arms(), Budget("flops", 1.0, "flops"), lambda arm: 1.0)


# ---- the name of a run ---------------------------------------------------------------------------------------------

TOKENS = TokenSet("folder", "abc", 50, 1000, 1000)


def name_of(arm, seed=0, tokens=TOKENS, eval_bytes=100):
    return trial_hash(arm.config(seed), tokens, eval_bytes, 3, "cpu")


def test_the_hash_covers_what_decides_and_nothing_else():
    (arm,) = arms()
    first = name_of(arm)
    assert first == name_of(arms()[0])  # the same again
    decides = [
        name_of(arm.with_value("model", "n_layer", 3)),
        name_of(arm.with_value("train", "lr", 1e-4)),
        name_of(arm.with_value("data", "val_fraction", 0.2)),
        name_of(arm, seed=1),
        name_of(arm, tokens=replace(TOKENS, digest="other")),
        name_of(arm, eval_bytes=101),
    ]
    assert len({first, *decides}) == 7
    assert name_of(arm, tokens=replace(TOKENS, folder="elsewhere")) == first
    for idle in ("keep", "eval_interval", "checkpoint_interval"):
        assert name_of(arm.with_value("train", idle, 77)) == first


def test_the_hash_covers_the_file_of_given_embeddings(tmp_path):
    path = tmp_path / "table.npy"
    found = []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        found.append(name_of(arms()[0].with_value("train", "embeddings", str(path))))
    assert found[0] != found[1]


# ---- statistics ----------------------------------------------------------------------------------------------------


def values(numbers):
    return dict(enumerate(numbers))


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_a_comparison_is_scipy_s_paired_test():
    arm, base = 2 + 0.1 * noise(0, 8), 2 + 0.1 * noise(1, 8)
    found = compare("arm", values(arm), "base", values(base))
    test = scipy_stats.ttest_rel(arm, base)
    interval = test.confidence_interval(0.95)
    assert found.p == pytest.approx(test.pvalue) and found.difference == pytest.approx((arm - base).mean())
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.wilcoxon == pytest.approx(scipy_stats.wilcoxon(arm - base).pvalue)
    assert found.dz == pytest.approx(test.statistic / math.sqrt(8)) and found.noise == pytest.approx(base.std(ddof=1))


def test_pairing_sees_what_the_spread_of_seeds_would_hide():
    seeds = 0.5 * noise(0, 6)
    found = judge(
        [compare("arm", values(seeds - 0.02 + 0.002 * noise(1, 6)), "base", values(seeds))], 0.05, "nats", "equal steps"
    )[0]
    assert found.detected and found.verdict.startswith("helps by 0.019 ± 0.002") and found.noise > 10 * found.half_width
    assert scipy_stats.ttest_ind(seeds - 0.02, seeds).pvalue > 0.8


def with_p(p):
    """A comparison of five pairs whose p-value is p."""
    t = scipy_stats.t.isf(p / 2, 4)
    around = np.array([-2.0, -1, 0, 1, 2])
    shift = t * around.std(ddof=1) / math.sqrt(5)
    return compare(f"{p}", values(around + shift), "base", values(np.zeros(5)))


def test_p_values_are_corrected_by_holm():
    found = judge([with_p(p) for p in (0.01, 0.04, 0.03)], 0.05, "nats", "equal steps")
    assert [c.p for c in found] == [pytest.approx(p) for p in (0.01, 0.04, 0.03)]
    assert [c.p_corrected for c in found] == [pytest.approx(p) for p in (0.03, 0.06, 0.06)]
    assert [c.detected for c in found] == [True, False, False]
    assert found[0].verdict.startswith("hurts") and found[1].verdict.startswith("no difference detectable")


def test_power_is_statsmodels_where_that_has_a_number():
    compared = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in (2, 3, 5, 12, 200):
            for dz in (0.01, 0.3, 1, 4):
                theirs = TTestPower().power(dz, n, 0.02)
                if not math.isnan(theirs):
                    compared += 1
                    assert power_of(-dz, n, 0.02) == pytest.approx(theirs, abs=1e-9)
    assert compared > 15


def test_seeds_needed_are_the_fewest_and_the_detectable_effect_has_its_power():
    for dz in (0.05, 0.3, 1.1):
        n = seeds_needed(dz, 2, 0.05)
        assert power_of(dz, n, 0.05) >= 0.8 > power_of(dz, n - 1, 0.05)
    assert seeds_needed(0.0001, 5, 0.05) is None
    for n in (2, 3, 6, 40):
        for alpha in (0.05, 0.05 / 20):
            assert power_of(detectable_effect(n, alpha), n, alpha) == pytest.approx(0.8, abs=1e-6)


def test_words_for_every_outcome():
    base = values([2.0, 2.1, 2.2])
    cases = {
        "helps by 0.": values([1.5, 1.61, 1.7]),
        "hurts by 0.": values([2.5, 2.61, 2.7]),
        "no difference detectable (+0.": values([2.2, 2.0, 2.3]),
        "no effect: both arms computed the very same numbers": base,
        "diverges: 3 of 3 runs diverged": values([None, None, None]),
        "diverges: 2 of 3 runs diverged": values([2.0, None, None]),
        "but 1 of 3 runs diverged": values([1.5, 1.59, None]),
        "not known: 1 pair of runs": {0: 2.0},
        "not known: 0 pairs of runs": {},
    }
    for words, arm in cases.items():
        (found,) = judge([compare("arm", arm, "base", base)], 0.05, "nats", "equal FLOPs")
        assert words in found.verdict, found.verdict
    (found,) = judge([compare("arm", values([2.2, 2.0, 2.3]), "base", base)], 0.05, "nats", "equal FLOPs")
    assert f"; {found.seeds_needed} seeds would be needed" in found.verdict


def test_noise_is_called_a_difference_at_the_rate_alpha_and_intervals_cover(monkeypatch):
    """300 designs of 3 arms without any effect: Holm keeps the rate of designs with a false verdict at or under alpha."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # statsmodels calls it each time: most of the time here
    wrong, single, covered, n = 0, 0, 0, 300
    for i in range(n):
        data = noise(i, 4, 5)  # a baseline and three arms, five seeds
        found = [compare(str(k), values(data[k]), "base", values(data[0])) for k in (1, 2, 3)]
        wrong += any(c.detected for c in judge(found, 0.05, "nats", "equal steps"))
        single += found[0].p < 0.05
        covered += found[0].low <= 0 <= found[0].high
    assert scipy_stats.binomtest(single, n, 0.05).pvalue > 0.01 and covered == n - single
    assert 0 < wrong and scipy_stats.binomtest(wrong, n, 0.05, alternative="greater").pvalue > 0.01


def test_an_a_a_control_counts_false_positives():
    left, right = noise(0, 2, 1000)
    found = false_positives(left, right, 5, 0.05)
    assert found.tests == 200 and found.low <= 0.05 <= found.high and abs(found.redrawn_rate - 0.05) < 0.015
    assert "which holds alpha" in found.verdict
    unlike = false_positives(left + 1, right, 5, 0.05)
    assert unlike.low > 0.05 and "MISSES" in unlike.verdict


def test_counts_for_reading_are_rounded_before_their_unit_is_chosen():
    assert [engineering(n) for n in (0, 999, 1000, 999_999, 1_234_567)] == ["0", "999", "1k", "1M", "1.23M"]


def test_main_effects_average_over_the_other_factor():
    assert averaged([{0: 1.0, 1: 2.0}, {0: 3.0, 1: None}]) == {0: 2.0, 1: None}


def test_a_trend_over_sizes_is_found_with_its_sign():
    points = [(10**k, -0.10 + 0.02 * k + 0.001 * e) for k in (3, 4) for e in noise(k, 6)]
    found = trend("arm", points, 0.05, "nats")
    assert found.low < 0.02 < found.high and found.verdict.startswith("the gain shrinks with size")
    assert "reach zero at about 98.1k" in found.verdict
    flat = trend("arm", [(10**k, 0.1 * e) for k in (3, 4) for e in noise(k, 6)], 0.05, "nats")
    assert flat.verdict.startswith("no change with size detectable")
    grows = trend("arm", [(p, 0.5 - d) for p, d in points], 0.05, "nats")
    assert grows.verdict.startswith("the loss shrinks")
    assert trend("arm", points[:6], 0.05, "nats") is None


def test_the_page_of_debates_is_generated_from_its_results():
    docs = Path(__file__).parent.parent / "docs"
    contents = json.loads((docs / "debates" / "results.json").read_text(encoding="utf-8"))
    assert len(contents) >= 14 and all(content["comparisons"] for content in contents)
    assert summarise(contents) == (docs / "debates.md").read_text(encoding="utf-8")


def test_every_design_of_the_debates_is_valid():
    for path in sorted((Path(__file__).parent.parent / "docs" / "debates").glob("*.toml")):
        if path.stem != "base":
            assert len(arms_of(read_design(path))) >= 2

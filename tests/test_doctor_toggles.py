"""The solver's parts: row orders are inverse, tables are what they are called, fits find the value, sets are the smallest."""

from dataclasses import replace

import pytest
import torch

from kobza.doctor.models.measure import measure, pick_ids
from kobza.doctor.models.search import Search, fitted, least_at, measured, windows
from kobza.doctor.models.stations import Input, place
from kobza.doctor.models.toggles import base_of, halve, one, pair, rebuilt, shortest, toggles
from kobza.doctor.mutations import parity as proof


def reference_of(family, dtype="fp32", n_tokens=40):
    model = proof.clean(family, 0)
    return model, measure(model, place(model), Input(pick_ids(61, n_tokens, 0), None, dtype), 400)


def search(a, reference, dtype="fp32"):
    base = base_of(a, dtype)
    return Search(base, reference, toggles(base, None, measured(reference, a)))


def labels(solution):
    return [sorted(toggle.label for toggle in chosen) for chosen in solution.sets]


def test_row_orders_are_inverse():
    rows = torch.arange(24.0).view(12, 2)
    assert torch.equal(halve(pair(rows, 3), 3), rows) and torch.equal(pair(halve(rows, 3), 3), rows)
    assert halve(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert not torch.equal(halve(rows, 1), halve(rows, 3))  # the count of heads matters


def test_a_rebuild_is_the_model():
    for family in proof.FAMILIES:
        model = proof.clean(family, 0)
        ids = pick_ids(61, 20, 0)
        assert torch.equal(rebuilt(base_of(model, "fp32"), ())(ids), model(ids)), family


def test_a_rebuild_keeps_odd_tables():
    model = proof.clean("llama", 0)
    rough = proof.tables("positions")(model)
    base = base_of(rough, "fp32")
    assert set(base.tables) == {"rope.cos", "rope.sin"} and not base_of(model, "fp32").tables
    ids, far = pick_ids(61, 20, 0), torch.arange(450, 470)
    assert torch.equal(rebuilt(base, ())(ids, far), rough(ids, far))
    assert not torch.equal(rough(ids, far), model(ids, far))
    assert torch.allclose(rough(ids), model(ids), atol=1e-4)  # bf16 counts to 256: nobody sees it in a short text


def test_toggles_that_do_not_fit_are_no_model():
    base = base_of(proof.clean("llama", 0), "fp32")
    assert rebuilt(base, (one("qk_norm_weight", True, "", "attn"),)) is None  # no qk_norm: refused by the config
    assert rebuilt(base, (one("norm_place", "both", "", "in"),)) is None  # norms that have no weights here


def test_no_two_toggles_are_one():
    for family in proof.FAMILIES:
        base = base_of(proof.clean(family, 0), "fp32")
        options = toggles(base)
        names = [toggle.label for toggle in options]
        assert len(set(names)) == len(names)
        assert all(replace(base.config, **dict(toggle.changes)) != base.config for toggle in options if toggle.changes)


def test_windows_are_measured():
    assert windows(reference_of("gemma")[1]) == [9, 0]
    assert windows(reference_of("phi")[1]) == [11, 11]
    assert windows(reference_of("llama")[1]) == [0, 0]


def test_the_shortest_word_of_a_pattern():
    assert [shortest(p) for p in ("LLL", "LGLG", "LLGLL", "G")] == ["L", "LG", "LLG", "G"]


def test_the_least_is_found():
    assert least_at(lambda x: (x - 1.234) ** 2, -5, 9) == pytest.approx(1.234, abs=1e-4)


@pytest.mark.parametrize(
    "family, field, value, others",
    [
        ("llama", "rope_theta", 34567.0, {}),
        ("gemma", "softcap", 37.0, {}),
        ("gemma", "attn_softcap", 14.0, {}),
        ("qwen", "norm_eps", 3e-5, {}),
    ],
)
def test_a_value_that_no_list_has_is_fitted(family, field, value, others):
    clean = proof.clean(family, 0)
    model = proof.twin(clean, **{field: value}, **others)
    reference = measure(model, place(model), Input(pick_ids(61, 40, 0)), 400)
    base = base_of(clean, "fp32")
    wrong = Search(base, reference, []).wrong(())
    (found,) = [t for t in fitted(base, reference, wrong) if t.slot == field]
    assert dict(found.changes)[field] == pytest.approx(value, rel=2e-3)
    assert labels(Search(base, reference, [found]).solve()) == [[found.label]]


def test_the_smallest_set_wins_and_equals_are_all_told():
    model, reference = reference_of("phi", n_tokens=40)
    config = replace(model.config, window=0, window_pattern="L")
    open_ = proof.twin(model, window=0, window_pattern="L")
    assert open_.config == config
    wide = proof.twin(model, window=100)  # past the 40 tokens that are run
    ref = measure(open_, place(open_), Input(pick_ids(61, 40, 0)), 0)
    solution = search(proof.twin(model, window=11), ref).solve()
    assert labels(solution) == [["window=0"]]
    assert search(wide, ref).solve().sets == ((),)  # nothing that was run tells 100 from none: nothing is claimed
    assert labels(search(proof.twin(model, rope_theta=5e5), reference).solve()) == [["rope_theta=10000"]]


def test_a_search_stops_in_time():
    model, reference = reference_of("llama")
    a = proof.edited(model, o_proj=2.0)
    base = base_of(a, "fp32")
    solution = Search(base, reference, toggles(base), seconds=0.2).solve()
    assert not solution.sets and solution.seconds < 3 and "blocks.0.attn" in solution.wrong

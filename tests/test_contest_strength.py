"""Strengths recover what was planted, their intervals cover it; the bracket is the same however often it is drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kobza.contest.bracket import draw, places
from kobza.contest.strength import PRIOR, strengths


def cast_votes(rng, planted, n_votes):
    """Votes on random pairs, drawn from the Bradley-Terry model of these strengths."""
    votes = []
    for _ in range(n_votes):
        a, b = rng.choice(len(planted), 2, replace=False)
        votes.append((int(a), int(b), float(rng.random() < 1 / (1 + np.exp(planted[b] - planted[a])))))
    return votes


def test_planted_strengths_are_recovered():
    planted = np.array([1.5, 0.7, 0.0, -0.7, -1.5])
    found = strengths(5, cast_votes(np.random.default_rng(1), planted, 4000))
    assert np.allclose([s.value for s in found], planted, atol=0.15)


def test_intervals_cover_about_95_percent():
    rng, inside = np.random.default_rng(2), []
    for _ in range(300):
        planted = rng.normal(0, 1, 8)
        planted -= planted.mean()
        found = strengths(8, cast_votes(rng, planted, 160))
        inside += [s.low <= value <= s.high for s, value in zip(found, planted, strict=True)]
    assert 0.93 < np.mean(inside) < 0.975, np.mean(inside)  # 2,400 intervals: two standard errors are 0.009


def test_without_the_prior_it_is_a_logistic_regression():
    """Its mode is the one that statsmodels finds for the same penalty, by another road."""
    pytest.importorskip("statsmodels")
    from scipy.optimize import minimize

    votes = cast_votes(np.random.default_rng(3), np.array([1.0, 0.0, -1.0]), 60)

    def loss(theta):
        nats = sum(np.logaddexp(0, -(theta[a] - theta[b])) if share else np.logaddexp(0, theta[a] - theta[b])
                   for a, b, share in votes)  # fmt: skip
        return nats + (theta**2).sum() / (2 * PRIOR**2)

    theirs = minimize(loss, np.zeros(3), tol=1e-12).x
    assert np.allclose([s.value for s in strengths(3, votes)], theirs - theirs.mean(), atol=1e-4)


def test_never_beaten_and_never_compared_stay_finite():
    found = strengths(3, [(0, 1, 1.0)] * 10_000)
    assert 2 < found[0].value < 30 and np.isfinite(found[0]).all()
    assert found[2].high - found[2].low > 5  # nothing is known of it
    assert [s.value for s in strengths(2, [])] == [0.0, 0.0] and strengths(0, []) == []


def test_a_tie_is_half_a_win_for_each():
    assert strengths(2, [(0, 1, 0.5)] * 2) == strengths(2, [(0, 1, 1.0), (0, 1, 0.0)])


@given(st.randoms(use_true_random=False))
def test_the_order_of_votes_and_sides_does_not_matter(random):
    votes = cast_votes(np.random.default_rng(4), np.zeros(4), 40)
    mixed = [(b, a, 1 - share) if random.random() < 0.5 else (a, b, share) for a, b, share in votes]
    random.shuffle(mixed)
    assert strengths(4, mixed) == strengths(4, votes)


# ---- bracket ----


def flat(_):
    return 0.0


def test_the_first_two_places_meet_in_the_final_only():
    assert places(4) == [0, 3, 1, 2]
    assert sorted(places(16)) == list(range(16))
    assert places(8).index(0) // 4 != places(8).index(1) // 4


@pytest.mark.parametrize("n", range(1, 18))
def test_byes_fill_up_to_a_power_of_two_and_everyone_plays_to_a_champion(n):
    done = draw(range(10, 10 + n), 7, {}, 3, True, flat)
    assert done.champion in range(10, 10 + n)
    first = done.rounds[0] if done.rounds else ()
    byes = [m for m in first if m.how == "bye"]
    assert len(byes) == (0 if n == 1 else 2 * len(first) - n)
    assert sum(m.how != "bye" for round_ in done.rounds for m in round_) == n - 1  # each match sends one home
    assert all(m.left is not None or m.right is not None for m in first)
    there = [id for m in first for id in (m.left, m.right) if id is not None]
    assert n == 1 or sorted(there) == list(range(10, 10 + n))


def test_a_match_is_decided_by_votes_once_there_are_enough_and_stays_so():
    pair = frozenset((1, 2))
    assert draw([1, 2], 0, {pair: [1, 1]}, 3, False, flat).champion is None
    assert draw([1, 2], 0, {pair: [1, 1, 2]}, 3, False, flat).champion == 1
    assert draw([1, 2], 0, {pair: [1, 1, 2, 2, 2, 2, 2]}, 3, False, flat).champion == 1  # later votes change nothing
    assert draw([1, 2], 0, {pair: [1, 2, None]}, 3, False, flat).champion is None  # even: open until a majority
    assert draw([1, 2], 0, {pair: [1, 2, None, 2]}, 3, False, flat).champion == 2


def test_at_the_close_majority_then_standings_then_lot_decide():
    pair = frozenset((1, 2))

    def final(votes, strength=flat):
        return draw([1, 2], 0, {pair: votes}, 5, True, strength).rounds[-1][0]

    assert (final([2]).winner, final([2]).how) == (2, "votes")
    strong = {1: 0.1, 2: 0.4}.__getitem__
    assert (final([1, 2], strong).winner, final([1, 2], strong).how) == (2, "standings")
    assert (final([]).how, final([]).winner) == ("lot", final([]).winner)


def test_lots_depend_on_the_stated_seed_alone():
    one, again = (draw(order, 3, {}, 1, True, flat) for order in ([1, 2, 3, 4, 5], [5, 3, 1, 2, 4]))
    assert one == again
    champions = {draw(range(1, 6), lot, {}, 1, True, flat).champion for lot in range(40)}
    assert champions == {1, 2, 3, 4, 5}


def test_only_matches_whose_sides_are_known_are_open():
    drawn = draw([1, 2, 3, 4], 0, {}, 1, False, flat)
    assert len(drawn.open_pairs()) == 2 and not drawn.rounds[1][0].open
    done = {pair: [max(pair)] for pair in drawn.open_pairs()}
    assert len(draw([1, 2, 3, 4], 0, done, 1, False, flat).open_pairs()) == 1

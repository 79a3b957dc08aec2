"""The search for copies against the naive one, for texts with repeats, and its speed on a long text."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kobza.evals.copies import TextIndex, code_points, covered, suffix_array

words = st.text(alphabet="ab\nё", max_size=40)

LONG = ["abba" * 12, "abab" * 12, "baab" * 13 + "a", "b" * 50]  # longer than what is packed into one integer
repeats = st.lists(st.sampled_from(LONG), min_size=2, max_size=8).map("".join)


@given(st.one_of(words, repeats, st.text(max_size=30), st.integers(1, 200).map(lambda n: "ab" * n), st.just("a" * 300)))
def test_the_suffix_array_orders_the_suffixes(text):
    wanted = sorted(range(len(text)), key=lambda i: [ord(c) for c in text[i:]])
    assert suffix_array(code_points(text)).tolist() == wanted


def naive(haystack, needle):
    return [max(n for n in range(len(needle) - i + 1) if needle[i : i + n] in haystack) for i in range(len(needle))]


@given(st.one_of(words, repeats), st.one_of(words, repeats))
def test_matches_equal_the_naive_search(haystack, needle):
    assert TextIndex(haystack).longest(needle).tolist() == naive(haystack, needle)


def test_a_long_copy_is_found_to_its_last_character():
    letters = np.random.default_rng(0).choice(list("abcdefg "), 5000)
    text = "".join(letters)
    copied = text[1234 : 1234 + 777]
    longest = TextIndex(text).longest("ЖЖ" + copied + "Ж")
    assert longest[:2].tolist() == [0, 0] and longest[2:4].tolist() == [777, 776] and longest[-1] == 0
    assert covered(longest, 700).tolist() == [False] * 2 + [True] * 777 + [False]


def test_covered():
    assert covered(np.array([0, 3, 2, 1, 0]), 3).tolist() == [False, True, True, True, False]
    assert covered(np.array([2, 1, 2, 1]), 2).all() and not covered(np.array([1, 1]), 2).any()


@pytest.mark.slow
def test_a_text_of_ten_million_characters_is_searched_in_a_minute():
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghijklmnop"), n)) for n in generator.integers(2, 9, 5000)]
    text = " ".join(generator.choice(words, 1_600_000))
    started = time.perf_counter()
    longest = TextIndex(text).longest(text[777:4777] + "!")
    assert longest[0] == 4000 and time.perf_counter() - started < 120

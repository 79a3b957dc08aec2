"""The worked examples run, learn, and learn from what they are meant to learn from."""

import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="examples/ is not part of an installed package")


@pytest.fixture(scope="module")
def name_digits():
    """The example as a module."""
    pytest.importorskip("sklearn", reason="the pictures are scikit-learn's: pip install kobza[examples]")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import name_digits

        yield name_digits
    finally:
        sys.path.remove(str(EXAMPLES))


def test_it_learns_to_name_digits_and_only_by_looking(name_digits, capsys):
    """In a third of its steps. Beside another's picture a sentence is right one time in ten."""
    result = name_digits.main(steps=100)
    shown = capsys.readouterr().out
    assert result["accuracy"] > 0.6, "chance, and any model that does not look, is right at about 0.1"
    assert result["blind"] < 0.2
    assert "-> this is a" in shown and f"{result['accuracy']:.1%}" in shown


def test_patches_are_the_picture_cut_in_order(name_digits):
    picture = torch.arange(64).view(1, 8, 8)
    patches = name_digits.cut(picture)
    assert patches.shape == (1, 16, 4)
    assert patches[0, 0].tolist() == [0, 1, 8, 9] and patches[0, 5].tolist() == [18, 19, 26, 27]
    assert sorted(patches.flatten().tolist()) == list(range(64))


def test_held_out_pictures_are_not_among_those_learned(name_digits):
    pictures, digits = name_digits.load()
    assert len(pictures) == len(digits) == 1797 and pictures.max() == 1
    learned = {tuple(p.flatten().tolist()) for p in pictures[:1437]}
    assert not any(tuple(p.flatten().tolist()) in learned for p in pictures[1437:])


def test_sentences_come_back_from_their_ids(name_digits):
    for sentence in name_digits.SENTENCES:
        assert name_digits.decode(name_digits.encode(sentence, 24)) == sentence
    assert name_digits.SENTENCES[8] == "this is an eight." and len(set(name_digits.SENTENCES)) == 10

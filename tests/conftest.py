"""What every test relies on: one thread, and property tests that draw the same examples each time."""

import pytest
import torch
from hypothesis import settings

# The models here are tiny: a second thread costs more than it computes, and on a busy machine the threads wait for each
# other. One thread also fixes the order of sums, which the golden losses and the bit-for-bit tests need.
torch.set_num_threads(1)

# No deadline: a busy machine is not a bug. Derandomized: a change fails for what it does, not for its luck.
settings.register_profile("kobza", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("kobza")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The path of a small text to train on."""
    from test_run import verse

    path = tmp_path_factory.mktemp("text") / "verse.txt"
    path.write_text(verse())
    return str(path)

"""The presets load."""

import pytest

from kobza.config import preset, preset_names, run_from_dict


@pytest.mark.parametrize("name", preset_names())
def test_preset_loads(name):
    assert run_from_dict(preset(name), name).train.steps > 0

"""The one way to change or observe a built model."""

import pytest
import torch
from torch import nn

from kobza.config import InputError, ModelConfig
from kobza.model import build
from kobza.surgery import replace_modules, watch

IDS = torch.arange(12).view(2, 6)


def small():
    return build(ModelConfig(vocab_size=12, max_seq_len=8, n_layer=2, n_head=2, n_embd=16, zero_init=False)).eval()


class Doubled(nn.Module):
    """Twice what the module inside says."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def test_replace_puts_the_new_module_in_place():
    model, plain = small(), small()
    names = replace_modules(model, lambda name, _: name.endswith("up_proj"), Doubled)
    assert names == ["blocks.0.mlp.up_proj", "blocks.1.mlp.up_proj"]
    assert all(isinstance(model.get_submodule(name), Doubled) for name in names)
    with torch.no_grad():
        for block in plain.blocks:
            block.mlp.up_proj.weight.mul_(2)
    assert torch.equal(model(IDS), plain(IDS))


def test_replacing_and_putting_back_changes_nothing():
    model = small()
    before = model(IDS)
    replace_modules(model, lambda _, m: isinstance(m, nn.Linear), Doubled)
    assert not torch.equal(model(IDS), before)
    replace_modules(model, lambda _, m: isinstance(m, Doubled), lambda m: m.inner)
    assert torch.equal(model(IDS), before)


def test_a_new_module_that_matches_too_is_not_wrapped_again():
    model = small()
    replace_modules(model, lambda name, _: "q_proj" in name, Doubled)
    assert isinstance(model.blocks[0].attn.q_proj.inner, nn.Linear)


@pytest.mark.parametrize(
    "act", [lambda m, match: replace_modules(m, match, Doubled), lambda m, match: watch(m, match, print).__enter__()]
)
def test_no_match_is_an_error_that_names_what_there_is(act):
    with pytest.raises(InputError, match="no module of GPT matches; its modules: .*q_proj.*v_proj"):
        act(small(), lambda name, _: name.endswith("c_attn"))


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_watch_sees_each_output_in_order():
    model, seen = small(), []
    with watch(model, lambda name, _: name in ("embed", "blocks.1", "lm_head"), lambda *pair: seen.append(pair)):
        logits = model(IDS)
        assert hooks(model) == 3
    assert [name for name, _ in seen] == ["embed", "blocks.1", "lm_head"]
    assert torch.equal(seen[0][1], model.embed.weight[IDS]) and torch.equal(seen[2][1], logits)


def test_hooks_are_gone_afterwards():
    model, seen = small(), []
    with watch(model, lambda name, _: True, lambda *pair: seen.append(pair)):
        pass
    with pytest.raises(ZeroDivisionError), watch(model, lambda name, _: True, lambda *pair: 1 / 0):
        model(IDS)
    assert hooks(model) == 0 and not seen
    model(IDS)
    assert not seen


def test_watching_changes_no_output():
    model = small()
    before = model(IDS)
    with watch(model, lambda name, _: True, lambda name, output: None):
        assert torch.equal(model(IDS), before)

"""The one way to change or observe a built model."""

import pytest
import torch
from torch import nn

from kobza.config import InputError, ModelConfig
from kobza.model import build
from kobza.surgery import compute_in_float32, find_modules, replace_modules, watch

IDS = torch.arange(12).view(2, 6)


def small():
    return build(ModelConfig(vocab_size=12, max_seq_len=8, n_layer=2, n_head=2, n_embd=16, init="gpt2")).eval()


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


# ---- by pattern ----


def test_modules_are_found_by_pattern_in_the_order_of_the_model():
    found = find_modules(small(), "lm_head, blocks.*.attn", "train.freeze")
    assert list(found) == ["blocks.0.attn", "blocks.1.attn", "lm_head"]
    assert list(find_modules(small(), "blocks.1", "x")) == ["blocks.1"]


@pytest.mark.parametrize(
    "patterns, words",
    [
        ("lm_haed", "train.freeze: the model has no module 'lm_haed'; did you mean lm_head?"),
        ("lm_head,blocks.*.mpl", "train.freeze: the model has no module 'blocks.*.mpl'; did you mean blocks."),
        ("zzz", "train.freeze: the model has no module 'zzz'; known: embed, "),
        (",", "train.freeze: the model has no module ''"),
    ],
)
def test_a_pattern_without_a_module_names_the_nearest(patterns, words):
    with pytest.raises(InputError) as error:
        find_modules(small(), patterns, "train.freeze")
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- parts in float32 ----


def logits_of(parts, dtype=torch.bfloat16):
    model = small()
    if parts:
        compute_in_float32(model, parts)
    return model(IDS, dtype=dtype).detach()


def test_every_part_in_float32_is_the_float32_model_but_for_what_flows_between():
    """By hand: float32 blocks, norm and head, and a stream that is rounded to bf16 between them."""
    model = small()
    views = model.views(torch.arange(6), None, 0, 6)
    x = model.embed(IDS).bfloat16()
    for part in (*model.blocks, model.norm):
        x = (part(x.float(), views, None) if part is not model.norm else part(x.float())).bfloat16()
    by_hand = model.lm_head(x.float())
    found = logits_of("blocks,norm,lm_head")
    assert found.dtype == torch.float32 and torch.equal(found, by_hand)
    assert torch.equal(found, logits_of("blocks.*,norm,lm_head"))  # what is inside them is float32 already
    exact = logits_of("", torch.float32)
    assert (found - exact).abs().mean() < (logits_of("").float() - exact).abs().mean()


@pytest.mark.parametrize("parts", ["blocks.0.attn", "blocks.*.mlp", "blocks.*.attn.o_proj"])
def test_a_part_computes_as_it_would_in_a_float32_model(parts):
    """And the others as they would in a bf16 one: the same as doing by hand what a hook before and one after see."""
    model, plain, seen = small(), small(), []
    names = compute_in_float32(model, parts)
    for name in names:
        by_hand = plain.get_submodule(name)
        wide = type(by_hand).forward

        def forward(*args, module=by_hand, wide=wide):
            seen.append(args[0].dtype)
            return wide(module, args[0].float(), *args[1:]).bfloat16()

        by_hand.forward = forward
    found = model(IDS, dtype=torch.bfloat16)
    assert torch.equal(found, plain(IDS, dtype=torch.bfloat16)) and found.dtype == torch.bfloat16
    assert seen == [torch.bfloat16] * len(names)
    assert not torch.equal(found, logits_of(""))


def test_where_all_is_float32_it_changes_nothing():
    assert torch.equal(logits_of("blocks,norm,lm_head", torch.float32), logits_of("", torch.float32))


def test_names_stay_and_gradients_flow_through_parts_in_float32():
    model, plain = small(), small()
    compute_in_float32(model, "blocks,norm,lm_head")
    assert list(model.state_dict()) == list(plain.state_dict())
    for each, dtype in ((model, torch.bfloat16), (plain, torch.float32)):
        each(IDS, dtype=dtype).float().log_softmax(-1)[..., 0].sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 0.02 * q.grad.norm(), name


@pytest.mark.parametrize("part", ["embed", "rope", "lm_head,embed"])
def test_a_table_cannot_be_put_into_float32(part):
    with pytest.raises(
        InputError, match=f"train.fp32_parts: {part.split(',')[-1]} is a table, float32 in every precision"
    ):
        compute_in_float32(small(), part)

"""Activation checkpointing: gradients of the plain model to the bit, what is kept, and where the inputs wait."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from kobza.config import InputError, ModelConfig
from kobza.generate import KVCache
from kobza.kernels import checkpointing, fused
from kobza.kernels.checkpointing import Checkpointed, Stay, checkpoint_blocks
from kobza.model import build
from kobza.surgery import replace_modules
from kobza.train import next_token_loss

IDS = torch.arange(24).view(2, 12) % 20
SMALL = {"vocab_size": 20, "max_seq_len": 16, "n_layer": 3, "n_head": 2, "n_embd": 32, "init": "gpt2"}
MODELS = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "llama": {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "qk_norm": True, "n_kv_head": 1},
    "window": {"position": "rope", "window": 4, "norm_place": "both", "dropout": 0.1},
    "bias": {"bias": True, "norm_place": "after"},
}


def pair(**settings):
    """Two models alike, the second checkpointed."""
    plain = build(ModelConfig(**SMALL | settings)).train()
    other = copy.deepcopy(plain)
    assert checkpointing.use(other) == ["blocks.0", "blocks.1", "blocks.2"]
    return plain, other


def gradients(model, dtype=None, **inputs):
    """The loss and the gradients by name, from one random state."""
    torch.manual_seed(7)
    logits = model(IDS, dtype=dtype, **inputs)
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), IDS.roll(-1, 1).flatten())
    loss.backward()
    after = torch.rand(1)  # the random state that is left behind
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found, after


def same(a, b):
    return (
        torch.equal(a[0], b[0])
        and a[1].keys() == b[1].keys()
        and all(torch.equal(a[1][k], b[1][k]) for k in a[1])
        and torch.equal(a[2], b[2])
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_plain_model_to_the_bit(name, dtype):
    plain, other = pair(**MODELS[name])
    assert same(gradients(plain, dtype), gradients(other, dtype))
    assert same(gradients(plain, dtype), gradients(other, dtype))  # and once more


def test_with_a_mask_and_positions_of_packed_documents():
    plain, other = pair(position="rope", norm="rmsnorm")
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 3])
    positions = torch.tensor([[*range(5), *range(7)], [*range(9), *range(3)]])
    mask = ((documents[:, :, None] == documents[:, None]) & torch.ones(12, 12, dtype=torch.bool).tril())[:, None]
    assert same(gradients(plain, mask=mask, positions=positions), gradients(other, mask=mask, positions=positions))


class Adapted(nn.Module):
    """A frozen Linear and two small matrices beside it, with dropout."""

    def __init__(self, base):
        super().__init__()
        self.base, self.drop = base, nn.Dropout(0.2)
        self.lora_a = nn.Parameter(torch.linspace(-1, 1, 2 * base.in_features).view(2, -1))
        self.lora_b = nn.Parameter(torch.linspace(-0.1, 0.1, 2 * base.out_features).view(-1, 2))

    def forward(self, x):
        return self.base(x) + self.drop(x) @ self.lora_a.to(x.dtype).T @ self.lora_b.to(x.dtype).T


@pytest.mark.parametrize("first", ["adapter", "checkpointing"])
def test_an_adapter_on_a_frozen_model_whose_first_input_wants_no_gradient(first):
    plain = build(ModelConfig(**SMALL)).train().requires_grad_(False)
    other = copy.deepcopy(plain)

    def adapt(model):
        replace_modules(model, lambda name, _: name.endswith("_proj"), Adapted)

    adapt(plain)
    for act in (adapt, checkpointing.use) if first == "adapter" else (checkpointing.use, adapt):
        act(other)
    found = gradients(other)
    assert same(gradients(plain), found) and len(found[1]) == 3 * 6 * 2
    assert all(grad.abs().max() > 0 for grad in found[1].values())


def test_over_fused_blocks():
    plain = build(ModelConfig(**SMALL | {"mlp": "relu2"})).train()
    fused.use(plain)
    other = copy.deepcopy(plain)
    checkpointing.use(other)
    assert same(gradients(plain), gradients(other))


def test_two_forwards_before_their_backwards():
    """As preference losses do: each backward meets the segments of its own forward."""
    plain, other = pair(dropout=0.2)
    for model in (plain, other):
        torch.manual_seed(3)
        (model(IDS).square().mean() - model(IDS.flip(1)).cos().mean()).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), other.parameters(), strict=True))


def test_a_graph_that_is_kept_gives_its_gradients_again():
    _, other = pair(dropout=0.2)
    loss, weights = other(IDS).square().mean(), list(other.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, weights), strict=True))


def test_the_training_step_of_the_core():
    plain, other = pair(dropout=0.1)
    batch = (IDS, IDS.roll(-1, 1))
    for model in (plain, other):
        torch.manual_seed(1)
        next_token_loss()(model, batch)[0].backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), other.parameters(), strict=True))


# ---- what changes and what does not ----


def kept_outside(model):
    """Bytes that autograd saves outside checkpointed blocks: within them other hooks are at work."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        model(IDS)
    return sum(sizes)


def test_of_the_blocks_only_their_inputs_are_kept():
    plain, other = pair()
    weights = sum(p.nbytes for p in plain.parameters())
    inputs = 3 * IDS.numel() * 32 * 4
    assert kept_outside(plain) - weights > 8 * inputs  # what there is to save
    assert kept_outside(other) < 2 * inputs  # tables, last norm and head


def test_inputs_and_slots_are_gone_after_the_backward():
    _, other = pair()
    loss = other(IDS).sum()
    segments = [block.latest for block in other.blocks]
    slots = [slot for segment in segments for slot in segment().slots]
    assert all(segment() is not None for segment in segments) and all(slot() is not None for slot in slots)
    loss.backward()
    del loss
    gc.collect()
    assert all(segment() is None for segment in segments) and all(slot() is None for slot in slots)


def test_names_weights_and_modes_stay():
    plain, other = pair(dropout=0.4)
    assert list(plain.state_dict()) == list(other.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in other.named_parameters()]
    assert torch.equal(plain.eval()(IDS), other.eval()(IDS))
    assert not any(module.training for module in other.modules()) and not other.blocks[0].outside[0].training


def test_generating_goes_past_it():
    plain, other = pair(position="rope")
    with torch.no_grad():
        caches = [KVCache(plain.config, 2, torch.device("cpu"), torch.float32) for _ in range(2)]
        for model, cache in zip((plain, other), caches, strict=True):
            model.eval()(IDS[:, :6], cache=cache)
        assert torch.equal(plain(IDS[:, 6:7], cache=caches[0]), other(IDS[:, 6:7], cache=caches[1]))
    cache = KVCache(plain.config, 2, torch.device("cpu"), torch.float32)
    other.requires_grad_(False)(
        IDS, cache=cache
    )  # where gradients are on: a block run twice would store its keys twice
    assert all(block.latest is None for block in other.blocks)


def test_the_last_product_of_a_block_is_not_computed_again():
    """What it yields is saved by nobody, and it is a tenth of the work."""
    plain, other = pair()
    counts = {}
    for model in (plain, other):
        calls = counts[model] = []
        for block in model.blocks:
            for part in ("up_proj", "down_proj"):
                getattr(block.mlp, part).register_forward_hook(lambda *_, part=part, calls=calls: calls.append(part))
        model(IDS).sum().backward()
    assert counts[plain].count("up_proj") == 3 and counts[other].count("up_proj") == 6
    assert counts[other].count("down_proj") == 3


def test_a_mode_changed_between_forward_and_backward_is_refused():
    _, other = pair(dropout=0.3)
    loss = other(IDS).sum()
    other.eval()
    with pytest.raises(RuntimeError, match="did otherwise the second time"):
        loss.backward()


class Through(nn.Module):
    def forward(self, x, *_):
        return x


@pytest.mark.parametrize(
    "part", [build(ModelConfig(**SMALL | {"n_ff": 40})).blocks[2].mlp, Through()], ids=["wider", "less"]
)
def test_a_part_changed_between_forward_and_backward_is_refused(part):
    _, other = pair()
    loss = other(IDS).sum()
    other.blocks[2].mlp = part
    with pytest.raises(RuntimeError, match="did otherwise the second time"):
        loss.backward()


# ---- offload ----


def test_offload_where_there_is_no_other_memory_is_refused():
    with pytest.raises(InputError, match="--checkpointing offload .* on cpu .* no effect: take --checkpointing on"):
        checkpointing.use(build(ModelConfig(**SMALL)), offload=True)


class Elsewhere:
    """A Mover whose copies are made late, as a stream's are: what comes back is whole only once it is ready."""

    def __init__(self):
        self.log, self.originals, self.names = [], [], {}

    def out(self, x: Tensor):
        self.names[len(self.originals)] = name = len(self.originals)
        self.originals.append(weakref.ref(x.untyped_storage()))
        self.log.append(f"out {name}")
        return name, x.clone()

    def back(self, away):
        self.log.append(f"back {away[0]}")
        return away[0], torch.full_like(away[1], float("nan")), away[1]

    def ready(self, coming):
        name, x, source = coming
        self.log.append(f"ready {name}")
        return x.copy_(source)


def test_inputs_wait_elsewhere_and_come_back_a_block_ahead():
    plain = build(ModelConfig(**SMALL | {"n_layer": 4, "dropout": 0.1})).train()
    other, mover = copy.deepcopy(plain), Elsewhere()
    checkpoint_blocks(other, mover)
    assert same(gradients(plain), gradients(other))
    mover.log.clear()
    loss = other(IDS).sum()
    assert mover.log == ["out 3", "out 4", "out 5"]  # the last block's stays
    for index, block in enumerate(other.blocks):
        block.attn.register_forward_hook(lambda *_, index=index: mover.log.append(f"block {index}"))
    loss.backward()
    # each is asked for before the block above it computes, and waited for afterwards
    assert mover.log[3:] == [
        *("back 5", "block 3"),
        *("ready 5", "back 4", "block 2"),
        *("ready 4", "back 3", "block 1"),
        *("ready 3", "block 0"),
    ]


def test_an_input_that_waits_elsewhere_is_not_kept_here_as_well():
    model, mover = build(ModelConfig(**SMALL)).train(), Elsewhere()
    checkpoint_blocks(model, mover)
    loss = model(IDS).sum()
    gc.collect()
    assert [original() is None for original in mover.originals] == [True, True]
    loss.backward()


def test_the_first_block_starts_a_chain_of_its_own():
    model, mover = build(ModelConfig(**SMALL)).train(), Elsewhere()
    checkpoint_blocks(model, mover)
    (model(IDS).sum() + model(IDS.flip(1)).sum()).backward()
    assert sorted(mover.log) == sorted(f"{what} {i}" for what in ("out", "back", "ready") for i in range(4))


def test_wrapped_twice_it_is_still_right():
    plain, other = pair(dropout=0.1)
    checkpoint_blocks(other, Stay())
    assert isinstance(other.blocks[0].outside[0], Checkpointed) and same(gradients(plain), gradients(other))

"""Sub-layers for tuning on a CPU, and the head's loss in chunks, equal their plain twins: values and gradients, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kobza.config import ModelConfig
from kobza.finetune.example import Packed
from kobza.finetune.sft import document_mask, sft_loss
from kobza.generate import KVCache
from kobza.kernels import head_loss as heads
from kobza.kernels import tuned
from kobza.kernels.head_loss import head_loss, model_head_loss
from kobza.model import build
from kobza.surgery import replace_modules
from kobza.train import IGNORE

LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "n_head": 6, "n_kv_head": 2, "qk_norm": False}
KINDS = {
    "llama": LLAMA,
    "qwen": LLAMA | {"qkv_bias": True, "norm_weight": True},
    "geglu, no gain": LLAMA | {"mlp": "geglu_tanh", "norm_weight": False},
    "no rope, all heads": LLAMA | {"position": "learned", "n_kv_head": 6, "mlp": "geglu"},
    "half turned": LLAMA | {"rope_dim": 4},
}


class PlainLora(nn.Module):
    """LoRA as it is written down."""

    def __init__(self, base, rank):
        super().__init__()
        self.base, self.scale, self.dropout, self.magnitude = base, 1.7, nn.Identity(), None
        self.on = True
        self.lora_a = nn.Parameter(0.3 * torch.randn(rank, base.in_features, dtype=base.weight.dtype))
        self.lora_b = nn.Parameter(0.3 * torch.randn(base.out_features, rank, dtype=base.weight.dtype))

    def forward(self, x):
        if not self.on:
            return self.base(x)
        return self.base(x) + self.scale * F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))


def twins(targets="q k v o gate up down", **switches):
    """A float64 model with LoRA on the named layers, and its copy with tuned blocks."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "n_layer": 2, "n_embd": 48, "n_ff": 40, "max_seq_len": 40}
    plain = build(ModelConfig(**sizes | LLAMA | switches))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain.double().requires_grad_(False)
    names = [f"{name}_proj" for name in targets.split()]
    ranks = iter([3, 2, 5, 4, 1, 3, 2] * 2)
    replace_modules(plain, lambda name, _: name.endswith(tuple(names)), lambda layer: PlainLora(layer, next(ranks)))
    fast = copy.deepcopy(plain)
    assert tuned.use(fast) == ["blocks.0", "blocks.1"]
    return plain, fast


def loss_and_gradients(model, ids, mask=None, positions=None):
    torch.manual_seed(1)
    loss = (model(ids, positions, mask) * torch.randn(*ids.shape, 11, dtype=torch.float64)).sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def check_equal(plain, fast, *inputs):
    loss, gradients = loss_and_gradients(plain, *inputs)
    fast_loss, fast_gradients = loss_and_gradients(fast, *inputs)
    assert torch.allclose(loss, fast_loss, rtol=1e-11)
    assert gradients and gradients.keys() == fast_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, fast_gradients[name], rtol=1e-8, atol=1e-11), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17)])
def test_tuned_blocks_equal_the_plain_ones(kind, shape):
    check_equal(*twins(**KINDS[kind]), torch.randint(11, shape))


@pytest.mark.parametrize("targets", ["q v", "down", "o up", "k gate"])
def test_lora_may_be_on_some_layers_only(targets):
    check_equal(*twins(targets), torch.randint(11, (2, 9)))


def test_documents_of_a_mask_are_kept_apart():
    documents = torch.tensor([[0] * 4 + [1] * 7 + [-1] * 2, [0] * 13])
    positions = torch.tensor([[*range(4), *range(7), 0, 0], [*range(13)]])
    mask = document_mask(documents)
    assert [d[:2] for d in tuned.documents_of(mask, 2, 13)] == [(0, 4), (4, 11), (11, 13), (13, 26)]
    check_equal(*twins(), torch.randint(11, (2, 13)), mask, positions)


def test_a_beginning_that_several_documents_share():
    owner = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    mask = ((owner[:, None] == owner) | (owner == 0)).tril()[None, None]
    positions = torch.tensor([[*range(5), *range(5, 9), *range(5, 8)]])
    found = [(d.first, d.end, d.shared_end - d.shared) for d in tuned.documents_of(mask, 1, 12)]
    assert found == [(0, 9, 0), (9, 12, 5)], "the first goes on where the beginning ends"
    check_equal(*twins(), torch.randint(11, (1, 12)), mask, positions)


def test_documents_with_and_without_a_beginning_stand_in_one_stack():
    owner = torch.tensor([0] * 7 + [1] * 6 + [2] * 3)
    mask = (owner[:, None] == owner).tril()
    mask[7:13, 1:4] = True
    stacks = tuned.stacks_of(tuned.documents_of(mask[None, None], 1, 16))
    assert [len(stack.rows) for stack in stacks] == [2, 1]
    check_equal(*twins(), torch.randint(11, (1, 16)), mask[None, None], torch.arange(16)[None])


def test_a_mask_that_is_not_made_of_documents_is_left_to_the_plain_block():
    torch.manual_seed(3)
    mask = (torch.rand(1, 1, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool)
    assert tuned.documents_of(mask, 1, 9) is None
    assert tuned.documents_of(torch.ones(1, 1, 9, 9, dtype=torch.bool), 1, 9) is None, "sees what comes after it"
    assert tuned.documents_of(torch.ones(9, 9, dtype=torch.bool).tril().triu(-3), 1, 9) is None, "a window"
    check_equal(*twins(), torch.randint(11, (2, 9)), mask)


def test_long_documents_are_left_to_the_plain_block(monkeypatch):
    monkeypatch.setattr(tuned, "MOST_SCORES", 15 * 15)
    plain, fast = twins()
    fast.blocks[0].seen.stacks(None, torch.Size((1, 15, 48)))
    assert fast.blocks[0].seen.found
    assert fast.blocks[0].seen.stacks(None, torch.Size((1, 16, 48))) is None


def test_generating_with_a_cache_gives_the_same_logits():
    plain, fast = twins()
    ids = torch.randint(11, (2, 9))
    with torch.no_grad():
        cache = KVCache(plain.config, 2, torch.device("cpu"), torch.float64)
        parts = [fast(ids[:, :6], cache=cache), fast(ids[:, 6:], cache=cache)]
        assert torch.allclose(torch.cat(parts, 1), plain(ids), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("damage", ["norm_backward", "turned_back", "add_back", "mul"])
def test_a_wrong_backward_would_be_seen(damage, monkeypatch):
    wrong = {
        "norm_backward": lambda dz, x, r, norm, residual: dz * r + residual,
        "turned_back": tuned.turned,
        "add_back": lambda d, stack, out: None,
    }
    if damage in wrong:
        monkeypatch.setattr(tuned, damage, wrong[damage])
    else:
        monkeypatch.setitem(tuned.ACTIVATIONS, nn.SiLU, lambda _: (F.silu, lambda d, gate: d))
    with pytest.raises(AssertionError):
        check_equal(*twins(), torch.randint(11, (2, 9)))


def test_hooks_and_parts_put_in_later_are_honoured():
    plain, fast = twins()
    ids, seen = torch.randint(11, (2, 9)), []
    hook = fast.blocks[1].attn.o_proj.register_forward_hook(lambda *_: seen.append(1))
    check_equal(plain, fast, ids)
    assert seen, "who watches a part sees it"
    hook.remove()
    for model in (plain, fast):
        for block in model.blocks:
            block.attn.q_proj = block.attn.q_proj.base
        model.zero_grad()
    with torch.no_grad():
        assert torch.allclose(plain(ids), fast(ids), rtol=1e-10)


def test_without_its_adapter_a_tuned_model_is_its_base():
    plain, fast = twins()
    ids = torch.randint(11, (2, 9))
    changed = fast(ids)
    for model in (plain, fast):
        for module in model.modules():
            if isinstance(module, PlainLora):
                module.on = False
    assert torch.allclose(plain(ids), fast(ids), rtol=1e-10)
    assert not torch.allclose(changed, fast(ids), rtol=1e-3)


class Kept(nn.Module):
    """A linear layer kept in another form, widened at each use."""

    def __init__(self, plain):
        super().__init__()
        self.in_features, self.out_features, self.bias, self.widened = plain.in_features, plain.out_features, None, 0
        self.register_buffer("halved", plain.weight.detach() / 2)

    @property
    def weight(self):
        self.widened += 1
        return 2 * self.halved

    def forward(self, x):
        return F.linear(x, self.weight)


def test_a_weight_that_is_kept_otherwise_is_widened_at_each_use():
    plain, fast = twins("k v o gate up down")
    for model in (plain, fast):
        replace_modules(model, lambda name, _: name.endswith(("gate_proj.base", "q_proj")), Kept)
    model = copy.deepcopy(plain)
    assert len(tuned.use(model)) == 2
    check_equal(plain, model, torch.randint(11, (2, 9)))
    kept = [module for module in model.modules() if isinstance(module, Kept)]
    assert [module.widened for module in kept] == [1, 2, 2, 2], "the first block's input needs no gradient"


def test_blocks_that_are_not_computed_here_stay_and_say_why():
    def left(change=lambda block: None, **switches):
        torch.manual_seed(0)
        model = build(ModelConfig(vocab_size=11, n_layer=1, n_embd=48, max_seq_len=40, **LLAMA | switches))
        model.requires_grad_(False)
        change(model.blocks[0])
        why = tuned.in_the_way(model.blocks[0])
        assert (tuned.use(model) == []) == bool(why)
        return why

    def adapted(**state):
        def change(block):
            block.attn.q_proj = PlainLora(block.attn.q_proj, 2)
            for name, value in state.items():
                setattr(block.attn.q_proj, name, value)

        return change

    assert left() == left(adapted()) == left(adapted(dropout=nn.Dropout(0.0))) == ""
    assert "norms are not" in left(norm="layernorm")
    assert "norms are not" in left(norm_offset=True)
    assert "in its heads" in left(qk_norm=True)
    assert "gated MLP" in left(mlp="gelu")
    assert "windowed" in left(window=8)
    assert "capped" in left(attn_softcap=30.0)
    assert "learn" in left(lambda block: block.mlp.requires_grad_(True))
    assert "dropped" in left(adapted(dropout=nn.Dropout(0.1)))
    assert "DoRA" in left(adapted(magnitude=torch.ones(48)))
    assert "watched" in left(lambda block: block.mlp.up_proj.register_forward_hook(lambda *_: None))


def test_in_bf16_it_is_as_close_to_the_truth_as_the_plain_form():
    plain, fast = (model.float() for model in twins(n_embd=96, n_head=12, n_kv_head=4, n_ff=256, n_layer=2))
    torch.manual_seed(2)
    ids = torch.randint(11, (8, 40))

    def gradients(model, dtype):
        model.zero_grad()
        F.cross_entropy(model(ids, dtype=dtype).float().flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    truth = gradients(plain, torch.float32)
    errors = [float((gradients(model, torch.bfloat16) - truth).norm() / truth.norm()) for model in (plain, fast)]
    assert 1e-4 < errors[0] and errors[1] < 1.15 * errors[0], errors


# ---- the head ------------------------------------------------------------------------------------------------------------


def plain_loss(x, weight, targets, softcap):
    logits = x @ weight.t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def drawn(n, v, c, dtype=torch.float64, frozen=False):
    torch.manual_seed(n + v)
    x, weight = torch.randn(n, c, dtype=dtype, requires_grad=True), torch.randn(v, c, dtype=dtype)
    targets = torch.randint(v, (n,))
    targets[::3] = IGNORE
    return x, weight.requires_grad_(not frozen), targets


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("n", "v", "c", "chunk"), [(1, 2, 1, 1), (7, 13, 5, 3), (16, 33, 8, 4), (5, 123, 17, None)])
def test_head_loss_equals_cross_entropy_over_all_logits(n, v, c, chunk, frozen, softcap):
    x, weight, targets = drawn(n, v, c, frozen=frozen)
    wanted = [x] if frozen else [x, weight]
    plain = plain_loss(x, weight, targets, softcap)
    found = head_loss(x, weight, targets, softcap, chunk)
    assert torch.allclose(plain, found, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(3 * plain, wanted), torch.autograd.grad(3 * found, wanted), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        assert torch.allclose(plain, head_loss(x, weight, targets, softcap, chunk), rtol=1e-12)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_head_loss_passes_gradcheck(softcap):
    x, weight, targets = drawn(6, 9, 4)
    assert torch.autograd.gradcheck(lambda x, w: head_loss(x, w, targets, softcap, 2), (x, weight))


def test_where_nothing_is_learned_the_loss_is_0():
    x, weight, targets = drawn(6, 9, 4)
    loss = head_loss(x, weight, torch.full_like(targets, IGNORE))
    loss.backward()
    assert loss == 0 and not x.grad.any() and not weight.grad.any()
    assert head_loss(x[:0], weight, targets[:0]) == 0


def test_in_bf16_the_softmax_is_float32():
    x, weight, targets = drawn(64, 1000, 16, torch.float32, frozen=True)
    half = x.detach().bfloat16().requires_grad_()
    found = head_loss(half, weight.bfloat16(), targets, 0.0, 10)
    plain = F.cross_entropy((half @ weight.bfloat16().t()).float(), targets, ignore_index=IGNORE, reduction="sum")
    assert found.dtype == torch.float32 and torch.allclose(found, plain, rtol=1e-6)
    (expected,), (gradient,) = torch.autograd.grad(plain, half), torch.autograd.grad(found, half)
    assert gradient.dtype == torch.bfloat16 and torch.allclose(expected.float(), gradient.float(), rtol=0.02, atol=0.02)


def test_no_chunk_is_larger_than_asked(monkeypatch):
    sizes, chunk_loss = [], heads.chunk_loss
    monkeypatch.setattr(heads, "chunk_loss", lambda z, *rest: sizes.append(len(z)) or chunk_loss(z, *rest))
    x, weight, targets = drawn(30, 50, 4)
    head_loss(x, weight, targets, 0.0, 6).backward()
    assert sizes == [6, 6, 6, 2], "20 targets learn"
    monkeypatch.setattr(heads, "CHUNK_LOGITS", 200)
    sizes.clear()
    head_loss(x, weight, targets)
    assert sizes == [4] * 5


@pytest.mark.parametrize("switches", [{}, {"pad_vocab": 8, "tied": True, "init": "gpt2"}, {"softcap": 4.0}])
def test_the_loss_of_a_model_is_the_plain_one(switches):
    torch.manual_seed(0)
    model = build(
        ModelConfig(vocab_size=11, n_layer=1, n_embd=24, max_seq_len=12, **LLAMA | switches | {"n_kv_head": 6})
    )
    with torch.no_grad():
        model.lm_head.weight.add_(0.3 * torch.randn_like(model.lm_head.weight))
    model.double()
    targets = torch.randint(11, (2, 9))
    targets[:, :4] = IGNORE
    batch = Packed(
        torch.randint(11, (2, 9)), targets, torch.arange(9).expand(2, 9), torch.zeros(2, 9, dtype=torch.int64)
    )
    found = []
    for loss_fn in (sft_loss(), sft_loss(head_loss=model_head_loss)):
        model.zero_grad()
        loss, _ = loss_fn(model, batch)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-11)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-12)

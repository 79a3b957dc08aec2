"""NF4 and 8-bit optimizer states: bits against bitsandbytes, layers against their plain twins, training against AdamW."""

import copy
import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kobza.checkpoint import fill_optimizers, optimizer_tensors
from kobza.config import InputError, ModelConfig
from kobza.model import build
from kobza.optim import AdamW, spare_the_compiler
from kobza.quant import adam8, nf4
from kobza.quant.adam8 import AdamW8bit
from kobza.quant.blocks import Codebook, dequantize_blocks, dynamic, quantize_blocks
from kobza.quant.nf4 import NF4, Linear4bit, Quantized, dequantize_nf4, quantize_nf4
from kobza.train import next_token_loss, train_step

CPU = torch.device("cpu")
spare_the_compiler()
IDS = torch.arange(24).view(2, 12) % 20
SMALL = {"vocab_size": 20, "max_seq_len": 16, "n_layer": 2, "n_head": 2, "n_embd": 64, "init": "gpt2"}


def fixed(n):
    """n numbers the same everywhere: a hash of their index, in blocks of unlike size. Their sums are exact in float32."""
    index = torch.arange(n)
    hashed = (index * 2654435761 % (1 << 32) >> 21) - 1024
    return (hashed * (1 + index // 64 * 7919 % 13)).float() / 4096


def digest(*tensors):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()[:16]


# ---- the bits of bitsandbytes --------------------------------------------------------------------------------------


def by_bitsandbytes(weight):
    """bitsandbytes' codes and scales. Its scales' codes by its torch kernel: the compiled one for CPUs has a coarser rule."""
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, scales = torch.ops.bitsandbytes.quantize_4bit(weight, 64, "nf4", torch.uint8)
    kernel = torch.ops.bitsandbytes.quantize_blockwise.default
    torch_only = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    offset = scales.mean()
    scale_codes, scale_scales = kernel.redispatch(torch_only, scales - offset, functional.create_dynamic_map(), 256)
    return Quantized(codes.view(-1), scale_codes, scale_scales, offset)


def goldens():
    """What GOLDEN holds, by bitsandbytes."""
    functional = pytest.importorskip("bitsandbytes.functional")
    maps = {f"dynamic {signed}": digest(functional.create_dynamic_map(signed=signed)) for signed in (True, False)}
    return maps | {n: digest(*by_bitsandbytes(fixed(n))) for n in (65536, 12345)}


# bitsandbytes 0.50.2, torch 2.13 on a CPU: python -c "import tests.test_quant as t; print(t.goldens())"
GOLDEN = {
    "dynamic True": "e732639a65f497b4",
    "dynamic False": "305f002cc11278fb",
    65536: "e27738095e7b0db1",
    12345: "53c71cf8d687c255",
}


@pytest.mark.parametrize("n", [65536, 12345])
def test_codes_and_scales_are_those_that_bitsandbytes_once_made(n):
    assert digest(*quantize_nf4(fixed(n))) == GOLDEN[n]


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_values_are_those_of_bitsandbytes(signed):
    assert digest(dynamic(signed, CPU).values) == GOLDEN[f"dynamic {signed}"]


def adversarial():
    """Weights by name: zeros, an outlier, numbers below the smallest normal one, ends of blocks anywhere, ties."""
    generator = torch.Generator().manual_seed(0)
    middles = (torch.tensor(NF4)[1:] + torch.tensor(NF4)[:-1]) / 2

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    cases = {f"{n} numbers": normal(n) for n in (1, 3, 63, 64, 65, 127, 16_384, 16_447, 700_001)}
    cases |= {"odd sides": normal(37, 51), "bf16": normal(128, 192).bfloat16(), "fp16": normal(128, 192).half()}
    cases |= {"zeros": torch.zeros(64, 64), "odd zeros": torch.zeros(65), "equal": torch.full((100, 64), 0.3)}
    cases |= {"denormal": normal(64, 64) * 1e-40, "all sizes": normal(64, 64) * torch.logspace(-44, 30, 64)[:, None]}
    cases |= {"huge": normal(64, 64) * 1e36, "values": torch.tensor(NF4).repeat(64), "middles": middles.repeat(64)}
    cases["middles"][::64] = 1.0
    cases["outlier"] = normal(64, 128) * 0.01
    cases["outlier"][5, 7] = 1000.0
    return cases


@pytest.mark.parity
def test_codes_and_scales_are_those_of_bitsandbytes():
    for name, weight in adversarial().items():
        for ours, theirs in zip(quantize_nf4(weight), by_bitsandbytes(weight), strict=True):
            assert torch.equal(ours, theirs), name


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_back_as_by_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    for name, weight in adversarial().items():
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        state.dtype = dtype
        packed = Quantized(codes.view(-1), state.absmax.view(-1), state.state2.absmax.view(-1), state.offset)
        back = dequantize_nf4(packed, tuple(weight.shape), dtype)
        assert back.dtype == dtype and torch.equal(back, functional.dequantize_4bit(codes, state).view_as(back)), name


class Grid(Codebook):
    """Rounds to 65,536 even steps first, as bitsandbytes' compiled kernel for CPUs does since 0.49."""

    def nearest(self, x):
        return super().nearest(-1.0 + 2.0 * ((x + 1) * 0.5 * 65535 + 0.5).int().float() / 65535)


@pytest.mark.parity
def test_the_compiled_kernel_for_cpus_differs_by_its_grid_alone(monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(1500, 1031, generator=torch.Generator().manual_seed(0))
    _, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    unlike = (quantize_nf4(weight).scale_codes != state.absmax.view(-1)).float().mean()
    assert 0 < unlike < 0.01
    grid = Grid(dynamic(True, CPU).values)
    monkeypatch.setattr(nf4, "dynamic", lambda signed, device: grid)
    assert torch.equal(quantize_nf4(weight).scale_codes, state.absmax.view(-1))


# ---- codebooks and blocks ------------------------------------------------------------------------------------------


def test_nf4_values_are_quantiles_of_a_normal_distribution():
    """Dettmers et al. 2023: the means of neighbouring ones of 16 above and 15 below zero, from a tail of 0.0323."""
    last = 0.9677083  # 1 - (1 / 30 + 1 / 32) / 2 in bitsandbytes' rounding
    above = torch.special.ndtri(torch.linspace(last, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(last, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((above, below, torch.zeros(1, dtype=torch.float64))).sort().values
    assert torch.allclose(values / values.max(), torch.tensor(NF4, dtype=torch.float64), atol=2e-7)


def around(book):
    """Numbers at which a lookup may go wrong: each bound and value, the floats beside them, and many others."""
    finite = torch.cat((book.bounds[:-1], book.values))
    near = [finite, finite.nextafter(torch.tensor(-2.0)), finite.nextafter(torch.tensor(2.0))]
    spread = torch.logspace(-44, 0, 20_000)
    even = torch.linspace(-1, 1, 60_001)
    return torch.cat((*near, spread, -spread, even, torch.tensor([0.0, -0.0, 1e-45, -1e-45]))).clamp(-1, 1)


@pytest.mark.parametrize(
    "book", [nf4.book(CPU), dynamic(True, CPU), dynamic(False, CPU)], ids=["nf4", "signed", "unsigned"]
)
def test_the_look_up_finds_what_a_search_finds(book):
    x = around(book)
    assert torch.equal(book.nearest(x).int(), torch.bucketize(x, book.bounds[:-1]).int())
    assert (book.bounds.diff() > 0).all() and (book.values.diff() > 0).all()


def test_a_block_cut_short_is_divided_by_its_scale():
    """As bitsandbytes does on a CPU; times 1 / scale the second number would be nearer to the next value."""
    scale, x = 0.9017173051834106, -0.7647431492805481
    assert quantize_blocks(torch.tensor([scale, x]), 64, nf4.book(CPU))[0].tolist() == [15, 0]
    assert quantize_blocks(torch.tensor([scale, *[x] * 63]), 64, nf4.book(CPU))[0].tolist() == [15, *[1] * 63]


def test_nearest_is_nearest():
    book = dynamic(True, CPU)
    x = torch.linspace(-1, 1, 4001)
    distance = (x[:, None].double() - book.values.double()).abs()
    chosen = distance.gather(1, book.nearest(x)[:, None].long()).squeeze(1)
    assert (chosen - distance.min(dim=1).values).max() < 1e-7  # the bounds are float32


def test_no_positive_square_becomes_zero():
    book = dynamic(False, CPU)
    assert book.nearest(torch.tensor([0.0, 1e-45, 1e-9, 1.0])).tolist() == [0, 1, 1, 255]


@settings(max_examples=40)
@given(n=st.integers(1, 900), size=st.sampled_from([64, 256]), seed=st.integers(0, 1 << 20), spread=st.floats(0, 12))
def test_blocks_come_back_within_half_a_step(n, size, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (spread * (torch.rand(n, generator=generator) - 0.5))
    book = dynamic(True, CPU)
    codes, scales = quantize_blocks(x, size, book)
    back = dequantize_blocks(codes, scales, size, book)
    half_step = 0.0071 * scales.repeat_interleave(size)[:n]  # the widest is 0.9 / 64
    assert codes.dtype == torch.uint8 and len(scales) == -(-n // size)
    assert ((back - x).abs() <= half_step).all()


# ---- NF4 -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(rows=st.integers(1, 40), cols=st.integers(1, 90), seed=st.integers(0, 1 << 20))
def test_any_shape_comes_back_within_its_blocks_band(rows, cols, seed):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    back = dequantize_nf4(quantize_nf4(weight), (rows, cols), torch.float32)
    scales = torch.stack([part.abs().max() for part in weight.view(-1).split(64)]).repeat_interleave(64)[: rows * cols]
    assert back.shape == weight.shape
    # half the widest gap of NF4 is 0.152; the scale itself is off by half a step of the widest deviation from their mean
    assert (
        (back - weight).abs().view(-1) <= 0.153 * scales + 0.0071 * (scales - scales.mean()).abs().max() + 1e-6
    ).all()


def test_a_stretch_at_a_time_gives_the_same_bits(monkeypatch):
    weight = torch.randn(77, 129, generator=torch.Generator().manual_seed(1))
    whole = quantize_nf4(weight)
    back = dequantize_nf4(whole, (77, 129), torch.bfloat16)
    monkeypatch.setattr(nf4, "CHUNK", 1 << 10)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize_nf4(weight), strict=True))
    assert torch.equal(dequantize_nf4(whole, (77, 129), torch.bfloat16), back)


def test_a_weight_takes_4_127_bits():
    packed = quantize_nf4(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)))
    assert sum(part.nbytes for part in packed) * 8 / 1024**2 == pytest.approx(4.127, abs=0.0005)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_weights_that_cannot_be_scaled_are_refused(value):
    weight = torch.full((16, 64), value)
    with pytest.raises(InputError, match="--quantize nf4: the weights hold inf, nan"):
        quantize_nf4(weight)


def linears(in_features=96, out_features=40, bias=True):
    """A Linear4bit, and the plain Linear of the same numbers."""
    torch.manual_seed(0)
    plain = nn.Linear(in_features, out_features, bias=bias)
    packed = Linear4bit.of(copy.deepcopy(plain))
    plain.weight.data = packed.weight
    return packed, plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_as_the_plain_one_of_the_same_numbers(bias, dtype):
    packed, plain = linears(bias=bias)
    plain = plain.to(dtype)
    x = torch.randn(3, 5, 96).to(dtype)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [layer(x) for layer, x in zip((packed, plain), inputs, strict=True)]
    assert torch.equal(*outputs)
    for y in outputs:
        y.backward(torch.ones_like(y).cumsum(-1))
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    if bias:
        assert torch.allclose(packed.bias.grad, plain.bias.grad.float())


def test_a_layer_keeps_nothing_of_a_weights_size_for_its_backward():
    packed, _ = linears(256, 256, bias=False)
    sizes = []
    x = torch.randn(2, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        y = packed(x)
    y.sum().backward()
    assert sum(sizes) == 0 and x.grad is not None


def test_an_input_without_gradient_goes_through():
    packed, _ = linears()
    packed.bias.requires_grad_(False)
    assert not packed(torch.randn(2, 96)).requires_grad


def test_a_model_in_another_number_format_keeps_its_scales():
    packed, _ = linears()
    weight = packed.weight
    packed.to(torch.bfloat16)
    assert packed.scale_scales.dtype == packed.offset.dtype == torch.float32 and packed.bias.dtype == torch.bfloat16
    assert torch.equal(packed.weight, weight)


def test_surgery_takes_the_trunk_and_leaves_head_and_tables():
    model = build(ModelConfig(**SMALL, mlp="swiglu", bias=True))
    twin = copy.deepcopy(model)
    names = nf4.use(model)
    assert len(names) == 2 * 7 and all(name.startswith("blocks.") and name.endswith("_proj") for name in names)
    assert not isinstance(model.lm_head, Linear4bit)
    for name in names:
        twin.get_submodule(name).weight.data = model.get_submodule(name).weight
    assert torch.equal(model(IDS), twin(IDS))
    assert not any(p.ndim > 1 for n, p in model.named_parameters() if n.startswith("blocks."))  # none left to train


def test_a_head_that_the_table_shares_is_left_even_when_named():
    model = build(ModelConfig(**SMALL, tied=True))
    assert nf4.use(model, lambda name, _: name.endswith(("lm_head", "q_proj"))) == [
        f"blocks.{i}.attn.q_proj" for i in (0, 1)
    ]
    with pytest.raises(InputError, match="no module of GPT matches"):
        nf4.use(model, lambda name, _: name == "lm_head")


def test_each_float_weight_goes_as_soon_as_it_is_packed():
    model = build(ModelConfig(**SMALL))
    linear = model.blocks[0].attn.q_proj
    nf4.use(model)
    assert linear.weight is None


def test_the_same_weights_give_the_same_bits():
    first, second = (build(ModelConfig(**SMALL)) for _ in range(2))
    for model in (first, second):
        nf4.use(model)
    for a, b in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(a, b)


# ---- AdamW in 8 bits -----------------------------------------------------------------------------------------------


def stepped(make, weights, gradients):
    """Weights after a step for each list of gradients, and the optimizer."""
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = make(parameters, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for each in gradients:
        for parameter, gradient in zip(parameters, each, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in parameters], optimizer


def draws(*shapes, n_steps=5):
    torch.manual_seed(0)
    return [torch.randn(s) for s in shapes], [[torch.randn(s) for s in shapes] for _ in range(n_steps)]


def test_the_first_step_is_adamws():
    """Before anything was stored in 8 bits."""
    drawn = draws((100, 70), (64,), n_steps=1)
    ours, theirs = (stepped(make, *drawn)[0] for make in (AdamW8bit, AdamW))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_small_weights_keep_float32_and_are_adamws_for_ever():
    drawn = draws((63, 65), (64,), n_steps=20)
    (ours, optimizer), (theirs, _) = (stepped(make, *drawn) for make in (AdamW8bit, AdamW))
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_large_ones_stay_near_adamw():
    drawn = draws((100, 70), n_steps=20)
    (ours, optimizer), (theirs, _) = (stepped(make, *drawn) for make in (AdamW8bit, AdamW))
    moved = (theirs[0] - drawn[0][0]).norm()
    state = next(iter(optimizer.state.values()))
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    assert 0 < (ours[0] - theirs[0]).norm() / moved < 0.05


def test_the_state_takes_two_bytes_a_weight():
    _, optimizer = stepped(AdamW8bit, *draws((512, 300), n_steps=1))
    tensors = optimizer_tensors([optimizer])
    assert sum(t.nbytes for t in tensors.values()) / (512 * 300) == pytest.approx(2 + 2 * 4 / 256, abs=0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_however_it_is_cut_into_stretches_the_step_is_the_same(monkeypatch, dtype):
    """Whole and cut blocks, long and short weights, some that keep float32."""
    shapes = [(100, 133), (64, 64), (16, 256), (65, 64), (7,), (64, 80), (300,), (77, 99)]
    weights, gradients = draws(*shapes, n_steps=3)
    weights, gradients = [w.to(dtype) for w in weights], [[g.to(dtype) for g in each] for each in gradients]
    results = []
    for chunk in (1 << 20, 1 << 13, 256):
        monkeypatch.setattr(adam8, "CHUNK", chunk)
        results.append(stepped(AdamW8bit, weights, gradients)[0])
    alone = [stepped(AdamW8bit, [w], [[each[i]] for each in gradients])[0][0] for i, w in enumerate(weights)]
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, alone, strict=True))


def test_weights_that_started_later_share_no_stretch_with_others():
    weights, gradients = draws((64, 64), (64, 64), n_steps=3)
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = AdamW8bit(parameters, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for n, each in enumerate(gradients):
        parameters[0].grad, parameters[1].grad = each[0], None if n == 0 else each[1]
        optimizer.step()
    alone = stepped(AdamW8bit, weights[1:], [[each[1]] for each in gradients[1:]])[0][0]
    assert torch.equal(parameters[1], alone)


def test_a_gradient_that_stands_otherwise_in_memory():
    weights, gradients = draws((80, 70), n_steps=2)
    turned = [[g.T.contiguous().T for g in each] for each in gradients]
    assert torch.equal(stepped(AdamW8bit, weights, gradients)[0][0], stepped(AdamW8bit, weights, turned)[0][0])


def test_a_small_gradient_beside_a_large_one_makes_no_leap():
    """Its square is 1e-8 of the block's largest: lost, the update would be a momentum over eps."""
    gradient = torch.full((64, 64), 1e-4)
    gradient[0, 0] = 1.0
    start = torch.zeros(64, 64)
    (moved,), _ = stepped(AdamW8bit, [start], [[gradient]] * 10)
    assert moved.abs().max() < 10 * 1e-2 * 1.5  # ten steps of the rate, and not a thousand


def test_zero_gradients_move_nothing_but_by_decay():
    weights = [torch.ones(64, 64)]
    (moved,), _ = stepped(AdamW8bit, weights, [[torch.zeros(64, 64)]] * 3)
    assert torch.allclose(moved, torch.full((64, 64), (1 - 1e-2 * 0.1) ** 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stopped_and_resumed_is_uninterrupted_to_the_bit(dtype):
    weights, gradients = draws((100, 70), (64,), n_steps=6)
    weights = [w.to(dtype) for w in weights]
    gradients = [[g.to(dtype) for g in each] for each in gradients]
    whole, _ = stepped(AdamW8bit, weights, gradients)
    half, optimizer = stepped(AdamW8bit, weights, gradients[:3])
    tensors = optimizer_tensors([optimizer])
    assert {name.split(".", 2)[2] for name in tensors if name.startswith("0.0.")} == {
        "step", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale",
    }  # fmt: skip
    parameters = [nn.Parameter(w.clone()) for w in half]
    again = AdamW8bit(parameters, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    fill_optimizers([again], tensors)
    for each in gradients[3:]:
        for parameter, gradient in zip(parameters, each, strict=True):
            parameter.grad = gradient
        again.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, parameters, strict=True))


def test_a_model_learns_as_with_adamw():
    """200 steps of one small model, by both: the curves lie within a hundredth of a nat of each other all along."""
    torch.manual_seed(0)
    text = torch.randint(20, (64,)).repeat(40)  # what comes next is the same each time, and has to be found
    curves = []
    for make in (AdamW, AdamW8bit):
        model = build(ModelConfig(**SMALL | {"max_seq_len": 32})).train()
        optimizer = make(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        generator, curve = torch.Generator().manual_seed(1), []
        for _ in range(200):
            starts = torch.randint(len(text) - 33, (4, 1), generator=generator) + torch.arange(33)
            rows = text[starts]
            curve.append(train_step(model, [optimizer], [(rows[:, :-1], rows[:, 1:])], next_token_loss(), 1.0)[0])
        curves.append(torch.tensor(curve))
    plain, ours = (curve.view(10, 20).mean(1) for curve in curves)
    assert plain[-1] < 0.5 * plain[0] and not torch.equal(plain, ours)
    assert (ours - plain).abs().max() < 0.01, (plain, ours)

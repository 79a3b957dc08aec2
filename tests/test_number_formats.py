"""Our bits of every number format are torch's, value by value; ties to even; what lies beyond the largest."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from kobza.studio.explorer.bits import FLOATS, Floating, Integer, running_sum

BY_NAME = {form.name: form for form in FLOATS}
TORCH = {
    "fp32": (torch.float32, torch.int32),
    "bf16": (torch.bfloat16, torch.int16),
    "fp16": (torch.float16, torch.int16),
    "fp8 e5m2": (torch.float8_e5m2, torch.uint8),
    "fp8 e4m3": (torch.float8_e4m3fn, torch.uint8),
}
SMALL = [name for name in TORCH if name != "fp32"]


def torch_values(name: str) -> list[float]:
    """The value of every pattern of a format of 8 or 16 bits."""
    dtype, whole = TORCH[name]
    patterns = torch.arange(1 << BY_NAME[name].width)
    return patterns.to(whole).view(dtype).double().tolist()


def same(a: float, b: float) -> bool:
    return math.isnan(a) and math.isnan(b) or a == b and math.copysign(1, a) == math.copysign(1, b)


@pytest.mark.parametrize("name", SMALL)
def test_every_pattern_is_torchs_and_comes_back(name: str):
    form, theirs = BY_NAME[name], torch_values(name)
    for bits, value in enumerate(theirs):
        assert same(form.decode(bits), value), (bits, value)
        if not math.isnan(value):
            assert form.encode(value) == bits, value
        else:
            assert math.isnan(form.decode(form.encode(value)))


@pytest.mark.parametrize("name", list(TORCH))
def test_numbers_between_round_as_torchs_cast(name: str):
    """Random sizes over the whole range, every midpoint of neighbours (ties) and what lies just beside it."""
    form, (dtype, _) = BY_NAME[name], TORCH[name]
    draw = np.random.default_rng(0)
    low, high = math.log2(form.smallest) - 2, min(127.9, math.log2(form.largest) + 1)
    xs = (2.0 ** draw.uniform(low, high, 3000) * draw.choice([-1, 1], 3000)).astype(np.float32).tolist()
    patterns = draw.integers(0, form.last, 400) if form.width > 8 else range(form.last)
    for bits in patterns if name != "fp32" else ():
        tie = (form.decode(int(bits)) + form.decode(int(bits) + 1)) / 2
        xs += [tie, *(float(np.nextafter(np.float32(tie), np.float32(to))) for to in (-1e38, 1e38))]
    edge = form.largest + form.spacing(form.largest) / 2  # from here on infinity, or NaN
    xs += [x for x in (form.largest, edge, edge * 1.01, -edge, 0.0, -0.0, form.smallest / 2) if abs(x) < 3.4e38]
    theirs = torch.tensor(xs, dtype=torch.float32).to(dtype).double().tolist()
    for x, value in zip(torch.tensor(xs, dtype=torch.float32).double().tolist(), theirs, strict=True):
        if abs(x) > edge and form.infinity is None:
            value = math.copysign(form.largest, x)  # older versions of torch made NaN of it
        assert same(form.decode(form.encode(x)), value), (x, value)


def test_a_number_is_rounded_once_not_by_way_of_float64():
    just_above_a_tie = Fraction(1) + Fraction(1, 2**24) + Fraction(1, 2**80)  # in float64 it would be the tie itself
    assert BY_NAME["fp32"].decode(BY_NAME["fp32"].encode(just_above_a_tie)) == 1 + 2**-23
    assert BY_NAME["fp32"].encode(Fraction(1, 3)) == 0x3EAAAAAB


def test_tf32_is_fp32_with_ten_bits_of_fraction():
    tf32, draw = BY_NAME["tf32"], np.random.default_rng(1)
    bits = draw.integers(1, 0x7F000000, 2000, dtype=np.uint32)
    for x, b in zip(bits.view(np.float32).tolist(), bits.tolist(), strict=True):
        rounded = (b + 0xFFF + (b >> 13 & 1)) & ~0x1FFF
        assert tf32.encode(x) == rounded >> 13 and tf32.decode(tf32.encode(x)) == float(
            np.uint32(rounded).view(np.float32)
        )


def test_fp4_is_its_table():
    fp4, table = BY_NAME["fp4 e2m1"], [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # OCP Microscaling Formats 1.0, table 5
    assert [fp4.decode(bits) for bits in range(16)] == table + [-x for x in table]
    assert math.copysign(1, fp4.decode(8)) == -1
    for x, kept in ((0.25, 0), (0.26, 0.5), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4), (5.1, 6)):
        assert fp4.decode(fp4.encode(x)) == kept and fp4.decode(fp4.encode(-x)) == -kept
    assert [fp4.decode(fp4.encode(x)) for x in (1e9, -math.inf)] == [6, -6]  # saturates


def test_int8_is_torchs_quantisation_with_both_ends_at_127():
    form, draw = Integer(Fraction(1, 16)), np.random.default_rng(2)  # 1/16: the same in float32
    xs = torch.tensor(np.append(draw.normal(0, 4, 500), [0.03125, 0.09375, -0.03125, 99, -99]), dtype=torch.float32)
    theirs = torch.fake_quantize_per_tensor_affine(xs, 1 / 16, 0, -127, 127).tolist()
    assert [form.decode(form.encode(x)) for x in xs.tolist()] == theirs
    assert form.between_1_and_2 == 16 and Integer(Fraction(1, 100)).between_1_and_2 == 28  # 1.00 ... 1.27


@pytest.mark.parametrize("name", SMALL)
def test_range_and_spacing_are_those_of_finfo(name: str):
    form, info = BY_NAME[name], torch.finfo(TORCH[name][0])
    assert (form.largest, form.smallest_normal) == (info.max, info.tiny)
    assert form.spacing(1.0) == info.eps and form.bytes * 8 == info.bits
    assert form.smallest == info.tiny * info.eps
    assert form.between_1_and_2 == sum(1 <= x < 2 for x in torch_values(name))


@pytest.mark.parametrize("form", FLOATS, ids=lambda form: form.name)
def test_flipping_a_bit_twice_gives_the_number_back(form: Floating):
    bits = form.encode(Fraction(3, 2))
    assert "".join(form.fields(bits)) == f"{bits:0{form.width}b}"
    others = {form.decode(bits ^ 1 << i) for i in range(form.width)}
    assert len(others) == form.width and 1.5 not in others


def test_sum_of_tenths_is_what_torch_adds_up():
    for name in ("fp16", "bf16", "fp32"):
        tenth, total = torch.tensor(0.1, dtype=TORCH[name][0]), torch.tensor(0.0, dtype=TORCH[name][0])
        for _ in range(10_000):
            total = total + tenth
        assert running_sum(BY_NAME[name], Fraction(1, 10), 10_000) == total.item()
    assert running_sum(BY_NAME["fp4 e2m1"], Fraction(1, 10), 10_000) == 0
    assert running_sum(Integer(Fraction(1, 10)), Fraction(1, 10), 10_000) == pytest.approx(12.7)  # full at 127 steps

"""Number formats bit by bit: a number -> its bits in fp32, tf32, bf16, fp16, fp8, fp4 or int8 -> the number that is kept.

Exact: a number is a fraction, rounded once, ties to even, as `round` does. Tests hold every value of the 8- and 16-bit formats
to torch's. Beyond the largest number a format goes to infinity, and where it has none (e4m3, e2m1, int8) stays at the largest:
saturates, as the casts of today's hardware do. numbers.py makes the lesson of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

Number = Fraction | float  # a float for what no fraction is: -0.0, inf, nan


@dataclass(frozen=True)
class Floating:
    """Sign, exponent and fraction. Its bits are read as (-1)^s * 2^(e - bias) * 1.f, and with e = 0 as 2^(1 - bias) * 0.f.

    `specials`: how many of the largest patterns are no numbers: "ieee" all with the highest e (infinity, NaN), "nan" the last
    alone, "none". stored: the bits it takes in memory.
    """

    name: str
    exponent: int
    fraction: int
    specials: str = "ieee"
    stored: int = 0
    about: str = ""

    @property
    def width(self) -> int:
        """Bits that count."""
        return 1 + self.exponent + self.fraction

    @property
    def bytes(self) -> float:
        """Of memory: tf32 lies in 32 bits and uses 19 of them."""
        return (self.stored or self.width) / 8

    @property
    def bias(self) -> int:
        """Subtracted from the stored exponent. 127 of fp32."""
        return 2 ** (self.exponent - 1) - 1

    @property
    def significand(self) -> int:
        """Bits that a multiplier multiplies: the fraction and the one before its point."""
        return self.fraction + 1

    @property
    def infinity(self) -> int | None:
        """Its pattern, where there is one."""
        return (2**self.exponent - 1) << self.fraction if self.specials == "ieee" else None

    @property
    def last(self) -> int:
        """The pattern of the largest number."""
        patterns = 1 << (self.exponent + self.fraction)
        return {"ieee": patterns - (1 << self.fraction), "nan": patterns - 1, "none": patterns}[self.specials] - 1

    @property
    def largest(self) -> float:
        """448.0 of e4m3."""
        return self.decode(self.last)

    @property
    def smallest_normal(self) -> float:
        """The smallest with all its bits of precision."""
        return self.decode(1 << self.fraction)

    @property
    def smallest(self) -> float:
        """The smallest above 0."""
        return self.decode(1)

    @property
    def between_1_and_2(self) -> int:
        """How many numbers x with 1 <= x < 2."""
        return 1 << self.fraction

    def encode(self, x: Number) -> int:
        """The bits of the nearest number. encode(Fraction(1, 3)) -> 0x3eaaaaab of fp32."""
        if isinstance(x, float) and math.isnan(x):
            return self.last if self.specials == "none" else (1 << (self.width - 1)) - 1
        sign = int(math.copysign(1, x) < 0 if isinstance(x, float) else x < 0) << (self.width - 1)
        if not is_finite(x):
            return sign | self.beyond
        size = abs(Fraction(x))
        lowest = 1 - self.bias
        e = max(lowest, floor_log2(size)) if size else lowest
        # below 2^lowest the step stays the same: subnormal. The sum carries into the exponent where rounding reaches 2^(e + 1).
        bits = ((e - lowest) << self.fraction) + round(size / Fraction(2) ** (e - self.fraction))
        return sign | (bits if bits <= self.last else self.beyond)

    @property
    def beyond(self) -> int:
        """Where a number too large goes."""
        return self.last if self.infinity is None else self.infinity

    def decode(self, bits: int) -> float:
        """The number of some bits, exactly: float64 holds every one."""
        size = bits & ((1 << (self.width - 1)) - 1)
        sign = -1.0 if bits >> (self.width - 1) else 1.0
        if size > self.last:
            return sign * math.inf if size == self.infinity else math.nan
        e, f = size >> self.fraction, size & (self.between_1_and_2 - 1)
        return sign * math.ldexp(f + (self.between_1_and_2 if e else 0), max(e, 1) - self.bias - self.fraction)

    def exactly(self, bits: int) -> Number:
        """The number of some bits, as a fraction where it is one."""
        value = self.decode(bits)
        return Fraction(value) if math.isfinite(value) else value

    def spacing(self, x: float) -> float:
        """From the number |x| to the next larger one; inf and nan have none."""
        size = self.encode(abs(x))
        if size > self.last:
            return math.nan
        low = min(size, self.last - 1)  # the largest has none above it
        return self.decode(low + 1) - self.decode(low)

    def fields(self, bits: int) -> tuple[str, str, str]:
        """Sign, exponent and fraction as digits: of 1.0 in e4m3 ("0", "0111", "000")."""
        digits = f"{bits:0{self.width}b}"
        return digits[0], digits[1 : 1 + self.exponent], digits[1 + self.exponent :]


@dataclass(frozen=True)
class Integer:
    """Whole numbers of 8 bits times a scale, in two's complement; -128 is left out, so that both sides reach as far."""

    scale: Fraction
    name: str = "int8"
    about: str = "whole steps of one scale: a row or a block of weights has its own"

    width, bytes, significand, specials = 8, 1.0, 8, "none"

    @property
    def largest(self) -> float:
        """127 steps."""
        return float(127 * self.scale)

    @property
    def smallest_normal(self) -> float:
        """One step: there is no exponent, so the precision is the same everywhere."""
        return float(self.scale)

    smallest = smallest_normal

    @property
    def between_1_and_2(self) -> int:
        """How many steps x with 1 <= x < 2, of those within reach."""
        first, after = (min(128, math.ceil(bound / self.scale)) for bound in (1, 2))
        return after - first

    def encode(self, x: Number) -> int:
        """The bits of the nearest step, the last where x lies beyond."""
        if not is_finite(x):
            return 0 if math.isnan(x) else 127 if x > 0 else 256 - 127
        return max(-127, min(127, round(Fraction(x) / self.scale))) % 256

    def decode(self, bits: int) -> float:
        """The number of some bits."""
        return float(self.exactly(bits))

    def exactly(self, bits: int) -> Fraction:
        """The same as a fraction: 10 steps of 0.01 are a tenth, which no float64 is."""
        return (bits - 256 * (bits > 127)) * self.scale

    def spacing(self, x: float) -> float:
        """One step, everywhere."""
        return float(self.scale)

    def fields(self, bits: int) -> tuple[str, str, str]:
        """The sign and the rest; no exponent."""
        return f"{bits:08b}"[0], "", f"{bits:08b}"[1:]


Format = Floating | Integer
FLOATS = (
    Floating("fp32", 8, 23, about="the usual: 7 digits, and a range that is never a worry"),
    Floating("tf32", 8, 10, stored=32, about="how NVIDIA's tensor cores read fp32: its range, fp16's precision"),
    Floating("bf16", 8, 7, about="fp32 cut in half: its range, 2 to 3 digits; what models are trained in"),
    Floating("fp16", 5, 10, about="3 digits, but nothing above 65,504: gradients need scaling"),
    Floating("fp8 e5m2", 5, 2, about="fp16 cut in half: the range for gradients"),
    Floating("fp8 e4m3", 4, 3, "nan", about="no infinity; the precision for weights and activations"),
    Floating(
        "fp4 e2m1", 2, 1, "none", about="0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; a scale for every 16 or 32"
    ),
)


def is_finite(x: Number) -> bool:
    """Whether x is a number: every fraction is, also one that no float could hold."""
    return isinstance(x, Fraction | int) or math.isfinite(x)


def floor_log2(x: Fraction) -> int:
    """floor(log2 x) of x > 0, exactly. floor_log2(Fraction(3)) -> 1"""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if x >= Fraction(2) ** e else e - 1


@lru_cache(maxsize=64)
def running_sum(form: Format, x: Fraction, times: int) -> float:
    """x, rounded, added `times` times, rounded after each: what a format that accumulates in itself makes of it."""
    step, total = form.decode(form.encode(x)), 0.0
    for _ in range(times):
        following = form.decode(
            form.encode(total + step)
        )  # float64 holds the sum of two such numbers exactly, or nearly
        if following == total:
            break  # too small beside the sum: nothing will change any more
        total = following
    return total

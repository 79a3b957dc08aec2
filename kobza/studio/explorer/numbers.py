"""Lesson: number formats bit by bit. bits.py has the arithmetic, this file the words and the links.

Each bit shown is a link to the page of the number that it would be if it were flipped, so a flip is an address like any other.
The number asked for is read exactly (a tenth is no float64), so what is shown as error is the format's alone.
"""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any
from urllib.parse import urlencode

from kobza.config import InputError, require
from kobza.studio.explorer.bits import FLOATS, Format, Integer, Number, is_finite, running_sum
from kobza.studio.explorer.lesson import Asked, Form, Lesson
from kobza.studio.explorer.sources import Eye

FARTHEST = 400  # decimal exponent
TIMES, TENTH = 10_000, Fraction(1, 10)
PICOJOULES = {"fp32": 3.7, "fp16": 1.1, "int8": 0.2}  # a multiplication; Horowitz, ISSCC 2014, at 45 nm


def ask(eye: Eye, asked: Asked) -> Form:
    """A number as text, so that 0.1 is a tenth and not a float64; and int8's scale."""
    form = Form(x=asked.text("x", "0.1", 60).strip(), scale=asked.text("scale", "0.01", 60).strip())
    read(form.x, "x")
    scale = read(form.scale, "scale")
    good = isinstance(scale, Fraction) and Fraction(1, 10**30) <= scale <= 10**30
    require(good, f"scale is {form.scale}; give a number from 1e-30 to 1e30")
    return form


def read(text: str, name: str) -> Number:
    """A number as someone writes it, exactly: "1/3", "-0.1", "6e-5", "inf"."""
    top, slash, bottom = text.replace("−", "-").replace(",", "").partition("/")
    try:
        above, below = Decimal(top), Decimal(bottom if slash else 1)
    except InvalidOperation:
        raise InputError(f"{name} is {text!r}, which is no number; write it as 0.1, 1/3 or 6e-8") from None
    require(below.is_finite() and below != 0, f"{name} is {text}, which divides by {below}; give another")
    if not above.is_finite():
        return math.nan if above.is_nan() else float(above)
    near = all(abs(part.adjusted()) <= FARTHEST for part in (above, below))
    require(near, f"{name} is {text}; give one between 1e-{FARTHEST} and 1e{FARTHEST}")
    return -0.0 if above == 0 and above.is_signed() else Fraction(above) / Fraction(below)


def show(eye: Eye, form: Form) -> dict[str, Any]:
    """A row a format."""
    x, formats = read(form.x, "x"), [*FLOATS, Integer(Fraction(read(form.scale, "scale")))]
    rows = [row(each, x, form) for each in formats]
    return {"x": form.x, "rows": rows, "sums": [sums(each) for each in formats], "times": TIMES}


def row(form: Format, x: Number, asked: Form) -> dict[str, Any]:
    """What a format makes of x, bit by bit, each bit a link to the number that it would be flipped."""
    bits = form.encode(x)
    kept, start = form.decode(bits), form.width
    groups = []
    for kind, digits in zip(("sign", "exponent", "fraction"), form.fields(bits), strict=True):
        group = []
        for digit in digits:
            start -= 1
            flipped = form.decode(bits ^ 1 << start)
            group.append({"digit": digit, "to": exact(flipped), "href": address(flipped, asked)})
        words = "rest, two's complement" if isinstance(form, Integer) and kind == "fraction" else kind
        groups.append({"kind": kind, "words": words, "bits": group})
    return {
        "name": form.name,
        "anchor": form.name.replace(" ", "-"),
        "about": form.about,
        "groups": groups,
        "hex": f"0x{bits:0{-(-form.width // 4)}x}",
        "reading": reading(form, bits),
        "kept": exact(kept),
        "error": error(x, form.exactly(bits)),
        "spacing": near(form.spacing(kept)),
        "largest": near(form.largest),
        "normal": near(form.smallest_normal),
        "smallest": near(form.smallest),
        "between": form.between_1_and_2,
        "bytes": f"{form.bytes:g}",
        "area": form.significand**2,
        "area_share": form.significand**2 / FLOATS[0].significand ** 2,
        "energy": PICOJOULES.get(form.name),
    }


def reading(form: Format, bits: int) -> str:
    """How the bits are read: "+ 2^-4 × 1.6"."""
    kept = form.decode(bits)
    if isinstance(form, Integer):
        return f"{bits - 256 * (bits > 127)} × {near(form.smallest_normal)}".replace("-", "−")
    sign, exponent, _ = form.fields(bits)
    if not math.isfinite(kept):
        return "all exponent bits are 1: " + ("no number (NaN)" if math.isnan(kept) else "infinity")
    e = int(exponent, 2)
    power = max(e, 1) - form.bias
    leading = abs(kept) / math.ldexp(1.0, power)
    words = "" if e else ", subnormal" if kept else ", zero"
    return f"{'−' if sign == '1' else '+'} 2^{power} × {leading:.9g}{words}".replace("-", "−")


def exact(x: float) -> str:
    """The shortest digits from which the number comes back: "0.1", "448", "-0", "inf"."""
    short = math.isfinite(x) and abs(x) < 1e16 and x == int(x)
    return f"{x:.0f}" if short else repr(x)


def address(x: float, asked: Form) -> str:
    """The page of another number, which opens at the same place."""
    return "/explorer/numbers?" + urlencode({"x": exact(x), "scale": asked.scale})


def error(x: Number, kept: Number) -> str:
    """How far the kept number lies from x, as a share of x."""
    if not is_finite(x) and str(x) == str(kept):
        return "exact"
    if not is_finite(x) or not is_finite(kept):
        return "lost: too large" if is_finite(x) else "lost: no such number"
    away = Fraction(kept) - Fraction(x)
    if away == 0:
        return "exact"
    share = away / abs(Fraction(x))
    return "lost: too small" if kept == 0 else f"{float(100 * share):+.3g} %".replace("-", "−")


def near(x: float) -> str:
    """A number to be read: 3.4e+38, 65,504, 0.0078."""
    text = "none" if math.isnan(x) else f"{x:,.0f}" if 1000 <= abs(x) < 1e6 else f"{x:.4g}"
    return text.replace("-", "−")


def sums(form: Format) -> dict[str, Any]:
    """A tenth, added ten thousand times in a format: 1,000 if nothing were lost."""
    total = running_sum(form, TENTH, TIMES)
    return {
        "name": form.name,
        "total": near(total),
        "share": min(1.0, total / 1000),
        "tenth": exact(form.decode(form.encode(TENTH))),
    }


LESSON = Lesson(
    "numbers",
    "Number formats",
    "what 32, 16, 8 or 4 bits can hold: flip a bit and see",
    ask,
    show,
)

"""The numbers of an adapter and its merge: checks A1 to A5 of `kobza doctor adapter`. lora.py measures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from kobza.doctor.files.lora import FLOATS, GRID_VALUES, MOST_PAIRS, PREFIX, Adapter, Fit, whole
from kobza.doctor.finding import Finding, Skip
from kobza.formats.headers import read_numpy

SCALE_OFF = 0.05  # of the scale; 0.0017 at most over 100 clean merges in bf16
GRID_SHARE = 0.95
ERASED = 0.3  # of the delta; a 4-bit grid costs 1.0
ROUNDED = 0.5  # of the delta lost to rounding: worth saying
COARSE = 0.3  # rounding beyond this share of the delta hides the scale: what is smaller than a step vanishes


def trained(adapter: Adapter) -> Iterator[Finding]:
    """A3: factors are finite; B moved away from its zeros; not both are zero."""
    untrained, seen = [], 0
    for pair in adapter.pairs[: 4 * MOST_PAIRS]:
        if pair.a.dtype not in FLOATS or pair.b.dtype not in FLOATS:
            raise Skip(f"the factors are {pair.a.dtype}, not floats")
        a, b = adapter.factors(pair)
        seen += 1
        for half, x in (("A", a), ("B", b)):
            bad = np.argwhere(~np.isfinite(x))
            if len(bad):
                at = tuple(int(i) for i in bad[0])
                yield a3(
                    pair.module,
                    "finite numbers",
                    f"{len(bad)} are not",
                    "the model answers nan",
                    "take an earlier checkpoint",
                    f"lora_{half}{list(at)} of {pair.module} is {x[at]}",
                )
                return
        if not a.any() and not b.any():
            yield a3(
                pair.module,
                "A drawn, B zero at the start",
                "both are zero",
                "the gradient of each is the other: it never learns",
                "draw A (kaiming), leave B at zero",
                f"{pair.module}: every number of A {a.shape} and of B {b.shape} is 0",
            )
            return
        if not a.any() or not b.any():
            untrained.append(pair.module)
    if untrained and len(untrained) == seen:
        yield Finding(
            "A3",
            "warn",
            "proven",
            "adapter_model.safetensors",
            "B away from zero",
            f"A or B is zero in all {seen} pairs",
            "the adapter changes nothing: it was saved before its first step, or never learned",
            "look at the learning rate, requires_grad and what was saved",
            f"{untrained[0]}: B @ A is 0 everywhere",
        )


def a3(where: str, expected: str, got: str, why: str, fix: str, example: str) -> Finding:
    """A finding of A3."""
    return Finding("A3", "error", "proven", where, expected, got, why, fix, example, "https://arxiv.org/abs/2106.09685")


def on_grid(adapter: Adapter) -> Iterator[Finding]:
    """A1: the merge was not made on a quantised grid, nor in a number format too coarse for the delta."""
    fits = adapter.fits
    for f in fits:
        if f.on_grid > GRID_SHARE and f.lost > ERASED:
            yield Finding(
                "A1",
                "error",
                "proven",
                f.pair.weight or "",
                "the delta on weights of 16 bits",
                f"{f.on_grid:.0%} of the blocks of 32 hold at most {GRID_VALUES} values; the delta is off by "
                f"{f.lost:.0%}",
                "the grid's steps are larger than the delta: the fine-tune is erased",
                "merge into the 16-bit (or dequantised) base in float32, save, then quantise",
                place(f),
                "https://github.com/huggingface/peft/issues/2321",
            )
            return
    coarse = [
        f
        for f in fits
        if f.on_grid <= GRID_SHARE and f.lost > ROUNDED and COARSE < f.rounding and f.lost < max(1.05, 2 * f.rounding)
    ]
    if len(coarse) > len(fits) / 2:
        f = max(coarse, key=lambda f: f.lost)
        yield Finding(
            "A1",
            "warn",
            "proven",
            f.pair.weight or "",
            "a delta that survives rounding",
            f"{f.lost:.0%} of it is lost to {f.dtype}",
            "the merged model is not the one that was evaluated",
            "merge and save in float32 or float16, or serve the adapter unmerged",
            place(f),
        )


def place(f: Fit) -> str:
    """The two numbers of a fit that anybody can read again."""
    return f"{f.pair.weight}{list(f.at)}: merged - base is {f.d_at:.6g}, scale * (B @ A) is {f.asked * f.r_at:.6g}"


def merged_scale(adapter: Adapter) -> Iterator[Finding]:
    """A2, A4, A5: the delta is the config's scale times B @ A, once."""
    yield from rank_of(adapter)
    fits = [f for f in adapter.fits if f.rr and f.on_grid <= GRID_SHARE and f.rounding <= COARSE]
    if not fits:
        raise Skip("B @ A is zero, or the merged weights are too coarse to read the scale off (A1)")
    weights = np.array([f.asked**2 * f.rr for f in fits])
    ratios = np.array([f.scale / f.asked for f in fits])
    ratio = float((ratios * weights).sum() / weights.sum())
    noise = max(f.rounding for f in fits) / math.sqrt(
        max(1.0, min(f.pair.a.shape[1] * f.pair.b.shape[0] for f in fits))
    )
    f = fits[int(np.argmax(weights))]
    if abs(ratio - 1) > max(SCALE_OFF, 6 * noise):
        yield wrong_scale(adapter, f, ratio)
        return
    odd = [g for g in fits if g.lost > 3 * g.rounding + 0.02 and abs(g.scale / g.asked - 1) > SCALE_OFF]
    odd = odd or [g for g in fits if g.lost > 3 * g.rounding + 0.02]
    if odd:
        g = max(odd, key=lambda g: g.lost)
        yield a5(
            g.pair.weight or "",
            "merged = base + scale * B @ A",
            f"the rest is {g.lost:.0%} of the delta",
            "this was merged from another base or another adapter",
            "merge again from the base that is named",
            place(g),
        )


def wrong_scale(adapter: Adapter, f: Fit, ratio: float) -> Finding:
    """A merge at another scale than the config's: once too often (A4), or by another formula (A2)."""
    r, alpha = adapter.rank(f.pair.module), adapter.setting(f.pair.module, "lora_alpha", "alpha_pattern")
    forms = {
        "alpha, not divided by r": alpha,
        "alpha / r, and use_rslora says alpha / sqrt(r)": alpha / r,
        "alpha / sqrt(r), and use_rslora is off": alpha / math.sqrt(r),
        "1: the scale was dropped": 1.0,
    }
    named = [
        name
        for name, value in forms.items()
        if abs(f.asked * ratio / value - 1) < 0.02 and abs(value / f.asked - 1) > 0.02
    ]
    example = f"{place(f)}; least squares over the weight gives {f.asked * ratio:.4g}, the config {f.asked:.4g}"
    times = round(ratio)
    if times != 1 and abs(ratio - times) < 0.02 * max(1, abs(times)) and -1 <= times <= 4 and not named:
        got = {0: "no delta at all: the base as it was", -1: "the delta was subtracted"}.get(
            times, f"the delta {times} times"
        )
        return Finding(
            "A4",
            "error",
            "proven",
            f.pair.weight or "",
            "the delta once",
            got,
            "the model is not the one that was evaluated",
            "merge once, from the untouched base",
            example,
            "https://github.com/huggingface/peft/issues/2733",
        )
    got = f"{f.asked * ratio:.4g}" + (f" = {' or '.join(named)}" if named else f", {ratio:.3g} times as much")
    return Finding(
        "A2",
        "error",
        "proven",
        f.pair.weight or "",
        f"scale {f.asked:.4g}",
        got,
        "the fine-tune is too weak or too strong everywhere",
        "scale = alpha / r, or alpha / sqrt(r) with use_rslora",
        example,
        "https://github.com/vllm-project/vllm/issues/6909",
    )


def rank_of(adapter: Adapter) -> Iterator[Finding]:
    """The rank that the config says is the factors'."""
    for pair in adapter.pairs:
        r = adapter.rank(pair.module)
        if whole(pair) and pair.a.shape[0] != r:
            yield Finding(
                "A2",
                "error",
                "proven",
                "adapter_config.json:r",
                f"r = {pair.a.shape[0]}, as lora_A has rows",
                f"r = {r:g}",
                f"the scale alpha / r comes out {pair.a.shape[0] / r:.3g} times too large",
                "write the r of the tensors (or its rank_pattern)",
                f"{pair.module}: A {pair.a.shape}, config r {r:g}",
            )
            return


def static_rank(adapter: Adapter) -> Iterator[Finding]:
    """A2 without a merge."""
    yield from rank_of(adapter)


def untouched(adapter: Adapter) -> Iterator[Finding]:
    """A5: what the adapter does not change is in the merged model as it is in the base."""
    if adapter.merged is None:
        raise Skip("no merged model was named")
    changed = {pair.weight for pair in adapter.pairs}
    own = [
        name.removeprefix(PREFIX).replace(".modules_to_save.default", "")
        for name in adapter.tensors
        if ".lora_" not in name
    ]
    tied = is_tied(adapter)
    others = [n for n in adapter.base_tensors if n in adapter.merged_tensors and n not in changed and n not in own]
    others = [n for n in others if not (tied and n.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight")))]
    for name in others[:: max(1, len(others) // MOST_PAIRS)]:
        told = first_difference(adapter, name)
        if told:
            yield a5(
                name,
                "as in the base: the adapter does not change it",
                "another",
                "the merge was made from another base",
                "merge again from the base that is named",
                told,
            )
            return


def first_difference(adapter: Adapter, name: str) -> str:
    """Where a tensor differs most between base and merged, beyond the coarser format's rounding; "" where it does not."""
    (base_path, base), (path, merged) = adapter.base_tensors[name], adapter.merged_tensors[name]
    if base.shape != merged.shape:
        return (
            f"{name}: {base.shape} in the base, {merged.shape} merged" if len(base.shape) == 1 else ""
        )  # rows may be added
    if base.dtype not in FLOATS or merged.dtype not in FLOATS:
        return ""
    rows = (
        None if len(base.shape) < 2 else (0, min(base.shape[0], max(1, (1 << 24) // max(1, math.prod(base.shape[1:])))))
    )
    a, b = (read_numpy(p, info, rows).astype(np.float32) for p, info in ((base_path, base), (path, merged)))
    off = np.abs(a - b) - 2 * max(FLOATS[base.dtype], FLOATS[merged.dtype]) * np.abs(a) - 1e-7
    at = tuple(int(i) for i in np.unravel_index(int(np.nan_to_num(off, nan=np.inf).argmax()), off.shape))
    return f"{name}{list(at)}: {a[at]:.6g} in the base, {b[at]:.6g} merged" if not off[at] <= 0 else ""


def a5(where: str, expected: str, got: str, why: str, fix: str, example: str, severity: Any = "error") -> Finding:
    """A finding of A5."""
    return Finding(
        "A5",
        severity,
        "proven",
        where,
        expected,
        got,
        why,
        fix,
        example,
        "https://huggingface.co/docs/peft/developer_guides/troubleshooting",
    )


def is_tied(adapter: Adapter) -> bool:
    """Whether the base's head is its table: said so, or said nothing and no head in the files."""
    said = adapter.base_config.get("tie_word_embeddings")
    return said is True or (said is None and not any(name.endswith("lm_head.weight") for name in adapter.base_tensors))

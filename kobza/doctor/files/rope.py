"""The rotary part of a config: is it complete, does it contradict itself, and do stored frequencies agree with it (L4, L5, G6).

`frequencies` computes the angles per position in float64 from the config alone, for the types whose formula is plain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from kobza.doctor.files.folder import Folder, as_real
from kobza.doctor.finding import Check, Finding, Skip

NEEDS = {  # the numbers a type cannot do without, as transformers validates them
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
OTHER_TYPES = ("mrope", "proportional")
# The base of every released model of the family, where there is but one. Llama: those with llama3 scaling.
RELEASED_THETA = {"qwen2": 1e6, "qwen3": 1e6, "llama3": 5e5}


def settings(folder: Folder) -> list[tuple[str, dict[str, Any]]]:
    """(key, its rope dict) of a config: rope_scaling, or rope_parameters (transformers 5), whole or per kind of layer."""
    new = folder.text.get("rope_parameters")
    if isinstance(new, dict):
        parts = {name: part for name, part in new.items() if isinstance(part, dict)}
        if parts and len(parts) == len(new):
            return [(f"rope_parameters.{name}", part) for name, part in parts.items()]
        return [("rope_parameters", new)]
    old = folder.text.get("rope_scaling")
    return [("rope_scaling", old)] if isinstance(old, dict) else []


def kind_of(rope: dict[str, Any]) -> str:
    """rope_type, or type as older files say; "su" is longrope's first name."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    return "longrope" if kind == "su" else kind if isinstance(kind, str) else repr(kind)


def theta(folder: Folder) -> float | None:
    """The base in use."""
    for _, rope in settings(folder):
        if as_real(rope.get("rope_theta")):
            return as_real(rope["rope_theta"])
    return folder.real("rope_theta")


def n_rotary(folder: Folder) -> int:
    """Dimensions of a head that are turned."""
    part = as_real(folder.text.get("partial_rotary_factor"))
    for _, rope in settings(folder):
        part = as_real(rope.get("partial_rotary_factor")) or part
    return int(folder.sizes()["D"] * (part if part is not None else 1.0))


def frequencies(folder: Folder) -> np.ndarray:
    """Radians per position of each pair of dimensions, float64 (n_rotary / 2,); Skip for a type whose formula needs more."""
    base, n = theta(folder), n_rotary(folder)
    if not base or base <= 0 or not 2 <= n <= 65536:
        raise Skip("the config gives no base and width for the rotary frequencies")
    plain = base ** -(np.arange(0, n, 2) / n)
    rope = dict(settings(folder)[0][1]) if settings(folder) else {}
    kind, factor = kind_of(rope), as_real(rope.get("factor")) or 1.0
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / factor
    if kind != "llama3":
        raise Skip(f"rope type {kind}: its frequencies depend on the length")
    low, high, longest = (as_real(rope.get(key)) for key in NEEDS["llama3"][1:])
    if not (low and high and longest and high > low):
        raise Skip("llama3 scaling is not complete")
    turns = longest * plain / (2 * math.pi)  # within the original context; few: slowed down, many: left alone
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return smooth * plain + (1 - smooth) * plain / factor


def _finding(code: str, severity: str, folder: Folder, key: str, expected: str, got: str, **more: Any) -> Finding:
    """A finding about a rope key; an error is proven by the numbers that contradict each other."""
    confidence = "proven" if severity == "error" else more.pop("confidence", "likely")
    why = "positions are turned by other angles than in training: fine on short texts, wrong on long ones"
    more = {"why": why, "fix": "take the value of the original release"} | more
    return Finding(code, severity, confidence, folder.where(key), expected, got, **more)  # type: ignore[arg-type]


def check_scaling(folder: Folder) -> Iterator[Finding]:
    """L4: the scaling's type is known, its numbers are there and agree with each other."""
    if folder.kind == "gpt2":
        raise Skip("gpt2 has learned positions")
    scaling = folder.text.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, dict):
        proof = f"rope_scaling = {scaling!r}"[:200]
        yield _finding("L4", "error", folder, "rope_scaling", "an object or null", proof, counterexample=proof)
    for key, rope in settings(folder):
        yield from _check_one(folder, key, rope)


def _check_one(folder: Folder, key: str, rope: dict[str, Any]) -> Iterator[Finding]:
    kind, shown = kind_of(rope), f"{key} = {rope}"[:300]
    both = {name: rope[name] for name in ("type", "rope_type") if name in rope}
    if len({str(value).replace("su", "longrope") for value in both.values()}) > 1:
        yield _finding("L4", "error", folder, key, "one type", f"{both}", counterexample=shown)
    if kind in OTHER_TYPES:
        return
    if kind not in NEEDS:
        known = ", ".join(NEEDS)
        yield _finding("L4", "warn", folder, f"{key}.rope_type", f"one of {known}", kind[:60], confidence="heuristic")
        return
    missing = [name for name in NEEDS[kind] if as_real(rope.get(name)) is None]
    if missing:
        got = ", ".join(f"{name}={rope.get(name)!r}" for name in missing)[:120]
        need = f"{kind} needs the numbers {', '.join(NEEDS[kind])}"
        yield _finding("L4", "error", folder, f"{key}.{missing[0]}", need, got, counterexample=shown)
        return
    factor = as_real(rope.get("factor"))
    if factor is not None and factor < 1:
        yield _finding("L4", "warn", folder, f"{key}.factor", "at least 1", f"{factor:g}: the context is shortened")
    if kind == "llama3":
        yield from _check_llama3(folder, key, rope, shown)
    if kind == "longrope":
        yield from _check_longrope(folder, key, rope)
    longest, original = folder.whole("max_position_embeddings"), as_real(rope.get("original_max_position_embeddings"))
    if kind == "yarn" and factor and longest and original and factor * original < longest:
        # not for llama3: 3.1 is released with 8 x 8,192 < 131,072
        got = f"{factor:g} x {original:g} = {factor * original:g}"
        yield _finding("L4", "warn", folder, f"{key}.factor", f"a reach of max_position_embeddings {longest}", got)


def _check_llama3(folder: Folder, key: str, rope: dict[str, Any], shown: str) -> Iterator[Finding]:
    low, high, original = (float(rope[name]) for name in NEEDS["llama3"][1:])
    if high <= low:
        got = f"low {low:g}, high {high:g}: the slope between them is 1 / ({high - low:g})"
        yield _finding(
            "L4",
            "error",
            folder,
            f"{key}.high_freq_factor",
            "above low_freq_factor",
            got,
            counterexample=shown,
        )
    longest = folder.whole("max_position_embeddings")
    if longest and original >= longest:
        got = f"{original:g} of {longest}"
        where = f"{key}.original_max_position_embeddings"
        yield _finding("L4", "warn", folder, where, "less than max_position_embeddings", got)


def _check_longrope(folder: Folder, key: str, rope: dict[str, Any]) -> Iterator[Finding]:
    n = n_rotary(folder) // 2
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        if not isinstance(factors, list) or len(factors) != n or any(as_real(f) is None for f in factors):
            got = f"{len(factors)} entries" if isinstance(factors, list) else repr(factors)[:60]
            D = folder.sizes()["D"]
            proof = f"head_dim {D}, {2 * n} of its dimensions turn in {n} pairs; {key}.{name} has {got}"
            yield _finding("L4", "error", folder, f"{key}.{name}", f"{n} numbers", got, counterexample=proof)
    if "original_max_position_embeddings" not in {*folder.text, *rope}:
        where = "original_max_position_embeddings"
        yield _finding("L4", "warn", folder, where, "the context before scaling", "absent")


def check_theta(folder: Folder) -> Iterator[Finding]:
    """L5: the base of the frequencies is said, once, and is the family's."""
    if folder.kind == "gpt2":
        raise Skip("gpt2 has learned positions")
    ropes, given = settings(folder), folder.text.get("rope_theta")
    inner = [(f"{key}.rope_theta", rope["rope_theta"]) for key, rope in ropes if "rope_theta" in rope]
    for where, value in inner:
        if given is not None and value != given and len(ropes) == 1:
            proof = f"rope_theta = {given!r} and {where} = {value!r}"[:200]
            yield _finding("L5", "error", folder, where, "one base", proof, counterexample=proof)
    for where, value in [*inner, *([("rope_theta", given)] if given is not None else [])]:
        if (as_real(value) or 0) <= 1:
            proof = f"{where} = {value!r}"[:120]
            yield _finding("L5", "error", folder, where, "a number above 1", proof, counterexample=proof)
            return
    family = "llama3" if any(kind_of(rope) == "llama3" for _, rope in ropes) else folder.kind
    released, now = RELEASED_THETA.get(family), theta(folder)
    if given is None and not inner and folder.kind in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2"):
        severity = "warn" if released else "info"
        known = f"{released:g}, as in the family's releases" if released else "the base said in the file"
        got = f"absent: the reader takes its default {now:g}" if now else "absent"
        patch = folder.patch("rope_theta", released) if released else None
        fix = f"write rope_theta {released:g}" if released else "write the base of the original release"
        yield _finding("L5", severity, folder, "rope_theta", known, got, confidence="heuristic", fix=fix, patch=patch)
    elif family == "llama3" and now == 10_000.0:
        yield _finding(
            "L5",
            "warn",
            folder,
            "rope_theta",
            "500000 beside llama3 scaling",
            "10000, the reader's default",
            confidence="heuristic",
            fix="write rope_theta 500000",
            patch=folder.patch("rope_theta", 500_000.0),
            source="https://github.com/meta-llama/llama-models/issues/322",
        )


def check_buffers(folder: Folder) -> Iterator[Finding]:
    """G6: rotary frequencies stored in the file are those of the config."""
    names = [name for name in folder.need_tensors() if name.endswith("rotary_emb.inv_freq")][:1000]
    if not names:
        raise Skip("no stored rotary frequencies")
    right, wrong = frequencies(folder), []
    for name in names:
        path, info = folder.tensors[name]
        if info.shape != right.shape:
            wrong.append((name, f"shape {info.shape}, expected {right.shape}", info.dtype))
            continue
        stored = folder.rows(name, 0, info.shape[0]).astype(np.float64)
        off = np.abs(stored / right - 1)
        off[~np.isfinite(off)] = np.inf
        i = int(off.argmax())
        # 1e-5: float32 arithmetic of theta ** -(i / n) is off by 6e-7 at most over theta 1e4..1e7 and heads of 8..256
        if off[i] > 1e-5:
            wrong.append((name, f"pair {i}: {stored[i]:.8g} in the file, {right[i]:.8g} in float64", info.dtype))
    if wrong:
        name, proof, dtype = wrong[0]
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        yield Finding(
            "G6",
            "error",
            "proven",
            name,
            "the frequencies of the config, to 1e-5",
            f"{proof} (stored as {dtype}){others}",
            "a reader that takes the stored buffer turns late positions by wrong angles; one that recomputes it does not",
            "drop the buffers from the file: readers recompute them in float32",
            counterexample=f"{name} {proof}",
            source="https://github.com/huggingface/transformers/pull/29285",
        )


CHECKS = (
    Check("L4", "the rotary scaling is complete and agrees with itself", check_scaling),
    Check("L5", "the rotary base is said, and is the family's", check_theta),
    Check("G6", "stored rotary frequencies are those of the config", check_buffers),
)

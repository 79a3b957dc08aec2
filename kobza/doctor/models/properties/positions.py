"""M5: rotary positions are relative, so logits stay when all positions move by k: in float32, autocast and bf16 alike.

Beside the law itself the angles are read where a module hands out (cos, sin): neighbouring positions must differ (G5), and
each angle must be position x declared frequency (G6).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kobza.doctor.finding import Finding, Skip
from kobza.doctor.models.properties.probe import SEED, draw_ids, rel_l2, settled
from kobza.doctor.models.subject import KobzaSubject, ModuleSubject
from kobza.layers import rope_slowdown

MODES = ("fp32", "autocast", "bf16")
SHIFTS = (100, 1000, 8000)
T = 24
# Logits move by up to 2e-4 (float32: angles at 8000 are exact to 5e-4) and 0.9 of the format's own noise on clean subjects.
FLOAT32_TOLERANCE, NOISES = 5e-3, 4.0


def furthest(subject: ModuleSubject) -> int:
    """Positions that the tables have; below the length at which the angles change by rule (dynamic, longrope)."""
    rope = getattr(subject.config, "rope_parameters", None) or getattr(subject.config, "rope_scaling", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        return min(subject.max_seq_len, rope.get("original_max_position_embeddings") or subject.max_seq_len)
    return subject.max_seq_len


def shift(subject: ModuleSubject) -> Iterator[Finding]:
    """Move all positions by k and compare the logits with those at 0, and with the format's own noise."""
    subject.need("rotary", "positions", "cast")
    settled(subject)
    shifts = [k for k in SHIFTS if k + T <= furthest(subject)] or [furthest(subject) - T]
    if shifts[0] < 1:
        raise Skip(f"a context of {subject.max_seq_len} leaves no room to move {T} tokens")
    ids = draw_ids(subject, 1, T)
    with torch.no_grad():
        exact = subject.at("fp32").logits(ids)
        # tables that went through to(bf16) stay rounded in the float32 copy: they have that format's noise there too
        rounded = 0.0 if subject.dtype == torch.float32 else rel_l2(subject.at("bf16").logits(ids), exact)
        table = [["mode", *(f"+{k}" for k in shifts), "noise of the format"]]
        for mode in MODES:
            at = subject.at(mode)
            base = at.logits(ids)
            moved = [rel_l2(at.logits(ids, torch.arange(k, k + T)[None]), base) for k in shifts]
            noise = rel_l2(base, exact)
            table.append([mode, *(f"{error:.2g}" for error in moved), f"{noise:.2g}"])
            limit = max(FLOAT32_TOLERANCE, NOISES * max(noise, rounded))
            worst = max(range(len(shifts)), key=lambda i: moved[i] if moved[i] == moved[i] else float("inf"))
            if not moved[worst] <= limit:
                yield _moved(subject, mode, shifts[worst], moved[worst], limit)
                break
    subject.notes["shift"] = table


def _moved(subject: ModuleSubject, mode: str, k: int, error: float, limit: float) -> Finding:
    return Finding(
        code="G5",
        severity="error",
        confidence="proven",
        where=f"rotary positions, {mode}",
        expected=f"logits stay within {limit:.2g} when all positions move by {k}",
        got=f"they move by {error:.2g} (relative L2)",
        why="long texts are read with blurred positions: attention can no longer tell neighbours apart",
        fix="keep positions and angles in float32 (outside autocast), and cast only cos and sin",
        counterexample=f"{T} ids of seed {SEED}, positions 0..{T - 1} and {k}..{k + T - 1} in {mode}: "
        f"logits differ by {error:.3g}",
        source="https://github.com/huggingface/transformers/pull/29285",
    )


def angles(subject: ModuleSubject) -> Iterator[Finding]:
    """Read (cos, sin) at both ends of the context in each mode: rows differ, and are those of the declared base."""
    subject.need("rotary", "positions", "cast")
    end = furthest(subject)
    n = min(T, end)
    places = torch.unique(torch.cat((torch.arange(n), torch.arange(end - n, end))))
    ids, seen_any = draw_ids(subject, 1, n), False
    for mode in MODES:
        for start in sorted({0, end - n}):
            for name, cos, sin in _pairs(subject.at(mode), ids, torch.arange(start, start + n)):
                seen_any = True
                finding = _same_rows(name, mode, start, cos, sin) or _wrong_angle(subject, name, mode, start, cos, sin)
                if finding is not None:
                    yield finding
                    return
    if not seen_any:
        raise Skip(f"no module hands out cos and sin of {len(places)} positions; the shift law is asked all the same")


@torch.no_grad()
def _pairs(subject: ModuleSubject, ids: Tensor, positions: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """(module, cos (T, .), sin (T, .)) of every module that returned such a pair: squares that add up to a constant."""
    found: list[tuple[str, Tensor, Tensor]] = []

    def see(name: str, output: Any) -> None:
        if not isinstance(output, tuple) or len(output) != 2 or not all(isinstance(part, Tensor) for part in output):
            return
        cos, sin = output
        if cos.shape != sin.shape or cos.ndim < 2 or cos.shape[-2] != len(positions) or not cos.is_floating_point():
            return
        size = cos.float() ** 2 + sin.float() ** 2
        if float(size.std()) < 0.01 * float(size.mean()) and name not in [known for known, *_ in found]:
            found.append(
                (name, cos.reshape(-1, *cos.shape[-2:])[0].float(), sin.reshape(-1, *sin.shape[-2:])[0].float())
            )

    with subject.watch(see):
        subject.logits(ids, positions[None])
    return found


def _same_rows(name: str, mode: str, start: int, cos: Tensor, sin: Tensor) -> Finding | None:
    """G5: two neighbours with the same angles."""
    rows = torch.cat((cos, sin), dim=-1)
    same = (rows[1:] == rows[:-1]).all(-1)
    if not bool(same.any()):
        return None
    first, distinct = start + int(same.long().argmax()), len(torch.unique(rows, dim=0))
    return Finding(
        code="G5",
        severity="error",
        confidence="proven",
        where=f"{name}, {mode}",
        expected=f"{len(rows)} positions have {len(rows)} different angles",
        got=f"{distinct} different ones among positions {start}..{start + len(rows) - 1}",
        why="tokens at these places cannot be told apart: text beyond a few hundred tokens is read as a blur",
        fix="keep positions in float32 or integers until cos and sin are made; bf16 holds integers to 256 only",
        counterexample=f"positions {first} and {first + 1} get bit-equal cos and sin in {mode}",
        source="https://github.com/huggingface/transformers/pull/29285",
    )


def _wrong_angle(subject: ModuleSubject, name: str, mode: str, start: int, cos: Tensor, sin: Tensor) -> Finding | None:
    """An angle that is not position x declared frequency. G6: the frequencies are wrong, in float32 too or as a cast left them;
    G5: they are right, and their product with the position is rounded."""
    declared = frequencies(subject, name)
    if declared is None:
        return None
    inverse, gain = declared
    pairs = len(inverse)
    if cos.shape[-1] not in (pairs, 2 * pairs):
        return None
    positions = torch.arange(start, start + len(cos), dtype=torch.float64)
    want = torch.outer(positions, inverse)  # (T, D/2)
    # a pair's two channels stand half a head apart (most) or side by side (Cohere)
    layouts = [(part[:, :pairs].cpu(), part[:, :: part.shape[-1] // pairs].cpu()) for part in (cos, sin)]
    error, cos, sin = min(
        ((_off(gain * want.cos(), c, gain * want.sin(), s), c, s) for c, s in zip(*layouts, strict=True)),
        key=lambda found: float(found[0].max()),
    )
    worst = int(error.argmax())
    row, pair = divmod(worst, pairs)
    # bf16 rounds a cosine by 0.004; float32 angles are off by 6e-8 of themselves
    limit = (0.01 + 5e-7 * float(positions[-1])) * max(1.0, gain)
    if float(error.max()) <= limit:
        return None
    low = [
        name
        for name, part in subject.at(mode).module.named_buffers()
        if name.endswith("inv_freq") and part.dtype != torch.float32
    ]
    rounded = mode != "fp32" and not low
    return Finding(
        code="G5" if rounded else "G6",
        severity="error",
        confidence="proven",
        where=f"{name}, {mode}",
        expected=f"cos and sin of position x frequency within {limit:.2g}",
        got=f"off by {float(error.max()):.2g}: "
        + (
            "right in float32, rounded here"
            if rounded
            else "the frequencies are not those of the declared base, or were rounded"
        ),
        why="distances are read wrong, the more the longer the text",
        fix="make the angles in float32, outside autocast, and cast cos and sin"
        if rounded
        else "compute inverse frequencies in float32 from the config, and keep the buffer out of half() and to(bf16)",
        counterexample=f"position {start + row}, pair {pair}: "
        f"cos, sin {float(cos[row, pair]):.4f}, {float(sin[row, pair]):.4f} where "
        f"{gain * float(want[row, pair].cos()):.4f}, {gain * float(want[row, pair].sin()):.4f} is right ({mode})",
        source="https://unsloth.ai/blog/gemma-bugs",
    )


def _off(cos: Tensor, got_cos: Tensor, sin: Tensor, got_sin: Tensor) -> Tensor:
    """How far off each pair is, (T, D/2)."""
    return (got_cos.double() - cos).abs().maximum((got_sin.double() - sin).abs())


def frequencies(subject: ModuleSubject, name: str) -> tuple[Tensor, float] | None:
    """Declared radians a position of each pair (D/2,) in float64, and the gain on cos and sin; None: we cannot tell."""
    config = subject.config
    if isinstance(subject, KobzaSubject):
        local = name.endswith("local_rope")
        theta = config.rope_local_theta if local and config.rope_local_theta else config.rope_theta
        divide, gain = (None, 1.0) if local or config.rope_scaling == "none" else rope_slowdown(config)
        width = config.rope_dim or config.head_dim
        inverse = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        return (inverse if divide is None else inverse / divide.double()), float(gain)
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type") not in ("default", "linear") or "rope_theta" not in rope:
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(width * rope.get("partial_rotary_factor", 1.0))
    inverse = rope["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return inverse / (rope["factor"] if rope["rope_type"] == "linear" else 1.0), 1.0

"""M10: bf16 beside float32, module by module; a jump at one module is a mistake, the level is the format. M11: headroom.

Softmax and cross-entropy are asked by name as well (R24): what they lose is too little to show in a layer's error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kobza.doctor.finding import Finding, Skip
from kobza.doctor.models.properties.probe import SEED, draw_ids, rel_l2, settled
from kobza.doctor.models.subject import ModuleSubject, Subject
from kobza.train import IGNORE

T = 24
HALF = (torch.bfloat16, torch.float16)
FLOAT16_MAX = 65504.0
JUMP, NOISE, LEVEL = 8.0, 0.004, 0.1


def short(subject: Subject) -> Tensor:
    """Token ids for a forward whose every output is kept."""
    return draw_ids(subject, 1, min(T, subject.max_seq_len))


# ---- M10: the ladder -----------------------------------------------------------------------------------------------------


def rungs(subject: ModuleSubject) -> dict[str, list[tuple[str, float]]]:
    """Relative L2 error of each module's output against float32, in order of execution, by mode."""
    if "ladder" not in subject.notes:
        ids = short(subject)
        exact = subject.at("fp32").outputs(ids)
        subject.notes["ladder"] = {
            mode: [
                (name, rel_l2(output, exact[name]))
                for name, output in subject.at(mode).outputs(ids).items()
                if name in exact and output.shape == exact[name].shape and output.shape[:2] == ids.shape
            ]
            for mode in ("autocast", "bf16")
        }
    return subject.notes["ladder"]


def ladder(subject: ModuleSubject) -> Iterator[Finding]:
    """The first module whose output jumps away from float32."""
    subject.need("cast", "hidden")
    settled(subject)
    blocks = [name for name, _ in subject.layers()]
    found = rungs(subject)
    if any(name.rpartition(".")[2] == "experts" for name, _ in subject.module.named_modules()):
        raise Skip("experts are chosen by near ties, which bf16 decides otherwise; the errors are in the facts")
    for mode, errors in found.items():
        worst = NOISE
        for name, error in errors:
            if not error <= max(LEVEL, JUMP * worst):
                yield _jump(subject, mode, name, error, worst, blocks)
                return
            worst = max(worst, error)


def _jump(subject: ModuleSubject, mode: str, name: str, error: float, before: float, blocks: list[str]) -> Finding:
    lost = error != error or error == float("inf")
    leaf = name.rpartition(".")[2].lower()
    inside = any(name == block or name.startswith(f"{block}.") for block in blocks)
    code = (
        "G14"
        if lost
        else "G3"
        if "norm" in leaf
        else "G5"
        if "attn" in name and "rotary" in subject.capabilities
        else "R24"
    )
    code = code if inside or lost else "G2" if "embed" in name else code
    return Finding(
        code=code,
        severity="error" if lost else "warn",
        confidence="proven",
        where=name,
        expected=f"in {mode} within {max(LEVEL, JUMP * before):.2g} of float32; what comes before it is within {before:.2g}",
        got="inf or nan" if lost else f"off by {error:.2g} (relative L2)",
        why="something here needs float32 and does not get it",
        fix=f"compute in float32 inside {name}: angles, norms, softmax, and cast the result",
        counterexample=f"ids of seed {SEED} in {mode}: the output of {name} differs by {error:.3g} of its norm",
        source="https://github.com/huggingface/transformers/pull/29285",
    )


def ladder_facts(subject: ModuleSubject) -> list[list[str]]:
    """The table of errors at each block."""
    found: dict[str, list[tuple[str, float]]] = subject.notes.get("ladder", {})
    modes, names = list(found), [name for name, _ in subject.layers()]
    rows = {mode: dict(errors) for mode, errors in found.items()}
    return [["block", *modes]] + [[name, *(f"{rows[m].get(name, float('nan')):.2g}" for m in modes)] for name in names]


# ---- R24: softmax and cross-entropy --------------------------------------------------------------------------------------------


class Softmaxes(TorchFunctionMode):
    """Within the context notes each softmax that reads and gives a 16-bit format: (what, how far rows are from 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, float]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (F.softmax, torch.softmax, Tensor.softmax) and result.dtype in HALF and args[0].dtype in HALF:
            self.found.append((f"softmax of {tuple(result.shape)}", float((result.float().sum(-1) - 1).abs().max())))
        return result


def low_precision(subject: ModuleSubject) -> Iterator[Finding]:
    """The softmaxes of a bf16 forward, and the loss beside the one that float32 makes of the same logits."""
    subject.need("cast")
    settled(subject)
    ids = short(subject)
    modes = (
        ("autocast", "bf16") if subject.kind == "kobza" else ("bf16",)
    )  # torch's autocast widens softmax on a GPU only
    for mode in modes:
        with Softmaxes() as seen, torch.no_grad():
            subject.at(mode).logits(ids)
        if seen.found:
            what, error = max(seen.found, key=lambda found: found[1])
            yield _low_finding(
                "info" if error < 0.01 else "warn",
                f"softmax, {mode}",
                "softmax in float32",
                f"{len(seen.found)} softmaxes in a 16-bit format",
                "small weights of attention are rounded away",
                "softmax(scores, dtype=float32), then cast",
                f"{what} in {mode}, ids of seed {SEED}: a row adds up to 1 only within {error:.3g}",
            )
            break
    if "loss" not in subject.capabilities or abs(_loss_error(subject.at("fp32"), ids)[0]) > 1e-4:
        return  # another loss than plain cross-entropy: nothing to compare with
    for mode in ("autocast", "bf16"):
        error, got, want = _loss_error(subject.at(mode), ids)
        if not abs(error) <= 1e-4:
            meant = mode == "autocast" or subject.dtype in HALF  # else nobody said that it is to be cast
            yield _low_finding(
                "warn" if meant else "info",
                f"loss, {mode}",
                "cross-entropy in float32 over the logits, whatever their format",
                f"off by {error:.2%}",
                "losses stand still in steps of 0.4%, and so do their gradients",
                "logits.float() before cross_entropy",
                f"ids of seed {SEED} in {mode}: {got:.5f} where float32 makes {want:.5f} of the same logits",
            )
            return


@torch.no_grad()
def _loss_error(subject: ModuleSubject, ids: Tensor) -> tuple[float, float, float]:
    """(relative error, loss, float32's loss of the same logits)."""
    got, logits = subject.loss(ids, ids)
    logits = logits[:, : ids.shape[1] - 1].float()
    want = float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=IGNORE))
    return float(got) / want - 1, float(got), want


def _low_finding(
    severity: Any, where: str, expected: str, got: str, why: str, fix: str, counterexample: str
) -> Finding:
    source = "https://github.com/huggingface/transformers/issues/33317"
    return Finding("R24", severity, "proven", where, expected, got, why, fix, counterexample, source)


# ---- M11: headroom -------------------------------------------------------------------------------------------------------------


class Scores(TorchFunctionMode):
    """Within the context notes the largest score of each attention: of q k^T scale, or of what a softmax reads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = args[0].float(), args[1].float()
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1) if q.ndim == 4 else k
            self.found.append(float((q @ k.mT).abs().max()) * (kwargs.get("scale") or q.shape[-1] ** -0.5))
        elif func in (F.softmax, torch.softmax, Tensor.softmax):
            visible = args[0][args[0] > -1e9]  # the rest is masked
            self.found.append(float(visible.abs().max()) if visible.numel() else 0.0)
        return func(*args, **kwargs)


def headroom(subject: ModuleSubject) -> Iterator[Finding]:
    """The largest value of every output and of every attention's scores, against float16's largest."""
    subject.need("cast", "hidden")
    asked, ids = subject.at("fp32"), short(subject)
    with Scores() as scores:
        outputs = asked.outputs(ids)
    peaks = {name: float(output.abs().max()) for name, output in outputs.items()}
    peaks |= {f"attention scores {i}": peak for i, peak in enumerate(scores.found)}
    subject.notes["headroom"] = peaks
    for name, peak in peaks.items():
        if not peak <= FLOAT16_MAX:
            finite = peak not in (float("inf"),) and peak == peak
            yield Finding(
                code="G14",
                severity="error" if not finite or subject.dtype == torch.float16 else "warn",
                confidence="proven",
                where=name,
                expected=f"values below {FLOAT16_MAX:g}, the largest of float16",
                got=f"{peak:.4g} in float32",
                why="in float16 this is inf, and everything after it nan"
                if finite
                else "the model computes nonsense already",
                fix="serve in bf16 or float32, or keep this module in float32",
                counterexample=f"ids of seed {SEED} in float32: max |{name}| is {peak:.6g}",
                source="https://github.com/huggingface/transformers/issues/33317",
            )
            return  # what follows it is large because of it


def headroom_facts(subject: ModuleSubject) -> list[list[str]]:
    """The ten modules with the least room."""
    peaks: dict[str, float] = subject.notes.get("headroom", {})
    ordered = sorted(peaks.items(), key=lambda item: -item[1])[:10]
    return [["module", "largest value", "room to float16"]] + [
        [name or "(the model)", f"{peak:.4g}", f"{FLOAT16_MAX / max(peak, 1e-30):.3g} x"] for name, peak in ordered
    ]

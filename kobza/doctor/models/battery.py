"""The area `model`: the metamorphic battery M1-M11, laws that hold for every causal language model whatever its weights.

Each law is a module of doctor/properties; here they are lined up, cheapest questions first. A large model is asked on a slice
of two blocks (`Subject.slice`), which has every kind of attention that the model declares; `layers` asks another number.
"""

from __future__ import annotations

from kobza.config import require
from kobza.doctor.finding import Check
from kobza.doctor.models import subject as subjects
from kobza.doctor.models.properties import causality, decoding, objective, positions, precision, reach, released
from kobza.doctor.models.subject import Subject

SMALL = 30_000_000  # weights up to which the whole model is asked: seconds on two cores
CHECKS: tuple[Check, ...] = (
    Check("R1 G11", "M1 causality: the future does not move the past", causality.causality),
    Check("I1 I2", "M2 cache: one token at a time as all at once", decoding.cache),
    Check("I3", "M3 batch: a row alone as among others, padded or not", decoding.batch),
    Check("R7 R8", "M4 packing: a document alone as behind another", decoding.packing),
    Check("G5", "M5 positions: all moved by k, the same logits", positions.shift),
    Check("G5 G6", "M5 angles: every position its own, of the declared base", positions.angles),
    Check("P1 P2 G11", "M6 window: measured as declared", reach.reach),
    Check("R2 R4 R6", "M7 target: what the loss teaches", objective.target),
    Check("R9", "M8 accumulation: micro-batches as one batch", objective.accumulation),
    Check("R17", "M9 evaluation: exact, and train() differs by dropout alone", objective.evaluation),
    Check("G2 G3 G5 G14 R24", "M10 dtype ladder: no jump at one module", precision.ladder),
    Check("G2", "M10 embedding scale: rounded as released", released.embedding_scale),
    Check("G3", "M10 norms: offset, and cast after it", released.norms),
    Check("R24", "M10 softmax and cross-entropy in float32", precision.low_precision),
    Check("G14", "M11 headroom: below float16's largest", precision.headroom),
)


def open_(spec: str, layers: int = 0) -> Subject:
    """What a user names -> the subject to ask: whole, or a slice of so many blocks; 0 takes two of a model of over 30 million
    weights."""
    require(layers >= 0, f"--layers is {layers}; it must not be negative: 0 slices large models alone")
    subject = subjects.open_(spec)
    if "hidden" not in subject.capabilities:
        return subject
    n, size = len(subject.layers()), sum(weight.numel() for weight in subject.module.parameters())
    require(layers <= n, f"--layers is {layers}, and {spec} has {n} blocks; take at most {n}")
    asked = subject.slice(layers or 2) if layers or size > SMALL else subject
    asked.notes["asked"] = [["blocks of the model", "asked"], [str(n), str(len(asked.layers()))]]
    return asked


def facts(subject: Subject) -> dict[str, list[list[str]]]:
    """What the checks measured: windows, errors by block, room to overflow, logits under shifted positions."""
    if "hidden" not in subject.capabilities:
        return {}
    tables = {
        "Blocks": subject.notes.get("asked", []),
        "Windows": reach.facts(subject),
        "Relative error against float32": precision.ladder_facts(subject),
        "Largest values": precision.headroom_facts(subject),
        "Logits when all positions move": subject.notes.get("shift", []),
    }
    return {title: table for title, table in tables.items() if len(table) > 1}


__all__ = ["CHECKS", "facts", "open_"]

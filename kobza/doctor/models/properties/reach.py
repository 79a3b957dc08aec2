"""M6: how far back each block sees, measured, beside what the config declares.

One place of a block's input is disturbed, and the last output that moves tells the window: W tokens, the token itself
included. A text of T > 2 W is needed; backends disagree by one (an eager mask of W, a flash kernel of W + 1), so one more or
less is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kobza.doctor.finding import Finding, Skip
from kobza.doctor.models.properties.probe import SEED, block_moves, draw_ids, length_of, settled
from kobza.doctor.models.subject import ModuleSubject

PLACE = 2  # of the disturbance; the first token is a sink in trained models
FAR = 2048  # above it only the subject's own attention is asked: eager ones hold T x T scores a head
CALM = 3  # outputs beyond the edge that must stay exactly as they are, for an edge to be one


def measure(subject: ModuleSubject) -> list[tuple[str, int, int | None, int | None]]:
    """(backend, block, declared, measured) of every block; measured None: no edge within the text."""
    if "reach" in subject.notes:
        return subject.notes["reach"]
    asked, T = subject.at("fp32"), length_of(subject, least=64)
    ids, rows = draw_ids(subject, 1, T), []
    for backend in asked.backends()[: 1 if T > FAR else None]:
        with asked.backend(backend):
            for index in range(len(asked.layers())):
                declared = asked.windows[index] if asked.windows else None
                rows.append((backend, index, declared, edge(block_moves(asked, index, ids, PLACE))))
    subject.notes["reach"] = rows
    return rows


def edge(moves: torch.Tensor) -> int | None:
    """Tokens seen: from the place disturbed to the last output that moved; None where the movement has no sharp end."""
    after = moves[PLACE:]
    last = int(after.nonzero().max()) if bool((after > 0).any()) else 0
    if last + 1 + CALM > len(after):
        return None
    typical = float(after[: last + 1].median())
    return last + 1 if float(after[last]) > 0.02 * typical else None  # a movement that fades out is no window


def reach(subject: ModuleSubject) -> Iterator[Finding]:
    """Measured against declared, block by block."""
    subject.need("hidden", "cast")
    settled(subject)
    rows = measure(subject)
    if subject.windows is None:
        raise Skip("it declares no windows; the measured ones are in the facts")
    T = length_of(subject, least=64)
    short = [declared for _, _, declared, _ in rows if declared and T < PLACE + declared + 1 + CALM]
    if short and len(short) == len(rows):
        raise Skip(f"the window of {short[0]} does not fit into the context of {subject.max_seq_len}")
    lost = [i for _, i, declared, seen in rows if declared and seen is None and declared not in short]
    extra = [i for _, i, declared, seen in rows if declared is None and (seen or 0) > 1]
    for backend, index, declared, seen in rows:
        alone = declared is None and seen == 1  # no attention in this block: each token is by itself
        if seen == declared or declared in short or alone:
            continue
        yield _finding(subject, backend, index, declared, seen, swapped=bool(lost and extra), T=T)


def _finding(
    subject: ModuleSubject, backend: str, index: int, declared: int | None, seen: int | None, swapped: bool, T: int
) -> Finding:
    """G11: windows in the wrong layers; P2: lost, or there undeclared; P1: of another size (by one: a warning)."""
    close = declared is not None and seen is not None and abs(seen - declared) == 1
    code = "P1" if declared and seen else "G11" if swapped else "P2"
    name = subject.layers()[index][0]
    got = f"{seen} tokens" if seen else f"all {T - PLACE} tokens asked"
    with_backend = f" ({backend})" if backend else ""
    last = PLACE + (seen or T - PLACE) - 1
    return Finding(
        code=code,
        severity="warn" if close else "error",
        confidence="proven",
        where=name + with_backend,
        expected=f"a window of {declared} tokens" if declared else "no window",
        got=f"{got} are seen" + (": off by one, on which backends disagree" if close else ""),
        why={
            "P1": "long texts are read with another reach than in training",
            "P2": "beyond the window the model reads what it never saw in training, or misses what it did",
            "G11": "local and global layers are swapped: long texts are read wrong, and nothing shows on short ones",
        }[code],
        fix="decide which convention the weights were trained with (W tokens with or without the token itself) and keep it"
        if close
        else "carry the window into this path's mask, in exactly the layers that the config names",
        counterexample=f"{T} ids of seed {SEED}: a disturbance of {name}'s input at position {PLACE} moves its outputs up to "
        f"position {last}" + ("" if seen is None else f" and none of {last + 1}..{T - 1}"),
        source="https://github.com/huggingface/transformers/issues/35924",
    )


def facts(subject: ModuleSubject) -> list[list[str]]:
    """The table of windows."""
    table = [["block", "attention", "declared", "measured"]]
    for backend, index, declared, seen in subject.notes.get("reach", ()):
        told = "says nothing" if subject.windows is None else str(declared or "all")
        table.append([subject.layers()[index][0], backend, told, str(seen or "all that was asked")])
    return table

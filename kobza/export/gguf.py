"""A model as GGUF files: several types in one pass over its weights, a slice of rows at a time.

A weight is read where it lies, put into the other format's order (formats/weights.py) and cut into slices of rows; each slice is
turned into every type that is wanted, by the threads of formats/ggml.py, and each file gets its bytes. In memory are one tensor
and one slice. The files appear under their names when all of them are whole. What the types are is types.py's; the settings and
names the families'; the tokenizer's keys vocabulary.py's.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kobza import __version__
from kobza.config import InputError, ModelConfig, nearest, require
from kobza.export.source import Source
from kobza.export.types import FLOATS, Types
from kobza.export.vocabulary import vocabulary
from kobza.formats.families import layout_of
from kobza.formats.ggml import bytes_of, quantize
from kobza.formats.gguf import gguf_writer
from kobza.formats.gguf_families import config_to_gguf, gguf_target
from kobza.formats.layouts import slots
from kobza.formats.weights import Piece, gguf_pieces

AT_ONCE = 1 << 22  # values of a slice: 16 MB in float32
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
SAMPLING |= {"repetition_penalty": "penalty_repeat"}
Progress = Callable[[str, int, int], None]
Entries = dict[str, tuple[str, Any]]


def write_ggufs(
    source: Source,
    outputs: Mapping[Path, Types],
    importance: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> dict[Path, list[str]]:
    """Write a model to one file or several; what a person should know of each, by its path.

    importance: by our tensor's name, the mean square of each column's inputs, (in,) float32
    progress(tensor, bytes written, bytes in all), of all files together
    """
    _check_places(outputs)
    _check_names(source, outputs, importance or {})
    arch, settings = config_to_gguf(source.config)
    pieces = list(gguf_pieces(source.config, arch, source.read, source.shapes))
    shapes = {piece.name: piece.shape for piece in pieces}
    ours = our_names(source.config, arch)
    plans = {path: types.plan(shapes, ours, importance is not None) for path, types in outputs.items()}
    total = sum(bytes_of(plan[name], shape) for plan, _ in plans.values() for name, shape in shapes.items())
    _check_room(outputs, total)
    tokens = vocabulary(source.tokenizer, shapes["token_embd.weight"][0], source.ends, source.template)
    general = about(source, arch, shapes)
    try:
        with ExitStack() as files:
            writers = []
            for path, (plan, _) in plans.items():
                entries = general | {"general.file_type": ("uint32", outputs[path].number)} | settings | tokens
                infos = {name: (plan[name], shape) for name, shape in shapes.items()}
                writers.append((plan, files.enter_context(gguf_writer(path, entries, infos))))
            done = 0
            for piece in pieces:
                columns = columns_of(piece.name, ours, importance or {})
                for made in blocks(piece, {plan[piece.name] for plan, _ in writers}, columns):
                    for plan, write in writers:
                        write(piece.name, made[plan[piece.name]])
                        done += made[plan[piece.name]].size
                    if progress is not None:
                        progress(piece.name, done, total)
    except BaseException:
        for path in outputs:  # all or none: the first may have been whole already
            path.unlink(missing_ok=True)
        raise
    return {path: notes for path, (_, notes) in plans.items()}


def our_names(config: ModelConfig, arch: str) -> dict[str, tuple[str, ...]]:
    """Our names of what each tensor of a file is made of; a head that is tied in ours is the embedding."""
    found = {slot.theirs: slot.ours for slot in slots(gguf_target(config, arch), layout_of(arch, gguf=True))}
    head = {"output.weight": ("embed.weight",)} if "output.weight" in found and config.tied else {}
    return found | head


def about(source: Source, arch: str, shapes: Mapping[str, tuple[int, ...]]) -> Entries:
    """The keys that say what a file is, as llama.cpp's converter gives them, and where ours comes from."""
    found: Entries = {
        "general.architecture": ("string", arch),  # first, by the specification
        "general.type": ("string", "model"),
        "general.name": ("string", source.name),
        "general.basename": ("string", re.sub(r"-v?\d[\d.]*[KMBT]?(-.*)?$", "", source.name, flags=re.IGNORECASE)),
        "general.size_label": ("string", size_label(sum(int(np.prod(shape)) for shape in shapes.values()))),
    }
    if isinstance(source.provenance.get("license"), str):
        found["general.license"] = ("string", source.provenance["license"])
    for name, theirs in SAMPLING.items():
        if source.sampling.get(name) is not None:
            found[f"general.sampling.{theirs}"] = ("int32" if name == "top_k" else "float32", source.sampling[name])
    found["general.quantization_version"] = ("uint32", 2)
    found["kobza.version"] = ("string", __version__)
    found["kobza.source.sha256"] = ("string", source.sha256)
    return found


def size_label(n: int) -> str:
    """A number of weights in two digits or more: 134,515,008 -> 135M, 1,235,814,400 -> 1.2B."""
    scale, letter = next(((s, x) for s, x in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if n > s), (1e3, "K"))
    digits = len(str(round(n / scale)).lstrip("0"))
    return f"{n / scale:.{max(2 - digits, 0)}f}{letter}"


def columns_of(name: str, ours: Mapping[str, tuple[str, ...]], importance: Mapping[str, Tensor]) -> np.ndarray | None:
    """The importance of a tensor's columns; of a joined one's parts any, for they have the same inputs."""
    if name == "token_embd.weight" and "output.weight" in ours:
        return None  # looked up, not multiplied
    names = ours.get(name, ())
    heads = ("lm_head.weight",) if names == ("embed.weight",) else ()
    found = [importance[part] for part in (*names, *heads) if part in importance]
    return found[0].numpy() if found else None


def blocks(piece: Piece, types: set[str], columns: np.ndarray | None) -> Iterator[dict[str, np.ndarray]]:
    """The bytes of a tensor in each of the types, slice by slice of its rows, in order."""
    tensor = piece.make()
    rows = tensor.reshape(-1, tensor.shape[-1])  # (rows, width)
    for part in rows.split(max(1, AT_ONCE // rows.shape[1])):
        numbers = part.float().numpy()
        whole = f"{piece.name}: a weight is infinite or no number; export a checkpoint that is whole"
        require(bool(np.isfinite(numbers).all()), whole)
        try:
            yield {type: quantize(numbers, type, columns) for type in types}
        except InputError as error:
            raise InputError(f"{piece.name}: {error}") from None


def _check_places(outputs: Mapping[Path, Types]) -> None:
    require(bool(outputs), "no GGUF file to write; name a type")
    real = [path.resolve() for path in outputs]
    for path in outputs:
        require(real.count(path.resolve()) == 1, f"{path}: two types for one file; give each its own name")
        require(not path.exists(), f"{path} exists; remove it or name another")
        require(path.parent.is_dir(), f"{path.parent}: no such folder; make it first")


def _check_room(outputs: Mapping[Path, Types], total: int) -> None:
    """Refuse what cannot fit before an hour has gone by."""
    folder = next(iter(outputs)).parent
    free = shutil.disk_usage(folder).free
    said = f"{folder}: {len(outputs)} GGUF files take {total / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
    require(total <= free, f"{said}; make room or take fewer types")


def _check_names(source: Source, outputs: Mapping[Path, Types], importance: Mapping[str, Tensor]) -> None:
    """Each tensor that is named must be a matrix that is written, and its importance as wide as its rows."""
    matrices = {name: shape for name, shape in source.shapes.items() if len(shape) == 2}
    heads = {"lm_head.weight": matrices["embed.weight"]} if source.config.tied else {}
    for name in (name for types in outputs.values() for name in types.overrides):
        known = f"{source.name} has no matrix {name!r}{nearest(name, list(matrices))}"
        require(name in matrices, f"{known}; keep one of its own in another type")
    for name, columns in importance.items():
        wanted = (matrices | heads).get(name, (0, 0))[-1:]
        fits = tuple(columns.shape) == wanted
        require(fits, f"importance of {name} is {list(columns.shape)}, not {list(wanted)}; measure it on this model")
    every = {type for types in outputs.values() for type in (types.base, *types.overrides.values())}
    idle = f"importance has no effect on {', '.join(sorted(every))}; take a type of few bits or leave it out"
    require(not importance or not every <= {*FLOATS, "Q8_0"}, idle)

"""What an artifact's files hold, by kobza's own readers: settings in our words, weights under our names as ours would be.

This is the way back, independent of what wrote the files: it goes by the config and the names that are in them. What a family
has and the source lacks (a norm's weights of 1, biases of 0, a head of its own that is the table again) is read like the rest, so
that it can be held against what changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kobza.config import InputError, ModelConfig, require
from kobza.export.source import Source
from kobza.formats.families import config_from_hf, layout_of
from kobza.formats.ggml import load_tensor
from kobza.formats.gguf import read_gguf
from kobza.formats.gguf_families import config_from_gguf, config_to_gguf, gguf_target
from kobza.formats.headers import find_tensors, inside, read_json
from kobza.formats.layouts import Layout, Slot, layout_by_names, prefix_of, shapes, slots
from kobza.formats.load import DTYPES, check_rest, read_tensor
from kobza.formats.stock import canonical, config_to_hf, differing
from kobza.formats.weights import check_slots, taken

ALONG = (
    "bias",
    "qkv_bias",
    "norm_weight",
    "qk_norm_weight",
)  # weights that a family has whether a model needs them or not


@dataclass(frozen=True)
class Stored:
    """An artifact's settings and weights."""

    config: ModelConfig
    arch: str
    """of a .gguf; "" of a folder"""
    types: dict[str, str]
    """ggml's name of the type that each weight is stored in, by our names"""
    read: Callable[[], Iterator[tuple[str, Tensor]]]
    read_back: bool = True
    """from files; else it is what they should be, and holding it against its source proves nothing"""

    def weights(self, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """Each weight as a model of `config` has it: with its norms' 1 taken away or added."""
        offset = float(self.config.norm_offset) - float(config.norm_offset)
        for name, tensor in self.read():
            yield name, tensor.float() + offset if offset and name.endswith("norm.weight") else tensor


def stored_in(path: Path) -> Stored:
    """A Hugging Face folder or a .gguf file; InputError where kobza cannot read it."""
    return _in_folder(path) if path.is_dir() else _in_gguf(path)


def stored_of(source: Source) -> Stored:
    """What an artifact in a form that kobza does not read back should hold: the source's own weights."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    types = {name: names.get(dtype, "F32") for name, dtype in source.dtypes.items()}
    return Stored(source.config, "", types, lambda: ((n, source.read(n)) for n in source.shapes), read_back=False)


def _in_folder(folder: Path) -> Stored:
    config = config_from_hf(read_json(inside(folder, "config.json")))
    infos = find_tensors(folder)
    layout = layout_by_names(config, infos.keys())
    sizes = {name: info.shape for name, (_, info) in infos.items()}
    places = _places(config, layout, prefix_of(layout, infos.keys()), sizes)
    types = {name: infos[slot.theirs][1].dtype for slot in places for name in slot.ours}
    strange = sorted(set(types.values()) - set(DTYPES))
    require(not strange, f"{folder}: weights of {strange}; kobza reads {', '.join(DTYPES)}")
    return Stored(config, "", types, lambda: _taken(config, places, lambda name: read_tensor(*infos[name])))


def _in_gguf(path: Path) -> Stored:
    file = read_gguf(path)
    sizes = {name: tensor.shape for name, tensor in file.tensors.items()}
    slowed = "rope_freqs.weight"
    freqs = [float(x) for x in load_tensor(file, slowed).ravel()[:4096]] if slowed in sizes else None
    config = config_from_gguf(file.metadata, sizes, freqs)
    arch = file.metadata["general.architecture"]
    places = _places(config, layout_of(arch, gguf=True), "", sizes)
    types = {name: file.tensors[slot.theirs].type for slot in places for name in slot.ours}
    return Stored(config, arch, types, lambda: _taken(config, places, lambda n: torch.from_numpy(load_tensor(file, n))))


def _places(config: ModelConfig, layout: Layout, prefix: str, sizes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    """Where each weight lies in the file; all that the config asks for, and nothing that it does not speak of."""
    places = slots(config, layout, prefix, sizes.keys())
    check_slots(shapes(config), places, sizes)
    check_rest(layout, places, sizes.keys(), config, prefix)
    return places


def _taken(config: ModelConfig, places: list[Slot], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    table = shapes(config)
    for slot in places:
        yield from taken(table, slot, read(slot.theirs))


def settings_that_differ(source: ModelConfig, stored: Stored) -> list[str]:
    """The settings that are not those of the stock model which computes the source, in words: ["rope_theta is 1e4, not 5e5"]."""
    try:
        if stored.arch:
            arch, _ = config_to_gguf(source)
            wanted, found = gguf_target(source, arch), stored.config
            kind = [f"the architecture is {stored.arch}, not {arch}"] if stored.arch != arch else []
        else:
            wanted, found, kind = config_from_hf(config_to_hf(source)), stored.config, []
    except InputError as error:
        return [str(error)]
    one, other = canonical(wanted), canonical(found)
    names = [name for name in differing(one, other) if name not in ALONG or not more(name, one, other)]
    return kind + [f"{name} is {getattr(other, name)!r}, not {getattr(one, name)!r}" for name in names]


def more(name: str, one: ModelConfig, other: ModelConfig) -> bool:
    """Whether the other has these weights and the one has them not; what is in them is held against what changes nothing."""
    return bool(getattr(other, name)) or (name == "qkv_bias" and other.bias)


def beginning_that_differs(source: Source, path: Path) -> list[str]:
    """What the files put before a text, where it is not what the model was trained with, in words."""
    bos = source.tokenizer.bos_id
    wanted, found = [] if bos is None else [bos], _beginning_in(path)
    return [] if found in (wanted, None) else [f"a text begins with {found}, not {wanted}"]


def _beginning_in(path: Path) -> list[int] | None:
    """The ids that the files put before a text; None where they leave it to the program."""
    if path.is_file():
        said = read_gguf(path).metadata
        adds = said.get("tokenizer.ggml.add_bos_token")
        return None if adds is None else [said.get("tokenizer.ggml.bos_token_id")] if adds else []
    from tokenizers import Tokenizer as Inner

    try:
        return Inner.from_file(str(inside(path, "tokenizer.json"))).encode("", add_special_tokens=True).ids
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}/tokenizer.json: {' '.join(str(error).split())}") from None


def wanted_weight(source: Source, name: str, like: Tensor) -> Tensor:
    """The source's weight for one of an artifact's, as many rows of it; what changes nothing where the source has none."""
    name = "embed.weight" if name == "lm_head.weight" and source.config.tied else name
    if name in source.shapes:
        return source.read(name)[: len(like)]
    is_gain = name.endswith("norm.weight")
    require(is_gain or name.endswith(".bias"), f"the artifact has {name}, which the model that was trained has not")
    return torch.full_like(like, float(is_gain and not source.config.norm_offset))

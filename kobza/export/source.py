"""What is exported: a model's settings, its tokenizer and template, and its weights one at a time.

`source_of` looks at a checkpoint's folder and maps its weights, so that an exporter holds one tensor and not the model;
`source_of_loaded` takes a model that is in memory already, as a tuning's is once its adapter has been merged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kobza.checkpoint import Loaded, model_tensors, read_config, verify
from kobza.config import InputError, ModelConfig, require
from kobza.formats.headers import read_header
from kobza.formats.layouts import shapes
from kobza.formats.load import DTYPES, read_tensor
from kobza.formats.template import ChatTemplate
from kobza.model import GPT
from kobza.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Source:
    """A model to export."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    shapes: dict[str, tuple[int, ...]]
    """of each weight by our name; a tied head has none"""
    dtypes: dict[str, torch.dtype]
    """as stored"""
    read: Callable[[str], Tensor]
    """a weight by our name, in its stored dtype; mapped from the disk where it lies there, so not to be written to"""
    sha256: str
    """of the weights"""
    template: ChatTemplate | None = None
    ends: tuple[int, ...] = ()
    """ids that end a text or an answer"""
    provenance: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    """the model's own defaults: temperature, top_k, ..."""

    def __post_init__(self) -> None:
        n_tokens, n_rows = self.tokenizer.vocab_size, self.config.vocab_size
        many = f"{self.name}: its tokenizer has {n_tokens:,} tokens and the model {n_rows:,} rows; take the tokenizer it was"
        require(n_tokens <= n_rows, f"{many} trained with")
        bad = [i for i in self.ends if type(i) is not int or not 0 <= i < n_tokens]
        require(not bad, f"{self.name}: its ends {bad} are no ids below {n_tokens:,}; pull or train the model again")

    def model(self) -> GPT:
        """The model in float32, ready to run; its weights are copies."""
        model = GPT(self.config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.read(name))
        return model


def source_of(
    folder: Path,
    template: ChatTemplate | None = None,
    ends: tuple[int, ...] | None = None,
    sampling: dict[str, Any] | None = None,
    name: str = "",
) -> Source:
    """A checkpoint's folder, whose checksums are verified; its weights are read when they are asked for. Where no `ends` are
    given they are those the model came with, else its tokenizer's."""
    verify(folder)
    run, provenance = read_config(folder / "config.json")
    path = folder / "model.safetensors"
    infos = read_header(path)
    wanted = shapes(run.model)
    odd = [
        key for key in wanted if key not in infos or infos[key].shape != wanted[key] or infos[key].dtype not in DTYPES
    ]
    odd += [key for key in infos if key not in wanted]
    require(not odd, f"{path}: {', '.join(odd[:3])} is not what its config makes; take another checkpoint")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(folder / "tokenizer.json", run.data.unknown)
    came_with = provenance.get("ends") or tokenizer.ends
    return Source(
        name=name or folder.name,
        config=run.model,
        tokenizer=tokenizer,
        shapes=wanted,
        dtypes={key: DTYPES[infos[key].dtype] for key in wanted},
        read=lambda key: read_tensor(path, infos[key]),
        sha256=manifest[path.name]["sha256"],  # verified above
        template=template,
        ends=tuple(came_with if ends is None else ends),
        provenance=provenance,
        sampling=sampling or {},
    )


def source_of_loaded(
    loaded: Loaded,
    template: ChatTemplate | None = None,
    ends: tuple[int, ...] = (),
    sampling: dict[str, Any] | None = None,
    name: str = "",
) -> Source:
    """A model in memory."""
    tensors = model_tensors(loaded.model)
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].reshape(-1).view(torch.uint8).numpy())

    def read(key: str) -> Tensor:
        try:
            return tensors[key]
        except KeyError:
            raise InputError(f"{loaded.folder}: its model has no {key}") from None

    return Source(
        name=name or loaded.folder.name,
        config=loaded.run.model,
        tokenizer=loaded.tokenizer,
        shapes={key: tuple(tensor.shape) for key, tensor in tensors.items()},
        dtypes={key: tensor.dtype for key, tensor in tensors.items()},
        read=read,
        sha256=digest.hexdigest(),
        template=template,
        ends=ends,
        provenance=loaded.provenance,
        sampling=sampling or {},
    )

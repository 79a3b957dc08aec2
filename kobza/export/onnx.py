"""A model as one ONNX graph, by torch's own exporter: ids (B, T) int64 -> logits (B, T, V) float32, for any B and T up to the
model's context. No family is needed, for the graph is the model itself; it keeps no keys and values between calls. `open_onnx` is
the engine that proves it: onnxruntime on the file, with the tokenizer, template and ends that lie beside.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from kobza import __version__
from kobza.config import require
from kobza.export.hf import generation, write_tokenizer
from kobza.export.proof.engine import EngineError, Reference, check_ids
from kobza.export.source import Source
from kobza.formats.headers import read_json
from kobza.formats.template import ChatTemplate, find_template
from kobza.model import GPT
from kobza.tokenizer import load_tokenizer

FILE, ENDS = "model.onnx", "generation_config.json"


def write_onnx(source: Source, folder: Path) -> None:
    """Fill an empty folder with the graph, and with the tokenizer, template and ends as a Hugging Face folder has them."""
    for package in ("onnx", "onnxscript"):
        _installed(package)
    ids = torch.zeros(2, min(7, source.config.max_seq_len), dtype=torch.long)
    sizes = ({0: "batch", 1: "length"},)  # by any name: both may be anything
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            Whole(source.model()), (ids,), input_names=["input_ids"], output_names=["logits"], dynamic_shapes=sizes,
            dynamo=True, optimize=False, verbose=False,  # onnxruntime optimises when it loads
        )  # fmt: skip
    about = {"max_seq_len": source.config.max_seq_len, "kobza": __version__, "source_sha256": source.sha256}
    program.model.metadata_props.update({name: str(value) for name, value in about.items()})
    program.save(folder / FILE)  # weights beyond 1.5 GB go beside it
    edges = write_tokenizer(source, folder)
    (folder / ENDS).write_text(json.dumps(generation(source, edges), indent=2), encoding="utf-8")


class Whole(nn.Module):
    """A model that sees a text from its first token on. Places and mask are given to it, so that no length is built in."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V)."""
        places = torch.arange(ids.shape[1])
        return self.model(ids, places, places[:, None] >= places)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that are not there and of its own inside."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _installed(package: str) -> None:
    require(find_spec(package) is not None, f'{package} is not installed; pip install "kobza[onnx]"')


# ---- the engine ------------------------------------------------------------------------------------------------------


class Graph(nn.Module):
    """A session of onnxruntime in the place of a model: what its `hidden` gives are the logits."""

    def __init__(self, path: Path):
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (logits,) = self.session.get_outputs()
        max_seq_len = int(self.session.get_modelmeta().custom_metadata_map["max_seq_len"])
        self.config = SimpleNamespace(vocab_size=int(logits.shape[-1]), max_seq_len=max_seq_len)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V)."""
        return torch.from_numpy(self.session.run(["logits"], {"input_ids": ids.numpy()})[0])

    def logits(self, x: Tensor) -> Tensor:
        """As they come."""
        return x


class OnnxRuntime(Reference):
    """The engine. It stops where who runs the file is told to: at the ends of generation_config.json."""

    def stops_at(self, id: int) -> bool:
        return id in self.ends

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        check_ids(ids, (), self.vocab_size, self.n_ctx - n)
        said: list[int] = []
        while len(said) < n and not (said and said[-1] in self.ends):
            said.append(int(self.logprobs([*ids, *said], [len(ids) + len(said) - 1]).argmax()))
        return said


def open_onnx(folder: Path) -> OnnxRuntime:
    """A folder of `write_onnx` as an engine; EngineError where onnxruntime will not open it."""
    _installed("onnxruntime")
    try:
        graph = Graph(folder / FILE)
    except Exception as error:  # onnxruntime's own have no common kind
        said = " ".join(str(error).split())[:300]
        raise EngineError(f"{folder / FILE}: onnxruntime does not open it: {said}") from None
    tokenizer, found = load_tokenizer(folder / "tokenizer.json", "skip"), find_template(folder)
    told = read_json(folder / ENDS).get("eos_token_id") if (folder / ENDS).exists() else None
    ends = [i for i in (told if isinstance(told, list) else [told]) if type(i) is int and 0 <= i < tokenizer.vocab_size]
    template = found if isinstance(found, ChatTemplate) else None
    return OnnxRuntime(graph, tokenizer, template, ends, f"onnxruntime {version('onnxruntime')}")

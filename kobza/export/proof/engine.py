"""What the certificate asks of whoever runs a model, and our own model as the one that answers first.

An `Engine` is a model with its tokenizer, its template and its notion of an end, in whatever program. Everything is asked by
behaviour: not "which id is eos" but "does it stop there". `Reference` answers with the model that was trained; own.py, hf.py and
llama_cpp.py answer for an artifact on disk. All are context managers, for one of them holds a process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Protocol, Self

import torch
from torch import Tensor

import kobza
from kobza.config import InputError, SampleConfig, require
from kobza.export.source import Source
from kobza.formats.chat import ChatEncoder
from kobza.formats.template import ChatTemplate
from kobza.generate import forbid, generate
from kobza.model import GPT
from kobza.tokenizer import Tokenizer

Message = Mapping[str, Any]


class EngineError(InputError):
    """The engine will not open an artifact, or fell over on the way."""


class Engine(Protocol):
    """A model that runs. ids are Python ints below `vocab_size`, sequences at most `n_ctx` long."""

    name: str
    """with the version"""
    vocab_size: int
    n_ctx: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text: nothing added, no special token read out of it."""

    def begin(self, text: str) -> list[int]:
        """Ids of a text as the engine itself begins one: with a beginning token or without."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids of a text; SentencePiece's space before it may stay, and what special tokens show differs."""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str | None:
        """The text of a chat as the model gets it, beginning token included; None: no template. Refused where it refuses."""

    def chat(self, messages: Sequence[Message]) -> list[int] | None:
        """Ids of a chat that waits for an answer, control tokens and beginning token included; None: no template."""

    def logprobs(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Log-probabilities of what follows ids[: p + 1] for each p (n, V) float64; NaN where the engine gives no number."""

    def stops_at(self, id: int) -> bool:
        """Whether a generation that says `id` ends there."""

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """Up to n ids that follow, the most likely each time; one that ends the text is the last."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def available(package: str) -> str | None:
    """The version of an installed package, None where it is absent; it is not imported."""
    try:
        return version(package) if find_spec(package) else None
    except (PackageNotFoundError, ValueError):
        return None


def installed(package: str) -> str:
    """The version of a package of the extra `parity`, or how to get it."""
    found = available(package)
    require(found is not None, f'{package} is not installed; pip install "kobza[parity]"')
    assert found is not None
    return found


def check_ids(ids: Sequence[int], positions: Sequence[int], vocab_size: int, n_ctx: int) -> None:
    """Refuse what no engine can answer, in the same words for all."""
    require(0 < len(ids) <= n_ctx, f"{len(ids):,} ids where 1 to {n_ctx:,} fit; give shorter texts")
    odd = next((i for i in ids if not 0 <= i < vocab_size), None)
    require(odd is None, f"id {odd} is none of {vocab_size:,}; its tokenizer is another one")
    out = next((p for p in positions if not 0 <= p < len(ids)), None)
    require(out is None, f"position {out} is not among the {len(ids):,} ids; give 0 to {len(ids) - 1:,}")


class Reference:
    """Our model in memory with our tokenizer and template; `ends` are the ids at which it stops."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        ends: Sequence[int] = (),
        name: str = "",
    ) -> None:
        self.model, self.tokenizer, self.template, self.ends = model.eval(), tokenizer, template, tuple(ends)
        self.name = name or f"kobza {kobza.__version__}"
        self.vocab_size, self.n_ctx = model.config.vocab_size, model.config.max_seq_len
        self._chat = None if template is None else ChatEncoder(template, tokenizer, self.ends)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()

    def begin(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str | None:
        return None if self.template is None else self.template.render(messages, add_generation_prompt)

    def chat(self, messages: Sequence[Message]) -> list[int] | None:
        return None if self._chat is None else self._chat.encode([dict(m) for m in messages], True)

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        check_ids(ids, positions, self.vocab_size, self.n_ctx)
        x = self.model.hidden(torch.tensor([list(ids)]))[0, list(positions)]  # (n, C)
        return self.model.logits(x).double().log_softmax(-1)

    def stops_at(self, id: int) -> bool:
        others = torch.arange(self.vocab_size) != id
        config = SampleConfig(tokens=2, temperature=0)
        said = list(generate(self.model, [[0]], config, self.ends, extra=[forbid(lambda row: others)]))
        return len(said) == 1

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        check_ids(ids, (), self.vocab_size, self.n_ctx - n)
        steps = generate(self.model, [list(ids)], SampleConfig(tokens=n, temperature=0), self.ends)
        return [i for step in steps for i in step.ids if i is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def reference_of(source: Source) -> Reference:
    """The model that is exported, as an engine."""
    return Reference(source.model(), source.tokenizer, source.template, source.ends)

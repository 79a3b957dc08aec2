"""What the explorer is given, since rooms do not know each other: models, tokenizers, and the functions that look into them.

A lesson never touches the model that others use at the same time: it asks `Eye` for a twin, whose modules are its own and whose
weights are the same tensors, so that what is hooked in sees no one else's forward. One lesson at a time looks (`Eye.look`).
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from kobza.checkpoint import Loaded
from kobza.config import ModelConfig, nearest, require
from kobza.model import GPT
from kobza.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

LOGITS = 32_000_000  # 128 MB while a prompt is looked at
MODELS, KEPT = 2, 6  # twins; what was seen of each, and tokenizers


class Name(Protocol):
    """A model to choose."""

    name: str
    kind: str
    note: str


class Playable(Protocol):
    """A model that is open."""

    loaded: Loaded


class Models(Protocol):
    """The models of this machine; `open` raises InputError in words."""

    def names(self) -> Sequence[Name]: ...

    def open(self, name: str) -> Playable: ...


class Traced(Protocol):
    """What kobza.trace saw of a prompt: see `Trace` there."""

    attention: dict[str, Tensor]
    lens: dict[str, Tensor]
    rms: dict[str, Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Sources:
    """By argument: kobza.trace.record.record, kobza.tokens.compare.Split, kobza.describe.parts.parts and .equations.equations.
    tokenizers: those on this machine besides the models' own, each opened when it is first chosen."""

    models: Models
    trace: Callable[[GPT, list[int]], Traced]
    split: Callable[[str, Tokenizer, str], Any]
    parts: Callable[[ModelConfig], Sequence[Any]]
    equations: Callable[[ModelConfig], Sequence[Any]]
    tokenizers: Mapping[str, Callable[[], Tokenizer]] = field(default_factory=dict)


class Kept:
    """The last few things made, by key; the oldest goes. One is made at a time."""

    def __init__(self, most: int):
        self.most, self.found, self.lock = most, OrderedDict[Any, Any](), threading.RLock()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made for the key, or make()."""
        with self.lock:
            if key not in self.found:
                self.found[key] = make()
                while len(self.found) > self.most:
                    self.found.popitem(last=False)
            self.found.move_to_end(key)
            return self.found[key]


class Look(NamedTuple):
    """A model, its twin, and what was seen of it lately. The model is kept, so that its id stays its own."""

    original: GPT
    model: GPT
    seen: Kept


class Eye:
    """Models and prompts as the lessons look at them."""

    def __init__(self, sources: Sources):
        self.sources = sources
        self.looks, self.tokenizers = Kept(MODELS), Kept(KEPT)

    def names(self) -> list[str]:
        """The models to choose from."""
        return [entry.name for entry in self.sources.models.names()]

    def find(self, name: str) -> tuple[Look, Tokenizer]:
        """A model as we look at it, and its tokenizer."""
        known = self.names()
        require(bool(known), "there is no model here yet; train one: kobza train --preset demo")
        require(name in known, f"no model {name[:80]!r}{nearest(name[:80], known)}")
        loaded = self.sources.models.open(name).loaded
        look = self.looks.get((name, id(loaded.model)), lambda: Look(loaded.model, twin(loaded.model), Kept(KEPT)))
        return look, loaded.tokenizer

    def open(self, name: str) -> tuple[GPT, Tokenizer]:
        """A twin of a model, in eval mode, and its tokenizer."""
        look, tokenizer = self.find(name)
        return look.model, tokenizer

    def ids(self, name: str, prompt: str, most: int) -> list[int]:
        """A prompt as the model reads it; too long a one is refused."""
        model, tokenizer = self.open(name)
        ids, most = tokenizer.encode_prompt(prompt), min(most, model.config.max_seq_len)
        require(
            len(ids) <= most, f"the prompt has {len(ids):,} tokens and this page shows at most {most:,}; shorten it"
        )
        return ids

    def look(self, what: str, name: str, ids: list[int], see: Callable[[GPT, list[int]], Any]) -> Any:
        """see(model, ids), once for each prompt; one at a time, for it hooks into the twin."""
        look, _ = self.find(name)
        return look.seen.get((what, *ids), lambda: see(look.model, ids))

    def tokenizer_names(self) -> list[str]:
        """The tokenizers to choose from: models' own, bytes, the text's own characters, and others of this machine."""
        return list(dict.fromkeys([*self.names(), "bytes", "characters", *self.sources.tokenizers]))

    def tokenizer(self, name: str, text: str) -> Tokenizer:
        """One of `tokenizer_names`."""
        known = self.tokenizer_names()
        require(name in known, f"no tokenizer {name[:80]!r}{nearest(name[:80], known)}")
        if name in self.names():
            return self.open(name)[1]
        if name in ("bytes", "characters"):
            return ByteTokenizer() if name == "bytes" else CharTokenizer.train([text])
        return self.tokenizers.get(name, self.sources.tokenizers[name])


def most_traced(model: GPT, most: int) -> int:
    """How many tokens of a prompt a trace takes: it holds the scores of every layer, place and token at once."""
    fit = LOGITS // (model.config.vocab_size * (model.config.n_layer + 1))
    require(fit > 0, f"{model.config.vocab_size:,} tokens in {model.config.n_layer} blocks are too much for this page")
    return min(most, fit)


def check_finite(name: str, *seen: Tensor) -> None:
    """Refuse to draw what is no number."""
    good = all(bool(x.isfinite().all()) for x in seen)
    require(good, f"{name} holds NaN or infinity: it diverged; the path shows where. Take an earlier checkpoint")


def twin(model: GPT) -> GPT:
    """The same model in modules of its own; the weights and buffers are shared."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared).eval()

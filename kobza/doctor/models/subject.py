"""What the battery and `parity` act on: any language model behind one set of calls.

`open_(spec)` takes a kobza run or checkpoint, a folder or file that kobza.formats reads, `transformers:DIR`, or the
user's own `package.module:callable`; `subject_of(thing)` takes what is in memory already. A Subject answers `logits`,
`hidden` (the stream after each block), `cache`, `loss` and so on; what it cannot do is missing from `capabilities`, and
`need` raises Skip with the reason, so that a check never guesses. Nothing here judges: battery.py does.

Three kinds, by how they are called: `Subject` itself is a plain callable(ids) -> logits; `ModuleSubject` any nn.Module,
called by the names its forward takes (input_ids, attention_mask, position_ids, labels: the field's convention; or nanoGPT's
targets); `KobzaSubject` our GPT. `TransformersSubject` adds to the second what only that library has: its cache, its kinds
of attention, its declared windows.

Shapes: B batch, T tokens, C width of the stream, V vocabulary.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kobza.config import ModelConfig, require
from kobza.doctor.finding import Skip
from kobza.generate import KVCache
from kobza.model import GPT
from kobza.surgery import watch
from kobza.train import IGNORE, next_token_loss

CONTEXT_NAMES = ("max_seq_len", "max_position_embeddings", "n_positions", "block_size", "n_ctx")
REASONS = {
    "hidden": "a plain callable shows no layers; give the nn.Module",
    "positions": "it takes no positions",
    "mask": "it takes no mask of padding",
    "packing": "it has no way to be told where a packed document ends",
    "cache": "it has no key/value cache that we know how to call",
    "loss": "it computes no loss of its own",
    "accumulate": "its loss cannot be told the targets of a whole window: the training step divides, see doctor train",
    "train": "it is no nn.Module, so it has no train() and eval()",
    "cast": "it is no nn.Module, so its number format cannot be changed",
    "rotary": "its positions are not rotary as far as we can see",
}


class Loss(NamedTuple):
    """A mean loss, and the logits (B, T or T-1, V) that it came from."""

    value: Tensor
    logits: Tensor


class Stop(Exception):
    """Raised by our own hook behind the last block: nobody asked for the head's logits."""


class Subject:
    """A plain callable: ids (B, T) -> logits (B, T, V). The base of the others."""

    kind = "callable"

    def __init__(self, call: Callable[..., Any], name: str = ""):
        self.call, self.name = call, name or getattr(call, "__name__", type(call).__name__)
        self.module: nn.Module | None = None
        self.capabilities: frozenset[str] = frozenset()
        self.windows: tuple[int | None, ...] | None = None  # tokens each block declares to see; None: says nothing
        self.dropout: float | None = None  # as declared; None: says nothing
        self.dtype = torch.float32
        self.autocast: torch.dtype | None = None
        self.notes: dict[str, Any] = {}  # what a check measured and another, or facts, wants
        self.max_seq_len = int(getattr(call, "max_seq_len", 0)) or self._probe_length()
        self.vocab_size = int(getattr(call, "vocab_size", 0)) or self._probe_vocab()

    # ---- what it can do ----

    def need(self, *capabilities: str) -> None:
        """Raise Skip with the reason unless it can do all of these."""
        for capability in capabilities:
            if capability not in self.capabilities:
                raise Skip(REASONS[capability])

    def logits(self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """ids (B, T) -> (B, T, V). positions (B, T) or (T,); mask (B, T), True at the real tokens."""
        require(positions is None and mask is None, f"{self.name} takes token ids alone")
        return self._logits(self.call(ids), ids)

    def _logits(self, answer: Any, ids: Tensor) -> Tensor:
        """The logits in what a model answered: a tensor, the first of a tuple, or `.logits`; the shape is checked."""
        answer = getattr(answer, "logits", answer)
        answer = answer.get("logits") if isinstance(answer, dict) else answer
        answer = answer[0] if isinstance(answer, tuple | list) else answer
        fine = isinstance(answer, Tensor) and answer.ndim == 3 and answer.shape[:2] == ids.shape
        what = f"a tensor of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        require(
            fine,
            f"{self.name}: ids of shape {tuple(ids.shape)} gave {what}; it must give logits of shape "
            f"({ids.shape[0]}, {ids.shape[1]}, vocab_size), one row a position",
        )
        return answer

    def _probe_vocab(self) -> int:
        with torch.no_grad():
            return self.logits(torch.zeros(1, 4, dtype=torch.long)).shape[-1]

    def _probe_length(self) -> int:
        """The longest of a few lengths that it takes: nothing declares one."""
        error: Exception | None = None
        for length in (128, 64, 32, 16, 8):
            try:
                with torch.no_grad():
                    self.call(torch.zeros(1, length, dtype=torch.long))
                return length
            except Exception as mistake:  # foreign code: any error means "not this length"
                error = mistake
        require(False, f"{self.name}: fails on 8 tokens already: {one_line(error)}")
        return 0

    def layers(self) -> list[tuple[str, nn.Module]]:
        """The blocks, in order of execution."""
        raise Skip(REASONS["hidden"])

    def at(self, mode: str) -> Subject:
        """The subject in "fp32", "autocast" (bf16 activations where torch or kobza choose so) or "bf16" (weights cast)."""
        raise Skip(REASONS["cast"])

    def backends(self) -> list[str]:
        """Names for `backend`; one nameless where there is nothing to choose."""
        return [""]

    @contextmanager
    def backend(self, name: str) -> Iterator[None]:
        """Within the context attention is computed by this backend."""
        yield


class ModuleSubject(Subject):
    """An nn.Module, called by the names that its forward takes."""

    kind = "module"

    def __init__(self, module: nn.Module, name: str = "", autocast: torch.dtype | None = None):
        self.module, self.autocast, self.notes = module.eval(), autocast, {}
        self.call, self.name = module, name or type(module).__name__
        parameters = inspect.signature(module.forward).parameters
        self.takes = set(parameters)
        self.takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.blocks = find_blocks(module)
        weight = next(module.parameters(), None)
        self.dtype = torch.float32 if weight is None else weight.dtype
        self.config = getattr(module, "config", None)
        self.dropout, self.windows, self.capabilities = self._dropout(), self._windows(), self._capabilities()
        self.max_seq_len = self._declared(*CONTEXT_NAMES) or self._probe_length()
        self.vocab_size = self._declared("vocab_size") or self._probe_vocab()

    def _declared(self, *names: str) -> int:
        """The first of these names that the config (an object or a dict) or the module has; 0: none."""
        for owner in (self.config, self.module):
            for name in names:
                value = owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)
                if isinstance(value, int) and value > 0:
                    return value
        return 0

    def _dropout(self) -> float | None:
        """The largest share of a Dropout in the module: there may be others, in a functional call."""
        shares = [part.p for part in self.module.modules() if isinstance(part, nn.Dropout)]
        return max(shares, default=None)

    def _windows(self) -> tuple[int | None, ...] | None:
        return None

    def _capabilities(self) -> frozenset[str]:
        able = {"train", "cast"}
        able |= {"hidden"} if self.blocks else set()
        able |= {"positions"} if "position_ids" in self.takes else set()
        able |= {"mask"} if "attention_mask" in self.takes else set()
        able |= {"loss"} if self.takes & {"labels", "targets"} else set()
        able |= {"accumulate"} if {"labels", "num_items_in_batch"} <= self.takes else set()
        able |= {"rotary"} if "positions" in able and self._is_rotary() else set()
        return frozenset(able)

    def _is_rotary(self) -> bool:
        return any(name.endswith("inv_freq") for name, _ in self.module.named_buffers())

    # ---- calls ----

    def _run(self, ids: Tensor, **more: Any) -> Any:
        """Call the module under its autocast."""
        automatic = torch.autocast(ids.device.type, self.autocast) if self.autocast else nullcontext()
        with automatic:
            return self.module(ids, **more)

    def _arguments(self, positions: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if positions is not None:
            self.need("positions")
            more["position_ids"] = positions if positions.ndim == 2 else positions[None]
        if mask is not None:
            self.need("mask")
            more["attention_mask"] = mask.long()
        return more

    def logits(self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        more = self._arguments(positions, mask)
        if "targets" in self.takes and "labels" not in self.takes:
            more["targets"] = ids  # nanoGPT: without targets it gives the last position's logits alone
        return self._logits(self._run(ids, **more), ids)

    def loss(self, ids: Tensor, labels: Tensor) -> Loss:
        """The model's own mean loss of labels (B, T) that stand under their own ids (not shifted; IGNORE: no target)."""
        self.need("loss")
        if "labels" in self.takes:
            answer = self._run(ids, labels=labels)
            return Loss(self._value(answer), self._logits(answer, ids))
        inputs, targets = ids[:, :-1], labels[:, 1:].contiguous()  # nanoGPT's convention: its caller has shifted
        try:
            answer = self._run(inputs, targets=targets)
        except (IndexError, RuntimeError):  # its mark of no target is -1, and torch's check names ours out of bounds
            answer = self._run(inputs, targets=targets.masked_fill(targets == IGNORE, -1))
        return Loss(self._value(answer), self._logits(answer, inputs))

    def _value(self, answer: Any) -> Tensor:
        value = answer[1] if isinstance(answer, tuple) else getattr(answer, "loss", None)
        require(
            isinstance(value, Tensor) and value.numel() == 1, f"{self.name}: its forward gave no loss, a single number"
        )
        return value

    def share(self, ids: Tensor, labels: Tensor, n_targets: int) -> Tensor:
        """The loss of a micro-batch in a window of n_targets targets: the sum of all shares is the window's mean loss."""
        self.need("accumulate")
        return self._value(self._run(ids, labels=labels, num_items_in_batch=torch.tensor(n_targets)))

    # ---- what happens inside ----

    def layers(self) -> list[tuple[str, nn.Module]]:
        self.need("hidden")
        return self.blocks

    def watch(self, see: Callable[[str, Any], None]) -> Any:
        """A context in which see(name, output) is called after every module's forward, in order of execution."""
        return watch(self.module, lambda *_: True, see)

    @contextmanager
    def streams(self, stop: bool = False) -> Iterator[list[Tensor]]:
        """Within the context a list fills with the stream (B, T, C) after each block. stop: leave out what follows the last."""
        names = [name for name, _ in self.layers()]
        found: list[Tensor] = []

        def see(name: str, output: Any) -> None:
            found.append(first_tensor(output))
            if stop and name == names[-1]:
                raise Stop

        with watch(self.module, lambda name, _: name in names, see):
            try:
                yield found
            except Stop:
                pass

    @torch.no_grad()
    def hidden(self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> list[Tensor]:
        """The stream (B, T, C) after each block; the head is not computed."""
        with self.streams(stop=True) as found:
            self.logits(ids, positions, mask)
        return found

    def outputs(self, ids: Tensor, gradients: bool = False, **more: Any) -> dict[str, Tensor]:
        """First output of every module by name in order of execution; with gradients each has .grad of a fixed sum of logits."""
        found: dict[str, Tensor] = {}

        def see(name: str, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is None or not tensor.is_floating_point() or name in found:
                return
            if gradients and tensor.requires_grad:
                tensor.retain_grad()
            found[name] = tensor

        with self.watch(see), torch.set_grad_enabled(gradients):
            logits = self.logits(ids, **more)
            if gradients:
                logits.float().log_softmax(-1)[..., 0].mean().backward()
        self.module.zero_grad(set_to_none=True)
        return found

    @contextmanager
    def narrowed(self, width: int) -> Iterator[None]:
        """Within the context windows wider than `width` are that wide: what a mask or a cache does at a window's edge is then
        asked of a short text. The declared width itself is measured without."""
        yield

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Within the context every weight takes a gradient, frozen ones too."""
        frozen = [
            weight for weight in self.module.parameters() if not weight.requires_grad and weight.is_floating_point()
        ]
        for weight in frozen:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in frozen:
                weight.requires_grad_(False)

    def make(self, module: nn.Module, autocast: torch.dtype | None = None) -> ModuleSubject:
        """A subject of the same kind around another module."""
        return type(self)(module, self.name, autocast)

    def copy(self, dtype: torch.dtype) -> ModuleSubject:
        """A copy whose weights are of this dtype. Buffers that no file holds (rotary tables) stay as they were computed: so do
        loaders that are asked for a dtype."""
        module = copy.deepcopy(self.module)
        for part in module.modules():
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype) if parameter.is_floating_point() else parameter.data
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_floating_point() and name not in part._non_persistent_buffers_set:
                    setattr(part, name, buffer.to(dtype))
        return self.make(module)

    def at(self, mode: str) -> ModuleSubject:
        if mode not in self.notes:
            wide = self if self.dtype == torch.float32 else self.copy(torch.float32)
            self.notes[mode] = {
                "fp32": lambda: wide if wide.autocast is None else wide.make(wide.module),
                "autocast": lambda: wide.make(wide.module, torch.bfloat16),
                "bf16": lambda: self if self.dtype == torch.bfloat16 else self.copy(torch.bfloat16),
            }[mode]()
        return self.notes[mode]

    def slice(self, n_layers: int = 2) -> ModuleSubject:
        """A copy with n blocks: the first of each kind of attention (each declared window), then the first ones."""
        if len(self.layers()) <= n_layers:
            return self
        kinds = self.windows or (None,) * len(self.blocks)
        picked = sorted({kinds.index(kind) for kind in kinds})[:n_layers]
        picked = sorted([*picked, *(i for i in range(len(kinds)) if i not in picked)][:n_layers])
        holder = self.module.get_submodule(self.blocks[0][0].rpartition(".")[0])
        whole = dict(holder._modules)
        try:  # a deep copy of the whole of a large model would not fit
            for name in whole:
                del holder._modules[name]
            for i, old in enumerate(picked):
                holder._modules[str(i)] = whole[str(old)]
            module = copy.deepcopy(self.module)
        finally:
            holder._modules.clear()
            holder._modules.update(whole)
        self._renumber(module, picked)
        return self.make(module, self.autocast)

    def _renumber(self, module: nn.Module, picked: list[int]) -> None:
        """Tell the blocks of a slice, and its config, which they are now."""
        blocks = [block for _, block in find_blocks(module)]
        for i, block in enumerate(blocks):
            for part in block.modules():
                if isinstance(getattr(part, "layer_idx", None), int):
                    part.layer_idx = i


class TransformersSubject(ModuleSubject):
    """A causal language model of the transformers library."""

    kind = "transformers"

    def _declared(self, *names: str) -> int:
        text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        return next((v for name in names if isinstance(v := getattr(text, name, None), int) and v > 0), 0)

    def _dropout(self) -> float | None:
        names = [name for name in self.config.to_dict() if "dropout" in name or name.endswith("pdrop")]
        names = [name for name in names if name not in ("classifier_dropout", "summary_first_dropout")]
        shares = [value for name in names if isinstance(value := getattr(self.config, name), float | int)]
        return float(max(shares, default=0.0))

    def _windows(self) -> tuple[int | None, ...] | None:
        window, n = getattr(self.config, "sliding_window", None), len(self.blocks)
        kinds, local = getattr(self.config, "layer_types", None), getattr(self.config, "attention_layers", None)
        if local and set(local) <= {"global", "local"}:  # GPT-Neo's names
            return tuple(self.config.window_size if kind == "local" else None for kind in local[:n])
        if kinds and set(kinds) <= {"sliding_attention", "full_attention"}:
            return tuple(window if kind == "sliding_attention" else None for kind in kinds[:n])
        if not kinds and getattr(self.config, "use_sliding_window", True) is False:
            return (None,) * n
        told = [name for name, value in self.config.to_dict().items() if value and "window" in name]
        if kinds or set(told) - {"sliding_window", "use_sliding_window"}:
            return None  # it declares something, by names that we do not know
        return (window or None,) * n

    def _capabilities(self) -> frozenset[str]:
        able = set(super()._capabilities())
        able |= {"packing"} if "positions" in able else set()
        able |= {"cache"} if "past_key_values" in self.takes else set()
        told = getattr(self.module, "accepts_loss_kwargs", True)  # its Trainer goes by this, and by **kwargs
        able |= {"accumulate"} if "loss" in able and self.takes_more and told is not False else set()
        return frozenset(able)

    @torch.no_grad()
    def packed(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """Logits of documents of these lengths in one row, told apart by positions that start again, as the library does."""
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        return self._logits(self._run(ids, position_ids=positions.to(ids.device), use_cache=False), ids)

    def cache(self, real: Tensor | None = None) -> Callable[[Tensor], list[Tensor]]:
        """feed(ids (B, T)) -> the stream after each block of these tokens, after all that was fed before. real (B, T): the
        mask of the first call, False at the padding to its left."""
        from transformers import DynamicCache

        store, known = DynamicCache(config=self.config), real

        @torch.no_grad()
        def feed(ids: Tensor) -> list[Tensor]:
            nonlocal known
            more: dict[str, Any] = {"past_key_values": store, "use_cache": True}
            if known is not None:
                past = store.get_seq_length()
                new = known.new_ones(ids.shape)
                known = known if past == 0 else torch.cat((known, new), dim=1)
                positions = (known.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                more |= {"attention_mask": known.long(), "position_ids": positions}
            more |= {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}
            with self.streams() as found:
                self._run(ids, **more)
            return found

        return feed

    def backends(self) -> list[str]:
        current = getattr(self.config, "_attn_implementation", "") or ""
        able = bool(getattr(self.module, "_supports_sdpa", False))
        return [current] + [name for name in ("sdpa", "eager") if name != current and (able or name == "eager")]

    @contextmanager
    def backend(self, name: str) -> Iterator[None]:
        old = self.config._attn_implementation
        if name != old:
            self.module.set_attn_implementation(name)
        try:
            yield
        finally:
            if name != old:
                self.module.set_attn_implementation(old)

    @contextmanager
    def narrowed(self, width: int) -> Iterator[None]:
        old = getattr(self.config, "sliding_window", None)
        if not old or old <= width or not any(self.windows or ()):
            yield
            return
        parts = [part for part in self.module.modules() if getattr(part, "sliding_window", None) == old]
        before, self.config.sliding_window = self.windows, width
        self.windows = self._windows()
        for part in parts:
            part.sliding_window = width
        try:
            yield
        finally:
            self.config.sliding_window, self.windows = old, before
            for part in parts:
                part.sliding_window = old

    def _renumber(self, module: nn.Module, picked: list[int]) -> None:
        super()._renumber(module, picked)
        module.config.num_hidden_layers = len(picked)
        if getattr(module.config, "layer_types", None):
            module.config.layer_types = [self.config.layer_types[i] for i in picked]


class KobzaSubject(ModuleSubject):
    """Our GPT."""

    kind = "kobza"

    def _dropout(self) -> float | None:
        return self.config.dropout

    def _windows(self) -> tuple[int | None, ...] | None:
        n, windows = self.config.pattern.count("A"), []
        for i in range(self.config.n_layer):
            places = range(i * n, (i + 1) * n)
            local = n > 0 and all(self.config.is_windowed(place) for place in places)
            windows.append(n * (self.config.window - 1) + 1 if local else None)
        return tuple(windows)

    def _capabilities(self) -> frozenset[str]:
        able = {"train", "cast", "hidden", "positions", "mask", "packing", "cache", "loss", "accumulate"}
        rotary = self.config.position == "rope" and self.config.n_attention > 0
        return frozenset(able | ({"rotary"} if rotary else set()))

    def _run(self, ids: Tensor, **more: Any) -> Any:
        return self.module(ids, dtype=self.autocast, **more)

    def _arguments(self, positions: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
        more: dict[str, Any] = {"positions": positions}
        if mask is not None:
            T = mask.shape[1]
            causal, alone = torch.ones(T, T, dtype=torch.bool).tril(), torch.eye(T, dtype=torch.bool)
            more["mask"] = (causal & mask[:, None] | alone)[
                :, None
            ]  # (B, 1, T, T); padding sees itself, or it were nan
        return more

    def loss(self, ids: Tensor, labels: Tensor) -> Loss:
        seen: list[Tensor] = []
        with watch(self.module, lambda name, _: name == "", lambda _, output: seen.append(output)):
            total, n = next_token_loss(self.autocast)(self.module, (ids[:, :-1], self._targets(labels)))
        return Loss(total / n, seen[0])

    def _targets(self, labels: Tensor) -> Tensor:
        return labels[:, 1:].contiguous()

    def share(self, ids: Tensor, labels: Tensor, n_targets: int) -> Tensor:
        total, _ = next_token_loss(self.autocast)(self.module, (ids[:, :-1], self._targets(labels)))
        return total / n_targets

    @torch.no_grad()
    def packed(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """Logits of documents of these lengths in one row, told apart by mask and positions."""
        segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
        mask = (segments[:, None] == segments).tril()[None, None]
        positions = torch.cat([torch.arange(n) for n in lengths])
        return self._run(ids, positions=positions, mask=mask)

    def cache(self, real: Tensor | None = None) -> Callable[[Tensor], list[Tensor]]:
        """As TransformersSubject.cache."""
        store: list[KVCache] = []

        @torch.no_grad()
        def feed(ids: Tensor) -> list[Tensor]:
            pad = None if real is None else (~real).sum(1)
            if not store:
                store.append(KVCache(self.config, ids.shape[0], ids.device, torch.float32, pad))
            length = store[0].length
            positions = None  # as generate.prefill and decode have it
            if pad is not None:
                positions = (torch.arange(length, length + ids.shape[1]) - pad[:, None]).clamp(min=0)
            with self.streams() as found:
                self.module.hidden(ids, positions, cache=store[0], dtype=self.autocast)
            return found

        return feed

    @contextmanager
    def narrowed(self, width: int) -> Iterator[None]:
        config, windows = self.config, self.windows
        if config.window > width:
            self.module.config = self.config = replace(config, window=width)
            self.windows = self._windows()
        try:
            yield
        finally:
            self.module.config = self.config = config
            self.windows = windows

    def _renumber(self, module: nn.Module, picked: list[int]) -> None:
        config, n = self.config, self.config.pattern.count("A")
        places = [i * n + j for i in picked for j in range(n)]
        attentions = [part for block in module.blocks for part in block.modules() if hasattr(part, "o_proj")]
        for i, attention in enumerate(attentions):
            attention.layer = i
        pattern = "".join("L" if config.is_windowed(place) else "G" for place in places)
        omitted = config.omitted()
        module.config = replace(
            config,
            n_layer=len(picked),
            ff_widths=",".join(
                str(config.ff_width(i * config.pattern.count("F") + j))
                for i in picked
                for j in range(config.pattern.count("F"))
            )
            if config.ff_widths
            else "",
            omit_heads=" ".join(f"{i}:{','.join(map(str, omitted[p]))}" for i, p in enumerate(places) if p in omitted),
            window=config.window if "L" in pattern else 0,
            window_pattern=pattern if "L" in pattern else "L",
            rope_local_theta=config.rope_local_theta if "L" in pattern else 0.0,
        )


# ---- finding one's way about a foreign module ----------------------------------------------------------------------


def find_blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The list of blocks: of all ModuleLists and Sequentials, the one with the most weights (the outermost of equals)."""
    best, most = [], 0
    for name, part in module.named_modules():
        if not isinstance(part, nn.ModuleList | nn.Sequential) or not name:
            continue
        size = sum(weight.numel() for weight in part.parameters())
        if size > most:
            best, most = [(f"{name}.{i}", child) for i, child in part.named_children()], size
    return best


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor in what a module returned: itself, of a tuple or list, of an object's logits or last_hidden_state."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return next((item for item in output if isinstance(item, Tensor)), None)
    found = (getattr(output, name, None) for name in ("logits", "last_hidden_state"))
    return next((item for item in found if isinstance(item, Tensor)), None)


def one_line(error: BaseException | None) -> str:
    """An error of foreign code on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# ---- opening ---------------------------------------------------------------------------------------------------------


def subject_of(thing: Any, name: str = "") -> Subject:
    """A Subject around a GPT, a transformers model, another nn.Module, or a callable(ids) -> logits."""
    if isinstance(thing, GPT):
        return KobzaSubject(thing, name)
    if isinstance(thing, nn.Module):
        foreign = any(base.__name__ == "PreTrainedModel" for base in type(thing).__mro__)
        return (TransformersSubject if foreign else ModuleSubject)(thing, name)
    require(
        callable(thing),
        f"{name or thing!r} is a {type(thing).__name__}; give an nn.Module or a callable(ids) -> logits",
    )
    return Subject(thing, name)


def open_(spec: str) -> Subject:
    """What a user names -> Subject: a run or checkpoint of kobza, a folder or file that kobza.formats reads,
    `transformers:DIR`, or `package.module:callable`."""
    if spec.startswith("transformers:"):
        return _open_transformers(Path(spec.removeprefix("transformers:")))
    path = Path(spec)
    if not path.exists() and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", spec):
        return _open_callable(spec)
    require(
        path.exists(),
        f"{spec}: no such file or folder; give a run, a model folder, a .gguf, transformers:DIR or package.module:callable",
    )
    if (path / "manifest.json").exists() or (path / "checkpoints").is_dir():
        from kobza.checkpoint import load_checkpoint

        return KobzaSubject(load_checkpoint(path).model, path.name)
    from kobza.formats.load import load_model

    return KobzaSubject(load_model(path).model, path.name)


def _open_transformers(folder: Path) -> Subject:
    """The library's own model of a local folder; code that lies beside the weights is not run."""
    require(folder.is_dir(), f"transformers:{folder}: no such folder; pull the model first, or give another")
    try:
        import transformers
    except ImportError:
        require(False, 'transformers: needs the transformers library; pip install "kobza[parity]"')
    with ExitStack() as stack:
        stack.callback(transformers.logging.set_verbosity, transformers.logging.get_verbosity())
        transformers.logging.set_verbosity_error()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True, dtype="auto", use_safetensors=True
            )
        except Exception as error:  # foreign files, foreign code: any error means "it does not load"
            require(False, f"transformers:{folder}: transformers cannot load it: {one_line(error)}")
    return TransformersSubject(model, folder.name)


def _open_callable(spec: str) -> Subject:
    """The user's own model: importing the module runs the user's code, which is what was asked for."""
    module_name, _, path = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m has it
    try:
        thing: Any = importlib.import_module(module_name)
        for part in path.split("."):
            thing = getattr(thing, part)
    except ImportError as error:
        require(False, f"{spec}: cannot import {module_name}: {one_line(error)}; run from the folder that holds it")
    except AttributeError:
        require(False, f"{spec}: {module_name} has no {path}")
    except Exception as error:
        require(False, f"{spec}: importing {module_name} failed: {one_line(error)}")
    if isinstance(thing, nn.Module):
        return subject_of(thing, spec)
    require(
        callable(thing), f"{spec} is a {type(thing).__name__}; name a function: () -> nn.Module, or (ids) -> logits"
    )
    wanted = [
        p
        for p in inspect.signature(thing).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if wanted:
        return subject_of(thing, spec)
    try:
        made = thing()
    except Exception as error:
        require(False, f"{spec}: calling it failed: {one_line(error)}")
    return subject_of(made, spec)


__all__ = ["IGNORE", "Loss", "ModelConfig", "Subject", "first_tensor", "open_", "subject_of"]

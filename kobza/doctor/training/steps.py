"""A user's own training step as the doctor sees it: the contract, its opening, and a record of what one update did.

`kobza doctor train module:make_step` (or file.py:make_step) imports that module, which runs its code: the user asks for it.
The checks themselves are train.py's; the two-process part is world.py's. Nothing here judges.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kobza.config import InputError, nearest, require
from kobza.doctor.finding import Skip

CONTRACT = """\
make_step(seed) returns an object (or a dict) with

  model            the nn.Module
  optimizer        a torch optimizer; or optimizers, a list of them
  batch(rows)      your collator: a list of lists of token ids -> one micro-batch, as your loop has it
  step(window)     one whole update from a list of micro-batches: forward, backward, clip, optimizer, zero_grad;
                   returns the loss you log, or {"loss": ..., "grad_norm": ..., "lr": ...}

and what else it has of these; a check whose part is missing is skipped and says so:

  evaluate(batches)                 the mean validation loss of a list of micro-batches
  state_dict(), load_state_dict(s)  all that a checkpoint keeps; or save(folder), load(folder)
  next_window()                     the next micro-batches of your own data, so that its place is checked on resume
  lr(i)                             the learning rate that update i (0, 1, ...) should have
  ema, ema_decay                    averaged weights: a module or {name: tensor}, and the decay of an update
  examples                          a few real micro-batches (fine-tuning: their supervised tokens are counted)
  eos_id, pad_id, vocab_size, max_len   where they cannot be read off the model
  pretrained = True                 the weights are not fresh: the first loss is not judged
  make_step(seed, rank, world)      with torch.distributed ready (gloo): two processes are compared with one
"""
NEEDED = ("model", "batch", "step")
OPTIONAL = (
    "optimizer optimizers evaluate state_dict load_state_dict save load next_window lr ema ema_decay "
    "examples eos_id pad_id "
    "vocab_size max_len pretrained scaler"
).split()
LOW = (torch.bfloat16, torch.float16)
FEWEST_TOKENS = 8  # below it the rows of uneven lengths are too short to tell targets apart
ROW_TOKENS = 12  # long enough that a shift by two is not an edge effect, short enough for any context


@dataclass(frozen=True)
class Subject:
    """What the checks of `train` take: a function that makes a fresh step, and the spec that names it (for other processes)."""

    make: Callable[..., Any]
    spec: str = ""

    def fresh(self, seed: int = 0, noise: int = 1, **ranks: int) -> Step:
        """A new step. `noise` sets torch's own generator before, as another process would have it: who seeds, is not moved."""
        torch.manual_seed(1_000 + noise)
        wants = inspect.signature(self.make).parameters
        given = {"seed": seed, **ranks} if "seed" in wants or "kwargs" in wants else dict(ranks)
        return Step(self.make(**given), self.spec or getattr(self.make, "__name__", "make_step"))

    @property
    def takes_world(self) -> bool:
        """Whether make_step(seed, rank, world) is what it is."""
        return {"rank", "world"} <= set(inspect.signature(self.make).parameters)


def open_(spec: str) -> Subject:
    """module:function or file.py:function -> a Subject whose first step was made and fits the contract."""
    place, colon, name = spec.rpartition(":")
    require(
        bool(colon and place and name), f"{spec!r} is no step function; write module:make_step or file.py:make_step"
    )
    try:
        module = load_module(place)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{place} cannot be imported: {where_from(error)}") from None
    names = [key for key, value in vars(module).items() if callable(value)]
    make = getattr(module, name, None)
    require(callable(make), f"{place} has no function {name!r}{nearest(name, names)}")
    subject = Subject(make, spec)
    try:
        step = subject.fresh()
    except Exception as error:
        raise InputError(f"{spec} failed: {where_from(error)}; it is called as make_step(seed=0)") from None
    step.check()
    return subject


def where_from(error: Exception) -> str:
    """An exception of the user's code in a line, with the last place in it."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    place = f" (line {last.lineno} of {Path(last.filename).name})" if last else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"


def load_module(place: str) -> Any:
    """The module of that name, or of that file. Its code runs."""
    path = Path(place)
    if path.suffix != ".py":
        sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise InputError(f"{place}: no such module ({error}); name a .py file, or start in its folder") from None
        finally:
            sys.path.pop(0)
    require(path.is_file(), f"{place}: no such file; give file.py:make_step")
    made = importlib.util.spec_from_file_location(path.stem, path)
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    sys.path.insert(0, str(path.resolve().parent))  # as `python file.py` does, for what stands beside it
    try:
        made.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


class Step:
    """A user's step: its parts by name, and what one update of it did."""

    def __init__(self, raw: Any, name: str):
        self.raw, self.name = raw, name

    def get(self, part: str) -> Any:
        """The part of that name, None where it is missing."""
        return self.raw.get(part) if isinstance(self.raw, Mapping) else getattr(self.raw, part, None)

    def need(self, *parts: str) -> list[Any]:
        """The parts; Skip where one is missing."""
        found = [self.get(part) for part in parts]
        lacking = [part for part, value in zip(parts, found, strict=True) if value is None]
        if lacking:
            raise Skip(f"make_step gives no {' and no '.join(lacking)}")
        return found

    def check(self) -> None:
        """Refuse what does not fit the contract, naming the first part that is missing."""
        has = list(self.raw) if isinstance(self.raw, Mapping) else [n for n in dir(self.raw) if not n.startswith("_")]
        told = "needed are model, optimizer, batch(rows), step(window)"
        for part in NEEDED:
            require(self.get(part) is not None, f"{self.name}: the step has no {part!r}{nearest(part, has)}; {told}")
        model = self.get("model")
        require(isinstance(model, nn.Module), f"{self.name}: model is a {type(model).__name__}, not an nn.Module")
        require(bool(self.optimizers), f"{self.name}: the step has no 'optimizer'{nearest('optimizer', has)}; {told}")
        for part in ("batch", "step"):
            require(
                callable(self.get(part)), f"{self.name}: {part} is a {type(self.get(part)).__name__}, not a function"
            )

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.get("model")

    @property
    def optimizers(self) -> list[Any]:
        """All optimizers."""
        one, several = self.get("optimizer"), self.get("optimizers")
        return list(several) if several is not None else [one] if one is not None else []

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """Weights by name, without what wrappers put before it."""
        plain = ("_orig_mod.", "module.")
        return {strip(name, plain): p for name, p in self.model.named_parameters()}

    @property
    def vocab_size(self) -> int:
        """Told, or read off the model's config."""
        told = self.get("vocab_size") or self.from_config("vocab_size")
        if not told:
            raise Skip("the vocabulary's size is not known: give vocab_size")
        return int(told)

    @property
    def row_tokens(self) -> int:
        """Length of the doctor's rows: 12, or what fits."""
        most = self.get("max_len") or self.from_config(
            "max_seq_len", "block_size", "max_position_embeddings", "n_positions"
        )
        if most and int(most) < FEWEST_TOKENS:
            raise Skip(f"the context is {most} tokens, and {FEWEST_TOKENS} are needed")
        return min(ROW_TOKENS, int(most)) if most else ROW_TOKENS

    def from_config(self, *names: str) -> Any:
        """The first of the names that model.config has."""
        config = getattr(getattr(self.model, "module", self.model), "config", None)
        values = (config.get(n) if isinstance(config, Mapping) else getattr(config, n, None) for n in names)
        return next((value for value in values if value), None)

    def rows(self, lengths: list[int], seed: int = 0) -> list[list[int]]:
        """Token rows, each of an alphabet of its own where the vocabulary has room, no token within three of its like. With an
        eos_id each row ends in it, as a document does."""
        eos, special = self.get("eos_id"), {self.get("eos_id"), self.get("pad_id")}
        first = 4 if self.vocab_size > 24 else 0  # specials stand first as a rule
        usable = [i for i in range(first, self.vocab_size) if i not in special]
        generator = torch.Generator().manual_seed(seed)
        usable = [usable[i] for i in torch.randperm(len(usable), generator=generator).tolist()]
        share = max(4, len(usable) // len(lengths))
        made = []
        for i, length in enumerate(lengths):
            own = [usable[(i * share + j) % len(usable)] for j in range(min(share, max(lengths)))]
            row = [own[j % len(own)] for j in range(length)]
            made.append(row[:-1] + [eos] if eos is not None else row)
        return made

    def window(self, groups: list[list[int]], seed: int = 0) -> list[Any]:
        """Micro-batches of rows of these lengths; Skip where the collator takes rows of one length only.
        window([[12, 12], [5]]) -> two micro-batches of two rows and one"""
        rows, made, at = self.rows([n for group in groups for n in group], seed), [], 0
        uneven = len({n for group in groups for n in group}) > 1
        for group in groups:
            made.append(self.collate(rows[at : at + len(group)], uneven))
            at += len(group)
        return made

    def collate(self, rows: list[list[int]], uneven: bool) -> Any:
        """The user's batch of these rows."""
        try:
            return self.get("batch")(rows)
        except Exception as error:
            if uneven:
                raise Skip(f"batch(rows) takes rows of one length only ({type(error).__name__})") from None
            raise InputError(f"{self.name}: batch(rows) failed: {type(error).__name__}: {first_line(error)}") from None

    @property
    def takes_uneven(self) -> bool:
        """Whether the collator takes rows of different lengths."""
        n = self.row_tokens
        try:
            self.collate(self.rows([n, n // 2]), True)
        except Skip:
            return False
        return True

    def low_precision(self) -> bool:
        """Whether any of its sums are of bf16 or fp16: the logits of one update, or the weights."""
        record = self.update(self.window([[self.row_tokens]]))
        return any(x.dtype in LOW for x in record.logits) or any(p.dtype in LOW for p in self.named.values())

    def update(self, window: list[Any], unclip: bool = False, softmax: bool = False) -> Record:
        """One update -> what it did. unclip: without its clipping; softmax: note the number format of the loss, which is slow."""
        record = Record()
        with watching(self, record, unclip), Softmaxes(record, self.vocab_size) if softmax else nullcontext():
            told = self.get("step")(window)
        record.told = dict(told) if isinstance(told, Mapping) else {"loss": told}
        return record

    def values(self) -> dict[str, Tensor]:
        """A copy of every weight."""
        return {name: p.detach().clone() for name, p in self.named.items()}


@dataclass
class Record:
    """What one update did. gradients: name -> what the optimizer was given; calls: of scaler, clip, optimizer, in order."""

    told: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    optimizer_autocast: bool = False
    softmax_in: list[tuple[torch.dtype, float, float]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The loss that the step tells."""
        value = self.told.get("loss")
        return float(value) if value is not None else math.nan

    def raw(self) -> Tensor:
        """The gradient as one vector, a clip that the step tells of undone."""
        flat = flatten(self.gradients)
        norm, told = float(flat.norm()), self.told.get("grad_norm")
        if told is not None and 0 < norm < 0.999 * float(told):
            flat = flat * (float(told) / norm)
        return flat


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors as one vector in float64, in the order of their names."""
    if not tensors:
        raise Skip("no weight had a gradient when the optimizer stepped")
    return torch.cat([tensors[name].detach().double().flatten() for name in sorted(tensors)])


def strip(name: str, parts: tuple[str, ...]) -> str:
    """A name without the prefixes. strip("module.x.weight", ("module.",)) -> "x.weight" """
    for part in parts:
        name = name.removeprefix(part)
    return name


def first_line(error: Exception) -> str:
    """A message in short."""
    return " ".join(str(error).split())[:160]


# ---- watching one update -------------------------------------------------------------------------------------------


@contextmanager
def watching(step: Step, record: Record, unclip: bool) -> Iterator[None]:
    """Within it an update writes itself into the record. unclip: clipping by norm or value measures and does nothing."""
    hooks = [step.model.register_forward_pre_hook(lambda _m, a, k: see_input(record, a, k), with_kwargs=True)]
    width = step.vocab_size
    for module in step.model.modules():
        hooks.append(module.register_forward_hook(lambda _m, _i, out: see_logits(record, out, width)))
    names = {id(p): name for name, p in step.named.items()}
    for optimizer in step.optimizers:
        if isinstance(optimizer, torch.optim.Optimizer):
            hooks.append(optimizer.register_step_pre_hook(lambda o, _a, _k: see_step(record, o, names)))
    try:
        with calls_seen(record, step, unclip):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def see_input(record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep the token ids of a forward: the first whole-number tensor of two axes, input_ids before others."""
    values = [kwargs["input_ids"]] if "input_ids" in kwargs else [*args, *kwargs.values()]
    ids = [v for v in values if isinstance(v, Tensor) and v.ndim == 2 and not v.is_floating_point()]
    record.inputs += ids[:1]


def see_logits(record: Record, output: Any, width: int) -> None:
    """Keep the tensors (B, T, V) that come out of a module, and have torch keep their gradients."""
    found = [output] if isinstance(output, Tensor) else []
    found = list(output.values()) if isinstance(output, Mapping) else found
    found = list(output) if isinstance(output, tuple | list) else found
    for x in found:
        if isinstance(x, Tensor) and x.ndim == 3 and x.shape[-1] == width and x.requires_grad:
            x.retain_grad()
            record.logits.append(x)


def see_step(record: Record, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
    """Keep what an optimizer is given."""
    record.calls.append("optimizer.step")
    record.optimizer_autocast |= torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    for group in optimizer.param_groups:
        record.rates.append(float(group["lr"]))
        for p in group["params"]:
            name = names.get(id(p), "?")
            if p.grad is None:
                record.without.append(name)
            else:
                record.gradients[name] = p.grad.detach().clone()


@contextmanager
def calls_seen(record: Record, step: Step, unclip: bool) -> Iterator[None]:
    """Note the calls of GradScaler, of clipping and of schedulers, in order."""
    targets: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        before = vars(owner).get(name)
        if before is not None:
            targets.append((owner, name, before))
            setattr(owner, name, make(before))

    def noted(label: str) -> Callable[[Any], Any]:
        def make(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                record.calls.append(label)
                return function(*args, **kwargs)

            return call

        return make

    def clip(function: Any) -> Any:
        def call(parameters: Any, limit: Any, *args: Any, **kwargs: Any) -> Any:
            record.calls.append("clip")
            parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            return function(parameters, math.inf if unclip else limit, *args, **kwargs)

        return call

    owner = step.raw.__class__ if not isinstance(step.raw, Mapping) else type(step.model)
    own = vars(sys.modules[owner.__module__]) if owner.__module__ in sys.modules else {}
    places = [torch.nn.utils, torch.nn.utils.clip_grad]
    places += [sys.modules[owner.__module__]] if "clip_grad_norm_" in own or "clip_grad_value_" in own else []
    scaler = torch.amp.GradScaler
    schedulers = torch.optim.lr_scheduler.LRScheduler
    nested: list[int] = []

    def scheduled(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            record.calls += [] if nested else ["scheduler.step"]  # one made of others steps them itself
            nested.append(1)
            try:
                return function(*args, **kwargs)
            finally:
                nested.pop()

        return call

    try:
        for place in places:
            put(place, "clip_grad_norm_", clip)
            put(place, "clip_grad_value_", clip)
        for name in ("scale", "unscale_", "step", "update"):
            put(scaler, name, noted(f"scaler.{name}"))
        for kind in {schedulers, *subclasses(schedulers)}:
            put(kind, "step", scheduled)
        yield
    finally:
        for owner_, name, before in reversed(targets):
            setattr(owner_, name, before)


def subclasses(kind: type) -> Iterator[type]:
    """All classes made from it."""
    for sub in kind.__subclasses__():
        yield sub
        yield from subclasses(sub)


class Softmaxes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the number format in which a log-softmax over the vocabulary is computed, whoever asks for it, and how far the
    log of its sum is from float32's."""

    def __init__(self, record: Record, width: int):
        super().__init__()
        self.record, self.width = record, width

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("_log_softmax", "logsumexp") and args[0].shape[-1:] == (self.width,):
            x, low = args[0], args[0].dtype in LOW
            got = function(*args, **(kwargs or {})) if low else None
            off = 0.0
            if low and name == "_log_softmax" and got.dtype in LOW:
                right = torch.log_softmax(x.float(), -1)
                off = float((right - got.float()).abs().max())
            low_result = low and got.dtype in LOW
            self.record.softmax_in.append((x.dtype if low_result else torch.float32, off, float(x.float().abs().max())))
            return got if low else function(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


# ---- a step made quiet ---------------------------------------------------------------------------------------------


def without_dropout(step: Step) -> Step:
    """The step with every dropout at 0: what is left is a function of weights and batch."""
    for module in step.model.modules():
        for name in ("p", "dropout", "attention_dropout", "dropout_p", "resid_dropout", "attn_dropout"):
            is_share = isinstance(vars(module).get(name), float)
            if is_share and (name != "p" or "dropout" in type(module).__name__.lower()):
                setattr(module, name, 0.0)
    return step


def has_dropout(step: Step) -> bool:
    """Whether something is dropped in training."""
    for module in step.model.modules():
        shares = [vars(module).get(n) for n in ("dropout", "attention_dropout", "dropout_p")]
        shares += [module.p] if isinstance(module, nn.Dropout) else []
        if any(isinstance(share, float) and share > 0 for share in shares):
            return True
    return False


def perturbed(step: Step, size: float = 0.02) -> Step:
    """The step with noise on every weight: from a start of zeros many gradients are rightly nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in step.model.parameters():
            p.add_((size * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype))
    return step


def digest(value: Any) -> str:
    """A short hash of every tensor in a batch, however it is nested."""
    made = hashlib.sha256()

    def take(part: Any) -> None:
        if isinstance(part, Tensor):
            made.update(str(tuple(part.shape)).encode() + part.detach().cpu().double().numpy().tobytes())
        elif isinstance(part, Mapping):
            for key in sorted(part):
                take(part[key])
        elif isinstance(part, list | tuple):
            for item in part:
                take(item)
        else:
            made.update(repr(part).encode())

    take(value)
    return made.hexdigest()[:12]

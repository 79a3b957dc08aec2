"""What the properties are asked with: token ids, lengths, a measure of difference, and one block moved from within.

All draws come from one seed, so that a counter-example can be repeated. Shapes: B batch, T tokens, C width of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kobza.doctor.finding import Skip
from kobza.doctor.models.subject import ModuleSubject, Stop, Subject, first_tensor
from kobza.surgery import watch

SEED = 0
LONG = 512  # above it a forward is dear: fewer questions are asked
WIDE, NARROW = 128, 48  # windows above the first are narrowed to the second where only their edge matters


def draw_ids(subject: Subject, batch: int, length: int, seed: int = SEED) -> Tensor:
    """Random ids (B, T); distinct within a row where the vocabulary allows it."""
    generator = torch.Generator().manual_seed(seed)
    if subject.vocab_size >= 4 * length:
        rows = [distinct(subject.vocab_size, length, generator) for _ in range(batch)]
        return torch.stack(rows).to(home(subject))
    return torch.randint(subject.vocab_size, (batch, length), generator=generator).to(home(subject))


def distinct(n: int, length: int, generator: torch.Generator) -> Tensor:
    """`length` different ids below n, in random order."""
    if n < 100_000:
        return torch.randperm(n, generator=generator)[:length]
    return torch.randint(n // length, (length,), generator=generator) + torch.arange(length) * (n // length)


def home(subject: Subject) -> torch.device:
    """Where the subject's weights are."""
    weight = next(subject.module.parameters(), None) if subject.module is not None else None
    return torch.device("cpu") if weight is None else weight.device


def shifted(ids: Tensor, subject: Subject, start: int, by: int = 1) -> Tensor:
    """ids with every token from `start` on replaced by another."""
    other = ids.clone()
    other[:, start:] = (ids[:, start:] + by) % subject.vocab_size
    return other


def spans(subject: Subject) -> list[int]:
    """The different declared windows, smallest first."""
    return sorted({window for window in subject.windows or () if window})


def length_of(subject: Subject, least: int = 40) -> int:
    """T > 2 W for every declared window W (a shorter text cannot see it), within the context; W + 64 where W is large."""
    widest = max(spans(subject), default=0)
    return min(subject.max_seq_len, max(least, widest + 64 if widest > LONG else 2 * widest + 9))


@contextmanager
def small(subject: Subject) -> Iterator[None]:
    """Within the context wide windows are narrow."""
    if isinstance(subject, ModuleSubject) and max(spans(subject), default=0) > WIDE:
        with subject.narrowed(NARROW):
            yield
    else:
        yield


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of b. nan where one of them is not finite."""
    a, b = a.float(), b.float()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def rel_l2(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@contextmanager
def training(subject: Subject, seed: int | None = None) -> Iterator[None]:
    """train() within, eval() and the buffers as they were afterwards; with a seed dropout draws the same each time."""
    module = subject.module
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        module.train()
        try:
            yield
        finally:
            module.eval()
            for name, buffer in module.named_buffers():
                if buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])


def settled(subject: Subject) -> None:
    """Raise Skip where eval() gives another answer each time: R17 is the finding then, and nothing else can be told apart."""
    if "settled" not in subject.notes:
        ids = draw_ids(subject, 2, min(8, subject.max_seq_len))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            subject.notes["settled"] = torch.equal(*(subject.logits(ids) for _ in range(2)))
    if not subject.notes["settled"]:
        raise Skip("eval() answers differently each time; mend R17 first")


def streams_of(subject: Subject, ids: Tensor, **more: Any) -> list[Tensor]:
    """The streams after the blocks, or of a plain callable its logits alone."""
    with torch.no_grad():
        return subject.hidden(ids, **more) if "hidden" in subject.capabilities else [subject.logits(ids, **more)]


def layer_name(subject: Subject, index: int) -> str:
    """Name of the index-th of `streams_of`."""
    return subject.layers()[index][0] if "hidden" in subject.capabilities else "logits"


@torch.no_grad()
def block_moves(subject: ModuleSubject, index: int, ids: Tensor, place: int, **more: Any) -> Tensor:
    """Which outputs (T,) of a block move, and by how much relative to its largest, when what enters the block at `place` does.
    Several noises are tried; what is masked gets an exact 0."""
    name, block = subject.layers()[index]
    calm = _block_output(subject, name, block, ids, place, None, more)
    moved = torch.zeros(ids.shape[1])
    for noise in range(3):
        output = _block_output(subject, name, block, ids, place, noise, more)
        moved = torch.maximum(moved, (output - calm).abs().amax((0, -1)).cpu())  # (T,)
        if moved[-1] > 0:
            break  # it reaches the end: other noises would show nothing new
    return moved / calm.abs().max().clamp(min=1e-30).cpu()


def _block_output(
    subject: ModuleSubject,
    name: str,
    block: nn.Module,
    ids: Tensor,
    place: int,
    noise: int | None,
    more: dict[str, Any],
) -> Tensor:
    """A block's output (B, T, C) when a noise (None: none) is added to its input at `place`."""
    found: list[Tensor] = []

    def disturb(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if noise is None:
            return args, kwargs
        if args and isinstance(args[0], Tensor):
            return (_disturbed(args[0], place, noise), *args[1:]), kwargs
        key = next(key for key, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point())
        return args, kwargs | {key: _disturbed(kwargs[key], place, noise)}

    def see(_: str, output: Any) -> None:
        found.append(first_tensor(output).float())
        raise Stop

    handle = block.register_forward_pre_hook(disturb, with_kwargs=True)
    try:
        with watch(subject.module, lambda at, _: at == name, see):
            subject.logits(ids, **more)
    except Stop:
        pass
    finally:
        handle.remove()
    return found[0]


def _disturbed(x: Tensor, place: int, noise: int) -> Tensor:
    """x (B, T, C) with a strong noise in place of one position."""
    generator = torch.Generator().manual_seed(noise)
    x = x.clone()
    size = 3 * x.float().pow(2).mean().sqrt()
    x[:, place] += (size * torch.randn(x.shape[-1], generator=generator).to(x.device)).to(x.dtype)
    return x

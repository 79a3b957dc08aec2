"""Training steps in three manners (nanoGPT's, the Hugging Face Trainer's, kobza's own), clean and each with one bug.

They are also the examples of steps.CONTRACT: what a person writes to have a loop examined. A bug is a subclass that does one
thing differently.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.config import ModelConfig, TrainConfig
from kobza.doctor.mutations.proof import Control, Mutation
from kobza.doctor.training.steps import Subject, open_
from kobza.model import build
from kobza.optim import make_optimizers, schedule, set_lr
from kobza.train import IGNORE, evaluate, next_token_loss, train_step

SIZE = {"vocab_size": 96, "n_layer": 2, "n_head": 2, "n_embd": 32, "max_seq_len": 24, "init": "gpt2"}
ROTARY = {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": False}
GEMMA = {"norm_offset": True, "norm_cast": "after", "norm_place": "both", "embed_scale": 32**0.5, "softcap": 30.0}
FLAVOURS = {
    "gpt2": ModelConfig(
        **SIZE, position="learned", norm="layernorm", mlp="gelu_tanh", bias=True, tied=True, qk_norm=False
    ),
    "llama": ModelConfig(**SIZE, **ROTARY, n_kv_head=1),
    "gemma": ModelConfig(**SIZE, **(ROTARY | GEMMA | {"mlp": "geglu_tanh"}), tied=True, window=8, window_pattern="LG"),
    "qwen": ModelConfig(**SIZE, **(ROTARY | {"qk_norm": True}), qk_norm_weight=True, qkv_bias=True),
    "phi": ModelConfig(**SIZE, **ROTARY, window=16),
}
EOS, PAD = 1, 0


# ---- three manners -------------------------------------------------------------------------------------------------


class NanoGPT:
    """The loop of nanoGPT's train.py: rows of one length, loss / GA, clip by norm, rates by a function of the step."""

    def __init__(self, config: ModelConfig, seed: int, dtype: str):
        torch.manual_seed(seed)
        self.model, self.dtype, self.i = build(config, seed), dtype, 0
        decay = [p for p in self.model.parameters() if p.ndim >= 2]
        plain = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-3
        )

    def batch(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor(rows)
        return ids[:, :-1], ids[:, 1:]

    def lr(self, i: int) -> float:
        return 1e-3 * min(1.0, (i + 1) / 4)

    def step(self, window: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.i)
        for x, y in window:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16"):
                logits = self.model(x)
                loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()) / len(window)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.i += 1
        return {"loss": loss.item() * len(window), "grad_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "i": self.i}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.i = state["i"]


class Wrapped(nn.Module):
    """A model as transformers calls one: forward(input_ids, attention_mask) -> .logits."""

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.body, self.config = build(config, seed), config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.body(input_ids))


class Trainer:
    """The Hugging Face Trainer's manner: the collator pads and labels, the loss shifts, a window is divided by its labels."""

    eos_id, pad_id, ema_decay, clip, scaler = EOS, PAD, 0.9, 1.0, None

    def __init__(self, config: ModelConfig, seed: int, dtype: str):
        torch.manual_seed(seed)
        self.dtype, self.data = dtype, np.random.default_rng(seed)
        self.model = Wrapped(config, seed)
        self.optimizer = torch.optim.AdamW(self.groups(), lr=2e-3)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: self.share(i))
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @property
    def examples(self) -> list[Any]:
        return [self.batch([[9, 8, 7, 30, 31, EOS], [12, 13, EOS]])]

    def groups(self) -> list[dict[str, Any]]:
        decay = [p for p in self.model.parameters() if p.ndim >= 2]
        return [
            {"params": decay, "weight_decay": 0.1},
            {"params": [p for p in self.model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]

    def share(self, i: int) -> float:
        return (i + 1) / 4 if i < 3 else 1 - (i - 3) / 20

    def lr(self, i: int) -> float:
        return 2e-3 * self.share(i)

    def batch(self, rows: list[list[int]]) -> dict[str, Tensor]:
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels(ids, mask)}

    def labels(self, ids: Tensor, mask: Tensor) -> Tensor:
        return ids.masked_fill(mask == 0, IGNORE)

    def next_window(self) -> list[dict[str, Tensor]]:
        return [self.batch([self.data.integers(4, 96, 10).tolist() + [EOS]]) for _ in range(2)]

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16"):
            return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def summed(self, batch: dict[str, Tensor]) -> Tensor:
        logits, labels = self.logits(batch)[:, :-1], batch["labels"][:, 1:]
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] != IGNORE).sum().clamp_min(1)

    def backward(self, window: list[dict[str, Tensor]]) -> float:
        n, total = sum(self.count(batch) for batch in window), 0.0
        for batch in window:
            loss = self.summed(batch) / n
            (self.scaler.scale(loss) if self.scaler else loss).backward()
            total += loss.item()
        return total

    def step(self, window: list[dict[str, Tensor]]) -> dict[str, Any]:
        self.model.train()
        loss = self.backward(window)
        norm = self.clipped()
        self.update()
        self.scheduler.step()
        self.clear()
        self.average()
        return {"loss": loss, "grad_norm": norm}

    def clipped(self) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)

    def update(self) -> None:
        self.optimizer.step()

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def average(self) -> None:
        for name, p in self.model.named_parameters():
            self.ema[name].lerp_(p.detach(), 1 - self.ema_decay)

    @torch.no_grad()
    def evaluate(self, batches: list[dict[str, Tensor]]) -> float:
        self.model.eval()
        total, n = sum(self.summed(b) for b in batches), sum(self.count(b) for b in batches)
        self.model.train()
        return float(total / n)

    def state_dict(self) -> dict[str, Any]:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        return state | {"data": self.data.bit_generator.state, "rng": torch.get_rng_state(), "ema": self.ema}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.data.bit_generator.state = state["data"]
        torch.set_rng_state(state["rng"])
        self.ema = copy.deepcopy(state["ema"])


class Kobza:
    """kobza's own step."""

    def __init__(self, config: ModelConfig, seed: int, dtype: str):
        self.model, self.i = build(config, seed), 0
        self.settings = TrainConfig(steps=20, warmup_steps=3, weight_decay=0.1, optimizer="muon")
        self.optimizers = make_optimizers(self.model, self.settings)
        self.loss_fn = next_token_loss(torch.bfloat16 if dtype == "bf16" else None)

    def batch(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        inputs = torch.tensor([row[:-1] + [PAD] * (width - len(row)) for row in rows])
        targets = torch.tensor([row[1:] + [IGNORE] * (width - len(row)) for row in rows])
        return inputs, targets

    def step(self, window: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        self.model.train()
        set_lr(self.optimizers, schedule(self.settings)(self.i))
        self.i += 1
        loss, norm = train_step(self.model, self.optimizers, window, self.loss_fn, self.settings.grad_clip)
        return {"loss": loss, "grad_norm": norm}

    def evaluate(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        return evaluate(self.model, batches, self.loss_fn)

    def save(self, folder: Path) -> None:
        state = {"model": self.model.state_dict(), "i": self.i, "rng": torch.get_rng_state()}
        torch.save(state | {"optimizers": [o.state_dict() for o in self.optimizers]}, folder / "state.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt")
        self.model.load_state_dict(state["model"])
        self.i = state["i"]
        torch.set_rng_state(state["rng"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)


# ---- clean variants ------------------------------------------------------------------------------------------------


class Scaled(Trainer):
    """With a GradScaler, as fp16 wants it."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.scaler = torch.amp.GradScaler("cpu")

    def clipped(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        return super().clipped()

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.scaler.load_state_dict(state["scaler"])


class Ended(Trainer):
    """Whose collator puts the end of text behind each row: the last token of a row has a target of its own."""

    eos_id = None

    def batch(self, rows: list[list[int]]) -> dict[str, Tensor]:
        return super().batch([[*row, EOS] for row in rows])


class Ranked(Trainer):
    """Under DistributedDataParallel, which means over ranks: the sum is divided by all ranks' labels and taken times world."""

    def __init__(self, config: ModelConfig, seed: int, dtype: str, rank: int, world: int):
        super().__init__(config, seed, dtype)
        self.world, self.ema = world, None
        self.model = nn.parallel.DistributedDataParallel(self.model) if world > 1 else self.model

    def together(self, value: Tensor) -> Tensor:
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value

    def backward(self, window: list[dict[str, Tensor]]) -> float:
        n, total = self.together(sum(self.count(batch) for batch in window)), torch.zeros(())
        for i, batch in enumerate(window):
            self.model.require_backward_grad_sync = self.syncs(i, len(window))
            loss = self.summed(batch) / n
            (loss * self.world).backward()
            total += loss.detach()
        return float(self.together(total))

    def syncs(self, i: int, n: int) -> bool:
        return i == n - 1

    def average(self) -> None:
        """No average here."""


def ranked(seed: int, rank: int = 0, world: int = 1, kind: type = Ranked) -> Ranked:
    """A clean step that takes rank and world."""
    return kind(FLAVOURS["llama"], seed, "fp32", rank, world)


# ---- one bug each --------------------------------------------------------------------------------------------------


class ShiftedTwice(Trainer):
    def labels(self, ids: Tensor, mask: Tensor) -> Tensor:
        return F.pad(super().labels(ids, mask)[:, 1:], (0, 1), value=IGNORE)


class NotShifted(Trainer):
    def summed(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(
            self.logits(batch).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE, reduction="sum"
        )


class EndMasked(Trainer):
    def labels(self, ids: Tensor, mask: Tensor) -> Tensor:
        return super().labels(ids, mask).masked_fill(ids == EOS, IGNORE)  # pad == eos, and labels masked by id


class PaddingLearned(Trainer):
    def labels(self, ids: Tensor, mask: Tensor) -> Tensor:
        return ids.clone()


class MarkerMissed(Trainer):
    marker = (30, 31)

    def labels(self, ids: Tensor, mask: Tensor) -> Tensor:
        labels = super().labels(ids, mask)
        for row, label in zip(ids.tolist(), labels, strict=True):
            starts = [i for i in range(len(row)) if tuple(row[i : i + 2]) == self.marker]
            if 9 in row or 12 in row:  # the examples: a prompt, a marker, a response
                label[: starts[0] + 2 if starts else len(row)] = IGNORE
        return labels


class FlattenedFirst(Trainer):
    def summed(self, batch: dict[str, Tensor]) -> Tensor:
        logits, labels = self.logits(batch).flatten(0, 1)[:-1], batch["labels"].flatten()[1:]
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


class MeanOfMeans(Trainer):
    def backward(self, window: list[dict[str, Tensor]]) -> float:
        for batch in window:
            (self.summed(batch) / self.count(batch) / len(window)).backward()
        return 4.0


class TimesWindow(Trainer):
    def backward(self, window: list[dict[str, Tensor]]) -> float:
        n = sum(self.count(batch) for batch in window)
        for batch in window:
            (self.summed(batch) / n * len(window)).backward()
        return 4.0


class DividedTwice(Trainer):
    def backward(self, window: list[dict[str, Tensor]]) -> float:
        n = sum(self.count(batch) for batch in window)
        for batch in window:
            (self.summed(batch) / n / len(window)).backward()
        return 4.0


class NotDivided(NanoGPT):
    def step(self, window: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        for x, y in window:
            loss = F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "grad_norm": norm}


class RankMean(Ranked):
    def together(self, value: Tensor) -> Tensor:
        return value / self.world if value.is_floating_point() else value  # each rank divides by its own labels


class LocalNorm(Ranked):
    def step(self, window: list[dict[str, Tensor]]) -> dict[str, Any]:
        told = super().step(window)
        return told | {"grad_norm": told["grad_norm"] / self.world**0.5}


class FirstSynced(Ranked):
    def syncs(self, i: int, n: int) -> bool:
        return i % n == 0


class ClippedScaled(Scaled):
    def clipped(self) -> Tensor:
        return Trainer.clipped(self)


class OwnClip(Scaled):
    """Clips by its own hands, before the scaler's step unscales."""

    def clipped(self) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients:
            gradient.mul_(min(1.0, 1.0 / float(norm)))
        return norm


class HalfUnscaled(Trainer):
    """The forward pass in fp16, no scaler."""

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return self.model(input_ids=batch["input_ids"]).logits


class InAutocast(Trainer):
    def update(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            super().update()


class HalfWeights(NanoGPT):
    def __init__(self, config: ModelConfig, seed: int, dtype: str):
        super().__init__(config, seed, dtype)
        self.model.bfloat16()

    def lr(self, i: int) -> float:
        return 1e-5


class WideStart(NanoGPT):
    def __init__(self, config: ModelConfig, seed: int, dtype: str):
        super().__init__(config, seed, dtype)
        with torch.no_grad():
            self.model.lm_head.weight.mul_(40)


class Growing(NanoGPT):
    """No norms and wide projections: each block multiplies what it gets."""

    def __init__(self, config: ModelConfig, seed: int, dtype: str):
        super().__init__(replace(config, n_layer=4, norm="none", qk_norm=False, mlp="relu"), seed, dtype)
        with torch.no_grad():
            for block in self.model.blocks:
                block.mlp.up_proj.weight.mul_(25)
                block.mlp.down_proj.weight.mul_(60)


class OneGroup(Trainer):
    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "weight_decay": 0.1}]


class ForgottenWeight(Trainer):
    def groups(self) -> list[dict[str, Any]]:
        first, second = super().groups()
        return [first | {"params": first["params"][1:]}, second]


class SteppedTwice(Trainer):
    def backward(self, window: list[dict[str, Tensor]]) -> float:
        loss = super().backward(window)
        for _ in window[1:]:
            self.scheduler.step()
        return loss


class NoEval(Trainer):
    @torch.no_grad()
    def evaluate(self, batches: list[dict[str, Tensor]]) -> float:
        total, n = sum(self.summed(b) for b in batches), sum(self.count(b) for b in batches)
        return float(total / n)


class StaysEval(NoEval):
    @torch.no_grad()
    def evaluate(self, batches: list[dict[str, Tensor]]) -> float:
        self.model.eval()
        return super().evaluate(batches)

    def step(self, window: list[dict[str, Tensor]]) -> dict[str, Any]:
        mode = self.model.training
        told = super().step(window)
        self.model.train(mode)
        return told


class MeanOfBatches(Trainer):
    @torch.no_grad()
    def evaluate(self, batches: list[dict[str, Tensor]]) -> float:
        self.model.eval()
        loss = sum(float(self.summed(b) / self.count(b)) for b in batches) / len(batches)
        self.model.train()
        return loss


class Loses(Trainer):
    """Loads all but one part of the checkpoint."""

    lost = ""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        fresh = Trainer.state_dict(self)
        super().load_state_dict(state | {self.lost: copy.deepcopy(fresh[self.lost])})


class LosesOptimizer(Loses):
    lost = "optimizer"


class LosesSchedule(Loses):
    lost = "scheduler"


class LosesPlace(Loses):
    lost = "data"


class LosesGenerators(Loses):
    lost = "rng"


class Unseeded(Trainer):
    def next_window(self) -> list[dict[str, Tensor]]:
        return [self.batch([torch.randint(4, 96, (11,)).tolist()])]

    def __init__(self, *args: Any):
        state = torch.get_rng_state()
        super().__init__(*args)
        torch.set_rng_state(state)


class NeverCleared(Trainer):
    def clear(self) -> None:
        """Forgotten."""


class Detached(Trainer):
    def __init__(self, *args: Any):
        super().__init__(*args)
        block = self.model.body.blocks[1]
        block.attn.register_forward_hook(lambda _m, _i, out: out.detach())


class PutBack(Trainer):
    """One weight is overwritten after each update, as by a copy that is loaded again."""

    def update(self) -> None:
        kept = self.model.body.blocks[0].mlp.up_proj.weight
        before = kept.detach().clone()
        super().update()
        kept.data.copy_(before)


class HalfLoss(Trainer):
    def summed(self, batch: dict[str, Tensor]) -> Tensor:
        logits, labels = self.logits(batch)[:, :-1].bfloat16(), batch["labels"][:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum").float()


class FrozenAverage(Trainer):
    def average(self) -> None:
        """Forgotten."""


class SlowAverage(Trainer):
    def average(self) -> None:
        for name, p in self.model.named_parameters():
            self.ema[name].lerp_(p.detach(), (1 - self.ema_decay) / 2)


# ---- the lists -----------------------------------------------------------------------------------------------------


def with_dropout(config: ModelConfig) -> ModelConfig:
    """The flavour with dropout, where a bug needs it to show."""
    return replace(config, dropout=0.1)


def make(kind: type, config: ModelConfig) -> Callable[[Path, int, str], Subject]:
    """A maker of subjects: the folder is not used, the seed and the number format are the step's."""

    def subject(_folder: Path, shift: int, dtype: str) -> Subject:
        return Subject(partial(made_step, kind=kind, config=config, shift=shift, dtype=dtype))

    return subject


def made_step(seed: int, kind: type, config: ModelConfig, shift: int, dtype: str) -> Any:
    """The make_step of a subject."""
    return kind(config, seed + shift, dtype)


def named(name: str) -> Callable[[Path, int, str], Subject]:
    """A maker of a subject that other processes can import."""
    return lambda _folder, _seed, _dtype: open_(f"{__name__}:{name}")


ranked_mean = partial(ranked, kind=RankMean)
ranked_norm = partial(ranked, kind=LocalNorm)
ranked_unsynced = partial(ranked, kind=FirstSynced)

CONTROLS: tuple[Control, ...] = (
    *(Control(f"the Trainer's manner, {name}", make(Trainer, config)) for name, config in FLAVOURS.items()),
    Control("nanoGPT's manner, gpt2", make(NanoGPT, FLAVOURS["gpt2"])),
    Control("kobza's step, qwen", make(Kobza, FLAVOURS["qwen"])),
    Control("kobza's step, zero start", make(Kobza, replace(FLAVOURS["llama"], init="zero"))),
    Control("the Trainer's manner with dropout", make(Trainer, with_dropout(FLAVOURS["gpt2"]))),
    Control("a scaler in order", make(Scaled, FLAVOURS["llama"])),
    Control("ends put on by the collator", make(Ended, FLAVOURS["phi"])),
    Control("two ranks", named("ranked")),
)

LLAMA, GPT2 = FLAVOURS["llama"], FLAVOURS["gpt2"]
MUTATIONS: tuple[Mutation, ...] = (
    Mutation("R2", "labels shifted twice", make(ShiftedTwice, LLAMA)),
    Mutation("R2", "labels not shifted", make(NotShifted, LLAMA)),
    Mutation("R3", "pad = eos masked in the labels", make(EndMasked, LLAMA)),
    Mutation("R4", "padding in the loss", make(PaddingLearned, LLAMA)),
    Mutation("R5", "response marker not found", make(MarkerMissed, LLAMA)),
    Mutation("R6", "flattened before the shift", make(FlattenedFirst, LLAMA)),
    Mutation("R9", "mean of micro-batch means", make(MeanOfMeans, LLAMA)),
    Mutation("R9", "gradients times the micro-batches", make(TimesWindow, LLAMA)),
    Mutation("R9", "divided twice", make(DividedTwice, LLAMA)),
    Mutation("R9", "not divided by the micro-batches", make(NotDivided, GPT2)),
    Mutation("R10", "each rank divides by its own count", named("ranked_mean")),
    Mutation("R10", "clip on a share of the norm", named("ranked_norm")),
    Mutation("R11", "the first micro-step is synced", named("ranked_unsynced")),
    Mutation("R12", "clip before unscale", make(ClippedScaled, LLAMA)),
    Mutation("R12", "own clip before unscale", make(OwnClip, LLAMA)),
    Mutation("R12", "fp16 without a scaler", make(HalfUnscaled, LLAMA)),
    Mutation("R12", "optimizer inside autocast", make(InAutocast, LLAMA)),
    Mutation("R13", "pure bf16 weights", make(HalfWeights, LLAMA)),
    Mutation("R14", "head drawn 40 times too wide", make(WideStart, LLAMA)),
    Mutation("R14", "residual projections too wide", make(Growing, LLAMA)),
    Mutation("R15", "decay on norms", make(OneGroup, LLAMA)),
    Mutation("R15", "a weight in no group", make(ForgottenWeight, LLAMA)),
    Mutation("R16", "scheduler stepped a micro-batch", make(SteppedTwice, LLAMA)),
    Mutation("R17", "no eval()", make(NoEval, with_dropout(GPT2))),
    Mutation("R17", "train() not restored", make(StaysEval, with_dropout(GPT2))),
    Mutation("R17", "mean of unequal batches", make(MeanOfBatches, LLAMA)),
    Mutation("R18", "optimizer not loaded", make(LosesOptimizer, LLAMA)),
    Mutation("R18", "schedule not loaded", make(LosesSchedule, LLAMA)),
    Mutation("R18", "place in the data not loaded", make(LosesPlace, LLAMA)),
    Mutation("R18", "generators not loaded", make(LosesGenerators, with_dropout(GPT2))),
    Mutation("R20", "unseeded data", make(Unseeded, LLAMA)),
    Mutation("R23", "zero_grad missing", make(NeverCleared, LLAMA)),
    Mutation("R23", "a detached attention", make(Detached, LLAMA)),
    Mutation("R23", "a weight that is put back", make(PutBack, LLAMA)),
    Mutation("R24", "cross-entropy in bf16", make(HalfLoss, LLAMA)),
    Mutation("R25", "average never updated", make(FrozenAverage, LLAMA)),
    Mutation("R25", "average at half the rate", make(SlowAverage, LLAMA)),
)

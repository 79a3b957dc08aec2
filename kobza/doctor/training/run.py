"""`kobza doctor run RUN_DIR|FILE`: rules on the metrics of a run, kobza's or another trainer's, and on the inside of its model.

A curve proves little: a log rule is a warning unless it names a step at which a number is not the one that the run's own config
asks for, or is not finite. The rules are shy; their limits are from clean runs (mutations/run.py makes them). What is inside the
model is internals.py's part, which loads torch; the rest does not.
"""

from __future__ import annotations

import json
import lzma
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kobza.config import InputError, TrainConfig
from kobza.doctor.finding import Check, Finding, Skip, examine
from kobza.doctor.training.curves import Log, read_log

WINDOW = 32  # records that a spike or a jump is judged by
SIGMAS = 8.0  # robust deviations: the spread of 32 values is itself off by a quarter, so 8 is at least 6 true ones
SPIKE_SHARE = 0.05  # of the loss: a calm curve has spikes that nobody can see
REPEATED = 3  # one or two bad batches heal by themselves
NEAR = 0.02  # as good as a landmark
FALLING = 0.01  # a loss that falls by 1% over half of the run is slow, not stuck
OVERFIT_EVALS = 3  # evaluations in a row above the best
CLIPPED = 0.9  # share of steps; up to 0.72 on clean tiny runs
CLIPPED_BY = 2.0  # the median norm in limits, where it is known: Adam and Muon do not mind a little
SLOWER = 0.5  # of the speed at the beginning
SAME = 2e-6  # relative: metrics are rounded to 6 digits
FIRST_LOSS = 0.5  # nats beside ln V
LEAK = 0.5  # of what a compressor needs
FEWEST = 16  # records, below which no shape is judged


def open_(path: Path, vocab_size: int = 0) -> Log:
    """A run folder or a file of metrics -> what the checks take."""
    return read_log(path, vocab_size)


def robust(values: np.ndarray) -> float:
    """Standard deviation around a slowly moving mean, from the differences of neighbours, outliers aside."""
    return float(1.4826 * np.median(np.abs(np.diff(values))) / math.sqrt(2)) if len(values) > 2 else 0.0


def need(log: Log, key: str, fewest: int = FEWEST) -> tuple[np.ndarray, np.ndarray]:
    """The finite values of a key; Skip where there are too few."""
    steps, values = log.finite(key)
    if len(values) < fewest:
        raise Skip(f"{len(values)} values of {key}, and {fewest} are needed")
    return steps, values


# ---- R21: shapes ---------------------------------------------------------------------------------------------------


def not_finite(log: Log) -> Iterator[Finding]:
    """The first step at which a loss or a gradient is nan or inf, with what came before it."""
    told = black_box(log)
    for record in log.records if told is None else ():
        bad = [
            key
            for key in ("train_loss", "val_loss", "grad_norm")
            if isinstance(record.get(key), float) and not math.isfinite(record[key])
        ]
        if bad:
            told = int(record["step"]), bad[0], str(record[bad[0]])
            break
    if told is None:
        return
    step, what, value = told
    steps, losses = log.finite("train_loss")
    before = losses[steps < step]
    norms = log.finite("grad_norm")[1][log.finite("grad_norm")[0] < step]
    last = f"; the last finite loss is {before[-1]:.4g}" if len(before) else ""
    if len(norms) > 8 and norms[-1] > 4 * np.median(norms):
        last += f", and the gradient norm had grown to {norms[-1]:.3g} from {np.median(norms):.3g}"
    yield Finding(
        "R21",
        "error",
        "proven",
        f"step {step}",
        "finite numbers",
        f"{what} is {value}",
        "every weight is lost from here on",
        "kobza replay names the first bad tensor; else lower the rate, lengthen the warm-up, or compute the "
        "part in float32",
        f"step {step}: {what} is {value}{last}",
    )


def black_box(log: Log) -> tuple[int, str, str] | None:
    """(step, what, value) of a failure that a kobza run kept: it stops before it would write such a record."""
    bundles = sorted(log.folder.glob("blackbox/[0-9]*/failure.json")) if log.folder else []
    if not bundles:
        return None
    try:
        told = json.loads(bundles[-1].read_text())
        return int(told["step"]), str(told["what"])[:60], str(told["value"])[:20]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def overfit(log: Log) -> Iterator[Finding]:
    """Validation loss above its best for three evaluations, beyond noise, while train loss falls."""
    steps, val = need(log, "val_loss", OVERFIT_EVALS + 2)
    at, train = need(log, "train_loss")
    best = int(np.argmin(val[:-OVERFIT_EVALS]))
    around = np.interp(steps, at, smooth(train, max(1, len(train) // (2 * len(val)))))
    noise = max(robust(np.diff(val)) if len(val) > 6 else 0.0, 0.0025 * float(val.min()))
    base = max(val[best], val[max(best - 1, 0) : best + 2].mean())
    if not (val[-OVERFIT_EVALS:] > base + 4 * noise).all() or not around[-1] < around[best]:
        return
    yield Finding(
        "R21",
        "warn",
        "likely",
        f"step {int(steps[best])}",
        "validation loss falls with the train loss",
        f"val {val[best]:.3f} there, {val[-1]:.3f} at step {int(steps[-1])}; train {around[best]:.3f} to "
        f"{around[-1]:.3f}",
        "the model learns its text by heart",
        "stop at the best evaluation, or take more text, more dropout, a smaller model",
        f"lowest at step {int(steps[best])}, the last {OVERFIT_EVALS} evaluations "
        + ", ".join(f"{v:.3f}" for v in val[-OVERFIT_EVALS:]),
    )


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Means over `reach` neighbours on both sides."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    low, high = np.maximum(i - reach, 0), np.minimum(i + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def plateau(log: Log) -> Iterator[Finding]:
    """A loss that stands still at ln V (nothing is learned) or at the entropy of the token counts (context is not used)."""
    steps, loss = need(log, "train_loss", 2 * FEWEST)
    half = loss[len(loss) // 2 :]
    first, second = float(np.median(half[: len(half) // 2])), float(np.median(half[len(half) // 2 :]))
    marks = landmarks(log)
    if not marks:
        raise Skip("neither the vocabulary's size nor the text is known (give the vocabulary's size)")
    if first - second > FALLING * second:
        return
    for name, mark in marks.items():
        if abs(second - mark) <= NEAR * mark:
            meaning = (
                "nothing is learned"
                if name == "ln V"
                else "only how frequent tokens are is learned: the context does not reach the logits"
            )
            yield Finding(
                "R21",
                "warn",
                "likely",
                f"steps {int(steps[len(loss) // 2])} to {int(steps[-1])}",
                f"below {name} = {mark:.3f}",
                f"stands at {second:.3f}",
                meaning,
                "look at the learning rate, frozen weights, a shuffled target, and attention that sees nothing",
                f"median loss {first:.4f}, then {second:.4f}; {name} is {mark:.4f}",
            )
            return


def landmarks(log: Log) -> dict[str, float]:
    """Losses that mean something: ln V, and the entropy of the token counts where the text is there."""
    marks = {}
    ids = tokens_of(log, "train", 5_000_000)
    if ids is not None and len(ids):
        shares = np.bincount(ids) / len(ids)
        shares = shares[shares > 0]
        marks["the entropy of the token counts"] = float(-(shares * np.log(shares)).sum())
    if log.vocab_size > 1:
        marks["ln V"] = math.log(log.vocab_size)
    return marks


def tokens_of(log: Log, part: str, most: int) -> np.ndarray | None:
    """The first `most` training or validation tokens of a kobza run; None where there are none to read."""
    if log.folder is None or not (log.folder / "tokens" / "index.json").is_file():
        return None
    from kobza.data import load_corpus  # with torch

    corpus = load_corpus(log.folder / "tokens", 1)
    return np.asarray((corpus.train if part == "train" else corpus.val).array(most))


def spikes(log: Log) -> Iterator[Finding]:
    """Train losses far above the recent ones, three times or more; and whether the gradient led or followed."""
    steps, loss = need(log, "train_loss", WINDOW + 8)
    past = np.lib.stride_tricks.sliding_window_view(loss, WINDOW)[:-1]
    usual = np.median(past, axis=1)
    spread = 1.4826 * np.median(np.abs(past - usual[:, None]), axis=1)
    jump = loss[WINDOW:] - usual
    odd = np.flatnonzero((jump > SIGMAS * spread) & (jump > SPIKE_SHARE * usual)) + WINDOW
    begins = [int(i) for n, i in enumerate(odd) if n == 0 or i - odd[n - 1] > 4]
    if len(begins) < REPEATED:
        return
    worst = max(begins, key=lambda i: loss[i] - usual[i - WINDOW])
    norms = dict(zip(*log.finite("grad_norm"), strict=True))
    led = leads(begins, steps, norms)
    yield Finding(
        "R21",
        "warn",
        "likely",
        f"step {int(steps[worst])}",
        "a loss that moves within its noise",
        f"{len(begins)} spikes beyond {SIGMAS:g} robust deviations{led}",
        "each costs the steps it takes to heal, and one may not heal",
        "lower the peak rate, clip the gradient, or look at the batches of those steps",
        f"steps {', '.join(str(int(steps[i])) for i in begins[:6])}: at {int(steps[worst])} the loss is "
        f"{loss[worst]:.3f}, usually {usual[worst - WINDOW]:.3f}",
    )


def leads(begins: list[int], steps: np.ndarray, norms: dict[float, float]) -> str:
    """Whether the gradient norm was already high a record before the spikes."""
    if not norms:
        return ""
    usual = float(np.median(list(norms.values())))
    before = sum(norms.get(steps[i - 1], 0) > 2 * usual for i in begins)
    during = sum(norms.get(steps[i], 0) > 2 * usual for i in begins)
    if before > len(begins) / 2:
        return ", the gradient norm rises first: the weights are at fault, not the batch"
    return (
        ", the gradient norm with them"
        if during > len(begins) / 2
        else ", the gradient norm stays: the batches are at fault"
    )


def clipping(log: Log) -> Iterator[Finding]:
    """The gradient is clipped at nearly every step: the rate is not the one that was set."""
    steps, norm = need(log, "grad_norm", 2 * FEWEST)
    late = norm[len(norm) // 4 :]
    limit = log.config.train.grad_clip if log.config else 0.0
    if log.config is None:  # a trainer that logs the norm after clipping shows its limit as a ceiling
        top = float(late.max())
        share = float((late >= top * (1 - 1e-4)).mean())
        limit = top if share > CLIPPED and float(np.ptp(late)) > 0 else 0.0
    if not limit:
        raise Skip("the limit of the clip is not known, or there is none")
    share, by = float((late >= limit * (1 - 1e-4)).mean()), float(np.median(late)) / limit
    if share > CLIPPED and (log.config is None or by > CLIPPED_BY):
        yield Finding(
            "R21",
            "warn",
            "likely",
            f"steps {int(steps[len(norm) // 4])} to {int(steps[-1])}",
            f"a norm above {limit:g} now and then",
            f"in {share:.0%} of the steps",
            "every update is of one length: the schedule and the batch size lose their meaning",
            "raise the limit to about twice the median norm, or see why gradients are large (a loss that is "
            "not divided?)",
            f"limit {limit:g}, median norm {float(np.median(late)):.3g}, smallest {float(late.min()):.3g}",
        )


def throughput(log: Log) -> Iterator[Finding]:
    """The last quarter at less than half the speed of the first half."""
    steps, speed = need(log, "tokens_per_second", 4 * FEWEST)
    early, late = float(np.median(speed[: len(speed) // 2])), float(np.median(speed[-len(speed) // 4 :]))
    if late < SLOWER * early:
        yield Finding(
            "R21",
            "warn",
            "likely",
            f"steps {int(steps[-len(speed) // 4])} to {int(steps[-1])}",
            f"about {early:,.0f} tokens a second",
            f"{late:,.0f}",
            "the run takes longer than planned",
            "look for another process, a hot or throttled device, memory that fills, a loader that starves",
            f"median {early:,.0f} tokens a second in the first half, {late:,.0f} in the last quarter",
        )


# ---- R14, R10, R1: levels ------------------------------------------------------------------------------------------


def first_loss(log: Log) -> Iterator[Finding]:
    """The first loss of a fresh model is about ln V."""
    steps, loss = log.finite("train_loss")
    if log.vocab_size < 2:
        raise Skip("the vocabulary's size is not known")
    if not len(loss) or steps[0] > 2:
        raise Skip("the first step is not in the log")
    if log.config and (log.config.train.embeddings or not plain(log.config.train) or log.config.model.n_ahead > 1):
        raise Skip("the objective is another than the plain loss, or the start was given")
    guess = math.log(log.vocab_size)
    if abs(multiple(loss[0] / guess) - 1) > 0.5:
        return  # a whole multiple: `scaled_loss` tells of it
    if loss[0] > guess + FIRST_LOSS or loss[0] < guess - FIRST_LOSS:
        high = loss[0] > guess
        why = (
            "the first steps unlearn a bad start, or the run diverges"
            if high
            else "nothing can be known yet: the target leaks, or the weights are not fresh"
        )
        fix = (
            "draw embedding and head smaller (0.02), or the head at zero"
            if high
            else "look at the mask and the shift of the targets"
        )
        example = f"step {int(steps[0])}: loss {loss[0]:.4f}; ln {log.vocab_size} = {guess:.4f}"
        yield Finding(
            "R14",
            "warn",
            "likely",
            f"step {int(steps[0])}",
            f"about ln V = {guess:.3f}",
            f"{loss[0]:.3f}",
            why,
            fix,
            example,
        )


def plain(train: TrainConfig) -> bool:
    """As loss.is_plain, which would load torch."""
    return not (train.label_smoothing or train.z_loss or train.min_context)


def multiple(ratio: float) -> float:
    """The whole number or its inverse that a ratio is within 2% of; 1 where it is none."""
    for k in (round(ratio), 1 / round(1 / ratio) if ratio > 0 and round(1 / ratio) else 0):
        if k and abs(ratio / k - 1) < 0.02:
            return float(k)
    return 1.0


def scaled_loss(log: Log) -> Iterator[Finding]:
    """R10: a train loss that is a whole multiple (or part) of the validation loss all along was summed or divided too often."""
    steps, val = need(log, "val_loss", 4)
    at, train = need(log, "train_loss")
    ratios = np.interp(steps, at, smooth(train, max(1, len(train) // (4 * len(val))))) / val
    k = multiple(float(np.median(ratios)))
    if k != 1 and float(np.percentile(np.abs(ratios / k - 1), 80)) < 0.05:
        i = len(val) // 2
        yield Finding(
            "R10",
            "warn",
            "likely",
            "train_loss",
            "about the validation loss",
            f"{k:g} times it, all along",
            "the logged loss, and maybe the gradient, depends on the number of ranks or micro-batches",
            "sum token losses over all ranks and micro-batches, divide once by all targets",
            f"step {int(steps[i])}: train about {ratios[i] * val[i]:.4f}, validation {val[i]:.4f}",
            "https://github.com/huggingface/transformers/issues/37474",
        )


def too_good(log: Log) -> Iterator[Finding]:
    """R1: a validation loss far below what a compressor needs that has read the training text."""
    steps, val = need(log, "val_loss", 1)
    bits = compressed_bits(log)
    if bits is None:
        raise Skip("the text is not there")
    got = float(val.min()) / math.log(2)
    if got < LEAK * bits:
        step = int(steps[int(np.argmin(val))])
        yield Finding(
            "R1",
            "warn",
            "likely",
            f"step {step}",
            f"at least {LEAK * bits:.3f} bits a token",
            f"{got:.3f}",
            "a model that sees the future predicts it, and writes nonsense",
            "kobza doctor model: M1 names the first layer that leaks; kobza doctor data finds validation "
            "text in the training text",
            f"xz needs {bits:.3f} bits a token of the validation text after the training text; the run has "
            f"{got:.3f} at step {step}",
            "https://github.com/karpathy/nanochat/pull/845",
        )


def compressed_bits(log: Log) -> float | None:
    """Bits a token that xz needs for validation tokens once it has read training tokens."""
    train, val = tokens_of(log, "train", 2_000_000), tokens_of(log, "val", 200_000)
    if train is None or val is None or not len(val):
        return None
    alone = len(lzma.compress(train.tobytes(), preset=1))
    return 8 * max(0, len(lzma.compress(np.concatenate([train, val]).tobytes(), preset=1)) - alone) / len(val)


# ---- R16, R18: rate and restarts -----------------------------------------------------------------------------------


def rate(log: Log) -> Iterator[Finding]:
    """R16: the logged rate is the one that the run's config says, at every step; without a config: it does not end early."""
    steps, lr = need(log, "lr")
    if log.config is None:
        yield from rate_shape(steps, lr)
        return
    train, end = log.config.train, len(lr)
    while end > 0:  # from the end: a resumed run may have had fewer steps before, and with them another schedule
        begin, asked = fitting(train, steps, lr, end)
        if begin == end:
            i = end - 1
            wanted = closed_form(train, int(steps[i]))
            yield Finding(
                "R16",
                "error",
                "proven",
                f"step {int(steps[i])}",
                f"lr {wanted:.6g}",
                f"{lr[i]:.6g}",
                "warm-up and decay are not where they were set to be",
                "step the schedule once an update, and restore its place on resume",
                f"config.toml says lr {train.lr:g}, {train.schedule} over {train.steps} steps, warm-up "
                f"{train.warmup_steps}: {wanted:.6g} at step {int(steps[i])}; the log has {lr[i]:.6g}",
            )
            return
        end, train = begin, replace(train, steps=asked)


def closed_form(train: TrainConfig, step: int) -> float:
    """The rate of an update (1 = the first)."""
    from kobza.optim import schedule  # with torch

    return train.lr * schedule(train)(step - 1)


def fitting(train: TrainConfig, steps: np.ndarray, lr: np.ndarray, end: int) -> tuple[int, int]:
    """The longest stretch that ends at record `end` and has the rates of `train`, under its number of steps or a smaller one
    -> (its first record, the number of steps)."""
    from kobza.optim import schedule

    begins = {}
    last = int(steps[end - 1])
    fewer = range(max(1, last), min(train.steps, last + 100_000))
    for n in (train.steps, *fewer):
        multiplier = schedule(replace(train, steps=n))
        good = lambda i: abs(train.lr * multiplier(int(steps[i]) - 1) - lr[i]) <= SAME * train.lr  # noqa: B023, E731
        if not good(end - 1) or (n != train.steps and not good(max(0, end - 8))):
            continue
        begin = end
        while begin > 0 and good(begin - 1):
            begin -= 1
        begins[n] = begin
        if begin == 0 or n == train.steps:
            break
    n = min(begins, key=lambda n: begins[n], default=train.steps)
    return begins.get(n, end), n


def rate_shape(steps: np.ndarray, lr: np.ndarray) -> Iterator[Finding]:
    """What a rate curve alone shows: a decay that ends long before the run does."""
    peak, last = int(np.argmax(lr)), float(lr[-1])
    fell = float(lr[peak]) > 5 * last
    floor = np.flatnonzero(lr <= last * (1 + 1e-6) + 1e-12)
    floor = floor[floor > peak]
    if not fell or not len(floor) or not np.allclose(lr[floor[0] :], last, rtol=1e-6, atol=1e-15):
        return
    share = float((steps[-1] - steps[floor[0]]) / max(1.0, steps[-1] - steps[0]))
    if share > 0.3:
        yield Finding(
            "R16",
            "warn",
            "likely",
            f"step {int(steps[floor[0]])}",
            "a decay that ends with the run",
            f"lr {last:.3g} for the last {share:.0%} of the steps",
            "the run learns next to nothing from there on",
            "count the schedule's steps in updates: not in micro-batches, not times the number of processes",
            f"peak {lr[peak]:.4g} at step {int(steps[peak])}, {last:.4g} from step {int(steps[floor[0]])} to "
            f"{int(steps[-1])}",
            "https://github.com/huggingface/accelerate/issues/963",
        )


def restarts(log: Log) -> Iterator[Finding]:
    """R18: after a restart the loss and the rate go on where they were, and the first batches are not read again."""
    if not log.restarts:
        raise Skip("no restart is in the log (its step and its clock never go back)")
    for i in log.restarts:
        step = int(log.records[i]["step"])
        yield from loss_jump(log, i, step)
        yield from repeated_batches(log, i, step)
        yield from rate_jump(log, i, step)


def loss_jump(log: Log, i: int, step: int) -> Iterator[Finding]:
    """The loss is higher after the restart than noise allows."""
    kept = [
        r["train_loss"] for r in log.records[:i] if math.isfinite(r.get("train_loss", math.nan)) and r["step"] < step
    ]
    after = [r["train_loss"] for r in log.records[i : i + WINDOW] if math.isfinite(r.get("train_loss", math.nan))]
    before = np.array(kept[-WINDOW:])
    if len(before) < 8 or len(after) < 4:
        return
    now, was, noise = float(np.median(after[:8])), float(np.median(before[-8:])), robust(before)
    if now > was + max(SIGMAS * noise / math.sqrt(4), SPIKE_SHARE * was):
        yield restart_finding(
            step,
            f"loss about {was:.3f}",
            f"{now:.3f}",
            "optimizer state, weights or schedule were not restored",
            f"median of 8 losses before step {step}: {was:.4f}, from it: {now:.4f}; noise {noise:.4f}",
        )


def repeated_batches(log: Log, i: int, step: int) -> Iterator[Finding]:
    """The batches after a restart are those of the beginning."""
    first = [r.get("batch_hash") for r in log.records[:3]]
    after = [r.get("batch_hash") for r in log.records[i : i + 3]]
    begins_anew = step <= log.records[0]["step"]
    if None not in first and len(after) == 3 and first == after and not begins_anew:
        yield restart_finding(
            step,
            "batches that were not read yet",
            "the first batches again",
            "the place in the data was not restored",
            f"batch hashes {', '.join(map(str, first))} at step {int(log.records[0]['step'])} and again at step {step}",
            "error",
            "proven",
        )


def rate_jump(log: Log, i: int, step: int) -> Iterator[Finding]:
    """The rate of a step that was done twice differs between the two times."""
    before = {r["step"]: r["lr"] for r in log.records[:i] if "lr" in r}
    for record in log.records[i : i + WINDOW]:
        was = before.get(record["step"])
        if was and "lr" in record and abs(record["lr"] - was) > 0.01 * was:
            example = f"step {int(record['step'])}: lr {was:.6g} before the restart, {record['lr']:.6g} after it"
            yield restart_finding(
                step, f"lr {was:.4g}", f"{record['lr']:.4g}", "the schedule starts anew, with its warm-up", example
            )
            return


def restart_finding(
    step: int, expected: str, got: str, why: str, example: str, severity: Any = "warn", confidence: Any = "likely"
) -> Finding:
    """The finding of R18."""
    fix = "save and load optimizer, schedule, generators and the place in the data with the weights"
    return Finding(
        "R18",
        severity,
        confidence,
        f"restart at step {step}",
        expected,
        got,
        why,
        fix,
        example,
        "https://github.com/huggingface/transformers/issues/46628",
    )


# ---- R22, L1: inside the model -------------------------------------------------------------------------------------


def inside(log: Log) -> Iterator[Finding]:
    """Dead units and heads, collapsed attention, logits and residual stream, on the run's own held-out text."""
    yield from measured(log).findings()


def unread(log: Log) -> Iterator[Finding]:
    """L1: rows of the token table that training never moved and that the held-out text reads."""
    yield from measured(log).unread_rows()


def measured(log: Log) -> Any:
    """internals.Internals of the run's best checkpoint, measured once."""
    if log.folder is None:
        raise Skip("a file of metrics has no model beside it")
    if not any((log.folder / "checkpoints").glob("[0-9]*")):
        raise Skip("the run has no checkpoint yet")
    from kobza.doctor.training.internals import measure  # with torch

    return measure(log.folder)


def facts(log: Log) -> dict[str, list[list[str]]]:
    """Tables for people: the curve in short, and layer by layer what the model does."""
    rows = [["figure", "first", "best", "last", "records"]]
    for key in ("train_loss", "val_loss", "lr", "grad_norm", "tokens_per_second"):
        _, values = log.finite(key)
        if len(values):
            best = values.min() if "loss" in key else values.max()
            rows.append([key, f"{values[0]:.4g}", f"{best:.4g}", f"{values[-1]:.4g}", f"{len(values):,}"])
    made = {"curves": rows}
    try:
        made["layers, on held-out text"] = measured(log).table()
    except (Skip, InputError):
        pass
    return made


CHECKS: tuple[Check, ...] = (
    Check("R21", "numbers are finite", not_finite),
    Check("R21", "validation follows training", overfit),
    Check("R21", "the loss is below what counting gives", plateau),
    Check("R21", "no spikes", spikes),
    Check("R21", "the clip is the exception", clipping),
    Check("R21", "the speed holds", throughput),
    Check("R14", "the first loss is ln V", first_loss),
    Check("R10", "train and validation loss are of one scale", scaled_loss),
    Check("R1", "the loss is not too good to be true", too_good),
    Check("R16", "the learning rate is the one set", rate),
    Check("R18", "a restart leaves no mark", restarts),
    Check("R22", "units, heads and logits inside the model", inside),
    Check("L1", "rows of the token table were learned", unread),
)
LIVE = CHECKS[:-2]  # what needs no model


def follow(
    path: Path, poll: float = 1.0, vocab_size: int = 0, idle: Callable[[float], bool] = lambda seconds: False
) -> Iterator[Finding]:
    """Findings of a run that goes on, each kind once, as they first appear. Ends when the run has made its last step or broken,
    or when idle(seconds without a new record) says so; whoever pulls may stop at any time."""
    said: set[tuple[str, str]] = set()
    size, since = -1, time.monotonic()
    while True:
        log = waiting(path, vocab_size)
        n = len(log.records) if log else 0
        if log and n != size:
            size, since = n, time.monotonic()
            for outcome in examine(LIVE, log):
                for finding in outcome.findings:
                    if (outcome.name, finding.code) not in said:
                        said.add((outcome.name, finding.code))
                        yield finding
        if (log and is_over(log)) or idle(time.monotonic() - since):
            return
        time.sleep(poll)


def waiting(path: Path, vocab_size: int) -> Log | None:
    """The log as it stands; None where nothing has been written yet."""
    empty = path.is_dir() and not any(
        (path / name).exists() for name in ("metrics.jsonl", "trainer_state.json", "metrics.csv")
    )
    if empty or (path.suffix == ".jsonl" and path.exists() and path.stat().st_size == 0):
        return None
    try:
        return read_log(path, vocab_size)
    except InputError as error:
        if "no record in it" in str(error):
            return None
        raise


def is_over(log: Log) -> bool:
    """Whether a kobza run has made its last step or met what is not finite."""
    return log.config is not None and (log.records[-1]["step"] >= log.config.train.steps or black_box(log) is not None)

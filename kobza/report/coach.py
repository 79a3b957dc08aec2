"""Metric records, landmarks and a few facts of a run -> what an experienced friend would say about it.

`meaning` says what a loss means for this vocabulary. `remarks` looks at the whole run with seven rules, each a short
function `(curves, landmarks, facts) -> Remark or None`. The rules judge the run as it stands, so they serve a live run
as well as a finished one. They are shy: a rule that is not sure says nothing, because a learner acts on what it says.
Nothing here draws or prints; `page.py` shows the remarks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kobza.report.landmarks import Landmarks
from kobza.report.metrics import Record, is_number, series

# How sure a rule must be. All shares are of the loss itself, so that they serve characters and tokens alike.
NOISE_FLOOR = 0.0025  # an evaluation wobbles by a quarter of a percent at least, however calm the few seen look
NOISE_MARGIN = 4.0  # a change counts beyond this many standard deviations: over a long run 3 would come up by chance

OVERFIT_EVALS = 3  # so many evaluations in a row above the best: two still happen by chance

FAIR_SHARE = 0.25  # of the steps after warm-up; by then any working run is past the token frequencies
UNIGRAM_NEAR = 0.02  # within 2% of the unigram entropy counts as "at" it: frequencies alone give that
STILL_FALLING = 0.01  # a loss that fell 1% between the last two quarters is slow, not stuck

PLATEAU_SPAN = 0.5  # of the planned steps: its first half is compared with its second
PLATEAU_EVALS = 3  # in each half; fewer cannot be averaged
PLATEAU_GAIN = 0.005  # less than half a percent over a quarter of the run; a healthy one gains about 2%

SPIKE_WINDOW = 32  # earlier losses a spike is judged by: enough for a median, few enough to follow the curve
SPIKE_SCORE = 8.0  # robust z-score; MAD of 32 values is off by a quarter, so 8 is at least 6 true deviations
SPIKE_SHARE = 0.05  # and 5% of the loss, or a very calm curve would have spikes nobody can see
SPIKE_GRAD = 2.0  # gradient norm in multiples of its median: a hard batch raises the loss, not the gradient so much
REPEATED_SPIKES = 3  # one or two are bad batches; three are the rate

RECENT_RECORDS = 10  # "now" is the median of the last 10 records, or of the last 5% where that is more
RECENT_SHARE = 0.05
RATE_RISE = 1.1  # train loss 10% above its own lowest: overfitting lowers train loss, so this is divergence
ABOVE_START = 1.02  # 2% above where it began, or above ln V: knowing nothing costs ln V, worse is harm done

MANY_EPOCHS = 4.0  # up to 4 a repeat is nearly as good as new text (Muennighoff et al. 2023)
GAP_SHARE = 0.05  # of the loss; a gap grown by less than 5% is the ordinary price of held-out text

IMPROVING_SPAN = 0.2  # the last fifth of the run
IMPROVING_GAIN = 0.03  # still 3% in the last fifth: a finished curve gains 1 to 2%
FINISHED = 0.98  # of the planned steps

LOW_RATE, HIGH_RATE = 3e-4, 1e-2  # AdamW on small models works between these; outside, the rate is the first suspect

CHARACTER_VOCAB = 256  # so small a vocabulary can only be characters or bytes
THIN_PAIRS = 10.0  # seen less often than this on average, the pair entropy reads 0.05 nats too low or worse
NEAR = 0.03  # within 3% of a landmark counts as at it


@dataclass(frozen=True)
class Facts:
    """What the coach must know of a run beside its records. train_tokens is the size of the corpus in tokens."""

    vocab_size: int
    n_params: int
    train_tokens: int
    steps: int
    warmup_steps: int
    lr: float
    dropout: float
    eval_interval: int


@dataclass(frozen=True)
class Remark:
    """One thing seen: a code for programs, the step it is about, and for people what is seen and what to change."""

    code: str
    step: int
    severity: str  # "info" or "warning"
    text: str
    remedy: str


@dataclass(frozen=True)
class Curves:
    """What the rules look at, taken from the records once. Arrays: R train losses, E evaluations."""

    step: np.ndarray  # (R,)
    train: np.ndarray  # (R,) finite
    grad_norm: np.ndarray  # (R,) NaN where absent
    eval_step: np.ndarray  # (E,)
    val: np.ndarray  # (E,) finite
    train_at_eval: np.ndarray  # (E,) train loss averaged around each evaluation
    val_noise: float  # standard deviation of one evaluation
    train_noise: float  # standard deviation of one train loss
    last_step: int
    tokens: float  # seen so far, repeats included
    broken_step: int | None  # the first step with a loss that is not finite


# ---- what one loss means ----


def meaning(val_loss: float, landmarks: Landmarks) -> str:
    """A loss in nats per token, Landmarks -> what it means for this vocabulary, in a sentence or three."""
    if not math.isfinite(val_loss):
        return f"The loss is {val_loss}: training has broken down and the weights are of no use."
    words = [place(val_loss, landmarks), unsureness(val_loss, landmarks)]
    if landmarks.mean_pair_count is not None and landmarks.mean_pair_count < THIN_PAIRS:
        words.append(
            f"The pair landmark ({landmarks.bigram:.2f}) reads too low here: the text shows each pair of tokens only "
            f"{landmarks.mean_pair_count:.1f} times on average, so staying above it is no fault."
        )
    return " ".join(words)


def place(loss: float, landmarks: Landmarks) -> str:
    """A loss -> where it stands among the landmarks."""
    uniform, unigram, bigram = landmarks.uniform, landmarks.unigram, landmarks.bigram
    if loss > uniform * (1 + NEAR):
        return f"{loss:.2f} is worse than blind guessing (ln V = {uniform:.2f}): the model is sure of wrong things."
    if loss > unigram * (1 + NEAR):
        return between_uniform_and_unigram(loss, uniform, unigram)
    if loss > unigram * (1 - NEAR) and loss > bigram:
        return f"{loss:.2f} is what token frequencies alone give ({unigram:.2f}): it knows which tokens are common."
    if loss > bigram * (1 + NEAR):
        share = (unigram - loss) / (unigram - bigram)
        return (
            f"{loss:.2f} is {share:.0%} of the way from token frequencies ({unigram:.2f}) to token pairs "
            f"({bigram:.2f}): it is learning which token follows which."
        )
    if loss >= bigram * (1 - NEAR):  # >=: both may be 0
        return f"{loss:.2f} is what token pairs alone give ({bigram:.2f}): it knows which token follows which."
    return below_bigram(loss, landmarks)


def between_uniform_and_unigram(loss: float, uniform: float, unigram: float) -> str:
    """A loss above the unigram entropy -> how far it is from knowing nothing."""
    share = (uniform - loss) / (uniform - unigram)
    if share < 0.1:
        return f"{loss:.2f} is close to ln V = {uniform:.2f}: the model knows nothing yet."
    return (
        f"{loss:.2f} is {share:.0%} of the way from knowing nothing ({uniform:.2f}) to token frequencies "
        f"({unigram:.2f}): it is learning which tokens are common."
    )


def below_bigram(loss: float, landmarks: Landmarks) -> str:
    """A loss below the bigram entropy -> what the longer context is used for, roughly."""
    share = loss / landmarks.bigram
    start = f"{loss:.2f} is {share:.0%} of what token pairs alone give ({landmarks.bigram:.2f})"
    if landmarks.uniform > math.log(CHARACTER_VOCAB):
        return f"{start}: it uses more context than one token."
    # The steps below are where small character models of plays and verse usually stand; a rough guide, no law.
    if share > 0.8:
        return f"{start}: it uses a few letters of context. Expect the sound of the language, few real words."
    if share > 0.65:
        return f"{start}: it is learning to spell. Expect many real words, little sense between them."
    return f"{start}: most words are spelled. Expect phrases that hold together for a line or so."


def unsureness(loss: float, landmarks: Landmarks) -> str:
    """A loss -> its perplexity in words, and bits per byte where the bytes of a token are known."""
    vocab_size = round(math.exp(landmarks.uniform))
    text = f"It is as unsure as between {math.exp(min(loss, 50.0)):,.1f} equally likely tokens of {vocab_size:,}"
    if landmarks.mean_token_bytes is None:
        return text + "."
    return f"{text}, about {loss / math.log(2) / landmarks.mean_token_bytes:.2f} bits for each byte of text."


# ---- the curves, taken from the records once ----


def read_curves(records: list[Record]) -> Curves:
    """Records -> Curves."""
    step, train = series(records, "train_loss")
    eval_step, val = series(records, "val_loss")
    grad = dict(zip(*series(records, "grad_norm"), strict=True))
    _, tokens = series(records, "tokens")
    return Curves(
        step=step,
        train=train,
        grad_norm=np.array([grad.get(s, math.nan) for s in step]),
        eval_step=eval_step,
        val=val,
        train_at_eval=train_around(eval_step, step, train),
        val_noise=evaluation_noise(val),
        train_noise=difference_noise(train),
        last_step=records[-1]["step"] if records else 0,
        tokens=float(tokens.max(initial=0.0)),
        broken_step=first_broken(records),
    )


def train_around(eval_step: np.ndarray, step: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Steps of evaluations (E,), steps and train losses (R,) -> train loss near each evaluation (E,).

    The mean over a quarter of the interval on both sides: on both, so that an early steep fall does not look like a
    gap between train and validation loss.
    """
    if len(train) == 0:
        return np.full(len(eval_step), math.nan)
    reach = np.median(np.diff(eval_step)) / 4 if len(eval_step) > 1 else 0.0
    low = np.minimum(np.searchsorted(step, eval_step - reach, side="left"), len(train) - 1)
    high = np.maximum(np.searchsorted(step, eval_step + reach, side="right"), low + 1)
    sums = np.concatenate([[0.0], np.cumsum(train)])
    return (sums[high] - sums[low]) / (high - low)


def evaluation_noise(val: np.ndarray) -> float:
    """Validation losses (E,) -> standard deviation of one of them, at least NOISE_FLOOR of the lowest.

    From third differences, whose variance is 20 times that of one value: a smooth bend leaves almost nothing in them.
    """
    floor = NOISE_FLOOR * val.min(initial=math.inf) if len(val) else 0.0
    if len(val) < 5:
        return floor
    late = np.diff(val, 3)[-20:]  # late ones: the first fall bends too sharply
    noise = float(np.sqrt(np.median(late**2) / 0.455 / 20))  # 0.455: median of a squared unit normal
    return max(floor, noise * (1 + 2 / len(late)))  # a few differences may all happen to be small


def difference_noise(values: np.ndarray) -> float:
    """Values (R,) -> standard deviation of one around a slowly moving mean, from the differences of neighbours."""
    if len(values) < 2:
        return 0.0
    return float(1.4826 * np.median(np.abs(np.diff(values))) / math.sqrt(2))  # 1.4826: MAD to standard deviation


def first_broken(records: list[Record]) -> int | None:
    """Records -> the first step whose train or validation loss is NaN or infinite, or None."""
    losses = ((r["step"], r.get(key)) for r in records for key in ("train_loss", "val_loss"))
    return next((step for step, loss in losses if is_number(loss) and not math.isfinite(loss)), None)


def recent_count(curves: Curves) -> int:
    """How many of the last records count as "now"."""
    return max(RECENT_RECORDS, int(RECENT_SHARE * len(curves.train)))


def recent_loss(curves: Curves) -> float:
    """The median of the latest train losses."""
    return float(np.median(curves.train[-recent_count(curves) :]))


def median_noise(curves: Curves) -> float:
    """Standard deviation of the median that `recent_loss` takes."""
    return 1.25 * curves.train_noise / math.sqrt(recent_count(curves))  # 1.25: median against mean of a normal


# ---- the rules ----


def overfitting(curves: Curves, landmarks: Landmarks, facts: Facts) -> Remark | None:
    """Validation loss above its best for three evaluations, beyond noise, while train loss falls."""
    val, train = curves.val, curves.train_at_eval
    if len(val) <= OVERFIT_EVALS:
        return None
    best = int(np.argmin(val[:-OVERFIT_EVALS]))
    # The lowest of many noisy values is too low; the mean with its neighbours is fairer and costs a V-shape little.
    base = max(val[best], min(val[max(best - 1, 0) : best + 2].mean(), val[best] + 2 * curves.val_noise))
    risen = (val[-OVERFIT_EVALS:] > base + NOISE_MARGIN * curves.val_noise).all()
    if not risen or not train[-1] < train[best]:
        return None
    step = int(curves.eval_step[best])
    return Remark(
        code="overfit",
        step=step,
        severity="warning",
        text=f"Validation loss was lowest at step {step:,} ({val[best]:.3f}) and has risen to {val[-1]:.3f}, while "
        f"train loss fell from {train[best]:.3f} to {train[-1]:.3f}: the model learns its text by heart.",
        remedy="Stop near the best: --train.patience=3. To go lower, give more text, "
        f"raise --model.dropout (now {facts.dropout:g}) or take a smaller model (--model.n_layer, --model.n_embd).",
    )


def rate_too_high(curves: Curves, landmarks: Landmarks, facts: Facts) -> Remark | None:
    """A loss that broke, ended above where it began or above ln V, rose from its lowest, or spiked again and again."""
    seen = rate_trouble(curves, landmarks, facts)
    if seen is None:
        return None
    step, text = seen
    return Remark(
        code="rate_too_high",
        step=step,
        severity="warning",
        text=text,
        remedy=f"Lower --train.lr (now {facts.lr:g}) to a third, {facts.lr / 3:.1g}, and --train.muon_lr as well if "
        "the optimizer is Muon; "
        f"if it happens early, lengthen --train.warmup_steps (now {facts.warmup_steps:,}).",
    )


def rate_trouble(curves: Curves, landmarks: Landmarks, facts: Facts) -> tuple[int, str] | None:
    """-> (step, text) of the gravest sign that the learning rate is too high, or None."""
    if curves.broken_step is not None:
        return curves.broken_step, f"The loss is not a finite number at step {curves.broken_step:,}: training diverged."
    if len(curves.train) < RECENT_RECORDS + 3:
        return None
    now, noise = recent_loss(curves), NOISE_MARGIN * median_noise(curves)
    start = float(np.median(curves.train[:3]))
    warm = curves.last_step > facts.warmup_steps
    if warm and now > ABOVE_START * start + noise:
        return curves.last_step, f"Train loss is {now:.3f}, above the {start:.3f} it began with."
    if warm and now > ABOVE_START * landmarks.uniform + noise and now > start / ABOVE_START:
        return (
            curves.last_step,
            f"Train loss is {now:.3f}, above the {landmarks.uniform:.3f} of knowing nothing (ln V).",
        )
    lowest_step, lowest = lowest_stretch(curves)
    if now > RATE_RISE * lowest + noise:
        return lowest_step, (
            f"Train loss was {lowest:.3f} around step {lowest_step:,} and is {now:.3f} now: training diverged."
        )
    spikes = find_spikes(curves)
    if len(spikes) >= REPEATED_SPIKES:
        return int(curves.step[spikes[0]]), f"Train loss has jumped up {len(spikes)} times since this step."
    return None


def lowest_stretch(curves: Curves) -> tuple[int, float]:
    """-> (step, loss) of the stretch of records with the lowest median train loss."""
    count = recent_count(curves)
    blocks = [curves.train[i : i + count] for i in range(0, len(curves.train) - count + 1, count)]
    medians = [float(np.median(block)) for block in blocks]
    lowest = int(np.argmin(medians))
    return int(curves.step[lowest * count + count // 2]), medians[lowest]


def no_learning(curves: Curves, landmarks: Landmarks, facts: Facts) -> Remark | None:
    """Loss at or above the unigram entropy after warm-up and a fair share of the steps, and not falling."""
    fair = facts.warmup_steps + FAIR_SHARE * max(facts.steps - facts.warmup_steps, 0)
    if curves.last_step < fair or len(curves.train) < RECENT_RECORDS or rate_too_high(curves, landmarks, facts):
        return None
    loss = min(recent_loss(curves), curves.val.min(initial=math.inf))
    if loss < landmarks.unigram * (1 - UNIGRAM_NEAR) or is_falling(curves):
        return None
    return Remark(
        code="no_learning",
        step=curves.last_step,
        severity="warning",
        text=f"After {curves.last_step:,} of {facts.steps:,} steps the loss is {loss:.3f}, no better than token "
        f"frequencies alone ({landmarks.unigram:.3f}), and it is not falling.",
        remedy=no_learning_remedy(facts.lr),
    )


def is_falling(curves: Curves) -> bool:
    """True when the last quarter of the train losses lies clearly below the quarter before."""
    _, _, before, now = np.array_split(curves.train, 4)
    return bool(np.median(now) < np.median(before) * (1 - STILL_FALLING))


def no_learning_remedy(lr: float) -> str:
    """The learning rate -> what to try first."""
    if lr < LOW_RATE:
        return f"Raise --train.lr (now {lr:g}) to {LOW_RATE:g} or more."
    if lr > HIGH_RATE:
        return f"Lower --train.lr (now {lr:g}) to {HIGH_RATE:g} or less."
    return f"Look at the text first (is it shuffled or random?), then try --train.lr={lr * 3:.1g} and {lr / 3:.1g}."


def spikes(curves: Curves, landmarks: Landmarks, facts: Facts) -> Remark | None:
    """A train loss far above the recent ones, together with a jump of the gradient norm."""
    found = find_spikes(curves)
    if not found:
        return None
    worst = max(found, key=lambda i: curves.train[i] - np.median(curves.train[i - SPIKE_WINDOW : i]))
    usual = float(np.median(curves.train[worst - SPIKE_WINDOW : worst]))
    times = "once" if len(found) == 1 else f"{len(found)} times, most"
    return Remark(
        code="spike",
        step=int(curves.step[worst]),
        severity="warning" if len(found) >= REPEATED_SPIKES else "info",
        text=f"Train loss jumped {times} at step {int(curves.step[worst]):,}, from {usual:.3f} to "
        f"{curves.train[worst]:.3f}{grad_text(curves, worst)}.",
        remedy="One or two that heal by themselves do no harm. If they come back, "
        f"lower --train.lr (now {facts.lr:g}) or --train.grad_clip, and look at the text around there.",
    )


def find_spikes(curves: Curves) -> list[int]:
    """-> indices of the records where a spike begins; those within a window of the last are the same spike."""
    loss, window = curves.train, SPIKE_WINDOW
    if len(loss) <= window:
        return []
    past = np.lib.stride_tricks.sliding_window_view(loss, window)[:-1]  # row i: the window before record i + window
    usual = np.median(past, axis=1)
    spread = 1.4826 * np.median(np.abs(past - usual[:, None]), axis=1)
    jump = loss[window:] - usual
    odd = np.flatnonzero((jump > SPIKE_SCORE * spread) & (jump > SPIKE_SHARE * usual)) + window
    begins = []
    for i in odd:
        if grad_jumped(curves, i) and (not begins or i - begins[-1] > window):
            begins.append(int(i))
    return begins


def grad_jumped(curves: Curves, i: int) -> bool:
    """True when the gradient norm jumped at record i or just before it; true as well where none was recorded."""
    now, past = curves.grad_norm[i - 1 : i + 1], curves.grad_norm[i - SPIKE_WINDOW : i - 1]
    if np.isnan(now).all() or np.isnan(past).all():
        return True
    return bool(np.nanmax(now) > SPIKE_GRAD * np.nanmedian(past))


def grad_text(curves: Curves, i: int) -> str:
    """Record i -> its gradient norm beside the usual one, or nothing where none was recorded."""
    past = curves.grad_norm[i - SPIKE_WINDOW : i]
    if np.isnan(curves.grad_norm[i]) or np.isnan(past).all():
        return ""
    return f" (gradient norm {curves.grad_norm[i]:.2g}, usually {np.nanmedian(past):.2g})"


def plateau(curves: Curves, landmarks: Landmarks, facts: Facts) -> Remark | None:
    """No gain in validation loss over half of the planned steps."""
    span = PLATEAU_SPAN * facts.steps
    age = curves.last_step - curves.eval_step
    before, now = curves.val[(age >= span / 2) & (age < span)], curves.val[age < span / 2]
    warm = curves.last_step - span >= facts.warmup_steps
    if not warm or min(len(before), len(now)) < PLATEAU_EVALS or overfitting(curves, landmarks, facts):
        return None
    gain = before.mean() - now.mean()
    doubt = 2 * curves.val_noise * math.sqrt(1 / len(before) + 1 / len(now))
    if gain + doubt > PLATEAU_GAIN * before.mean() or no_learning(curves, landmarks, facts):
        return None
    if rate_too_high(curves, landmarks, facts):
        return None
    return Remark(
        code="plateau",
        step=int(curves.last_step - span),
        severity="info",
        text=f"Validation loss has hardly moved since step {int(curves.last_step - span):,}: "
        f"{before.mean():.3f} then, {now.mean():.3f} now.",
        remedy="More steps will not help. Try a larger model (--model.n_layer, --model.n_embd) or more text; "
        "to save time, stop early with --train.patience=5.",
    )


def exhausted_data(curves: Curves, landmarks: Landmarks, facts: Facts) -> Remark | None:
    """More than four epochs over the corpus, and validation loss draws away from train loss."""
    epochs = curves.tokens / max(facts.train_tokens, 1)
    gap = curves.val - curves.train_at_eval
    if epochs <= MANY_EPOCHS or len(gap) < 6 or not np.isfinite(gap).all():
        return None
    third = len(gap) // 3
    early, late = float(gap[third : 2 * third].mean()), float(gap[-third:].mean())
    beyond = max(GAP_SHARE * curves.val[-1], NOISE_MARGIN * curves.val_noise)
    if late - early < beyond or late < beyond:
        return None
    return Remark(
        code="exhausted_data",
        step=curves.last_step,
        severity="info",
        text=f"The run has read its text {epochs:.1f} times (epochs). Beyond about {MANY_EPOCHS:.0f} a repeat teaches "
        f"less and less: the gap between validation and train loss grew from {early:.3f} to {late:.3f}.",
        remedy="More text helps most. Otherwise fewer --train.steps, a smaller model, "
        f"or a higher --model.dropout (now {facts.dropout:g}).",
    )


def still_improving(curves: Curves, landmarks: Landmarks, facts: Facts) -> Remark | None:
    """A finished run whose validation loss fell clearly in its last fifth."""
    val = curves.val
    if curves.last_step < FINISHED * facts.steps or len(val) < 4 or val[-1] > val.min():
        return None
    then = float(np.interp((1 - IMPROVING_SPAN) * curves.last_step, curves.eval_step, val))
    noise = NOISE_MARGIN * curves.val_noise * math.sqrt(2)
    if then - val[-1] < max(IMPROVING_GAIN * then, noise):
        return None
    return Remark(
        code="still_improving",
        step=curves.last_step,
        severity="info",
        text=f"Validation loss was still falling at the end: {then:.3f} to {val[-1]:.3f} in the last fifth.",
        remedy=f"Train longer: --train.steps={2 * facts.steps}.",
    )


RULES = (rate_too_high, no_learning, overfitting, spikes, exhausted_data, plateau, still_improving)


def remarks(records: list[Record], landmarks: Landmarks, facts: Facts) -> list[Remark]:
    """Records, Landmarks, Facts -> the Remarks that apply, warnings first. A healthy run gets none."""
    curves = read_curves(records)
    found = [rule(curves, landmarks, facts) for rule in RULES]
    return sorted((r for r in found if r is not None), key=lambda r: r.severity != "warning")

"""Arms of different shapes -> arms that spend the same: equal steps, tokens, FLOPs or seconds, and if asked equal parameters.

`budget = { steps = 300 }` gives every arm 300 updates; tokens, flops and seconds likewise, turned into whole steps of each
arm. `{ steps = 300, match = "flops" }` gives the baseline 300 steps and the others as many as its FLOPs buy. `parameters =
"n_ff"` first solves each arm's feed-forward width (or n_embd) for the baseline's number of weights. What cannot be met exactly
is met to the nearest, and the report shows what each arm really spent. Counts are of a model built on torch's meta device:
no weights, no time, and no second bookkeeping that could disagree with the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kobza.config import ModelConfig, require
from kobza.lab.design import Arm, Budget, named
from kobza.model import GPT, n_parameters, training_flops_per_token

MOST_STEPS = 10_000_000
WIDEST = 1 << 20


@dataclass(frozen=True)
class Cost:
    """What a model of a config has and what training it takes for each token."""

    parameters: int
    flops_per_token: int


@functools.lru_cache(maxsize=4096)
def cost(config: ModelConfig) -> Cost:
    """Parameters and training FLOPs a token, counted on the model itself, without its memory."""
    with torch.device("meta"):
        model = GPT(config)
    return Cost(n_parameters(model), training_flops_per_token(model))


# ---- parameters ----------------------------------------------------------------------------------------------------


def match_parameters(arms: list[Arm], width: str) -> list[Arm]:
    """The arms, each with `width` solved for the number of parameters of the baseline of its size."""
    targets = {arm.size: cost(arm.config().model).parameters for arm in arms if arm.is_baseline}
    return [arm if arm.is_baseline else solve_width(arm, width, targets[arm.size]) for arm in arms]


def solve_width(arm: Arm, width: str, target: int) -> Arm:
    """The arm with the width whose number of parameters is nearest to the target."""
    model = arm.config().model
    none = f"arm {arm.label!r}: its pattern {model.pattern!r} has no feed-forward whose n_ff could be solved; "
    require(width != "n_ff" or "F" in model.pattern, none + 'give budget.parameters = "n_embd"')
    # whole heads of an even width; below that every width will do
    stride = 2 * model.n_head if width == "n_embd" and not arm.values["model"].get("head_dim") else 1

    def at(n: int) -> Arm:
        return arm.with_value("model", width, n * stride)

    def count(n: int) -> int:
        return cost(at(n).config().model).parameters

    low, high = 1, 2
    idle = count(low) == count(high)
    require(not idle, f"arm {arm.label!r}: model.{width} does not change its number of parameters; match by another")
    while count(high) < target and high * stride < WIDEST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    best = min((low, high), key=lambda n: abs(count(n) - target))
    off = count(best) / target - 1
    require(
        abs(off) < 0.2,
        f"arm {arm.label!r}: no model.{width} gives {target:,} parameters; the nearest, {best * stride}, has {count(best):,}",
    )
    return at(best)


# ---- steps ---------------------------------------------------------------------------------------------------------


def match_steps(arms: list[Arm], budget: Budget, seconds_per_step: Callable[[Arm], float]) -> list[Arm]:
    """The arms, each with the train.steps that its share of the budget buys; the schedule stretches over them.
    `seconds_per_step` is asked only where seconds are to match."""

    def price(arm: Arm) -> float:
        """What one step of the arm costs in the matched quantity."""
        config = arm.config()
        if budget.match == "steps":
            return 1.0
        if budget.match == "tokens":
            return config.batch_tokens
        if budget.match == "flops":
            return config.batch_tokens * cost(config.model).flops_per_token
        return seconds_per_step(arm)

    prices = {arm.label: price(arm) for arm in arms}
    amounts = {
        arm.size: budget.amount * (prices[arm.label] if budget.unit != budget.match else 1.0)
        for arm in arms
        if arm.is_baseline
    }
    matched = []
    for arm in arms:
        steps = round(amounts[arm.size] / prices[arm.label])
        require(
            1 <= steps <= MOST_STEPS,
            f"arm {arm.label!r}: the budget of {amounts[arm.size]:,.6g} {budget.match} gives {steps:,} steps at "
            f"{prices[arm.label]:,.6g} each; it must give 1 to {MOST_STEPS:,}",
        )
        matched.append(arm.with_value("train", "steps", steps))
    return matched


def check_arms(arms: list[Arm]) -> None:
    """Refuse an arm that its budget made invalid or that no model can be built of."""
    for arm in arms:
        with named(arm):
            cost(arm.config().model)

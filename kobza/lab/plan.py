"""A design -> the runs it takes: texts tokenised, widths and steps solved, every run named by its hash. Nothing is trained here.

All that is wrong with a design is said by the end of this, before the first run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kobza.checkpoint import write_file
from kobza.config import DataConfig, RunConfig, require, to_dict
from kobza.lab.budget import check_arms, cost, match_parameters, match_steps
from kobza.lab.design import Arm, Design, arms_of, named
from kobza.lab.store import TokenSet, Trial, digest, held_out_bytes, source_digest, text_digest, token_set, trial_hash
from kobza.tokenizer import Tokenizer


@dataclass(frozen=True)
class Plan:
    """The arms as they will run, their runs, and what a report says of the text."""

    arms: list[Arm]
    trials: dict[tuple[str, str], dict[int, Trial]]  # (size, arm) -> seed -> run
    facts: dict[str, Any]

    def in_order(self) -> list[Trial]:
        """Every run once, all arms of a seed before the next seed: what a kill leaves is then paired."""
        rows = [list(runs.values()) for runs in self.trials.values()]
        found = [row[i] for i in range(max(map(len, rows))) for row in rows if i < len(row)]
        return list({trial.hash: trial for trial in found}.values())


def make_plan(
    design: Design,
    text: list[str],
    out: Path,
    device: str,
    seconds_per_step: Callable[[Trial], float],
    given_tokenizer: Callable[[DataConfig], Tokenizer | None],
    check_training: Callable[[RunConfig], None],
) -> Plan:
    """Solve the budget of every arm and name its runs. `seconds_per_step` measures where seconds are to be equal;
    `check_training` refuses a config that could not begin to train."""
    arms = arms_of(design)
    tokens = {arm.label: arm_tokens(arm, text, out, given_tokenizer) for arm in arms}
    check_measure(design, tokens)
    first = arms[0]
    n_bytes = held_out_bytes(design.eval_bytes, tokens[first.label], first.config().data)
    arms = [arm.with_value("model", "vocab_size", tokens[arm.label].vocab_size) for arm in arms]
    check_arms(arms)
    if design.budget.parameters:
        arms = match_parameters(arms, design.budget.parameters)
    for arm in arms:
        with named(arm):
            check_training(arm.config())

    def trial(arm: Arm, seed: int) -> Trial:
        config, own = arm.config(seed), tokens[arm.label]
        return Trial(
            hash=trial_hash(config, own, n_bytes, design.evaluations, device),
            label=arm.label,
            seed=seed,
            values=to_dict(config),
            tokens=own.folder,
            eval_bytes=n_bytes,
            evaluations=design.evaluations,
            device=device,
            flops=config.train.steps * config.batch_tokens * cost(config.model).flops_per_token,
        )

    arms = match_steps(arms, design.budget, lambda arm: calibrated(out, trial(arm, 0), seconds_per_step))
    trials = {(arm.size, arm.name): {seed: trial(arm, seed) for seed in seeds_of(design, arm)} for arm in arms}
    check_variation(trials)
    facts = {"eval_bytes": n_bytes, "text": text_facts(text, tokens[first.label])}
    return Plan(arms, trials, facts)


def seeds_of(design: Design, arm: Arm) -> tuple[int, ...]:
    """The seeds of an arm: the design's, shared by all; an A/A control's equal arms get seeds of their own."""
    if not design.is_control:
        return design.seeds
    n = len(design.seeds) * design.repeats
    first = min(design.seeds) + arm.levels[0] * n
    return tuple(range(first, first + n))


def arm_tokens(
    arm: Arm, text: list[str], out: Path, given_tokenizer: Callable[[DataConfig], Tokenizer | None]
) -> TokenSet:
    """The text as the arm's tokens."""
    config = arm.config()
    return token_set(out, text, config, given_tokenizer(config.data))


def check_measure(design: Design, tokens: dict[str, TokenSet]) -> None:
    """Refuse nats a token where a token is not the same thing in every arm."""
    kinds = {found.digest for found in tokens.values()}
    require(
        len(kinds) == 1 or design.measure == "val_bpb",
        f"{design.name}: the arms have {len(kinds)} different tokenizations, whose nats a token do not compare; set measure = "
        f'"val_bpb"',
    )


def check_variation(trials: dict[tuple[str, str], dict[int, Trial]]) -> None:
    """Refuse two arms that are the same runs: a factor without effect."""
    seen: dict[str, Trial] = {}
    for trial in (trial for runs in trials.values() for trial in runs.values()):
        twin = seen.setdefault(trial.hash, trial)
        require(
            twin is trial,
            f"arms {twin.label!r} and {trial.label!r} have the same configuration: the factor has no effect; give it another "
            f"level or leave it out",
        )


def calibrated(out: Path, trial: Trial, measure: Callable[[Trial], float]) -> float:
    """Seconds a step of an arm, measured once: a design that goes on must count the same steps again."""
    values = {**trial.values, "train": {**trial.values["train"], "steps": 0}}
    path = out / "calibration" / f"{digest([values, trial.tokens, trial.device, source_digest()])}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        seconds = measure(replace(trial, values={**values, "train": {**values["train"], "steps": 1000}}))
        write_file(path, json.dumps({"seconds_per_step": seconds, "label": trial.label}))
    return json.loads(path.read_text(encoding="utf-8"))["seconds_per_step"]


def text_facts(text: list[str], tokens: TokenSet) -> dict[str, Any]:
    """What a report says of the text."""
    names = [Path(path).name for path in text]
    return {"names": names, "bytes": tokens.n_bytes, "tokens": tokens.n_tokens, "sha256": text_digest(text)}

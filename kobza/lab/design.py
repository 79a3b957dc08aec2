"""A design file -> its arms: which configurations are compared, over which seeds, at what budget, by what measure.

A design is a TOML file:

    base = "tiny"                         a preset, or a .toml beside the design
    title = "LayerNorm or RMSNorm?"       the question
    text = ["poems.txt"]                  beside the design; default: the built-in text
    seeds = 5                             or a list of them
    budget = { steps = 300 }              or tokens, flops, seconds; see budget.py
    measure = "val_loss"                  or val_bpb
    plan = "one-at-a-time"                or grid, paired
    [set]                                 for every arm: "train.lr" = 3e-3
    [factors]                             norm = [{ "model.norm" = "rmsnorm" }, { "model.norm" = "layernorm" }]
    [sizes]                               small = { "model.n_embd" = 64 }

The first level of a factor is its baseline. An arm is a whole RunConfig; arms share seeds, and with them the data order and,
where shapes allow, the first weights: the comparisons are paired. Everything a person can get wrong here is said before any
training. Budgets are budget.py's business, runs are runner.py's; this file needs no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kobza.config import (
    SECTIONS,
    InputError,
    RunConfig,
    check_keys,
    flatten,
    load_toml,
    nearest,
    preset,
    require,
    run_from_dict,
    without_idle,
)

DESIGNS = Path(__file__).parent / "designs"
PLANS = ("one-at-a-time", "grid", "paired")
MEASURES = ("val_loss", "val_bpb")
QUANTITIES = ("steps", "tokens", "flops", "seconds")  # what a budget can hold equal
WIDTHS = ("n_ff", "n_embd")  # what is solved for an equal number of parameters
BASELINE = "baseline"
MOST = 10_000  # seeds, and evaluations of a run

# Settings that decide nothing here: the lab keeps no checkpoints, looks at its own places and spends the whole budget.
WITHOUT_EFFECT = {
    "train.steps": "the budget sets it",
    "train.eval_interval": "give `evaluations`",
    "train.eval_tokens": "give `eval_bytes`",
    "train.checkpoint_interval": "the lab keeps no checkpoints",
    "train.keep": "the lab keeps no checkpoints",
    "train.patience": "every run spends its whole budget",
    "train.stop_at": "every run spends its whole budget",
    "model.vocab_size": "the tokenizer sets it",
}


@dataclass(frozen=True)
class Budget:
    """What every arm may spend: `amount` of `unit`, matched in `match`; `parameters` names the width solved for, or is empty."""

    unit: str = "steps"
    amount: float = 0.0
    match: str = "steps"
    parameters: str = ""

    def words(self) -> str:
        """ "equal FLOPs and parameters"."""
        name = "FLOPs" if self.match == "flops" else self.match
        return f"equal {name}{' and parameters' * bool(self.parameters)}"


@dataclass(frozen=True)
class Level:
    """One setting of a factor: a name and {"model.norm": "layernorm", ...}; `alone`: its name where no factor's stands beside."""

    name: str
    settings: dict[str, Any]
    alone: str


@dataclass(frozen=True)
class Arm:
    """One configuration to be run over all seeds. `values` is the nested dict that makes its RunConfig."""

    name: str
    size: str  # "" where the design has no sizes
    levels: tuple[int, ...]  # place in each factor; all 0: the baseline
    values: dict[str, Any]

    @property
    def is_baseline(self) -> bool:
        """Whether every factor stands at its first level."""
        return not any(self.levels)

    @property
    def label(self) -> str:
        """Its name, with the size where there are several."""
        return sized(self.name, self.size)

    def config(self, seed: int = 0) -> RunConfig:
        """Its RunConfig under a seed."""
        with named(self):
            return run_from_dict({**self.values, "seed": seed}, f"arm {self.label!r}")

    def with_value(self, section: str, key: str, value: Any) -> Arm:
        """The arm with one value changed."""
        return replace(self, values={**self.values, section: {**self.values.get(section, {}), key: value}})


def sized(name: str, size: str) -> str:
    """An arm's name with its size; "" where the design has no sizes."""
    return f"{name} ({size})" if size else name


@contextmanager
def named(arm: Arm) -> Iterator[None]:
    """Put the arm's name before a complaint that does not have it."""
    try:
        yield
    except InputError as error:
        message, name = str(error), f"arm {arm.label!r}"
        raise InputError(message if message.startswith(name) else f"{name}: {message}") from None


@dataclass(frozen=True)
class Design:
    """A checked design file."""

    name: str
    title: str
    folder: Path
    base: dict[str, Any]
    base_name: str
    text: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: Budget
    measure: str
    at: str
    plan: str
    alpha: float
    evaluations: int
    eval_bytes: int
    factors: dict[str, list[Level]]
    sizes: dict[str, dict[str, Any]]
    repeats: int  # of an A/A control; 0: none

    @property
    def is_control(self) -> bool:
        """Whether both arms are the same on purpose."""
        return self.repeats > 0


# ---- read ----------------------------------------------------------------------------------------------------------


def find_design(word: str) -> Path:
    """The path of a design: a file, or the name of one that comes with kobza."""
    path = Path(word)
    if path.suffix == ".toml" or path.exists():
        return path
    names = sorted(p.stem for p in DESIGNS.glob("*.toml"))
    require(word in names, f"no design {word!r}{nearest(word, names)}; or give a .toml file")
    return DESIGNS / f"{word}.toml"


def read_design(path: Path) -> Design:
    """A design file, checked, with its base loaded."""
    raw = load_toml(path)
    known = (
        "base title text seeds budget measure at plan alpha evaluations eval_bytes control repeats set factors sizes"
    )
    for key in raw:
        require(key in known.split(), f"{path}: unknown key {key!r}{nearest(key, known.split())}")
    where = str(path)
    base_name = checked(raw, "base", "tiny", str, where)
    base = load_toml(path.parent / base_name) if base_name.endswith(".toml") else preset(base_name)
    common = settings(table(raw, "set", where), f"{where} [set]")
    control = raw.get("control")
    require(control in (None, "A/A"), f'{where}: control is {control!r}; the one control is "A/A", two equal arms')
    require(
        control is None or "factors" not in raw, f"{where}: an A/A control compares equal arms; leave [factors] out"
    )
    require(control is not None or "repeats" not in raw, f'{where}: repeats has no effect without control = "A/A"')
    sizes = {name: settings(v, f"{where} [sizes] {name}") for name, v in table(raw, "sizes", where).items()}
    require(control is None or not sizes, f"{where}: sizes have no effect on an A/A control; leave [sizes] out")
    design = Design(
        name=path.stem,
        title=checked(raw, "title", path.stem, str, where),
        folder=path.parent,
        base=merged(base, common),
        base_name=Path(base_name).stem,
        text=text_paths(raw.get("text", []), path),
        seeds=read_seeds(raw.get("seeds", 5), where),
        budget=read_budget(raw.get("budget"), base, where),
        measure=choice(raw, "measure", MEASURES, where),
        at=choice(raw, "at", ("last", "best"), where),
        plan=choice(raw, "plan", PLANS, where),
        alpha=float(checked(raw, "alpha", 0.05, (int, float), where)),
        evaluations=checked(raw, "evaluations", 6, int, where),
        eval_bytes=checked(raw, "eval_bytes", 40_000, int, where),
        factors=read_factors(table(raw, "factors", where), where),
        sizes=sizes,
        repeats=checked(raw, "repeats", 20, int, where) if control else 0,
    )
    check(design, where)
    return design


def check(design: Design, where: str) -> None:
    """Refuse what cannot vary, be paired or be measured."""
    require(0 < design.alpha < 1, f"{where}: alpha is {design.alpha}; it must be between 0 and 1")
    good = 0 < design.evaluations <= MOST
    require(good, f"{where}: evaluations is {design.evaluations}; it must be from 1 to {MOST:,}")
    require(design.eval_bytes > 0, f"{where}: eval_bytes is {design.eval_bytes}; it must be at least 1")
    n_sizes = len(design.sizes)
    require(n_sizes != 1, f"{where}: [sizes] has one size, so there is no trend; give two or more, or use [set]")
    if design.is_control:
        require(design.repeats >= 2, f"{where}: repeats is {design.repeats}; an A/A control needs at least 2")
        return
    n_levels = [len(levels) for levels in design.factors.values()]
    require(any(n > 1 for n in n_levels), f"{where}: no variation: give [factors] with a factor of two levels or more")
    for name, levels in design.factors.items():
        require(len(levels) > 1, f"{where}: factor {name!r} has one level, so it varies nothing; use [set]")
    require(
        design.plan != "paired" or n_levels == [2],
        f'{where}: plan "paired" compares two arms, but the factors give {" x ".join(map(str, n_levels))} levels; give one '
        f'factor of two levels, or take plan "one-at-a-time" or "grid"',
    )


def checked(raw: dict[str, Any], key: str, default: Any, kind: Any, where: str) -> Any:
    """raw[key], refused unless of the kind."""
    value = raw.get(key, default)
    good = isinstance(value, kind) and not isinstance(value, bool)
    wanted = "a text" if kind is str else "a whole number" if kind is int else "a number"
    require(good, f"{where}: {key} is {value!r}; it must be {wanted}")
    return value


def choice(raw: dict[str, Any], key: str, known: tuple[str, ...], where: str) -> str:
    """raw[key] out of the known words; the first is the default."""
    value = raw.get(key, known[0])
    require(value in known, f"{where}: {key} is {value!r}{nearest(str(value), list(known))}")
    return value


def table(raw: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """raw[key], a table."""
    value = raw.get(key, {})
    require(isinstance(value, dict), f"{where}: {key} is {value!r}; it must be a table [{key}]")
    return value


def text_paths(given: Any, path: Path) -> tuple[str, ...]:
    """The text's paths, beside the design unless absolute."""
    words = [given] if isinstance(given, str) else given
    good = isinstance(words, list) and all(isinstance(word, str) for word in words)
    require(good, f"{path}: text is {given!r}; it must be a list of files or folders")
    return tuple(str(path.parent / word) for word in words)


def read_seeds(given: Any, where: str) -> tuple[int, ...]:
    """5 -> (0, 1, 2, 3, 4); a list as it is."""
    whole = isinstance(given, int) and not isinstance(given, bool)
    require(not whole or given <= MOST, f"{where}: seeds is {given}; it must be at most {MOST:,}")
    seeds = tuple(range(given)) if whole else tuple(given) if isinstance(given, list) else ()
    good = whole or (
        bool(seeds) and all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**63 for s in seeds)
    )
    require(good, f"{where}: seeds is {given!r}; it must be a number of seeds or a list of whole numbers")
    require(len(seeds) >= 2, f"{where}: {len(seeds)} seed(s); a spread needs at least 2, and 5 tell more")
    twice = next((s for s in seeds if seeds.count(s) > 1), None)
    require(twice is None, f"{where}: seed {twice} stands twice; the same run again is no new evidence")
    return seeds


def read_budget(given: Any, base: dict[str, Any], where: str) -> Budget:
    """{steps = 300, match = "flops", parameters = "n_ff"} -> Budget; none: the steps of the base."""
    given = {} if given is None else given
    require(isinstance(given, dict), f"{where}: budget is {given!r}; write budget = {{ steps = 300 }}")
    known = [*QUANTITIES, "match", "parameters"]
    for key in given:
        require(key in known, f"{where}: budget has an unknown key {key!r}{nearest(key, known)}")
    units = [key for key in QUANTITIES if key in given]
    require(len(units) <= 1, f"{where}: the budget names {' and '.join(units)}; give one, and what to match in `match`")
    unit = units[0] if units else "steps"
    amount = given.get(unit, run_from_dict(base, where).train.steps)
    good = isinstance(amount, (int, float)) and not isinstance(amount, bool) and 0 < amount < math.inf
    require(good, f"{where}: budget.{unit} is {amount!r}; it must be a finite number above 0")
    require(unit != "steps" or float(amount).is_integer(), f"{where}: budget.steps is {amount}; it must be whole")
    match = given.get("match", unit)
    require(match in QUANTITIES, f"{where}: budget.match is {match!r}{nearest(str(match), list(QUANTITIES))}")
    require(
        unit == "steps" or match == unit,
        f"{where}: budget.match {match} has no effect beside {unit}; give the baseline's steps, e.g. "
        f'{{ steps = 300, match = "{match}" }}',
    )
    width = given.get("parameters", "")
    width = "n_ff" if width is True else "" if width is False else width
    require(
        width in ("", *WIDTHS),
        f"{where}: budget.parameters is {width!r}; it names the width that is solved for the baseline's count: "
        f"{' or '.join(WIDTHS)}",
    )
    return Budget(unit, float(amount), match, width)


# ---- settings and levels -------------------------------------------------------------------------------------------


def settings(given: Any, where: str) -> dict[str, Any]:
    """{"model": {"norm": "x"}} or {"model.norm": "x"} -> {"model.norm": "x"}; unknown and effectless keys are refused."""
    require(isinstance(given, dict), f'{where}: {given!r}; it must be a table like {{ "model.n_embd" = 64 }}')
    flat = flatten(given)
    for name in flat:
        section, _, key = name.partition(".")
        require(section in SECTIONS and bool(key), f"{where}: {name!r} is no setting; write model.X, data.X or train.X")
        check_keys(SECTIONS[section], {key: None}, f"{where} {section}")
        require(name not in WITHOUT_EFFECT, f"{where}: {name} has no effect in the lab: {WITHOUT_EFFECT.get(name)}")
    return flat


def merged(base: dict[str, Any], *changes: dict[str, Any]) -> dict[str, Any]:
    """A nested dict with flat settings put in, the last winning; the base is left as it was. What a change takes the effect from,
    as position=none does from rope_theta, goes from the base."""
    strong: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in itertools.chain(*(change.items() for change in changes)):
        section, _, key = name.partition(".")
        strong[section][key] = value
    kept = {section: without_idle(section, dict(base.get(section, {})), strong[section]) for section in SECTIONS}
    return {section: kept[section] | strong[section] for section in SECTIONS}


def read_factors(given: dict[str, Any], where: str) -> dict[str, list[Level]]:
    """[factors] -> {name: levels}. "model.tied" = [false, true] is the short form of a factor of one setting."""
    factors = {}
    for name, levels in flatten(given).items():
        require(isinstance(levels, list) and bool(levels), f"{where}: factor {name!r} must be a list of levels")
        read = [read_level(name, level, f"{where} factor {name!r}") for level in levels]
        names = [level.name for level in read]
        twice = next((n for n in names if names.count(n) > 1), None)
        alike = [level.settings for level in read if level.name == twice]
        why = (
            ", and they are the same: no effect; give another"
            if alike[1:] == alike[:-1]
            else "; give them a name = ..."
        )
        require(twice is None, f"{where}: factor {name!r} has two levels called {twice!r}{why}")
        factors[name] = read
    return factors


def read_level(factor: str, given: Any, where: str) -> Level:
    """One level: a table of settings with an optional name, or a bare value in the short form."""
    if not isinstance(given, dict):
        name, full = shown(given), f"{short(factor)} {shown(given)}"
        return Level(name, settings({factor: given}, where), name if isinstance(given, str) and given else full)
    flat = settings({key: value for key, value in given.items() if key != "name"}, where)
    name = given.get("name", None if flat else "as the base")
    require(name is None or isinstance(name, str), f"{where}: a level's name is {name!r}; it must be a text")
    if name is None:
        one = len(flat) == 1
        name = ", ".join(shown(v) if one else f"{k.partition('.')[2]} {shown(v)}" for k, v in flat.items())
    return Level(name, flat, name)


def shown(value: Any) -> str:
    """A value as a person writes it. shown(True) -> "yes", shown(0.003) -> "0.003", shown("") -> "none" """
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


# ---- arms ----------------------------------------------------------------------------------------------------------


def arms_of(design: Design) -> list[Arm]:
    """Every arm of the design at every size, the baseline of each size first; an invalid or idle level is refused."""
    sizes = design.sizes or {"": {}}
    if design.is_control:
        return [Arm(name, "", (i,), merged(design.base)) for i, name in enumerate(("A", "A'"))]
    found = [
        Arm(name, size, places, merged(design.base, change, *(level.settings for level in levels)))
        for size, change in sizes.items()
        for places, levels, name in combinations(design)
    ]
    check_overlap(design)
    seen: dict[RunConfig, Arm] = {}
    for arm in found:
        config = arm.config()
        twin = seen.setdefault(config, arm)
        require(
            twin is arm,
            f"arms {twin.label!r} and {arm.label!r} have the same configuration: the factor has no effect; give it another "
            f"level or leave it out",
        )
    return found


def combinations(design: Design) -> Iterator[tuple[tuple[int, ...], list[Level], str]]:
    """(place in each factor, levels, name) of every arm of a size, the baseline first."""
    factors = list(design.factors.items())
    counts = [range(len(levels)) for _, levels in factors]
    if design.plan == "grid":
        chosen = list(itertools.product(*counts))
    else:
        start = (0,) * len(factors)
        chosen = [start] + [start[:i] + (j,) + start[i + 1 :] for i, n in enumerate(counts) for j in n[1:]]
    for places in chosen:
        levels = [factors[i][1][place] for i, place in enumerate(places)]
        if len(factors) == 1:
            name = levels[0].alone
        elif design.plan == "grid":
            name = ", ".join(
                f"{short(factor)} {level.name}" for (factor, _), level in zip(factors, levels, strict=True)
            )
        else:
            moved = [f"{short(factors[i][0])}: {levels[i].name}" for i, place in enumerate(places) if place]
            name = moved[0] if moved else BASELINE
        yield places, levels, name


def short(factor: str) -> str:
    """The name of a factor without its section. short("model.tied") -> "tied" """
    section, dot, key = factor.partition(".")
    return key if dot and section in SECTIONS else factor


def check_overlap(design: Design) -> None:
    """Refuse a setting that two of size, factor and factor move: the last would silently win."""
    moved: dict[str, str] = {}
    for name, levels in design.factors.items():
        for key in {key for level in levels for key in level.settings}:
            other = moved.setdefault(key, name)
            require(
                other == name, f"{key} is moved by the factors {other!r} and {name!r}; the second would hide the first"
            )
    for size, change in design.sizes.items():
        both = sorted(set(change) & set(moved))
        require(not both, f"{both[:1]} is moved by size {size!r} and by factor {moved.get((both or [''])[0])!r}")

"""`kobza doctor parity A B`: how far A is from B, the reference that is trusted, where it begins, and what would mend it.

measure.py holds the two side by side at every station, free-running and forced, forward and backward; toggles.py looks for the
switches that make them equal. Here their answers become findings. A switch that is found is proven: without it a station is far
above the noise of the arithmetic, with it every station of the whole network is inside, forward and backward. Nothing less is
called equal: the nearest set of a search that failed is told as not equal.

Whichever of the two is a kobza model (or was read into one) has the switches. Where only B is, the search says under which switch
B would compute what A does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kobza.config import InputError, ModelConfig, nearest, require
from kobza.doctor.finding import Check, Finding, Skip
from kobza.doctor.models import subject as subjects
from kobza.doctor.models.measure import Reference, Row, compare, like, measure, pick_ids, weight_gradients
from kobza.doctor.models.search import Search, Solution, fitted, measured
from kobza.doctor.models.stations import DTYPES, Input, Tap, distance, in_dtype, kind, matched, place, prefix, run
from kobza.doctor.models.subject import Subject
from kobza.doctor.models.toggles import Base, Toggle, base_of, rebuilt, toggles
from kobza.model import GPT

MOST_TOKENS = 1024
DEEP = 4  # blocks: a deeper model is searched by its first ones, and the answer tried on all


@dataclass
class ParitySubject:
    """Two models, the second trusted; the dtypes to compare in; whether causes are looked for, and for how long a dtype."""

    a: Subject
    b: Subject
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    explain: bool = True
    seed: int = 0
    seconds: float = 60.0
    hints: bool = True  # whether the config that the reference declares may be read for values
    notes: dict[str, Any] = field(default_factory=dict)


def open_(a: str, b: str, explain: bool = True, dtype: str = "fp32,bf16", plot: Any = None) -> ParitySubject:
    """What a user names, twice, and dtypes parted by commas. `plot` is the recipe's: `plots` has what it writes."""
    wanted = tuple(word.strip() for word in dtype.split(",") if word.strip())
    for word in wanted:
        require(word in DTYPES, f"--dtype has {word!r}{nearest(word, list(DTYPES))}")
    require(bool(wanted), f"--dtype is empty; known: {', '.join(DTYPES)}")
    return ParitySubject(subjects.open_(a), subjects.open_(b), wanted, explain)


@dataclass(frozen=True)
class Step:
    """All stations after the fixes so far; the first is A as it is."""

    label: str
    rows: list[Row]

    @property
    def wrong(self) -> list[str]:
        """Stations above the noise in any way."""
        return [row.station for row in self.rows if not row.equal]


@dataclass
class Result:
    """What came of one dtype. `changed` is the model the toggles act on ("A", or "B" where only B has them, "" none);
    `mended` is it after the solution."""

    dtype: str
    reference: Reference
    steps: list[Step]
    changed: str = ""
    solution: Solution | None = None
    chosen: tuple[Toggle, ...] = ()
    firsts: dict[str, str] = field(default_factory=dict)
    remade: bool = False
    moved: nn.Module | None = None  # the model that the toggles act on, before any
    mended: GPT | None = None
    weights: list[tuple[str, float, float]] = field(
        default_factory=list
    )  # gradients of weights: error and limit, worst first

    @property
    def equal(self) -> bool:
        """Whether A is B, as given."""
        return not self.steps[0].wrong and not self.wrong_weights

    @property
    def wrong_weights(self) -> list[tuple[str, float, float]]:
        """The weights whose gradient is above the noise; only looked at where all stations are equal."""
        return [row for row in self.weights if not row[1] <= row[2]]

    @property
    def solved(self) -> bool:
        """Whether some set of fixes makes every station equal."""
        return not self.steps[-1].wrong and not self.wrong_weights


# ---- measuring -----------------------------------------------------------------------------------------------------


def module_of(subject: Subject, name: str) -> nn.Module:
    """The module inside, for its layers."""
    if subject.module is None:
        raise Skip(f"{name} is a plain callable, which shows no layers; give the nn.Module")
    return subject.module


def input_of(subject: ParitySubject, dtype: str) -> tuple[Input, int]:
    """What is run: tokens enough to leave every window, and the place from which the far probe counts (0: none)."""
    a, b = subject.a, subject.b
    room = min(a.max_seq_len, b.max_seq_len)
    spans = [width for s in (a, b) for width in s.windows or () if width and width < room]
    n_tokens = min(room, MOST_TOKENS, max(40, max(spans, default=0) + 8))
    vocab = min(a.vocab_size, b.vocab_size)
    rotary = all("rotary" in s.capabilities for s in (a, b))
    ids = pick_ids(vocab, n_tokens, subject.seed)
    return Input(ids, None, dtype, vocab), (room - n_tokens if rotary else 0)


def result_of(subject: ParitySubject, dtype: str) -> Result:
    """The comparison in a dtype, made once."""
    if dtype not in subject.notes:
        subject.notes[dtype] = make_result(subject, dtype)
    return subject.notes[dtype]


def make_result(subject: ParitySubject, dtype: str) -> Result:
    """Compare; where they differ and causes are wanted, search."""
    a, b = module_of(subject.a, "A"), module_of(subject.b, "B")
    before = subject.notes.get("fp32")
    if before is not None and before.mended is not None:  # what fp32 has found is mended first
        a, b = (before.mended, b) if before.changed == "A" else (a, before.mended)
    if subject.explain and not isinstance(a, GPT) and not isinstance(b, GPT):
        a = read(a) or a
    changed = "A" if isinstance(a, GPT) else "B" if isinstance(b, GPT) else ""
    if changed == "B":
        a, b = b, a  # the switches are B's: it is moved towards A
    here, there = matched(place(a), place(b))
    what, far = input_of(subject, dtype)
    reference = measure(b, there, what, far)
    mine = in_dtype(a, dtype)
    result = Result(dtype, reference, [Step("as given", compare(mine, reference))], changed, moved=a)
    if not result.steps[0].wrong:
        result.weights = weight_rows(mine, reference)
        return result
    if not subject.explain or not changed or not forward_wrong(result.steps[0]):
        return result
    hints = declared(b) if subject.hints else None
    explain(result, a, mine, far, hints, subject.seconds)
    return result


def forward_wrong(step: Step) -> bool:
    """Whether the forward pass differs; a gradient alone has no switch."""
    return any(row.running > row.running_limit or row.local > row.local_limit for row in step.rows)


def declared(model: nn.Module) -> ModelConfig | None:
    """The config that a model says it has, in our terms; None where it says none that we can read."""
    if isinstance(model, GPT):
        return model.config
    try:
        from kobza.formats.families import config_from_hf

        return config_from_hf(model.config.to_dict())  # type: ignore[union-attr, operator]
    except (ImportError, AttributeError, InputError, KeyError, TypeError, ValueError):
        return None


def read(model: nn.Module) -> GPT | None:
    """A foreign model as one of ours, which has the switches; None where the name table cannot read it, or what it reads computes
    something else."""
    config = declared(model)
    tensors = in_our_names(model, dict(model.named_parameters()))
    if config is None or not tensors:
        return None
    ours = rebuilt(
        Base(config, {name: value.detach().float() for name, value in with_head(config, tensors).items()}), ()
    )
    if ours is None:
        return None
    here, there = matched(place(ours), place(model))
    what = Input(pick_ids(config.vocab_size, min(40, config.max_seq_len), 0))
    return ours if all(row.equal for row in compare(ours, measure(model, there, what), backward=False)) else None


def with_head(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, and the table once more as the head where the two are one."""
    return tensors | ({"lm_head.weight": tensors["embed.weight"]} if config.tied else {})


def explain(result: Result, a: GPT, mine: nn.Module, far: int, hints: ModelConfig | None, seconds: float) -> None:
    """Search, and fill the result in."""
    whole, dtype = result.reference, result.dtype
    base = base_of(a, dtype)
    found = measured(whole, mine)
    plain = rebuilt(base, ())
    if plain is None:
        return
    step = Step("rebuilt from its config", compare(plain, whole))
    given = result.steps[0]
    result.remade = len(step.wrong) < len(given.wrong) and step.wrong != given.wrong
    reference, short = sliced(whole, base.config, a, found["windows"], far)
    search = Search(replace(base, config=short), reference, toggles(replace(base, config=short), hints, found), seconds)
    solution = search.solve()
    if not solution.sets:
        more = fitted(replace(base, config=short), reference, search.wrong(()) or [])
        if more:
            search.extend(more, seconds)
            solution = search.solve()
    result.solution = solution
    start = [step] if result.remade else []
    for chosen in [s for s in solution.sets if s] or ([solution.nearest] if solution.nearest else []):
        steps, model = walk(base, whole, chosen)
        if not result.chosen or not steps[-1].wrong:
            result.chosen, result.steps = chosen, [given, *start, *steps]
            result.mended = model if not steps[-1].wrong else None
        if not steps[-1].wrong:
            break
    else:
        if solution.sets == ((),) and result.remade and not step.wrong:
            result.steps, result.mended = [given, step], plain
    wrong = search.wrong(()) or []
    result.firsts = {t.label: next((s for s in wrong if kind(s) in t.kinds), wrong[0]) for t in result.chosen if wrong}


def sliced(
    whole: Reference, config: ModelConfig, a: nn.Module, windows: list[int], far: int
) -> tuple[Reference, ModelConfig]:
    """The reference and the config of the first blocks, enough to hold each kind of attention; a shallow model as it is."""
    if config.n_layer <= DEEP or config.ff_widths or config.omit_heads:
        return whole, config
    per = config.pattern.count("A")
    local = [(w > 0, config.is_windowed(i)) for i, w in enumerate(windows)] or [(False, False)]
    needed = max(local.index(pair_) // max(1, per) + 1 for pair_ in set(local))
    depth = max(2, needed)
    if depth >= config.n_layer:
        return whole, config
    model = prefix(whole.model, depth)
    return measure(model, like(model, whole.where), whole.what, far), replace(config, n_layer=depth)


def walk(base: Any, reference: Reference, chosen: tuple[Toggle, ...]) -> tuple[list[Step], GPT | None]:
    """The toggles one after the other, in the order of the stations they move -> a step each, and the model after all."""
    places = ["embed", "in", "attn", "mlp", "stream", "norm", "logits"]
    ordered = sorted(chosen, key=lambda t: min(places.index(k) for k in t.kinds))
    steps, model = [], None
    for n in range(1, len(ordered) + 1):
        made = rebuilt(base, tuple(ordered[:n]))
        if made is not None:
            model = made
            steps.append(Step("+ " + ordered[n - 1].label, compare(made, reference)))
    return steps, model


# ---- what the numbers look like ------------------------------------------------------------------------------------


def signs(model: nn.Module, reference: Reference) -> Iterator[tuple[str, str]]:
    """(station, words) of each stretch that is wrong: a factor, an error that grows with the position, or only in the dtype."""
    probe = reference.probes[0]
    values = run(model, like(model, reference.where), probe.what, Tap(probe.forced))
    for station in reference.stations:
        mine, theirs = values[station].double(), probe.values[station].double()
        error = distance(mine, theirs)
        if error <= probe.limits[station]:
            continue
        yield station, sign(mine, theirs, error)


def sign(mine: Tensor, theirs: Tensor, error: float) -> str:
    """What the difference of two values (B, T, C) is like. theirs = 0.5 mine -> "the reference is 0.5 times it" """
    factor = float((mine * theirs).sum() / mine.square().sum().clamp(min=1e-300))
    rest = distance(mine * factor, theirs)
    if rest < 0.02 * error:
        return f"the reference is {factor:.6g} times it, to {rest:.0e}"
    by_position = (mine - theirs).norm(dim=-1).mean(0) / theirs.norm(dim=-1).mean().clamp(min=1e-300)
    T = len(by_position)
    first, last = float(by_position[0]), float(by_position[-(T // 4) :].mean())
    if first < 1e-3 * last and T > 4:
        start = int((by_position > 0.05 * last).nonzero()[0]) if last else 0
        if start > T // 8:
            return f"none up to position {start - 1}, then {last:.1e}: what a window looks like"
        return f"none at position 0, {last:.1e} further on: what positions or scores look like"
    return f"{error:.1e} at all positions"


def tensors_apart(a: nn.Module, b: nn.Module) -> list[tuple[str, float]]:
    """(name, relative distance) of the weights that differ, most first; [] where they cannot be held against each other."""
    if isinstance(a, GPT) and isinstance(b, GPT):
        ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    else:
        ours, theirs = (in_our_names(model, dict(model.named_parameters())) for model in (a, b))
    rows = [
        (name, distance(ours[name].detach(), theirs[name].detach()))
        for name in ours
        if name in theirs and ours[name].shape == theirs[name].shape
    ]
    return sorted([row for row in rows if row[1] > 1e-6], key=lambda row: -row[1])


def weight_rows(model: nn.Module, reference: Reference) -> list[tuple[str, float, float]]:
    """(name, error, limit) of each weight's gradient that both have under one name, the furthest over its limit first. The error
    is in the largest gradient of all: a key's bias moves all scores of a query alike and has none of its own."""
    mine = in_our_names(model, weight_gradients(model, reference))
    theirs = in_our_names(reference.model, reference.weight_grads)
    noise = in_our_names(
        reference.model, {n: torch.full_like(g, reference.weight_limits[n]) for n, g in reference.weight_grads.items()}
    )
    size = max((float(grad.double().norm()) for grad in theirs.values()), default=1.0)
    rows = [
        (name, float((mine[name].double() - grad.double()).norm()) / size, float(noise[name].max()))
        for name, grad in theirs.items()
        if name in mine and mine[name].shape == grad.shape
    ]
    return sorted(rows, key=lambda row: -row[1] / row[2])


def in_our_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model, or their gradients, under our names, through the name table; {} where that cannot read it."""
    if isinstance(model, GPT) or not tensors:
        return tensors
    config = declared(model)
    try:
        from kobza.formats.weights import from_hf

        return dict(from_hf(config, tensors)) if config else {}
    except (ImportError, InputError, KeyError, ValueError, RuntimeError, AttributeError, TypeError):
        return {}


# ---- findings ------------------------------------------------------------------------------------------------------

SWITCHES = "G2 G3 G4 G5 G6 G7 G8 G11 G12 G13 L4 L5 L6 P1 P2 D2"
WHY = {
    "G2": "every layer reads an embedding of another size than the weights were trained with",
    "G3": "each norm scales or rounds differently from training, in every layer",
    "G4": "small activations are normalised differently; the error grows where the stream is small",
    "G5": "rounded positions coincide, so that far tokens cannot be told apart",
    "G6": "angles drift with the position",
    "G7": "each feed-forward is off by up to 5e-4 a unit, in every layer",
    "G8": "logits come from another matrix than the one that was trained",
    "G11": "the window lies on the wrong layers",
    "G12": "large scores and logits are not bounded as in training",
    "G13": "attention is sharper or flatter than in training",
    "L4": "long contexts are read with angles the model was not trained for",
    "L5": "the order of tokens is read with the wrong wavelengths, worse with distance",
    "L6": "queries meet keys with their channels shuffled: fine for a few tokens, then gibberish",
    "P1": "one token more or less is seen than in training",
    "P2": "tokens are seen that were hidden in training, or the reverse",
    "D2": "the two networks compute different functions",
}


def findings(subject: ParitySubject, dtype: str) -> Iterator[Finding]:
    """What a dtype has to say."""
    if dtype not in subject.dtypes:
        raise Skip(f"{dtype} was not asked for; --dtype names it")
    before = subject.notes.get("fp32")
    if dtype != "fp32" and before is not None and not before.solved:
        raise Skip("they differ in fp32 already, and the cause was not found")
    result = result_of(subject, dtype)
    if result.equal:
        return
    if result.solved:
        yield from solved(subject, result)
    elif not forward_wrong(result.steps[0]):
        yield backward_only(subject, result)
    else:
        yield unsolved(subject, result)


def told(subject: ParitySubject, result: Result, row: Row) -> str:
    """What was run and what came out at a station."""
    what = result.reference.what
    B, T = what.ids.shape
    local = row.local > row.local_limit
    error, top = (row.local, row.local_limit) if local else (row.running, row.running_limit)
    how = f"on the reference's own input, {row.probe} probe" if local else "free-running"
    inputs = f"ids seed {subject.seed}, {B} x {T}, {result.dtype}"
    return f"{inputs}: {row.station} is off by {error:.2e} {how}; noise ends at {top:.1e}"


def solved(subject: ParitySubject, result: Result) -> Iterator[Finding]:
    """One finding for each switch of the set that makes them equal."""
    rows, last = {row.station: row for row in result.steps[0].rows}, result.steps[-1].rows
    fixes = ", ".join(t.label for t in result.chosen) or "a rebuild"
    after = f"; after {fixes} all {len(last)} stations are equal, forward and backward"
    others = [
        " and ".join(t.label for t in s)
        for s in (result.solution.sets if result.solution else ())
        if s != result.chosen
    ]
    also = f"; nothing that was run tells it from: {' | '.join(others)}" if others else ""
    if result.remade:
        yield remade(subject, result, rows, after)
    for toggle in result.chosen:
        row = rows[result.firsts.get(toggle.label, result.steps[0].wrong[0])]
        if row.equal:  # seen by the forced stretches of a slice, or after another fix only
            row = rows[result.steps[0].wrong[0]]
        at = row.station
        now = given_value(result, toggle)
        ours = result.changed == "A"
        yield Finding(
            code=toggle.code,
            severity="error",
            confidence="proven",
            where=at,
            expected=toggle.label if ours else now,
            got=(now if ours else toggle.label) + also,
            why=WHY[toggle.code],
            fix=f"A needs {toggle.label}" if ours else f"A computes what B would with {toggle.label}; A needs {now}",
            counterexample=told(subject, result, row) + after,
        )


def given_value(result: Result, toggle: Toggle) -> str:
    """What stands where the toggle would change something."""
    module = result.moved
    names = [name for name, _ in toggle.changes]
    if not names:
        return "rotary angles in float32" if toggle.tables and result.changed == "B" else f"not: {toggle.label}"
    return " ".join(f"{name}={getattr(module.config, name)}" for name in names)  # type: ignore[union-attr]


def remade(subject: ParitySubject, result: Result, rows: dict[str, Row], after: str) -> Finding:
    """The model is not what its own config says: its tables, or its code."""
    tables = base_of(result.moved, "fp32").tables  # type: ignore[arg-type]
    row = rows[result.steps[0].wrong[0]]
    return Finding(
        code="D2",
        severity="error",
        confidence="proven",
        where=row.station,
        expected="the model that its config says, rebuilt from its weights",
        got=f"another: {', '.join(tables) or 'its modules were changed after it was built'}",
        why=WHY["D2"],
        fix="build it anew from config and weights",
        counterexample=told(subject, result, row) + after,
    )


def unsolved(subject: ParitySubject, result: Result) -> Finding:
    """They differ, and no set of switches makes them equal."""
    step = result.steps[0]
    wrong = [row for row in step.rows if row.local > row.local_limit] or [row for row in step.rows if not row.equal]
    row = wrong[0]
    names = ", ".join(r.station for r in wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
    hint = ""
    apart = tensors_apart(module_of(subject.a, "A"), module_of(subject.b, "B"))
    if apart:
        hint = "; weights differ: " + ", ".join(f"{name} by {gap:.1e}" for name, gap in apart[:4])
    if not subject.explain:
        fix = "run with --explain to look for the cause"
    elif not result.changed:
        fix = "neither model is one of kobza's, so no switch can be tried; and the name table does not read A as one"
    else:
        best = " and ".join(t.label for t in result.chosen)
        left = len(result.steps[-1].wrong)
        tried = f"{result.solution.runs} runs" if result.solution else "it"
        nearest_ = f"; the nearest set, {best}, leaves {left} stations wrong and is NOT equal" if best else ""
        fix = f"no set of switches makes them equal ({tried}){nearest_}"
    return Finding(
        code="D1",
        severity="error",
        confidence="proven",
        where=row.station,
        expected="the reference's values within its own noise",
        got=f"differs, each on the reference's own input, at {names}{hint}",
        why="A is not the same function of its input as B",
        fix=fix,
        counterexample=told(subject, result, row),
    )


def backward_only(subject: ParitySubject, result: Result) -> Finding:
    """Equal forward, other gradients."""
    wrong = [row for row in result.steps[0].rows if not row.equal]
    own = [row for row in wrong if row.diverges] or wrong
    if own:
        row = own[-1]  # gradients flow from the end
        where, error, top = (
            row.station,
            *((row.back_local, row.back_local_limit) if row.diverges else (row.back, row.back_limit)),
        )
    else:
        where, error, top = result.wrong_weights[0]
    B, T = result.reference.what.ids.shape
    return Finding(
        code="D3",
        severity="error",
        confidence="proven",
        where=f"{where} (gradient)",
        expected="the reference's gradient within its own noise",
        got=f"off by {error:.2e}; forward all {len(result.steps[0].rows)} stations are equal",
        why="training moves the weights elsewhere although generation looks right",
        fix="look for a detach, an in-place change or a custom backward here or in what reads it",
        counterexample=f"ids seed {subject.seed}, {B} x {T}, {result.dtype}: gradient at {where} off by {error:.2e}; "
        f"noise ends at {top:.1e}",
    )


def check_in(dtype: str) -> Callable[[ParitySubject], Iterator[Finding]]:
    """A check's run."""
    return lambda subject: findings(subject, dtype)


CHECKS = tuple(Check(f"{SWITCHES} D1 D3", f"A equals B in {dtype}", check_in(dtype)) for dtype in DTYPES)


# ---- for people ----------------------------------------------------------------------------------------------------


def results(subject: ParitySubject) -> list[Result]:
    """Those of the dtypes that could be compared."""
    return [subject.notes[dtype] for dtype in DTYPES if isinstance(subject.notes.get(dtype), Result)]


def facts(subject: ParitySubject) -> dict[str, list[list[str]]]:
    """The stations of each dtype, the fixes one by one, and what the differences look like. After the checks have run."""
    tables: dict[str, list[list[str]]] = {}
    for result in results(subject):
        head = ["station", "free", "forced", "gradient", "grad, forced", ""]
        rows = [cells(row) for row in result.steps[0].rows]
        tables[f"log10 of the relative L2 error / where noise ends, in {result.dtype}"] = [head, *rows]
        if len(result.steps) > 1:
            rows = [
                [s.label, str(len(s.wrong)), f"{s.rows[-1].running:.1e}", "equal" if not s.wrong else "not equal"]
                for s in result.steps
            ]
            tables[f"Fixes in {result.dtype}"] = [["fix", "stations wrong", "error of the logits", ""], *rows]
        if result.weights:
            rows = [[name, f"{error:.1e}", f"{top:.1e}"] for name, error, top in result.weights[:4]]
            tables[f"Gradients of weights in {result.dtype}, nearest to their limit first"] = [
                ["weight", "error", "noise ends"],
                *rows,
            ]
        if not result.equal:
            words = list(signs(in_dtype(result.moved, result.dtype), result.reference))  # type: ignore[arg-type]
            if words:
                tables[f"Signs in {result.dtype}"] = [
                    ["station", "the difference, on the reference's own input"],
                    *map(list, words),
                ]
    return tables


def cells(row: Row) -> list[str]:
    """A row of numbers for people."""
    pairs = [(row.running, row.running_limit), (row.local, row.local_limit)]
    pairs += [(row.back, row.back_limit), (row.back_local, row.back_local_limit)]
    shown = ["" if x is None or top is None else f"{power(x)} / {power(top)}" for x, top in pairs]
    return [row.station, *shown, "" if row.equal else "differs"]


def power(x: float) -> str:
    """log10 to one digit. power(0.001) -> "-3.0"; of 0: "exact" """
    return "exact" if x == 0 else f"{math.log10(x):.1f}"


def plots(subject: ParitySubject) -> dict[str, str]:
    """title -> svg: the error of every station, forward and backward, as given and after each fix."""
    from kobza.doctor.models.plot import Curve, draw

    found = {}
    for result in results(subject):
        curves = [
            Curve(step.label, [row.running for row in step.rows], [row.back for row in step.rows])
            for step in result.steps
        ]
        rows = result.steps[0].rows
        found[f"Parity in {result.dtype}"] = draw(
            [row.station for row in rows],
            curves,
            [row.local for row in rows],
            [row.local_limit for row in rows],
            [row.running_limit for row in rows],
            [row.back_limit for row in rows],
            f"{subject.a.name or 'A'} against {subject.b.name or 'B'}, {result.dtype}",
        )
    return found

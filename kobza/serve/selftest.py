"""What the engine proves on itself before it takes traffic: each way it saves work writes what the plain way writes.

Every check runs the same few requests twice, over the weights that will serve: once alone, cold and unspeculated, once the other
way. An exact runner must give the same ids and log-probabilities to the bit. Where a device cannot, log-probabilities may differ
by TOLERANCE, and ids where two were that close; the line says so. A check that found nothing to check has not passed.

`make(**changes)` makes an engine as it will serve, with some of Engine's settings changed. The engines made here share the
runner's blocks, so the one that serves must be made afterwards.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from kobza.config import InputError, SampleConfig
from kobza.serve.engine import Engine
from kobza.serve.request import Limits, Logprob, Request, Result

RIVALS = 20  # tokens that are compared at each place
TOLERANCE = 0.1  # of a log-probability, where rows are not bit-equal
PLAIN: dict[str, Any] = {"draft": None, "lookup": False, "speculate": 0}
GREEDY = SampleConfig(temperature=0.0, top_k=0)
WARM = SampleConfig(temperature=0.8, top_k=40)
FLAT = SampleConfig(temperature=100.0, top_k=0)  # whatever the model says, every seed writes something else


@dataclass(frozen=True)
class Check:
    """One line of the table. `what`: what was compared, or how it differed."""

    name: str
    ok: bool
    what: str
    seconds: float


class Differs(Exception):
    """Two ways of writing a text did not agree; the message says where."""


@dataclass
class Bench:
    """The engines and requests of one self-test."""

    make: Callable[..., Engine]
    tokens: int
    seed: int
    reference: Callable[[list[int]], Tensor] | None
    tolerance: float
    made: list[Engine] = field(default_factory=list)
    pace: list[tuple[str, float]] = field(default_factory=list)

    def engine(self, **changes: Any) -> Engine:
        """A new one, its cache empty."""
        self.made.append(self.make(**changes))
        return self.made[-1]

    @cached_property
    def first(self) -> Engine:
        """For what all engines have in common."""
        return self.make()

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.first.runner.block_size

    def prompt(self, n: int, name: int = 0) -> list[int]:
        """n ids of ordinary tokens, others for each name; fewer where the context is short."""
        tokenizer, rng = self.first.tokenizer, random.Random(f"{self.seed} {name}")
        size, most = self.first.runner.vocab_size, self.first.runner.max_seq_len - self.tokens
        ordinary = [i for i in range(min(size, len(tokenizer.pieces))) if tokenizer.pieces[i]] or list(range(size))
        return [rng.choice(ordinary) for _ in range(max(1, min(n, most)))]

    def request(self, ids: list[int], sampling: SampleConfig = GREEDY, seed: int = 0, **some: Any) -> Request:
        """A text of exactly `tokens` tokens, each with its log-probability and the best two."""
        two = min(2, self.first.runner.vocab_size)
        return Request(ids, replace(sampling, tokens=self.tokens, seed=seed), (), logprobs=two, **some)

    @cached_property
    def requests(self) -> list[Request]:
        """Of several lengths, greedy and drawn in turn where rows are exact."""
        exact = self.first.runner.exact
        prompts = [self.prompt(n, n) for n in (1, 5, 17, self.block + 3)]
        return [self.request(ids, WARM if exact and i % 2 else GREEDY, i) for i, ids in enumerate(prompts)]

    @cached_property
    def singles(self) -> list[Result]:
        """Each of `requests` alone, in an engine of its own."""
        start = time.monotonic()
        results = [self.cold(request) for request in self.requests]
        self.pace.append(("alone", len(results) * self.tokens / (time.monotonic() - start)))
        return results

    def cold(self, request: Request) -> Result:
        """A text written alone, cold, whole and unspeculated."""
        return self.engine(**PLAIN, limits=Limits(chunk=self.first.runner.max_seq_len)).run([request])[0]

    def agree(self, ours: list[Result], theirs: list[Result]) -> str:
        """Raise Differs unless the texts are the same -> what was compared."""
        exact = self.first.runner.exact
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            error = next((result.error or result.finish for result in (a, b) if result.finish == "error"), None)
            if error or len(a.ids) != len(b.ids):
                raise Differs(f"text {i}: {error or f'{len(a.ids)} tokens, not {len(b.ids)}'}")
            for place, (x, y) in enumerate(zip(a.logprobs, b.logprobs, strict=True)):
                if exact and x != y:
                    raise Differs(f"text {i}, token {place}: {_show(x)}, not {_show(y)}")
                if not exact and not _near(x, y):
                    raise Differs(f"text {i}, token {place}: {_show(x)}, not {_show(y)} within {TOLERANCE}")
                if x.id != y.id:
                    break  # two equally good ways on
        n = sum(len(result.ids) for result in ours)
        return f"{n} tokens of {len(ours)} texts, {'bit for bit' if exact else f'log-probabilities within {TOLERANCE}'}"


def _near(x: Logprob, y: Logprob) -> bool:
    """Whether two tokens at the same place are the same or equally good."""
    there = dict(y.top) | {y.id: y.logprob}
    return abs(x.logprob - there.get(x.id, float("-inf"))) <= TOLERANCE and abs(x.logprob - y.logprob) <= TOLERANCE


def _show(logprob: Logprob) -> str:
    return f"id {logprob.id} at {logprob.logprob:.6f}"


# ---- the checks ----------------------------------------------------------------------------------------------------


def batched(bench: Bench) -> str:
    """All at once, and one by one."""
    start = time.monotonic()
    results = bench.engine(**PLAIN).run(bench.requests)
    bench.pace.append((f"{len(results)} at once", len(results) * bench.tokens / (time.monotonic() - start)))
    return bench.agree(results, bench.singles)


def chunked(bench: Bench) -> str:
    """A prompt in pieces of 7 tokens."""
    return bench.agree(bench.engine(**PLAIN, limits=Limits(chunk=7)).run(bench.requests[-2:]), bench.singles[-2:])


def cached(bench: Bench) -> str:
    """The same prompt again, and one that begins alike."""
    engine, first = bench.engine(**PLAIN), bench.requests[-1]
    other = replace(first, ids=first.ids[: bench.block] + bench.prompt(4, -1))
    if len(first.ids) <= bench.block:
        return f"nothing to share: the context is shorter than a block of {bench.block} and {bench.tokens} tokens"
    engine.run([first])
    again = engine.run([first, other])
    if not all(result.n_cached >= bench.block for result in again):
        raise Differs(
            f"{[result.n_cached for result in again]} tokens came from the cache; at least {bench.block} each should"
        )
    return f"{bench.agree(again, [bench.singles[-1], bench.cold(other)])}; {again[0].n_cached} came from the cache"


def preempted(bench: Bench) -> str:
    """Three rows in a cache that holds them until each needs one block more."""
    size = bench.block
    prompts = [bench.prompt(max(1, size - 2), -10 - i) for i in range(3)]
    if len(prompts[0]) + bench.tokens <= size:
        return f"nothing to do: the context is shorter than a block of {size} and {bench.tokens} tokens"
    requests = [bench.request(ids) for ids in prompts]
    engine = bench.engine(**PLAIN, limits=Limits(blocks=5, max_running=3))
    results = engine.run(requests)
    if not engine.stats().preempted:
        raise Differs("no row made way in a cache too small for all")
    return bench.agree(results, [bench.cold(request) for request in requests])


def speculated(bench: Bench) -> str:
    """The way of guessing that will serve, or look-up; over a prompt that repeats itself, so that there is much to guess."""
    own = bench.first.speculate > 0
    engine = bench.engine(**({} if own else PLAIN | {"lookup": True, "speculate": 3}))
    part = bench.prompt(5, -20)
    request = bench.request((part * 4)[: max(1, bench.first.runner.max_seq_len - bench.tokens)])
    words = bench.agree(engine.run([request]), [bench.cold(request)])
    stats = engine.stats()
    name = "a draft model" if engine.draft else "look-up"
    if own and engine.draft and not stats.drafted:
        raise Differs("the draft model guessed nothing")
    return f"{words}; {name} guessed {stats.drafted}, {stats.accepted} held"


def greedy(bench: Bench) -> str:
    """Temperature 0 takes the likeliest, whatever the seed."""
    prompt = bench.requests[1].ids
    results = bench.engine(**PLAIN).run([bench.request(prompt, GREEDY, seed) for seed in (1, 2)])
    for logprob in (logprob for result in results for logprob in result.logprobs):
        if logprob.logprob < logprob.top[0][1]:
            raise Differs(
                f"{_show(logprob)} was taken, but id {logprob.top[0][0]} is likelier at {logprob.top[0][1]:.6f}"
            )
    return bench.agree(results[:1], results[1:])


def seeded(bench: Bench) -> str:
    """A seed writes the same text among others and alone; another seed writes another."""
    prompt = bench.requests[1].ids
    requests = [bench.request(prompt, FLAT, seed) for seed in (1, 2, 1)]
    results = bench.engine(**PLAIN).run(requests)
    again = bench.engine(**PLAIN).run(requests[:1])
    if results[0].ids != results[2].ids or again[0].ids != results[0].ids:
        raise Differs("the same seed wrote two texts")
    if results[0].ids == results[1].ids and bench.first.runner.vocab_size > 1:
        raise Differs("seeds 1 and 2 wrote the same text at temperature 100")
    return f"{bench.tokens} tokens, twice in a batch and once alone"


def adapters_apart(bench: Bench) -> str:
    """The same prompt without and with each adapter, at once and after one another, against each alone."""
    ids, names = bench.requests[-1].ids, [None, *bench.first.runner.adapters]
    requests = [bench.request(ids, adapter=name) for name in names]
    colds = [bench.cold(request) for request in requests]
    engine = bench.engine(**PLAIN)
    words = bench.agree(engine.run(requests), colds)
    turns = bench.engine(**PLAIN)
    for request, cold in zip(requests, colds, strict=True):  # what one left in the cache is not for the next
        bench.agree(turns.run([request]), [cold])
    return f"{words}; {len(names) - 1} adapters and none"


def near_model(bench: Bench) -> str:
    """Log-probabilities of what the model thinks likely at each place of a prompt against those of the plain model."""
    assert bench.reference is not None
    ids, k = bench.prompt(2 * bench.block, -30), min(RIVALS, bench.first.runner.vocab_size)
    request = replace(bench.request(ids, prompt_logprobs=True), logprobs=k)
    event = _first_event(bench.engine(**PLAIN, limits=Limits(chunk=7)), request)
    own = bench.reference(ids).float().log_softmax(-1)  # (T, V)
    if event.finish == "error":
        raise Differs(event.error)
    if not event.prompt:
        return "nothing to compare: the context is too short"
    gaps = [math.exp(lp) * abs(float(own[at, i]) - lp) for at, told in enumerate(event.prompt) for i, lp in told.top]
    mean = sum(gaps) / len(event.prompt)
    words = f"log-probabilities at {len(event.prompt)} places differ by {mean:.2g} on average, each token by its weight"
    if not mean <= bench.tolerance:
        raise Differs(f"{words}; at most {bench.tolerance:g} is right for this number format")
    return words


def _first_event(engine: Engine, request: Request) -> Any:
    events: list[Any] = []
    engine.submit(request, events.append)
    while engine.step():
        pass
    return events[0]


def nothing_leaked(bench: Bench) -> str:
    """After all the others."""
    pools = [pool for e in bench.made for pool in [e.pool, *([e.draft.pool] if e.draft else [])]]
    leaked = sum(len(pool.leaked()) for pool in pools)
    if leaked:
        raise Differs(f"{leaked} blocks are still held")
    return f"{len(pools)} caches"


def paced(bench: Bench) -> str:
    """No bar: what the first two checks took, prompts and all."""
    return ", ".join(f"{rate:,.0f} tokens/s {name}" for name, rate in reversed(bench.pace))


CHECKS: dict[str, Callable[[Bench], str]] = {
    "near the model": near_model,
    "batched = single": batched,
    "chunked = whole": chunked,
    "prefix-cached = cold": cached,
    "preempted = undisturbed": preempted,
    "speculative greedy = greedy": speculated,
    "temperature 0 = likeliest": greedy,
    "a seed = a text": seeded,
    "adapters apart": adapters_apart,
    "no block leaked": nothing_leaked,
    "pace": paced,
}


def selftest(
    make: Callable[..., Engine],
    *,
    reference: Callable[[list[int]], Tensor] | None = None,
    tolerance: float = 0.1,
    tokens: int = 6,
    seed: int = 0,
) -> list[Check]:
    """The table. reference(ids) -> logits (T, V) of the model as it was trained; None leaves that check out.

    tolerance: mean difference of a log-probability from the reference: 1e-3 in float32, 0.1 in bf16 and int8 do.
    """
    bench, table = Bench(make, tokens, seed, reference, tolerance), []
    absent = {"near the model": reference is None, "adapters apart": not bench.first.runner.adapters}
    for name, check in CHECKS.items():
        if absent.get(name):
            continue
        start, ok = time.monotonic(), True
        try:
            what = check(bench)
        except (Differs, InputError) as error:
            ok, what = False, str(error)
        except Exception as error:  # a check that cannot run has not passed
            ok, what = False, f"{type(error).__name__}: {error}"
        table.append(Check(name, ok, what, time.monotonic() - start))
    return table


def failed(table: list[Check]) -> list[str]:
    """Names of the checks that did not pass."""
    return [check.name for check in table if not check.ok]

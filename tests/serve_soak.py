"""Mixed requests, many at once, some cancelled: what finished must be what a quiet engine writes, and no block may stay held.

soak(engine, twin, 1000, 32, seed=0, ends=...) for any two engines over the same weights; the twin serves one at a time. The
engine's rows are stepped here unless it was started.
"""

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kobza.config import SampleConfig
from kobza.serve.engine import Engine
from kobza.serve.request import Collector, Request


@dataclass
class SoakReport:
    """`different`: the requests whose text is not their twin's. A cancelled text must be the beginning of its twin's."""

    finished: Counter = field(default_factory=Counter)
    different: list[int] = field(default_factory=list)
    leaked: int = 0
    preempted: int = 0
    prefix_hits: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0


def mixed(n, rng, engine, ends, adapters, constraints, longest, most) -> list[Request]:
    """n requests: prompts that share beginnings, all knobs, adapters, constraints, stop strings."""
    vocab = engine.runner.vocab_size
    beginnings = [[rng.randrange(1, vocab) for _ in range(longest)] for _ in range(4)]
    requests = []
    for seed in range(n):
        shared = rng.choice(beginnings)[: rng.randrange(longest)]
        ids = shared + [rng.randrange(1, vocab) for _ in range(rng.randrange(1, max(2, longest // 4)))]
        tokens = rng.randrange(1, most + 1)
        sampling = SampleConfig(
            tokens=tokens,
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_k=rng.choice([0, 3, 40]),
            top_p=rng.choice([1.0, 1.0, 0.9]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            no_repeat_ngram=rng.choice([0, 0, 3]),
            min_tokens=rng.choice([0, min(4, tokens)]),
            seed=seed,
        )
        stops = rng.choice([(), (), (engine.tokenizer.decode([rng.randrange(vocab), rng.randrange(vocab)]) or "?",)])
        bias = rng.choice([{}, {}, {rng.randrange(vocab): 2.0}])
        constraint = rng.choice([None, None, None, *constraints])
        adapter = rng.choice([None, *adapters])
        logprobs = rng.choice([None, None, 2])
        requests.append(Request(ids, sampling, ends, stops, bias, logprobs, adapter, constraint))
    return requests


def soak(
    engine: Engine,
    twin: Engine,
    n: int,
    at_once: int,
    seed: int,
    ends: tuple[int, ...] = (),
    adapters: Sequence[str] = (),
    constraints: Sequence = (),
    longest: int = 24,
    most: int = 30,
    cancelled: float = 0.15,
) -> SoakReport:
    """n requests, at_once in flight, a share of them cancelled somewhere on their way -> what came of it."""
    rng, start, before = random.Random(seed), time.monotonic(), engine.stats()
    requests = mixed(n, rng, engine, ends, adapters, constraints, longest, most)
    doomed = {i: rng.randrange(most) for i in range(n) if rng.random() < cancelled}  # after so many events
    sinks = [Collector() for _ in requests]
    tickets: list = []
    flying: list[int] = []
    while len(tickets) < n or flying:
        while len(tickets) < n and len(flying) < at_once:
            flying.append(len(tickets))
            tickets.append(engine.submit(requests[len(tickets)], sinks[len(tickets)]))
        time.sleep(0.001) if engine.started else engine.step()
        for i in flying:
            if i in doomed and len(sinks[i].events) >= doomed[i]:
                engine.cancel(tickets[i])
        flying = [i for i in flying if sinks[i].result is None]
    seconds = time.monotonic() - start
    while engine.stats().running:  # its thread may not have come to the end of its step
        time.sleep(0.001)
    pools = [engine.pool] + ([engine.draft.pool] if engine.draft else [])
    report = SoakReport(leaked=sum(len(pool.leaked()) for pool in pools), seconds=seconds)
    for i, (request, sink) in enumerate(zip(requests, sinks, strict=True)):
        got, single = sink.result, twin.run([request])[0]
        report.finished[got.finish] += 1
        report.tokens += len(got.ids)
        part = len(got.ids) if got.finish == "cancelled" else None
        same = got.ids == single.ids[:part] and got.logprobs == single.logprobs[:part]
        if not same or (part is None and (got.text, got.finish) != (single.text, single.finish)):
            report.different.append(i)
    after = engine.stats()
    for name in ("preempted", "prefix_hits", "drafted", "accepted", "forwards"):
        setattr(report, name, getattr(after, name) - getattr(before, name))
    return report

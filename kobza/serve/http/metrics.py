"""What Prometheus is told: the engines' own numbers, read when it asks, and the times that clients saw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kobza.serve.http.service import Flow, Service

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
GAUGES = {"running": "texts being written", "queued": "requests that wait for a place"}
COUNTERS = {
    "tokens_in": "tokens of prompts, cached ones among them",
    "tokens_out": "tokens written",
    "prefix_hits": "tokens of prompts found in the cache",
    "drafted": "tokens guessed ahead",
    "accepted": "guesses that stood",
    "preempted": "texts put back because the cache was full",
    "forwards": "forwards of the model",
}


class Metrics:
    """The numbers of one service, in a registry of its own."""

    def __init__(self, service: Service):
        self.registry, self.service = CollectorRegistry(), service
        self.registry.register(self)  # type: ignore[arg-type]
        self.requests = Counter(
            "kobza_requests", "Answers by path and status.", ["path", "status"], registry=self.registry
        )
        self.seconds = self._histogram("kobza_request_seconds", "Seconds until an answer was whole.", WHOLE)
        self.first = self._histogram("kobza_time_to_first_token_seconds", "Seconds until the first token.", FIRST)
        self.each = self._histogram("kobza_time_per_token_seconds", "Seconds a token after the first.", EACH)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, what, registry=self.registry, buckets=buckets)

    def collect(self) -> Iterator[Metric]:
        """The engines' numbers of this moment; an engine that serves several names counts once, under the first."""
        engines = {id(served.engine): served for served in reversed(self.service.models.values())}
        stats = [(served.name, served.engine.stats()) for served in reversed(engines.values())]
        for name, what in GAUGES.items():
            yield _family(
                GaugeMetricFamily(f"kobza_{name}", what, labels=["model"]), [([m], getattr(s, name)) for m, s in stats]
            )
        blocks = GaugeMetricFamily("kobza_cache_blocks", "blocks of keys and values", labels=["model", "state"])
        yield _family(blocks, [([m, state], n) for m, s in stats for state, n in _blocks(s).items()])
        for name, what in COUNTERS.items():
            family = CounterMetricFamily(f"kobza_{name}", what, labels=["model"])
            yield _family(family, [([m], getattr(s, name)) for m, s in stats])
        finished = CounterMetricFamily("kobza_finished", "texts by how they ended", labels=["model", "reason"])
        yield _family(finished, [([m, reason], n) for m, s in stats for reason, n in s.finished.items()])

    def answered(self, scope: dict[str, Any], status: int, seconds: float) -> None:
        """Count an answer. Paths are the routes' own: what strangers try is one line."""
        path = getattr(scope.get("route"), "path", "other")
        self.requests.labels(path, str(status)).inc()
        self.seconds.observe(seconds)

    def flowed(self, flow: Flow, now: float) -> None:
        """Count a flow's times."""
        if flow.first is None:
            return
        self.first.observe(flow.first)
        if flow.n_new > len(flow.texts):
            self.each.observe(max(0.0, now - flow.began - flow.first) / (flow.n_new - len(flow.texts)))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


def _family(family: Any, samples: list[tuple[list[str], float]]) -> Any:
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _blocks(stats: Any) -> dict[str, int]:
    """In use, free, and cached (kept for a prefix that may come again)."""
    used = stats.blocks - stats.free - stats.cached
    return {"used": used, "free": stats.free, "cached": stats.cached}

"""Figures for dashboards, as Prometheus text."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from benthic.inference.request import EngineStats
from benthic.serve.models import Models, Served

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAUGES = {
    "requests_running": ("Requests at work.", lambda s: s.running),
    "requests_waiting": ("Requests in the queue.", lambda s: s.waiting),
    "cache_usage_ratio": ("Share of the cache's pages that running requests hold.", lambda s: cache_share(s)),
    "cache_bytes": ("Size of the cache.", lambda s: s.pages_total * s.page_bytes),
}
_COUNTERS = {
    "prompt_tokens": ("Tokens read.", lambda s: s.prompt_tokens),
    "cached_prompt_tokens": ("Tokens of prompts that were found in the cache.", lambda s: s.cached_tokens),
    "generated_tokens": ("Tokens written.", lambda s: s.generated_tokens),
    "drafted_tokens": ("Tokens that MTP modules drafted.", lambda s: s.drafted_tokens),
    "accepted_tokens": ("Drafts that turned out right.", lambda s: s.accepted_tokens),
    "preemptions": ("Requests set back for want of cache.", lambda s: s.preemptions),
}


def cache_share(stats: EngineStats) -> float:
    """Share of the cache's pages that running requests hold."""
    return stats.pages_used / stats.pages_total if stats.pages_total else 0.0


class Metrics:
    """What the server counts itself, and what it reads from the engines when asked."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        self.first_token = Histogram(
            "benthic_time_to_first_token_seconds", "From arrival to the first token.", ["model"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.inter_token = Histogram(
            "benthic_inter_token_latency_seconds", "Between one token and the next.", ["model"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.responses = Counter(
            "benthic_http_responses", "Responses by status.", ["status"], registry=self.registry,
        )  # fmt: skip
        self.registry.register(_Engines(models))

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)


class _Engines(Collector):
    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        stats = [(served.name, served.engine.stats()) for served in self._models]
        for name, (told, figure) in _GAUGES.items():
            yield _family(GaugeMetricFamily(f"benthic_{name}", told, labels=["model"]), figure, stats)
        for name, (told, figure) in _COUNTERS.items():
            yield _family(CounterMetricFamily(f"benthic_{name}", told, labels=["model"]), figure, stats)
        told = "Choices that have ended, by reason."
        finished = CounterMetricFamily("benthic_requests_finished", told, labels=["model", "reason"])
        for name, one in stats:
            for reason, count in one.finished.items():
                finished.add_metric([name, reason], count)
        yield finished


def _family(family: Any, figure: Any, stats: list[tuple[str, EngineStats]]) -> Any:
    for name, one in stats:
        family.add_metric([name], figure(one))
    return family


def status(served: Served) -> dict[str, Any]:
    """The same figures of one model for the page's status view."""
    stats = served.engine.stats()
    return {
        "model": served.name, "context": served.context, "running": stats.running, "waiting": stats.waiting,
        "max_batch": stats.max_batch, "max_queue": served.slots - stats.max_batch, "cache_usage": cache_share(stats),
        "cache_kept": stats.pages_cached / stats.pages_total if stats.pages_total else 0.0,
        "cache_bytes": stats.pages_total * stats.page_bytes, "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens, "generated_tokens": stats.generated_tokens,
        "drafted_tokens": stats.drafted_tokens, "accepted_tokens": stats.accepted_tokens, "decoder": stats.decoder,
        "reader": stats.reader,
    }  # fmt: skip

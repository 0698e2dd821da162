"""What Prometheus reads: counters of this server's requests, and the engine's own numbers when they are asked for.

Adapters are labels. A label costs memory for ever, here and at whoever reads it: the first so many adapters that have
traffic get their own, the others are counted together as "other", so that no counter ever goes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from .calls import Call
from .record import Record

FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
GAPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
WHOLE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
OTHER, BASE = "other", "base"
GAUGES = (  # name, what it is, the engine's word for it
    ("veneer_batch_rows", "Rows that share the running step", "rows"),
    ("veneer_batch_distinct_adapters", "Adapters in the running step", "adapters_running"),
    ("veneer_queue_length", "Requests that wait for a slot", "queue"),
    ("veneer_slots", "Rows that can run together", "slots"),
    ("veneer_cache_bytes", "Bytes of the rows' keys and values", "cache_bytes"),
)
COUNTERS = (
    ("veneer_steps", "Steps of the engine", "steps"),
    ("veneer_adapter_loads", "Adapters read into memory", "loads"),
    ("veneer_adapter_evictions", "Adapters put out of memory for others", "evictions"),
)


class Metrics:
    """Args:
    stats: the engine's numbers, asked for at each reading; an empty dict while there is no engine.
    labels: adapters with labels of their own.
    """

    def __init__(self, stats: Callable[[], dict[str, Any]], labels: int, vllm_names: bool = False) -> None:
        self._stats, self._most, self._vllm = stats, labels, vllm_names
        self._labels: dict[str, str] = {}
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "veneer_requests",
            "Requests by how they ended",
            ["adapter", "method", "outcome"],
            registry=registry,
        )
        self.tokens = Counter(
            "veneer_tokens",
            "Tokens of prompts, made, or found in the cache",
            ["adapter", "kind"],
            registry=registry,
        )
        self.ttft = Histogram(
            "veneer_ttft_seconds", "Until the first token", ["adapter"], buckets=FIRST, registry=registry
        )
        self.gap = Histogram(
            "veneer_inter_token_seconds",
            "Between tokens of one row",
            ["adapter"],
            buckets=GAPS,
            registry=registry,
        )
        self.whole = Histogram(
            "veneer_request_seconds", "Until the last token", ["adapter"], buckets=WHOLE, registry=registry
        )
        self.http = Counter("veneer_http_responses", "Answers by status", ["status"], registry=registry)
        self._steps = Histogram(
            "veneer_step_seconds", "Of one step of the engine", buckets=GAPS, registry=registry
        )
        self._loads = Histogram(
            "veneer_adapter_load_seconds", "Reading one adapter into memory", buckets=FIRST, registry=registry
        )
        self._seen = 0  # steps that were observed
        self._read: dict[str, float] = {}  # of versions, the reading that was observed
        registry.register(self)  # type: ignore[arg-type]

    def label(self, adapter: str) -> str:
        found = self._labels.get(adapter)
        if found is None:
            if len(self._labels) >= self._most:
                return OTHER
            found = self._labels[adapter] = adapter
        return found

    def finished(self, call: Call, target: Any) -> None:
        """Count a call that is over."""
        name = BASE if target.version is None else self.label(target.name)
        now = time.perf_counter()
        outcome = call.record.outcome or "cancelled"
        self.requests.labels(name, target.method or "none", outcome).inc()
        for kind, counts in (
            ("prompt", call.prompt_tokens), ("generated", call.completion_tokens), ("cached", call.cached_tokens)
        ):  # fmt: skip
            self.tokens.labels(name, kind).inc(sum(counts))
        if call.first is not None:
            self.ttft.labels(name).observe(call.first - call.record.began)
        for gap in call.gaps:
            self.gap.labels(name).observe(gap)
        if outcome == "done":
            self.whole.labels(name).observe(now - call.record.began)

    def answered(self, record: Record) -> None:
        self.http.labels(str(record.status or 499)).inc()

    def text(self, accept: str) -> tuple[bytes, str]:
        """(body, content type), OpenMetrics where it is asked for."""
        self._observe(self._stats())
        encoder, kind = choose_encoder(accept)
        return encoder(self.registry), kind

    def _observe(self, stats: dict[str, Any]) -> None:
        """What the engine remembers of its last steps and readings goes into histograms once."""
        steps, ring = stats.get("steps", 0), stats.get("step_seconds", ())
        for seconds in list(ring)[-(steps - self._seen) :] if steps > self._seen else ():
            self._steps.observe(seconds)
        self._seen = steps
        for version, facts in stats.get("residents", {}).items():
            seconds = facts.get("load_seconds")
            if seconds and self._read.get(version) != seconds:
                self._read[version] = seconds
                self._loads.observe(seconds)

    def collect(self) -> Iterator[Any]:
        """The engine's numbers. Also called once at registration, for the names."""
        stats = self._stats()
        for name, about, key in GAUGES:
            yield GaugeMetricFamily(name, about, stats.get(key, 0))
        for name, about, key in COUNTERS:
            yield CounterMetricFamily(name, about, stats.get(key, 0))
        yield from self._residents(stats.get("residents", {}))
        yield from _shares(stats, self._most)
        if self._vllm:
            yield GaugeMetricFamily("vllm:num_requests_running", "Rows running", stats.get("rows", 0))
            yield GaugeMetricFamily("vllm:num_requests_waiting", "Requests waiting", stats.get("queue", 0))
            made = sum(c.get("generated", 0) for c in stats.get("tokens", {}).values())
            read = sum(c.get("prompt", 0) for c in stats.get("tokens", {}).values())
            yield CounterMetricFamily("vllm:generation_tokens", "Tokens made", made)
            yield CounterMetricFamily("vllm:prompt_tokens", "Tokens of prompts", read)
            prefix = stats.get("prefix", {})
            yield CounterMetricFamily(
                "vllm:prefix_cache_queries", "Blocks looked for", prefix.get("asked", 0)
            )
            yield CounterMetricFamily("vllm:prefix_cache_hits", "Blocks found", prefix.get("hits", 0))

    def _residents(self, residents: dict[str, Any]) -> Iterator[Any]:
        size = GaugeMetricFamily(
            "veneer_adapter_resident_bytes", "Bytes of adapters by where they are", labels=["tier"]
        )
        count = GaugeMetricFamily("veneer_adapters_resident", "Adapters by where they are", labels=["tier"])
        each = GaugeMetricFamily(
            "veneer_adapter_resident", "1 where a version is", labels=["version", "tier"]
        )
        tiers: dict[str, list[int]] = {}
        for version, facts in residents.items():
            tier = str(facts.get("tier", ""))
            tiers.setdefault(tier, []).append(int(facts.get("bytes", 0)))
            if tier == "memory" and len(each.samples) < self._most:
                each.add_metric([version[:12], tier], 1)
        for tier, sizes in tiers.items():
            size.add_metric([tier], sum(sizes))
            count.add_metric([tier], len(sizes))
        yield from (size, count, each)


def _shares(stats: dict[str, Any], most: int) -> Iterator[Any]:
    """What the prefix cache found, and how far each tenant is behind the one that was served most."""
    prefix = stats.get("prefix", {})
    yield CounterMetricFamily(
        "veneer_prefix_blocks", "Blocks of prompts that were looked for", prefix.get("asked", 0)
    )
    yield CounterMetricFamily(
        "veneer_prefix_hits", "Blocks of prompts that were there already", prefix.get("hits", 0)
    )
    behind = GaugeMetricFamily(
        "veneer_service_deficit", "Weighted tokens behind the most served", labels=["tenant"]
    )
    served = stats.get("served", {})
    first = max(served.values(), default=0.0)
    for tenant, tokens in sorted(served.items(), key=lambda item: item[1])[:most]:
        behind.add_metric([tenant], first - tokens)
    yield behind

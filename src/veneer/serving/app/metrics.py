"""What Prometheus reads: counters of this server's requests, and the engine's own numbers when they are asked for.

Adapters are labels. A label costs memory for ever, here and at whoever reads it: the first so many adapters that have
traffic get their own, the others are counted together as "other", so that no counter ever goes back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder

from .calls import Call
from .metrics_stats import as_vllm, of_engine, of_reading, of_training
from .record import Record

FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
GAPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
WHOLE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
OTHER, BASE = "other", "base"


class AsVllm:
    """Latencies and ends of requests under vLLM's names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def made(name: str, about: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"vllm:{name}", about, buckets=buckets, registry=registry)

        self.first = made("time_to_first_token_seconds", "Until the first token", FIRST)
        self.gap = made("inter_token_latency_seconds", "Between tokens of one row", GAPS)
        self.whole = made("e2e_request_latency_seconds", "Until the last token", WHOLE)
        self.ends = Counter(
            "vllm:request_success", "Rows by how they ended", ["finished_reason"], registry=registry
        )

    def finished(self, call: Call, now: float) -> None:
        if call.first is not None:
            self.first.observe(call.first - call.record.began)
        for gap in call.gaps:
            self.gap.observe(gap)
        for reason in call.finishes:
            if reason in ("stop", "length"):
                self.ends.labels(reason).inc()
        if call.record.outcome == "done":
            self.whole.observe(now - call.record.began)


class Metrics:
    """Args:
    stats: the engine's numbers, asked for at each reading; an empty dict while there is no engine.
    labels: adapters with labels of their own. reading, training: as stats, of the engine that reads and of jobs.
    """

    def __init__(
        self,
        stats: Callable[[], dict[str, Any]],
        labels: int,
        vllm_names: bool = False,
        *,
        reading: Callable[[], dict[str, Any]] | None = None,
        training: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self._stats, self._most, self._vllm = stats, labels, vllm_names
        self._reading, self._training = reading, training
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
            "veneer_step_seconds", "Of one turn of the model: a step for requests, or a slice of training",
            ["phase"], buckets=GAPS, registry=registry,
        )  # fmt: skip
        self._loads = Histogram(
            "veneer_adapter_load_seconds", "Reading one adapter into memory", buckets=FIRST, registry=registry
        )
        self._as_vllm = AsVllm(registry) if vllm_names else None
        self._looking = threading.Lock()
        self._seen = {"serve": 0, "train": 0}  # turns that were observed
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
        if self._as_vllm is not None:
            self._as_vllm.finished(call, now)

    def read(self, target: Any, record: Record, tokens: int) -> None:
        """Count a request that was read with a head, or embedded."""
        name = BASE if target.version is None else self.label(target.name)
        self.requests.labels(name, target.method or "none", record.outcome).inc()
        self.tokens.labels(name, "prompt").inc(tokens)
        if record.outcome == "done":
            self.whole.labels(name).observe(time.perf_counter() - record.began)

    def answered(self, record: Record) -> None:
        self.http.labels(str(record.status or 499)).inc()

    def text(self, accept: str) -> tuple[bytes, str]:
        """(body, content type), OpenMetrics where it is asked for."""
        with self._looking:
            self._observe(self._stats())
            training = {} if self._training is None else self._training()
            self._observe_turns("train", sum(training.get("slices", {}).values()), training.get("recent", ()))
        encoder, kind = choose_encoder(accept)
        return encoder(self.registry), kind

    def _observe(self, stats: dict[str, Any]) -> None:
        """What the engine remembers of its last steps and readings goes into histograms once."""
        self._observe_turns("serve", stats.get("steps", 0), stats.get("step_seconds", ()))
        for version, facts in stats.get("residents", {}).items():
            seconds = facts.get("load_seconds")
            if seconds and self._read.get(version) != seconds:
                self._read[version] = seconds
                self._loads.observe(seconds)

    def _observe_turns(self, phase: str, count: int, recent: Sequence[float]) -> None:
        new = count - self._seen[phase]
        for seconds in list(recent)[-new:] if new > 0 else ():
            self._steps.labels(phase).observe(seconds)
        self._seen[phase] = count

    def collect(self) -> Iterator[Any]:
        """The numbers that others keep. Also called once at registration, for the names."""
        stats = self._stats()
        yield from of_engine(stats, self._most)
        if self._reading is not None:
            yield from of_reading(self._reading())
        if self._training is not None:
            yield from of_training(self._training(), self._most)
        if self._vllm:
            yield from as_vllm(stats)

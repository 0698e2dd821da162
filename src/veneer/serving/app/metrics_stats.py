"""Numbers that others keep, as Prometheus reads them: the engine's, the reading engine's, those of jobs that train.

Everything is asked for at a reading and given out as it is. Where a number is of an adapter or a tenant, at most so
many have a label of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

Stats = Mapping[str, Any]
Numbers = tuple[tuple[str, str, str], ...]  # name, what it is, the word for it in the stats

GAUGES: Numbers = (
    ("veneer_batch_rows", "Rows that share the running step", "rows"),
    ("veneer_batch_distinct_adapters", "Adapters in the running step", "adapters_running"),
    ("veneer_queue_length", "Requests that wait for a slot", "queue"),
    ("veneer_slots", "Rows that can run together", "slots"),
    ("veneer_cache_bytes", "Bytes of the rows' keys and values", "cache_bytes"),
)
COUNTERS: Numbers = (
    ("veneer_steps", "Steps of the engine", "steps"),
    ("veneer_adapter_loads", "Adapters read into memory", "loads"),
    ("veneer_adapter_evictions", "Adapters put out of memory for others", "evictions"),
)
READ_GAUGES: Numbers = (("veneer_read_queue_rows", "Texts that wait to be read", "waiting"),)
READ_COUNTERS: Numbers = (
    ("veneer_read_forwards", "Forwards over texts that are read with a head or embedded", "forwards"),
    ("veneer_read_rows", "Texts that were read", "rows"),
)
TRAIN_GAUGES: Numbers = (
    ("veneer_train_members", "Jobs that train together now", "members"),
    ("veneer_train_slack_seconds", "Left between two tokens for a slice of training", "slack"),
)
TRAIN_COUNTERS: Numbers = (
    (
        "veneer_train_refusals",
        "Times that a slice of training waited, since it would hold up tokens",
        "put_off",
    ),
)


def of_engine(stats: Stats, most: int) -> Iterator[Any]:
    yield from _plain(stats, GAUGES, COUNTERS)
    yield from _residents(stats.get("residents", {}), most)
    yield from _shares(stats, most)


def of_reading(stats: Stats) -> Iterator[Any]:
    yield from _plain(stats, READ_GAUGES, READ_COUNTERS)
    residents = stats.get("residents", {}).values()
    yield GaugeMetricFamily("veneer_read_adapters_resident", "Adapters with a head in memory", len(residents))
    size = sum(int(facts.get("bytes", 0)) for facts in residents)
    yield GaugeMetricFamily("veneer_read_adapter_bytes", "Bytes of adapters with a head in memory", size)


def of_training(stats: Stats, most: int) -> Iterator[Any]:
    """Jobs by state; steps and tokens by job, the first so many jobs of this process apart."""
    yield from _plain(stats, TRAIN_GAUGES, TRAIN_COUNTERS)
    jobs = GaugeMetricFamily("veneer_train_jobs", "Jobs by state", labels=["state"])
    for state, count in stats.get("jobs", {}).items():
        jobs.add_metric([state], count)
    slices = CounterMetricFamily("veneer_train_slices", "Slices of training that were done", labels=["kind"])
    for kind, count in stats.get("slices", {}).items():
        slices.add_metric([kind], count)
    yield from (jobs, slices)
    for word, about in (("steps", "Updates"), ("tokens", "Tokens that training read")):
        each = CounterMetricFamily(f"veneer_train_{word}", about, labels=["job"])
        counts = list(stats.get(word, {}).items())  # in the order in which they began
        for name, count in counts[:most]:
            each.add_metric([name], count)
        if len(counts) > most:
            each.add_metric(["other"], sum(count for _, count in counts[most:]))
        yield each


def as_vllm(stats: Stats) -> Iterator[Any]:
    """The engine's numbers under vLLM's names."""
    yield GaugeMetricFamily("vllm:num_requests_running", "Rows running", stats.get("rows", 0))
    yield GaugeMetricFamily("vllm:num_requests_waiting", "Requests waiting", stats.get("queue", 0))
    counts = stats.get("tokens", {}).values()
    for word, name in (("generated", "generation_tokens"), ("prompt", "prompt_tokens")):
        yield CounterMetricFamily(f"vllm:{name}", "Tokens", sum(c.get(word, 0) for c in counts))
    prefix = stats.get("prefix", {})
    yield CounterMetricFamily("vllm:prefix_cache_queries", "Blocks looked for", prefix.get("asked", 0))
    yield CounterMetricFamily("vllm:prefix_cache_hits", "Blocks found", prefix.get("hits", 0))


def _plain(stats: Stats, gauges: Numbers, counters: Numbers) -> Iterator[Any]:
    for name, about, key in gauges:
        yield GaugeMetricFamily(name, about, stats.get(key, 0))
    for name, about, key in counters:
        yield CounterMetricFamily(name, about, stats.get(key, 0))


def _residents(residents: Mapping[str, Any], most: int) -> Iterator[Any]:
    size = GaugeMetricFamily(
        "veneer_adapter_resident_bytes", "Bytes of adapters by where they are", labels=["tier"]
    )
    count = GaugeMetricFamily("veneer_adapters_resident", "Adapters by where they are", labels=["tier"])
    each = GaugeMetricFamily("veneer_adapter_resident", "1 where a version is", labels=["version", "tier"])
    tiers: dict[str, list[int]] = {}
    for version, facts in residents.items():
        tier = str(facts.get("tier", ""))
        tiers.setdefault(tier, []).append(int(facts.get("bytes", 0)))
        if tier == "memory" and len(each.samples) < most:
            each.add_metric([version.removeprefix("sha256:")[:12], tier], 1)
    for tier, sizes in tiers.items():
        size.add_metric([tier], sum(sizes))
        count.add_metric([tier], len(sizes))
    yield from (size, count, each)


def _shares(stats: Stats, most: int) -> Iterator[Any]:
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

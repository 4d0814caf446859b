"""What `/metrics` shows: small and flat, whatever the number of adapters.

The `vllm:*` gauges have the names that the Kubernetes inference gateway and other tools read already.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.border.client import EngineClient
from server.messages import EngineInfo, EngineStats

# Else each counter has a second series, which nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no annotation here

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 5)


class Metrics:
    """Counters of the HTTP face, and a reader of the engine's heartbeat. One per app, its own registry."""

    def __init__(self, engine: EngineClient, name_of: Callable[[str], str]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "chorus_requests",
            "Inference requests: completed, rejected (4xx), failed (5xx) or aborted (the client went away).",
            ["outcome"],
            registry=self._registry,
        )
        for outcome in ("completed", "rejected", "failed", "aborted"):
            self.requests.labels(outcome)
        self.prompt_tokens = Counter(
            "chorus_prompt_tokens", "Prompt tokens of accepted sequences.", registry=self._registry
        )
        self._output_tokens = Counter(
            "chorus_output_tokens", "Tokens given to clients.", registry=self._registry
        )
        self._first_token = Histogram(
            "chorus_time_to_first_token_seconds",
            "From handing a sequence to the engine to its first token.",
            buckets=_TTFT_BUCKETS,
            registry=self._registry,
        )
        self._next_token = Histogram(
            "chorus_inter_token_seconds",
            "Between two outputs of one sequence.",
            buckets=_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(engine, name_of))

    def observe_tokens(self, count: int, seconds: float, *, first: bool) -> None:
        """`count` tokens of one sequence came, `seconds` after what came before them."""
        self._output_tokens.inc(count)
        (self._first_token if first else self._next_token).observe(seconds)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the newest heartbeat when it is asked, so that nothing is kept in step."""

    def __init__(self, engine: EngineClient, name_of: Callable[[str], str]) -> None:
        self._engine = engine
        self._name_of = name_of

    def describe(self) -> list[Metric]:
        return []  # else registering would call collect() for the names

    def collect(self) -> Iterator[Metric]:
        engine, stats, info = self._engine, self._engine.stats, self._engine.info
        yield _gauge("chorus_engine_ready", "1 when the engine takes requests.", engine.state == "ready")
        yield _counter("chorus_engine_restarts", "Times the engine was started again.", engine.restarts)
        if info is not None:
            yield from _sizes(info)
        if stats is not None:
            yield from _load(stats)
            yield from _memory(stats)
            yield from _totals(stats)
        if stats is not None and info is not None:
            yield self._adapters(stats, info)

    def _adapters(self, stats: EngineStats, info: EngineInfo) -> Metric:
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in use.", labels=labels)
        running = ",".join(sorted({self._name_of(digest) for digest in stats.resident}))
        waiting = ",".join(sorted({self._name_of(digest) for digest in stats.waiting_digests}))
        family.add_metric([str(info.rank16_adapters), running, waiting], time.time())
        return family


def _sizes(info: EngineInfo) -> Iterator[Metric]:
    config = GaugeMetricFamily(
        "vllm:cache_config_info", "Size of the KV cache.", labels=["block_size", "num_gpu_blocks"]
    )
    config.add_metric([str(info.block_size), str(info.kv_blocks)], 1)
    yield config
    yield _gauge("chorus_weights_bytes", "Weights of the base model.", info.weights_bytes)
    yield _gauge("chorus_kv_bytes", "Size of the KV cache.", info.kv_bytes)


def _load(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("vllm:num_requests_running", "Sequences that run.", stats.running)
    yield _gauge("vllm:num_requests_waiting", "Sequences that wait.", stats.waiting)
    yield _gauge(
        "chorus_requests_waiting_for_adapter", "Of these, for their adapter.", stats.waiting_for_adapter
    )


def _memory(stats: EngineStats) -> Iterator[Metric]:
    in_use = stats.kv_blocks_total - stats.kv_blocks_free - stats.kv_blocks_cached
    yield _gauge(
        "vllm:kv_cache_usage_perc", "KV blocks held, 0 to 1.", in_use / max(stats.kv_blocks_total, 1)
    )
    yield _gauge("chorus_kv_blocks_free", "KV blocks that hold nothing.", stats.kv_blocks_free)
    yield _gauge("chorus_kv_blocks_cached", "KV blocks kept for prefix reuse.", stats.kv_blocks_cached)
    yield _gauge("chorus_arena_bytes", "Size of the adapter arena.", stats.arena_bytes_total)
    yield _gauge("chorus_arena_used_bytes", "Arena bytes that hold adapters.", stats.arena_bytes_used)
    yield _gauge("chorus_arena_adapters", "Adapters in the arena.", len(stats.resident))
    yield _gauge("chorus_host_used_bytes", "Packed adapters in host memory.", stats.host_bytes_used)


def _totals(stats: EngineStats) -> Iterator[Metric]:
    """Of the present engine process: they start anew with it, as Prometheus counters may."""
    yield _counter("chorus_engine_steps", "Steps.", stats.steps)
    yield _counter("chorus_preemptions", "Sequences set back for want of KV blocks.", stats.preemptions)
    yield _counter("chorus_adapter_loads", "Copies of adapters into the arena.", stats.adapter_loads)
    yield _counter("chorus_adapter_evictions", "Adapters that left the arena.", stats.adapter_evictions)
    yield _counter("chorus_engine_prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
    yield _counter("chorus_engine_cached_prompt_tokens", "Prompt tokens reused.", stats.cached_prompt_tokens)
    yield _counter("chorus_engine_generated_tokens", "Tokens sampled.", stats.generated_tokens)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)

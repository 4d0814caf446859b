"""What the engine's newest heartbeat says, as metrics. The `vllm:` names are those that others read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.border.client import EngineClient
from server.messages import STEP_TOKEN_BOUNDS, EngineInfo, EngineStats
from server.telemetry.exposition import counter, gauge, histogram

# Characters of the lists in `vllm:lora_requests_info`: sixty short names, a few of the longest.
_RUNNING_CHARACTERS = 880
_WAITING_CHARACTERS = 180


class EngineMetrics(Collector):
    """Reads the heartbeat when it is asked, so that nothing is kept in step.

    `name_of`: the adapter's name of a digest.
    """

    def __init__(self, engine: EngineClient, name_of: Callable[[str], str], model_name: str) -> None:
        self._engine = engine
        self._name_of = name_of
        self._labels = {"model_name": model_name}

    def describe(self) -> list[Metric]:
        return []  # else registering would call collect() for the names

    def collect(self) -> Iterator[Metric]:
        engine, stats, info = self._engine, self._engine.stats, self._engine.info
        yield gauge("chorus_engine_ready", "1: it takes requests.", engine.state == "ready")
        yield counter("chorus_engine_restarts", "Engine restarts.", engine.restarts)
        if info is not None:
            yield from _sizes(info)
        if stats is not None:
            yield from _load(stats, self._labels)
            yield from _memory(stats, self._labels)
            yield from _totals(stats)
            yield from _standard_totals(stats, self._labels)
        if stats is not None and info is not None:
            yield self._adapters(stats, info)

    def _adapters(self, stats: EngineStats, info: EngineInfo) -> Metric:
        """Gateways send a request where its adapter is listed: first those in use, then the newest ones."""
        newest = chain(stats.running_digests, reversed(stats.resident))
        labels = {
            "max_lora": str(info.rank16_adapters),
            "running_lora_adapters": self._listed(newest, _RUNNING_CHARACTERS),
            "waiting_lora_adapters": self._listed(stats.waiting_digests, _WAITING_CHARACTERS),
        }
        return gauge("vllm:lora_requests_info", "Adapters in use.", time.time(), labels)

    def _listed(self, digests: Iterable[str], room: int) -> str:
        """Their names, the first ones of which there is room for, each once and sorted."""
        names: set[str] = set()
        for digest in digests:
            name = self._name_of(digest)
            if name in names:
                continue
            room -= len(name) + 1
            if room < 0:
                break
            names.add(name)
        return ",".join(sorted(names))


def _sizes(info: EngineInfo) -> Iterator[Metric]:
    labels = {"block_size": str(info.block_size), "num_gpu_blocks": str(info.kv_blocks)}
    yield gauge("vllm:cache_config_info", "Size of the KV cache.", 1, labels)
    yield gauge("chorus_weights_bytes", "Base model.", info.weights_bytes)
    yield gauge("chorus_kv_bytes", "Size of the KV cache.", info.kv_bytes)


def _load(stats: EngineStats, labels: dict[str, str]) -> Iterator[Metric]:
    yield gauge("vllm:num_requests_running", "Sequences that run.", stats.running, labels)
    yield gauge("vllm:num_requests_waiting", "Sequences that wait.", stats.waiting, labels)
    yield gauge(
        "chorus_requests_waiting_for_adapter", "Of these, for their adapter.", stats.waiting_for_adapter
    )


def _memory(stats: EngineStats, labels: dict[str, str]) -> Iterator[Metric]:
    in_use = stats.kv_blocks_total - stats.kv_blocks_free - stats.kv_blocks_cached
    share = in_use / max(stats.kv_blocks_total, 1)
    yield gauge("vllm:kv_cache_usage_perc", "KV blocks held, 0 to 1.", share, labels)
    yield gauge("chorus_kv_blocks_free", "Hold nothing.", stats.kv_blocks_free)
    yield gauge("chorus_kv_blocks_cached", "Kept for reuse.", stats.kv_blocks_cached)
    yield gauge("chorus_arena_bytes", "Adapter arena.", stats.arena_bytes_total)
    yield gauge("chorus_arena_used_bytes", "In use.", stats.arena_bytes_used)
    yield gauge("chorus_arena_adapters", "Adapters in the arena.", len(stats.resident))
    yield gauge("chorus_host_used_bytes", "Packed adapters.", stats.host_bytes_used)


def _totals(stats: EngineStats) -> Iterator[Metric]:
    """Of the present engine process: they start anew with it, as Prometheus counters may."""
    yield counter("chorus_engine_steps", "Steps.", stats.steps)
    yield counter("chorus_preemptions", "Sequences set back.", stats.preemptions)
    yield counter("chorus_adapter_loads", "Copies into the arena.", stats.adapter_loads)
    yield counter("chorus_adapter_evictions", "Adapters that left.", stats.adapter_evictions)
    yield counter("chorus_engine_prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
    yield counter("chorus_engine_cached_prompt_tokens", "Prompt tokens reused.", stats.cached_prompt_tokens)
    yield counter("chorus_engine_generated_tokens", "Tokens sampled.", stats.generated_tokens)


def _standard_totals(stats: EngineStats, labels: dict[str, str]) -> Iterator[Metric]:
    """The same life of the engine in the names that others read."""
    yield counter("vllm:num_preemptions", "Preemptions.", stats.preemptions, labels)
    yield counter("vllm:prefix_cache_queries", "Tokens looked up.", stats.prefix_query_tokens, labels)
    yield counter("vllm:prefix_cache_hits", "Tokens found.", stats.cached_prompt_tokens, labels)
    counts = stats.step_tokens or (0,) * (len(STEP_TOKEN_BOUNDS) + 1)
    name, total = "vllm:iteration_tokens_total", stats.step_tokens_sum
    yield histogram(name, "Tokens of a step.", labels, STEP_TOKEN_BOUNDS, counts, total)

"""`/metrics` of an engine that holds thousands of adapters: small, and what gateways need is in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from load_tests.fake_engine import empty_stats, engine_info
from server.messages import STEP_TOKEN_BOUNDS
from server.telemetry.exposition import Distribution
from server.telemetry.metrics import Metrics

LIMIT = 20_000  # bytes
RESIDENT = tuple(f"{at:064x}" for at in range(3000))  # most recently used last


def metrics_of(name_of: Any = lambda digest: f"tenant/customer-{int(digest, 16)}", **fields: Any) -> Metrics:
    engine: Any = SimpleNamespace(
        state="ready", restarts=0, info=engine_info(), stats=msgspec.structs.replace(empty_stats(), **fields)
    )
    metrics = Metrics(engine, name_of, "Llama-3.1-8B-Instruct")
    metrics.watch_queue(lambda: 123_456, lambda: 123_456)
    return metrics


def samples(metrics: Metrics) -> dict[str, Any]:
    text = metrics.render().decode()
    return {s.name: s for family in text_string_to_metric_families(text) for s in family.samples}


def listed(metrics: Metrics, label: str) -> list[str]:
    names: str = samples(metrics)["vllm:lora_requests_info"].labels[label]
    return names.split(",")


@pytest.mark.parametrize("length", [8, 64, 255], ids="names of {} characters".format)
def test_it_is_small_with_thousands_of_adapters_and_large_figures(length: int) -> None:
    many = 123_456_789
    metrics = metrics_of(
        lambda digest: digest[-8:].rjust(length, "n"),
        resident=RESIDENT, on_host=RESIDENT, running_digests=RESIDENT[:64], waiting_digests=RESIDENT,
        step_tokens=(many,) * (len(STEP_TOKEN_BOUNDS) + 1), step_tokens_sum=many, preemptions=many,
        generated_tokens=many, arena_bytes_total=many, arena_bytes_used=many, prompt_tokens=many,
    )  # fmt: skip
    for distribution in vars(metrics.sequences).values():
        if isinstance(distribution, Distribution):
            distribution._counts[:] = [many] * len(distribution._counts)
            distribution._sum = many / 7
    assert len(metrics.render()) < LIMIT


def test_adapters_in_use_are_listed_first_then_the_newest() -> None:
    in_use = RESIDENT[:5]  # the least recently used ones
    names = listed(metrics_of(resident=RESIDENT, running_digests=in_use), "running_lora_adapters")
    assert set(names) >= {f"tenant/customer-{at}" for at in range(5)}
    others = {int(name.rpartition("-")[2]) for name in names} - set(range(5))
    assert others == set(range(3000 - len(others), 3000))
    assert len(names) > 40
    assert names == sorted(names)


def test_all_are_listed_where_there_are_few() -> None:
    metrics = metrics_of(resident=RESIDENT[:40], waiting_digests=RESIDENT[40:43])
    assert len(listed(metrics, "running_lora_adapters")) == 40
    assert listed(metrics, "waiting_lora_adapters") == [f"tenant/customer-{at}" for at in (40, 41, 42)]


def test_two_versions_of_a_name_are_one() -> None:
    metrics = metrics_of(lambda _: "same", resident=RESIDENT[:2], running_digests=RESIDENT[:1])
    assert listed(metrics, "running_lora_adapters") == ["same"]


def test_totals_in_the_names_that_others_read() -> None:
    found = samples(metrics_of(
        preemptions=2, prefix_query_tokens=30, cached_prompt_tokens=16,
        step_tokens=(4, 0, 0, 1, 0, 0, 0), step_tokens_sum=104,
    ))  # fmt: skip
    assert found["vllm:num_preemptions_total"].value == 2
    assert found["vllm:prefix_cache_queries_total"].value == 30
    assert found["vllm:prefix_cache_hits_total"].value == 16
    assert found["vllm:iteration_tokens_total_count"].value == 5
    assert found["vllm:iteration_tokens_total_sum"].value == 104
    assert found["vllm:num_requests_running"].labels == {"model_name": "Llama-3.1-8B-Instruct"}

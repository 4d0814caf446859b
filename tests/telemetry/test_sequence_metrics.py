"""The figures of sequences, at times that the test gives."""

from __future__ import annotations

import random
from bisect import bisect_left

import pytest
from prometheus_client import CollectorRegistry

from server.messages import Fork, Request, SamplingParams, TokenOutput
from server.telemetry import sequence_metrics
from server.telemetry.exposition import Distribution
from server.telemetry.sequence_metrics import SequenceMetrics
from tests.scheduling.fake_step import Clock

LABELS = {"model_name": "base"}


class Watched:
    """Metrics on a clock of the test's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        monkeypatch.setattr(sequence_metrics.time, "monotonic", self.clock)
        self.metrics = SequenceMetrics("base")
        self._registry = CollectorRegistry()
        self._registry.register(self.metrics)

    def value(self, name: str, **labels: str) -> float:
        value = self._registry.get_sample_value(name, LABELS | labels)
        assert value is not None, name
        return value

    def both(self, name: str) -> tuple[float, float]:
        """Count and sum of a histogram."""
        return self.value(f"{name}_count"), self.value(f"{name}_sum")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def request(forks: int = 0, max_tokens: int = 30) -> Request:
    others = tuple(Fork(f"f{at}") for at in range(forks))
    return Request("r", [1, 2, 3], SamplingParams(max_tokens=max_tokens), forks=others)


def test_phases_of_a_sequence_add_up(watched: Watched) -> None:
    watched.clock.now = 100.0
    (times,) = watched.metrics.begin(request())
    for now, started, tokens in ((103.0, 101.0, 1), (103.5, None, 2), (105.0, None, 1)):
        watched.clock.now = now
        watched.metrics.output(times, TokenOutput("r", [7] * tokens, started_at=started), tokens)
    watched.metrics.end(times, "length")
    assert watched.both("vllm:time_to_first_token_seconds") == (1, 3.0)
    assert watched.both("vllm:inter_token_latency_seconds") == (2, 2.0)
    assert watched.both("vllm:request_queue_time_seconds") == (1, 1.0)
    assert watched.both("vllm:request_prefill_time_seconds") == (1, 2.0)
    assert watched.both("vllm:request_decode_time_seconds") == (1, 2.0)
    assert watched.both("vllm:request_inference_time_seconds") == (1, 4.0)
    assert watched.both("vllm:e2e_request_latency_seconds") == (1, 5.0)
    assert watched.both("vllm:request_time_per_output_token_seconds") == (1, 2.0 / 3)
    assert watched.both("vllm:request_prompt_tokens") == (1, 3)
    assert watched.both("vllm:request_generation_tokens") == (1, 4)
    assert watched.both("vllm:request_params_max_tokens") == (1, 30)
    assert watched.value("vllm:request_success_total", finished_reason="length") == 1
    assert watched.value("vllm:prompt_tokens_total") == 3
    assert watched.value("vllm:generation_tokens_total") == 4


@pytest.mark.parametrize(("error", "reason"), [(None, "abort"), (ValueError(), "error")])
def test_those_cut_off_are_counted_and_their_latencies_are_not(
    watched: Watched, error: Exception | None, reason: str
) -> None:
    choices = watched.metrics.begin(request(forks=2))
    for times, tokens in zip(choices, (4, 9, 1), strict=True):
        watched.metrics.output(times, TokenOutput("r", [7] * tokens, started_at=0.0), tokens)
    watched.metrics.end(choices[0], "stop")
    watched.metrics.prompt_ended(choices, error)
    assert watched.value("vllm:request_success_total", finished_reason=reason) == 2
    assert watched.value("vllm:request_success_total", finished_reason="stop") == 1
    assert watched.both("vllm:e2e_request_latency_seconds")[0] == 1
    assert watched.both("vllm:request_max_num_generation_tokens") == (1, 4)
    assert watched.both("vllm:request_params_n") == (1, 3)
    assert watched.value("vllm:generation_tokens_total") == 14


def test_a_value_falls_into_the_first_bucket_that_holds_it() -> None:
    bounds = (0.1, 1.0, 5.0)
    distribution = Distribution(bounds)
    values = [*bounds, *(random.Random(0).uniform(0, 7) for _ in range(200))]
    for value in values:
        distribution.observe(value)
    samples = distribution.family("x", "X.", {}).samples
    for sample in samples:
        if sample.name == "x_bucket":
            assert sample.value == sum(value <= float(sample.labels["le"]) for value in values)
    assert samples[-1].value == pytest.approx(sum(values))
    assert bisect_left(bounds, 0.1) == 0  # a bound belongs to its own bucket, as Prometheus has it

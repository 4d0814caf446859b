"""What `/metrics` and `/metrics/adapters` show: small and flat, whatever the number of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest

from server.border.client import EngineClient
from server.telemetry.adapter_metrics import AdapterMetrics
from server.telemetry.engine_metrics import EngineMetrics
from server.telemetry.sequence_metrics import SequenceMetrics

# Else each counter has a second series, which nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no annotation here

OUTCOMES = ("completed", "rejected", "failed", "aborted")
REFUSALS = (  # codes of errors, and for quotas the limit that was met
    "queue_full", "queue_share_full",
    "requests_per_s", "tokens_per_s", "tokens_per_day", "concurrent_requests",
    "engine_not_ready", "deadline_exceeded",
)  # fmt: skip

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """All metrics of one app: what the HTTP face counts, and a reader of the engine's heartbeat.

    `name_of`: the adapter's name of a digest; `model_name`: the base model's.
    """

    def __init__(self, engine: EngineClient, name_of: Callable[[str], str], model_name: str = "") -> None:
        self._registry = CollectorRegistry()
        self._of_adapters = CollectorRegistry()
        self._requests = self._counter("chorus_requests", "Inference requests.", "outcome", OUTCOMES)
        self._refused = self._counter(
            "chorus_refused",
            "Those that an idle server serves.",
            "reason",
            REFUSALS,
        )
        self.sequences = SequenceMetrics(model_name)
        self.adapters = AdapterMetrics(lambda: engine.stats)
        self._registry.register(self.sequences)
        self._registry.register(EngineMetrics(engine, name_of, model_name))
        self._of_adapters.register(self.adapters)

    def _counter(self, name: str, text: str, label: str, values: Iterable[str]) -> Counter:
        """With a series of each value from the start."""
        made = Counter(name, text, [label], registry=self._registry)
        for value in values:
            made.labels(value)
        return made

    def watch_queue(self, waiting: Callable[[], int], limit: Callable[[], int]) -> None:
        """Show how many sequences wait for their first token, of how many that may."""
        text = "Without a first token."
        Gauge("chorus_queue_sequences", text, registry=self._registry).set_function(waiting)
        Gauge("chorus_queue_limit", "How many may.", registry=self._registry).set_function(limit)

    def count_request(self, outcome: str, reason: str | None = None) -> None:
        """One inference request that has ended; `reason`: of the error that it ended with."""
        self._requests.labels(outcome).inc()
        if reason in REFUSALS:
            self._refused.labels(reason).inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)

    def render_adapters(self) -> bytes:
        """The same, of what is known by adapter."""
        return generate_latest(self._of_adapters)

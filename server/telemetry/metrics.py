"""What `/metrics` and `/metrics/adapters` show: small and flat, whatever the number of adapters."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, disable_created_metrics, generate_latest

from server.border.client import EngineClient
from server.telemetry.adapter_metrics import AdapterMetrics
from server.telemetry.engine_metrics import EngineMetrics
from server.telemetry.sequence_metrics import SequenceMetrics

# Else each counter has a second series, which nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no annotation here

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """All metrics of one app: what the HTTP face counts, and a reader of the engine's heartbeat.

    `name_of`: the adapter's name of a digest; `model_name`: the base model's.
    """

    def __init__(self, engine: EngineClient, name_of: Callable[[str], str], model_name: str = "") -> None:
        self._registry = CollectorRegistry()
        self._of_adapters = CollectorRegistry()
        self.requests = Counter(
            "chorus_requests",
            "Inference requests, by outcome.",
            ["outcome"],
            registry=self._registry,
        )
        for outcome in ("completed", "rejected", "failed", "aborted"):
            self.requests.labels(outcome)
        self.sequences = SequenceMetrics(model_name)
        self.adapters = AdapterMetrics(lambda: engine.stats)
        self._registry.register(self.sequences)
        self._registry.register(EngineMetrics(engine, name_of, model_name))
        self._of_adapters.register(self.adapters)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)

    def render_adapters(self) -> bytes:
        """The same, of what is known by adapter."""
        return generate_latest(self._of_adapters)

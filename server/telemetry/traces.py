"""OpenTelemetry traces over OTLP/HTTP. Nothing of it is imported, and nothing done, unless it is asked for.

Spans are made when a request is over, from times that were taken anyway: a token costs nothing more. Prompts
and answers are never part of them.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from server.config import OtelEnvironment, Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_CLOSE_S = 3.0  # for the last spans; a collector that is gone holds nobody up for longer
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)

Attributes = dict[str, Any]


class TracesError(Exception):
    """Traces were asked for and cannot be had; the text is for the operator."""


def trace_id_of(headers: Mapping[str, str]) -> str | None:
    """The trace that a caller's `traceparent` names (W3C Trace Context), if it is well-formed."""
    match = _TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    return match[1] if match else None


class Traces:
    """Makes one trace of each request, and sends them in the background."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("chorus")

    @classmethod
    def of(cls, settings: Settings, version: str) -> Traces | None:
        """None where nobody asked for traces. Raises TracesError where they cannot be had."""
        environment = OtelEnvironment.read()
        if environment.disabled or not (settings.otlp_endpoint or environment.has_endpoint):
            return None
        if environment.protocol not in ("", "http/protobuf"):
            raise TracesError(
                f"OTEL_EXPORTER_OTLP_PROTOCOL {environment.protocol}: only http/protobuf is sent"
            )
        try:
            return cls(_provider(settings.otlp_endpoint, version))
        except ImportError as error:
            raise TracesError("traces need a package: pip install 'chorus-serve[otel]'") from error

    def begin(self, headers: Mapping[str, str], method: str) -> RequestTrace:
        """A request came, perhaps with a `traceparent`, whose child it is then."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(method, context=extract(headers), kind=SpanKind.SERVER)
        return RequestTrace(self._tracer, span)

    async def close(self) -> None:
        """Send what is left, in bounded time."""
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, _CLOSE_S)


class RequestTrace:
    """The spans of one request. Times are in seconds of time.monotonic()."""

    def __init__(self, tracer: Tracer, span: Span, since_1970_ns: int | None = None) -> None:
        self._tracer = tracer
        self._span = span
        # Where time.monotonic() began; one value for the whole trace, or its spans would not fit together.
        self._since_1970_ns = since_1970_ns or time.time_ns() - time.monotonic_ns()

    @property
    def trace_id(self) -> str:
        return format(self._span.get_span_context().trace_id, "032x")

    @property
    def wanted(self) -> bool:
        """Whether the sampler took it: if not, what is told of it goes nowhere."""
        return self._span.is_recording()

    def child(self, name: str, began: float, ended: float, attributes: Attributes) -> RequestTrace:
        """A part of it that is over."""
        from opentelemetry.trace import set_span_in_context

        within = set_span_in_context(self._span)
        span = self._tracer.start_span(name, within, attributes=attributes, start_time=self._ns(began))
        span.end(self._ns(ended))
        return RequestTrace(self._tracer, span, self._since_1970_ns)

    def end(self, name: str, attributes: Attributes, error: str | None) -> None:
        """`error`: what went wrong, as a word; None when nothing did."""
        from opentelemetry.trace import Status, StatusCode

        self._span.update_name(name)
        self._span.set_attributes(attributes)
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()

    def _ns(self, monotonic_s: float) -> int:
        return self._since_1970_ns + int(monotonic_s * 1e9)


def _provider(endpoint: str | None, version: str) -> TracerProvider:
    """Sampler, headers, time limits, batches and the rest are the SDK's own OTEL_* variables."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    url = endpoint.rstrip("/") + "/v1/traces" if endpoint else None  # None: as the environment says
    given = OTELResourceDetector().detect()  # OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES
    resource = Resource.create({"service.name": "chorus", "service.version": version}).merge(given)
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return provider

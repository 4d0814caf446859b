"""Traces as a collector gets them: OTLP over HTTP, from the whole face on a fake engine."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from server.api.app import create_app
from server.base_model import BaseModel, StartError
from server.config import Settings
from server.messages import ErrorCode
from tests.api.face_site import model_folder, open_site
from tests.api.fake_engine import FakeEngine

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Span:
    """One span as it was received, its attributes as plain values."""

    def __init__(self, span: Any) -> None:
        self.name: str = span.name
        self.trace_id: str = span.trace_id.hex()
        self.id: bytes = span.span_id
        self.parent: bytes = span.parent_span_id
        self.kind: int = span.kind
        self.failed = span.status.code == 2
        self.began: int = span.start_time_unix_nano
        self.ended: int = span.end_time_unix_nano
        self.attributes = {each.key: _plain(each.value) for each in span.attributes}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(each) for each in value.array_value.values]
    return getattr(value, kind)


class Collector:
    """An OTLP/HTTP collector on a free port, in a thread."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                collector.path = self.path
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.path = ""
        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def spans(self) -> list[Span]:
        return [
            Span(span)
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def resource(self) -> dict[str, Any]:
        found = self.requests[0].resource_spans[0].resource
        return {each.key: _plain(each.value) for each in found.attributes}

    def named(self, name: str) -> Span:
        (span,) = [span for span in self.spans if span.name == name]
        return span


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        collector.server.shutdown()
        thread.join()
        collector.server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


class LateEngine(FakeEngine):
    """Says of each first output that it left the line for its adapter's sake."""

    def _outputs(self, request: Any) -> list[Any]:
        first, *rest = super()._outputs(request)
        if first.error is None:
            now = time.monotonic()
            first = msgspec.structs.replace(first, started_at=now, waited_for_adapter=bool(request.adapters))
        return [first, *rest]


async def test_a_request_is_one_trace_under_its_callers(tmp_path: Path, collector: Collector) -> None:
    async with open_site(tmp_path, LateEngine(), otlp_endpoint=collector.url) as site:
        site.say("the quick brown fox")
        answer = await site.client.post(
            "/v1/chat/completions",
            json={"model": "sql", "messages": [{"role": "user", "content": "secret"}], "n": 2, "seed": 5},
            headers={"traceparent": PARENT, "x-request-id": "mine"},
        )
        await site.client.get("/health")
        await site.client.get("/metrics")
    assert collector.path == "/v1/traces"
    assert collector.resource["service.name"] == "chorus"
    assert {span.trace_id for span in collector.spans} == {PARENT.split("-")[1]}
    root = collector.named("POST /v1/chat/completions")
    assert root.parent.hex() == PARENT.split("-")[2]
    assert root.kind == 2  # SERVER
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["http.route"] == "/v1/chat/completions"
    assert root.attributes["chorus.request.id"] == "mine"
    whole = collector.named("chat sql")
    assert whole.parent == root.id
    body = answer.json()
    assert {name: whole.attributes[name] for name in whole.attributes if ".usage." in name} == {
        "gen_ai.usage.input_tokens": body["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": body["usage"]["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 6,
    }
    assert whole.attributes["gen_ai.operation.name"] == "chat"
    assert whole.attributes["gen_ai.request.model"] == "sql"
    assert whole.attributes["gen_ai.response.id"] == body["id"]
    assert whole.attributes["gen_ai.response.finish_reasons"] == ["stop", "stop"]
    assert whole.attributes["gen_ai.request.seed"] == 5
    assert whole.attributes["chorus.adapter.names"] == ["sql"]
    phases = [span for span in collector.spans if span.parent == whole.id]
    assert sorted(span.name for span in phases) == [
        "decode",
        "decode",
        "prefill",
        "prefill",
        "queue",
        "queue",
    ]
    queues = {span.id for span in phases if span.name == "queue"}
    loads = [span for span in collector.spans if span.name == "load adapter"]
    assert {span.parent for span in loads} == queues
    for span in [*phases, *loads]:
        assert root.began <= whole.began <= span.began <= span.ended <= whole.ended <= root.ended
    assert not any("secret" in str(span.attributes) for span in collector.spans)


async def test_failures_are_marked_and_changes_of_adapters_traced(
    tmp_path: Path, collector: Collector
) -> None:
    async with open_site(tmp_path, otlp_endpoint=collector.url) as site:
        site.say("the quick brown fox")
        site.engine.error, site.engine.error_after = ErrorCode.NON_FINITE, 1
        await site.complete(model="sql", stream=True)
        await site.client.delete("/v1/adapters/team/json")
        await site.complete(model="nobody")
    roots = {span.name: span for span in collector.spans if span.kind == 2}
    deleted = roots["DELETE /v1/adapters/{name}"]
    assert not deleted.failed
    assert not deleted.parent
    completions = [span for span in collector.spans if span.name == "POST /v1/completions"]
    assert sorted((span.failed, span.attributes.get("error.type")) for span in completions) == [
        (False, None),  # a mistake of the client is none of the server's
        (True, "non_finite_logits"),
    ]
    assert collector.named("text_completion sql").attributes["gen_ai.response.finish_reasons"] == ["error"]


async def test_the_standard_environment_turns_traces_on_and_off(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    async with open_site(tmp_path / "on") as site:
        await site.client.get("/v1/models")
    assert collector.resource["service.name"] == "ours"
    count = len(collector.spans)
    assert count == 1
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    async with open_site(tmp_path / "off") as site:
        await site.client.get("/v1/models")
    assert len(collector.spans) == count


async def test_what_the_sampler_leaves_out_is_not_sent(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    async with open_site(tmp_path, otlp_endpoint=collector.url) as site:
        await site.complete()
        await site.client.get("/v1/models", headers={"traceparent": PARENT})
    assert [span.name for span in collector.spans] == ["GET /v1/models"]


async def test_a_collector_that_is_gone_costs_no_answer(tmp_path: Path) -> None:
    with collecting() as closed:
        url = closed.url
    async with open_site(tmp_path, otlp_endpoint=url) as site:
        assert (await site.complete()).status_code == 200


def test_another_protocol_is_refused_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    settings = Settings(model=str(model_folder(tmp_path)), load_format="dummy")
    with pytest.raises(StartError, match="grpc: only http/protobuf"):
        create_app(settings, FakeEngine(), BaseModel.resolve(settings))


def test_without_the_package_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    settings = Settings(model=str(model_folder(tmp_path)), load_format="dummy", otlp_endpoint="http://x")
    with pytest.raises(StartError, match=r"chorus-serve\[otel\]"):
        create_app(settings, FakeEngine(), BaseModel.resolve(settings))


OFF = """
import asyncio, sys
from pathlib import Path
from tests.api.face_site import open_site

async def main():
    async with open_site(Path(sys.argv[1])) as site:
        assert (await site.complete(model="sql")).status_code == 200

asyncio.run(main())
parts = ("opentelemetry.sdk", "opentelemetry.exporter")
print(*sorted(name for name in sys.modules if name.startswith(parts)))
"""


def test_nothing_is_imported_when_it_is_off(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", OFF, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""

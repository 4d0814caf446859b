"""The worker's loop against the echo engine, in this process: sockets are inproc, turns are counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from server.engine import worker as worker_module
from server.engine.wakeup import Wakeup
from server.engine.worker import Worker
from server.messages import (
    Abort,
    AdapterRef,
    AdapterResult,
    ErrorCode,
    FromEngine,
    LoadAdapter,
    Request,
    SamplingParams,
    Shutdown,
    StepOutputs,
    TokenOutput,
    UnloadAdapter,
)
from tests.engine.echo_engine import CRASH, REFUSE, EchoEngine


class Border:
    """The face's ends of a worker's two sockets."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], engine: EchoEngine | None = None) -> None:
        self.engine = engine or EchoEngine()
        inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        self._to, self._from = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        inbox.bind("inproc://to")
        self._to.connect("inproc://to")
        self._from.bind("inproc://from")
        outbox.connect("inproc://from")
        self.worker = Worker(self.engine, inbox, outbox)

    def send(self, *messages: object) -> None:
        for message in messages:
            self._to.send(msgspec.msgpack.encode(message))

    def received(self) -> list[FromEngine]:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        messages: list[FromEngine] = []
        while self._from.poll(0):
            messages.append(decoder.decode(self._from.recv()))
        return messages

    def outputs(self) -> list[TokenOutput]:
        return [o for m in self.received() if isinstance(m, StepOutputs) for o in m.outputs]


@pytest.fixture
def border() -> Iterator[Border]:
    context = zmq.Context()
    yield Border(context)
    context.destroy(linger=0)


def request(request_id: str = "a", prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 3) -> Request:
    return Request(request_id, list(prompt), SamplingParams(max_tokens=max_tokens))


def test_one_publish_per_step_carries_every_request(border: Border) -> None:
    border.send(request("a", (1, 2), 2), request("b", (7,), 2))
    assert border.worker.turn()
    assert border.worker.turn()
    first, second = border.received()
    assert isinstance(first, StepOutputs)
    assert isinstance(second, StepOutputs)
    assert first.outputs == [TokenOutput("a", [1]), TokenOutput("b", [7])]
    assert second.outputs == [TokenOutput("a", [2], "length"), TokenOutput("b", [7], "length")]


def test_first_publish_has_stats_and_the_next_within_the_interval_has_none(border: Border) -> None:
    border.engine.step_s = 0.0
    border.send(request(max_tokens=100))
    for _ in range(3):
        border.worker.turn()
    stats = [m.stats for m in border.received() if isinstance(m, StepOutputs)]
    assert stats[0] is not None
    assert stats[0].running == 1
    assert None in stats


def test_idle_turns_send_heartbeats_and_do_not_step(border: Border) -> None:
    assert border.worker.turn()  # sends the first stats
    assert border.worker.turn()  # sleeps until the next are due
    beats = border.received()
    assert beats
    assert all(isinstance(b, StepOutputs) and b.outputs == [] and b.stats is not None for b in beats)
    assert border.engine.steps == 0


def test_stats_after_the_last_step_show_it_gone(border: Border) -> None:
    border.send(request(max_tokens=1))
    border.worker.turn()
    border.worker.turn()
    last = border.received()[-1]
    assert isinstance(last, StepOutputs)
    assert last.stats is not None
    assert (last.stats.running, last.stats.generated_tokens) == (0, 1)


def test_abort_reaches_the_engine_before_the_next_step(border: Border) -> None:
    border.send(request("a"), request("b"), Abort(["a"]))
    border.worker.turn()
    assert [o.request_id for o in border.outputs()] == ["b"]
    assert border.engine.aborted == ["a"]


def test_a_request_that_add_refuses_fails_alone(border: Border) -> None:
    border.send(request("bad", (REFUSE,)), request("good"))
    border.worker.turn()
    bad, good = border.outputs()
    assert (bad.request_id, bad.finish_reason, bad.error) == ("bad", "error", ErrorCode.INTERNAL)
    assert bad.message == "token 13 is refused"
    assert good == TokenOutput("good", [1])
    border.worker.turn()
    assert [o.request_id for o in border.outputs()] == ["good"]  # told once


def test_a_malformed_request_fails_alone(border: Border) -> None:
    fields = msgspec.to_builtins(request("bad")) | {"prompt_token_ids": ["x"]}
    border.send(fields, request("good"))
    border.worker.turn()
    assert [(o.request_id, o.error) for o in border.outputs()] == [
        ("bad", ErrorCode.INTERNAL),
        ("good", None),
    ]


def test_a_malformed_message_of_no_request_is_an_error(border: Border) -> None:
    border.send({"type": "abort", "request_ids": 5})
    with pytest.raises(msgspec.ValidationError):
        border.worker.turn()


def test_adapter_calls_are_answered_when_the_copy_landed(border: Border) -> None:
    border.send(LoadAdapter(1, AdapterRef("d", "")), LoadAdapter(2, AdapterRef("missing", "")))
    results: list[FromEngine] = []
    while len(results) < 2:
        border.worker.turn()
        results += [m for m in border.received() if isinstance(m, AdapterResult)]
    assert [(r.call_id, r.residency, r.error) for r in results if isinstance(r, AdapterResult)] == [
        (1, "arena", None),
        (2, "disk", ErrorCode.ADAPTER_LOAD_FAILED),
    ]
    assert border.engine.steps < 30  # it slept meanwhile


class LandingEngine(EchoEngine):
    """Its copies land when another thread says so."""

    def __init__(self) -> None:
        super().__init__()
        self.wakeup = Wakeup()
        self.wakeup_fd = self.wakeup.fileno()

    def land(self) -> None:
        self.copies = [(0.0, call) for _, call in self.copies]
        self.wakeup.set()

    def load_adapter(self, call: LoadAdapter) -> None:
        self.copies.append((float("inf"), call))

    def step(self) -> tuple[list[TokenOutput], list[AdapterResult]]:
        self.wakeup.clear()
        return super().step()

    def idle_ms(self) -> int | None:
        return 3_600_000 if self.copies else super().idle_ms()


@pytest.fixture
def landing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Border]:
    """No heartbeat wakes this worker."""
    monkeypatch.setattr(worker_module, "_HEARTBEAT_S", 3600.0)
    monkeypatch.setattr(worker_module, "_STATS_S", 3600.0)
    context = zmq.Context()
    engine = LandingEngine()
    yield Border(context, engine)
    context.destroy(linger=0)
    engine.wakeup.close()


def test_a_copy_that_lands_wakes_a_worker_that_sleeps(landing: Border) -> None:
    assert isinstance(landing.engine, LandingEngine)
    landing.send(LoadAdapter(1, AdapterRef("d", "")))
    assert landing.worker.turn()
    asleep = threading.Thread(target=landing.worker.turn, daemon=True)
    asleep.start()
    landing.engine.land()
    asleep.join(timeout=10)
    assert not asleep.is_alive()
    assert [m.call_id for m in landing.received() if isinstance(m, AdapterResult)] == [1]
    assert landing.engine.steps == 2


def test_a_wake_up_of_which_nobody_waits_is_one_step(landing: Border) -> None:
    assert isinstance(landing.engine, LandingEngine)
    landing.engine.wakeup.set()
    landing.worker.turn()
    assert landing.engine.steps == 1
    assert not landing.engine.wakeup.wait(0)


def test_who_has_its_answer_sees_in_the_stats_what_the_call_did(border: Border) -> None:
    border.send(LoadAdapter(1, AdapterRef("d", "")))
    received: list[FromEngine] = []
    while not any(isinstance(message, AdapterResult) for message in received):
        border.worker.turn()
        received += border.received()
    answer = next(at for at, message in enumerate(received) if isinstance(message, AdapterResult))
    stats = [message.stats for message in received[:answer] if isinstance(message, StepOutputs)]
    assert stats
    assert stats[-1] is not None
    assert stats[-1].resident == ("d",)


def test_adapter_calls_that_raise_are_answered_with_an_error(border: Border) -> None:
    border.send(LoadAdapter(1, AdapterRef("broken", "")), UnloadAdapter(2, "unknown"))
    border.worker.turn()
    results = [m for m in border.received() if isinstance(m, AdapterResult)]
    assert [(r.call_id, r.error) for r in results] == [(1, ErrorCode.INTERNAL), (2, ErrorCode.INTERNAL)]


def test_shutdown_ends_the_loop_without_a_step(border: Border) -> None:
    border.send(request(), Shutdown())
    assert not border.worker.turn()
    assert border.engine.steps == 0


def test_an_exception_of_step_escapes(border: Border) -> None:
    border.send(request(prompt=(CRASH,)))
    with pytest.raises(RuntimeError, match="told to crash"):
        border.worker.turn()

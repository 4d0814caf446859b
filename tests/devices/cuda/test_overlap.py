"""A step is built and launched before the host has read the one before, whose tokens stay on the device.

On a device that may not be read: every wait in the forward and in sampling is an error, and what a step gives
is read when it is collected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.engine import Engine
from server.messages import Request, SamplingParams
from server.model.logits import Penalties
from tests.devices.cuda.interpreted import capture, make_interpreted
from tests.engine.harness import adapter_ref, run
from tests.model.tiny_models import add_adapter, build, targets_of

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles here", allow_module_level=True)

from tests.devices.cuda.host_waits import refusing  # noqa: E402  (after the skip)

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # as in test_graphs.py

STEPS = 4


class Unread:
    """Notes, as an operators' `read`, when steps are launched and when they are read."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._steps = 0

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        step, copies = self._steps, [tensor.clone() for tensor in tensors]
        self._steps += 1
        self.events.append(f"launched {step}")

        def read() -> list[torch.Tensor]:
            self.events.append(f"read {step}")
            return copies

        return read


def watched(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with waits refused."""

    @wraps(work)
    def call(*arguments: Any) -> Any:
        with refusing():
            return work(*arguments)

    return call


def on_a_device_that_may_not_be_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Unread:
    runner, unread = engine._runner, Unread()
    monkeypatch.setattr(type(runner._operators), "read", lambda self, tensors: unread(tensors))
    monkeypatch.setattr(runner, "_forward", watched(runner._forward))
    monkeypatch.setattr(runner._sampler, "sample", watched(runner._sampler.sample))
    return unread


def requests(adapter: Path) -> list[Request]:
    def params(**of_one: object) -> SamplingParams:
        return SamplingParams(STEPS, ignore_eos=True, **({"temperature": 0.0} | of_one))  # type: ignore[arg-type]  # free-form

    return [
        Request("adapted", [5, 6, 7], params(), (adapter_ref(adapter),)),
        Request("drawn", [8, 9], params(temperature=0.9, top_p=0.8, seed=3, logprobs=2)),
        Request("greedy", [8, 9, 3, 1], params(frequency_penalty=0.7, repetition_penalty=1.3)),
    ]


def serve(engine: Engine, asked: list[Request]) -> dict[str, list[tuple[int, list[int]]]]:
    """Each request's tokens, and the likeliest ones beside them."""
    for request in asked:
        engine.add(request)
    outputs = run(engine)
    return {
        request.request_id: [
            (token, [other for found in output.logprobs or () for other, _ in found.top])
            for output in outputs[request.request_id]
            for token in output.token_ids
        ]
        for request in asked
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build("llama", tmp_path / "model")


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    return add_adapter(model, tmp_path / "adapter", seed=1, rank=4, target_modules=targets_of("llama"))


@pytest.mark.parametrize("captured", [False, True])
def test_a_step_is_launched_before_the_one_before_is_read(
    captured: bool, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_interpreted(model, max_model_len=64, max_num_seqs=4)
    want = serve(engine, requests(adapter))
    monkeypatch.setattr(engine, "_runs_beside_host", True)
    unread = on_a_device_that_may_not_be_read(engine, monkeypatch)
    if captured:
        capture(engine, lambda work: work, most=4)
        assert engine.fast_paths["graphs"]
    assert serve(engine, requests(adapter)) == want
    assert unread.events == [
        "launched 0",
        *(event for n in range(1, STEPS) for event in (f"launched {n}", f"read {n - 1}")),
        f"read {STEPS - 1}",
    ]
    engine.close()


def test_what_reads_the_output_waits_for_it(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No processor of today does: what a penalty counts is kept on the device."""
    monkeypatch.setattr(Penalties, "reads_output", True)
    engine = make_interpreted(model, max_model_len=64, max_num_seqs=4)
    monkeypatch.setattr(engine, "_runs_beside_host", True)
    unread = Unread()
    monkeypatch.setattr(type(engine._runner._operators), "read", lambda self, tensors: unread(tensors))
    serve(engine, requests(adapter)[1:])
    assert unread.events == [event for n in range(STEPS) for event in (f"launched {n}", f"read {n}")]
    engine.close()

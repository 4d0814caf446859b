"""A step is built and launched before the host has read the one before, whose tokens stay on the device.

On a device that may not be read: every wait in the forward and in sampling is an error, and what a step gives
is read when it is collected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.engine import Engine
from server.messages import Request, SamplingParams
from server.model.batch import BatchBuilder, Carried
from server.model.runner import StepResults
from server.scheduling.sequence import Sequence as Seq
from server.scheduling.step_plan import ScheduledRun
from tests.devices.cuda.interpreted import capture, make_interpreted
from tests.engine.harness import adapter_ref, run, tokens_of
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


def ahead(engine: Engine, requests: list[Request]) -> list[StepResults]:
    """STEPS steps of the requests, each launched before the last one is read."""
    runner, arena = engine._runner, engine._arena.view()
    batches = BatchBuilder(engine._residency.slot, runner._block_size, ())
    sequences = [Seq(request, 0.0, i) for i, request in enumerate(requests)]
    for seq in sequences:
        seq.block_ids = engine._pool.allocate(4)
    prompts = [ScheduledRun(seq, seq.mix_key, 0, seq.num_tokens, rows=1) for seq in sequences]
    pending, results = runner.launch(batches.build(prompts), arena), []
    for _ in range(STEPS - 1):
        for seq in sequences:
            seq.append(-1)  # nobody knows yet
        runs = [ScheduledRun(seq, seq.mix_key, seq.num_tokens - 1, 1, rows=1) for seq in sequences]
        carried = Carried(torch.arange(len(sequences)), pending.token_ids)
        following = runner.launch(replace(batches.build(runs), carried=carried), arena)
        results.append(pending.collect())
        pending = following
    return [*results, pending.collect()]


@pytest.mark.parametrize("captured", [False, True])
def test_a_step_is_launched_before_the_one_before_is_read(
    captured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build("llama", tmp_path / "model")
    adapter = add_adapter(folder, tmp_path / "adapter", seed=1, rank=4, target_modules=targets_of("llama"))
    greedy = SamplingParams(STEPS, temperature=0.0, ignore_eos=True)
    drawn = SamplingParams(STEPS, temperature=0.9, top_p=0.8, seed=3, logprobs=2, ignore_eos=True)
    requests = [
        Request("adapted", [5, 6, 7], greedy, (adapter_ref(adapter),)),
        Request("drawn", [8, 9], drawn),
        Request("greedy", [8, 9, 3, 1], greedy),
    ]
    engine = make_interpreted(folder, max_model_len=64, max_num_seqs=4)
    for request in requests:
        engine.add(request)
    outputs = run(engine)

    unread = on_a_device_that_may_not_be_read(engine, monkeypatch)
    if captured:
        capture(engine, lambda work: work, most=4)
        assert engine.fast_paths["graphs"]
    steps = ahead(engine, requests)
    engine.close()
    for place, request in enumerate(requests):
        want = outputs[request.request_id]
        assert [step.token_ids[place] for step in steps] == [[token] for token in tokens_of(want)]
    logprobs = [found for output in outputs["drawn"] for found in output.logprobs or ()]
    for step, want_one in zip(steps, logprobs, strict=True):
        (got,) = step.logprobs[1]
        assert got.token_id == want_one.token_id
        assert got.logprob == pytest.approx(want_one.logprob, abs=1e-4)
        assert [token for token, _ in got.top] == [token for token, _ in want_one.top]
    assert unread.events == [
        "launched 0",
        *(event for n in range(1, STEPS) for event in (f"launched {n}", f"read {n - 1}")),
        f"read {STEPS - 1}",
    ]

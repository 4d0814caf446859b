"""Memory that runs out in the middle of a step, at each place where a device can say so (faults.md 34)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from server.engine.engine import Engine
from server.messages import ErrorCode, Request, TokenOutput
from server.model.device import is_out_of_memory
from tests.engine.harness import assert_at_rest, greedy, make_engine, run, tokens_of

Read = Callable[[Sequence[torch.Tensor]], Callable[[], list[torch.Tensor]]]


pytestmark = pytest.mark.usefixtures("runs_beside_host")


class SmallDevice:
    """Steps run out of memory as `too_large` says of what each is to give back: its tokens, whether they are
    finite and, where any row wants them, the log-probabilities."""

    def __init__(self, when: str) -> None:
        self.when = when  # launch or collect
        self.too_large: Callable[[Sequence[torch.Tensor]], bool] = lambda tensors: False
        self.error: Exception = torch.OutOfMemoryError("CUDA out of memory")
        self.failures = 0

    def reading(self, read: Read) -> Read:
        def limited(tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
            fails = self.too_large(tensors)
            if fails and self.when == "launch":
                self.fail()
            collect = read(tensors)
            return self.fail if fails else collect

        return limited

    def fail(self) -> list[torch.Tensor]:
        self.failures += 1
        raise self.error


@pytest.fixture(params=["launch", "collect"])
def device(request: pytest.FixtureRequest) -> SmallDevice:
    return SmallDevice(request.param)


@pytest.fixture
def engine(model: Path, device: SmallDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    made = make_engine(model, prefix_caching=False)
    operators = made._runner._operators
    object.__setattr__(operators, "read", device.reading(operators.read))  # a frozen dataclass of the device
    yield made
    made.close()


def asks(count: int, **sampling: object) -> list[Request]:
    return [greedy(str(i), [3 + i, 5, 7 + i], 6 + i, **sampling) for i in range(count)]


def answers(engine: Engine, requests: list[Request]) -> dict[str, list[TokenOutput]]:
    for request in requests:
        engine.add(request)
    return run(engine)


def tokens(outputs: dict[str, list[TokenOutput]]) -> dict[str, list[int]]:
    return {name: tokens_of(each) for name, each in outputs.items()}


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.3, "frequency_penalty": 0.5}]
)
def test_too_many_at_once_take_turns_and_lose_nothing(
    engine: Engine, device: SmallDevice, sampling: dict[str, object]
) -> None:
    want = answers(engine, asks(5, **sampling))
    device.too_large = lambda tensors: len(tensors[0]) > 3
    got = answers(engine, asks(5, **sampling))
    assert device.failures > 0
    assert engine.stats().preemptions > 0
    ended = {name: each[-1].finish_reason for name, each in got.items()}
    whole = [name for name, reason in ended.items() if reason == "length"]
    assert len(whole) >= 3
    assert {name: tokens(got)[name] for name in whole} == {name: tokens(want)[name] for name in whole}
    assert all(got[name][-1].error is ErrorCode.OUT_OF_MEMORY for name in ended.keys() - whole)
    assert_at_rest(engine)


def test_one_that_is_too_large_fails_alone(engine: Engine, device: SmallDevice) -> None:
    """It comes while others run; each of its steps runs out of memory."""
    want = answers(engine, asks(4))
    device.too_large = lambda tensors: len(tensors) > 2  # log-probabilities are wanted
    for request in asks(4):
        engine.add(request)
    first = [output for _ in range(2) for output in engine.step()[0]]
    got = answers(engine, [greedy("large", [9, 9], 5, logprobs=3)])
    for output in reversed(first):
        got[output.request_id].insert(0, output)
    (large,) = got.pop("large")
    assert (large.finish_reason, large.error) == ("error", ErrorCode.OUT_OF_MEMORY)
    assert device.failures == 2
    assert tokens(got) == tokens(want)
    assert_at_rest(engine)
    device.too_large = lambda tensors: False
    assert tokens(answers(engine, asks(4))) == tokens(want)


def test_alone_it_is_tried_twice(engine: Engine, device: SmallDevice) -> None:
    device.too_large = lambda tensors: True
    got = answers(engine, asks(1))
    assert [output.error for output in got["0"]] == [ErrorCode.OUT_OF_MEMORY]
    assert device.failures == 2
    assert_at_rest(engine)


def test_what_passes_by_itself_costs_nobody_anything(engine: Engine, device: SmallDevice) -> None:
    want = answers(engine, asks(4))
    device.too_large = lambda tensors: device.failures < 1
    assert tokens(answers(engine, asks(4))) == tokens(want)
    assert device.failures == 1
    assert_at_rest(engine)


def test_any_other_error_still_ends_the_step(engine: Engine, device: SmallDevice) -> None:
    device.too_large, device.error = lambda tensors: True, RuntimeError("a kernel failed")
    with pytest.raises(RuntimeError, match="a kernel failed"):
        answers(engine, asks(2))


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))

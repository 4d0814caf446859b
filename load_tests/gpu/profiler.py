"""Where the device's time goes: every kernel of a decode step and of a mixed one, its calls and its time.

64 sequences, each with an adapter of its own, as in `mixed`; three steps of each kind under torch's profiler.
On a CPU the operations of torch stand in for kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from load_tests.gpu.context import Context
from load_tests.gpu.engine import adapters
from load_tests.gpu.mixed import output_tokens
from load_tests.gpu.timing import clocked, device

_SHOWN = 14  # kernels of each kind of step; all are in the JSON
_NAME = 58  # characters


@dataclass(frozen=True)
class Kernel:
    """All calls of one kernel in all steps of one kind."""

    step: str
    kernel: str
    calls: int
    total_us: float


def kernels_of(step: str, work: Callable[[], None]) -> tuple[list[Kernel], float]:
    """What `work` ran, the longest first, and its seconds by the host's clock."""
    cuda = device() == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        seconds = clocked(work)
    found = [
        Kernel(
            step, event.key, event.count, event.self_device_time_total if cuda else event.self_cpu_time_total
        )
        for event in recorded.key_averages()
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU)
    ]
    return sorted((one for one in found if one.total_us > 0), key=lambda one: -one.total_us), seconds


def table(kernels: list[Kernel], steps: int) -> str:
    """Times and calls of one step, as a share of all kernels' time."""
    total = sum(kernel.total_us for kernel in kernels)
    lines = [f"{'':{_NAME}}{'calls':>8}{'us':>10}{'share':>8}"]
    lines += [
        f"{kernel.kernel[:_NAME]:{_NAME}}{kernel.calls / steps:>8.1f}{kernel.total_us / steps:>10.1f}"
        f"{kernel.total_us / total:>8.1%}"
        for kernel in kernels[:_SHOWN]
    ]
    return "\n".join(lines)


def measure(context: Context) -> None:
    """On the shared engine."""
    on, work, results = context.subject(), context.workload, context.results
    users = adapters(work.sequences, [work.rank])
    on.load(users)
    steps = work.profiled_steps

    def decode() -> None:
        for _ in range(steps):
            on.turn()

    def mixed() -> None:
        for _ in range(steps):
            on.add(users[0], work.prompt, output=1)
            on.turn()

    for name, turns in (("decode", decode), ("mixed", mixed)):
        ids = [on.add(version, work.prompt, output_tokens()) for version in users]
        on.begin(ids)
        turns()  # once before, so that nothing compiles under the profiler
        kernels, seconds = kernels_of(name, turns)
        on.engine.abort(ids)
        results.add(kernels)
        busy = sum(kernel.total_us for kernel in kernels)
        results.say(
            f"{name} step of {len(users)}: kernels {busy / steps / 1e3:.2f} ms of "
            f"{seconds / steps * 1e3:.2f} ms by the host's clock, profiled"
        )
        results.say(table(kernels, steps))

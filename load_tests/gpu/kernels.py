"""The LoRA kernels alone against the bytes they must move, and against two other ways to do the same.

Each row applies one module's adapters to a batch: `tokens` tokens, spread over `adapters` distinct ones.
The floor is the time of the bytes that must move (each distinct A and B once; x read; out read and
written) at the rate of a device-to-device copy measured in the same run. `grouped` is torch's grouped_mm
(two of them and an addition), `bmm` is a batched product; both pad every rank to the largest and get their
inputs already sorted and packed, at no cost. Calls rotate over adapters, so that no cache holds a call's
weights. On a CPU, for which Triton has its interpreter alone, everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

import torch
import torch.nn.functional as F

from load_tests.gpu.context import Context
from load_tests.gpu.timing import copy_rate, device, median_seconds
from server.devices.cuda.lora import TritonKernels
from server.lora.kernels.interface import ArenaView, Modules
from server.lora.segments import Segments

DTYPE = torch.bfloat16 if device() == "cuda" else torch.float32
RANKS: list[tuple[int, ...]] = [(8,), (64,), (128,), (8, 16, 64, 128)]  # besides the workload's
COLD_BYTES = 256 * 2**20  # several times the L2 cache of any GPU so far


@dataclass(frozen=True)
class Case:
    """A batch and one projection."""

    tokens: int
    adapters: int
    ranks: tuple[int, ...]  # dealt out to the adapters in turn
    in_features: int = 4096
    out_features: int = 4096
    most_calls: int = 512

    def rank(self, adapter: int) -> int:
        return self.ranks[adapter % len(self.ranks)]

    def weight_bytes(self) -> int:
        total_rank = sum(self.rank(adapter) for adapter in range(self.adapters))
        return DTYPE.itemsize * total_rank * (self.in_features + self.out_features)

    def floor_bytes(self) -> int:
        return self.weight_bytes() + DTYPE.itemsize * self.tokens * (self.in_features + 2 * self.out_features)

    def calls(self) -> int:
        """How many sets of adapters to rotate over."""
        return min(self.most_calls, max(4, -(-COLD_BYTES // self.floor_bytes())))


@dataclass(frozen=True)
class Row:
    """One line of the table; times in microseconds a call, None where torch has no such product."""

    tokens: int
    adapters: int
    ranks: str
    floor_us: float
    triton_us: float
    grouped_us: float | None
    bmm_us: float | None
    error: float  # of Triton against bmm, relative


class Inputs:
    """Random weights in one arena for all calls of a case. Every slot is as wide as the largest rank."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rank = max(case.ranks)
        self.slots = case.calls() * case.adapters
        slot_size = self.rank * (case.in_features + case.out_features)
        self.data = torch.empty(self.slots * slot_size, device=device(), dtype=DTYPE).normal_(std=0.02)
        # rows past an adapter's rank are zero, so that padded products give the same
        self.a = self.data.view(self.slots, -1)[:, : self.rank * case.in_features].unflatten(
            1, (self.rank, -1)
        )
        self.b = self.data.view(self.slots, -1)[:, self.rank * case.in_features :].unflatten(
            1, (self.rank, -1)
        )
        for adapter in range(case.adapters):
            self.a[adapter :: case.adapters, case.rank(adapter) :] = 0
        starts = torch.arange(self.slots, device=device())[:, None] * slot_size
        no_part = torch.zeros_like(starts)
        offsets = torch.stack([starts, starts + self.rank * case.in_features, no_part, no_part], dim=2)
        ranks = [[case.rank(slot % case.adapters)] for slot in range(self.slots)]
        self.arena = ArenaView(self.data, offsets, torch.tensor(ranks, dtype=torch.int32, device=device()))
        self.lengths = [case.tokens // case.adapters] * case.adapters
        self.x = torch.randn(case.tokens, case.in_features, device=device()).to(DTYPE)
        self.out = torch.zeros(case.tokens, case.out_features, device=device(), dtype=DTYPE)

    def triton(self) -> Callable[[int], None]:
        kernels, adapters = TritonKernels(), self.case.adapters
        built = (
            Segments.build([(((call * adapters + i, 1.0),), length) for i, length in enumerate(self.lengths)])
            for call in range(self.case.calls())
        )
        steps = [kernels.prepare(segments).to(device()) for segments in built if segments is not None]

        def apply(call: int) -> None:
            modules = Modules(0, (self.case.out_features,))
            kernels.begin(self.x, modules, steps[call], self.arena).finish(self.out)

        return apply

    def packed(self, call: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A as [adapters, in_features, rank] and B as [adapters, rank, out_features] of a call, as views."""
        mine = slice(call * self.case.adapters, (call + 1) * self.case.adapters)
        return self.a[mine].transpose(1, 2), self.b[mine]

    def bmm(self) -> Callable[[int], None]:
        x_GTI = self.x.unflatten(0, (self.case.adapters, -1))
        out_GTO = self.out.unflatten(0, (self.case.adapters, -1))

        def apply(call: int) -> None:
            a, b = self.packed(call)
            out_GTO.add_(torch.bmm(torch.bmm(x_GTI, a), b))

        return apply

    def grouped(self) -> Callable[[int], None] | None:
        grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
        if grouped_mm is None:
            return None
        ends = torch.tensor(list(accumulate(self.lengths)), dtype=torch.int32, device=device())

        def apply(call: int) -> None:
            a, b = self.packed(call)
            self.out.add_(grouped_mm(grouped_mm(self.x, a, offs=ends), b, offs=ends))

        return apply

    def result(self, apply: Callable[[int], None]) -> torch.Tensor:
        self.out.zero_()
        apply(self.case.calls() - 1)
        return self.out.double()


def measure_case(case: Case, rate: float) -> Row:
    inputs = Inputs(case)
    calls = case.calls()

    def microseconds(apply: Callable[[int], None]) -> float:
        def work() -> None:
            for call in range(calls):
                apply(call)

        return 1e6 * median_seconds(work) / calls

    triton, bmm, grouped = inputs.triton(), inputs.bmm(), inputs.grouped()
    reference = inputs.result(bmm)
    error = ((inputs.result(triton) - reference).norm() / reference.norm()).item()
    grouped_us = None
    if grouped is not None:
        try:
            grouped_us = microseconds(grouped)
        except RuntimeError as problem:  # a size or device that this torch does not take
            print(f"grouped_mm: {str(problem).splitlines()[0]}")
    return Row(
        case.tokens,
        case.adapters,
        "-".join(map(str, case.ranks)),
        floor_us=1e6 * case.floor_bytes() / rate,
        triton_us=microseconds(triton),
        grouped_us=grouped_us,
        bmm_us=microseconds(bmm),
        error=error,
    )


def show(row: Row) -> str:
    peers = "".join(
        f"{time:10.2f}" if time is not None else f"{'-':>10}" for time in (row.grouped_us, row.bmm_us)
    )
    share = row.floor_us / row.triton_us
    return (
        f"{row.tokens:7}{row.adapters:9}{row.ranks:>13}{row.floor_us:10.2f}{row.triton_us:10.2f}{share:8.0%}"
        f"{peers}{row.error:10.1e}"
    )


def run(context: Context, ranks: Sequence[tuple[int, ...]]) -> None:
    """Every batch with every choice of ranks, as far as the time reaches."""
    results, work = context.results, context.workload
    rate, width = context.rate or copy_rate(work.copy_bytes), work.kernel_width
    results.add(copy_rate=rate)
    results.say(f"copy {rate / 1e12:.2f} TB/s; us a call, {width} -> {width}")
    results.say(
        f"{'tokens':>7}{'adapters':>9}{'ranks':>13}{'floor':>10}{'triton':>10}{'share':>8}"
        f"{'grouped':>10}{'bmm':>10}{'error':>10}"
    )
    for (tokens, adapters), of_rank in product(work.kernel_batches, ranks):
        if context.deadline.over:
            results.say("out of time")
            return
        row = measure_case(Case(tokens, adapters, of_rank, width, width, work.kernel_calls), rate)
        results.add([row])
        results.say(show(row))
        torch.cuda.empty_cache()


def measure(context: Context) -> None:
    """One rank."""
    run(context, [(context.workload.rank,)])


def measure_ranks(context: Context) -> None:
    """The other ranks, and mixed ones."""
    run(context, RANKS)

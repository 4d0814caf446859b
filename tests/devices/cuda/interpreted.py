"""What CUDA computes with, on a CPU: kernels in Triton's interpreter, captures that run their work again."""

from __future__ import annotations

from collections.abc import Callable

from server.devices.cpu.device import CpuDevice
from server.devices.cuda.attention import PagedTritonAttention
from server.devices.cuda.capture import Capture
from server.devices.cuda.device import CudaOperators
from server.devices.cuda.graphs import CapturedSteps
from server.devices.cuda.levers import USUAL, Levers
from server.devices.cuda.lora import TritonKernels
from server.engine.engine import Engine
from server.lora.kernels.interface import LoraKernels
from server.model.device import Operators, PlainOperators
from server.model.loader import LoadedModel, load
from server.model.memory import memory_sizes
from server.model.runner import Runner
from tests.engine.harness import settings_for


class InterpretedOperators(CudaOperators):
    read = PlainOperators.read  # there is no page-locked memory


def cuda_operators(
    loaded: LoadedModel, lora: LoraKernels | None = None, levers: Levers = USUAL
) -> CudaOperators:
    attention = PagedTritonAttention(loaded.cache_specs.values(), loaded.dtype)
    return InterpretedOperators(attention, lora or TritonKernels(max_mix_rank=16), levers)


class InterpretedCuda(CpuDevice):
    def operators(self, loaded: LoadedModel, attention: str = "auto") -> Operators:
        return cuda_operators(loaded)


def make_interpreted(*arguments: object, **overrides: object) -> Engine:
    """As `harness.make_engine`."""
    settings, device = settings_for(*arguments, **overrides), InterpretedCuda()  # type: ignore[arg-type]  # the same
    loaded = load(settings)
    return Engine(settings, loaded, memory_sizes(settings, loaded, device), device)


def captured_steps(runner: Runner, how: Capture, most: int, tokens: int) -> CapturedSteps:
    """Of up to `most` sequences, with contexts of up to 64 tokens; `tokens`: of steps with prompts."""
    return CapturedSteps(
        runner._forward,
        runner._attention.prepare,
        new_capture_of(how),
        max_num_seqs=most,
        max_tokens=tokens,
        max_model_len=64,
        block_size=runner._block_size,
        device=InterpretedCuda.torch_device,
    )


def capture(engine: Engine, how: Capture, most: int, tokens: int = 1) -> None:
    """Run its steps through them."""
    engine._runner.capture(
        engine._arena.view(),
        lambda forward, prepare: captured_steps(engine._runner, how, most, tokens),
        max_num_seqs=most,
    )


def new_capture_of(how: Capture) -> Callable[[], Capture]:
    return lambda: how

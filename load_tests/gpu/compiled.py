"""What Triton's compiler makes of every kernel for Hopper (sm_90), read without a GPU.

    python -m load_tests.gpu.compiled

The host code runs as it would in the server, on tensors that are never touched; launches compile and stop.
For each kernel: warps, registers a thread, stack bytes (spills), shared memory, and how many instructions
of the kinds that matter its SASS holds: tensor core (HGMMA, HMMA), 16-byte loads, local memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is imported

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from server.devices.cuda.attention import PagedTritonAttention
from server.devices.cuda.layer_kernels import HeadNorm, activate, add_norm, norm_rotate, rotate_write
from server.devices.cuda.levers import USUAL, Levers
from server.devices.cuda.lora import TritonKernels
from server.devices.cuda.lora_work import lora_work
from server.devices.cuda.sampling import triton_argmax, triton_draw
from server.lora.kernels.interface import ArenaView, Modules, Part
from server.lora.segments import Segments
from server.messages import SamplingParams
from server.model.attention.interface import (
    AttentionOptions,
    AttentionPlan,
    LayerCache,
    LayerCacheSpec,
    paged_cache,
)
from server.model.layer_reader import Norm
from server.model.sampling import Draws, SampleRow

MULTIPROCESSORS = 132


class NoDevice:
    """A Triton driver that names a target and has no device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    kernel: str
    warps: int
    registers: int
    stack: int  # bytes a thread; spills go here
    shared: int  # bytes a program
    instructions: dict[str, int]  # in the SASS, by kind


KINDS = {
    "HGMMA": r"\bHGMMA",
    "HMMA": r"\bHMMA",
    "LD.128": r"\b(?:LDG|LDGSTS)\.[\w.]*128",
    "local": r"\b(?:LDL|STL)\b",
    "waits": r"\bACQBULK\b",  # for the kernel before (griddepcontrol.wait)
}


def launch_lora(
    lengths: list[int],
    dtype: torch.dtype,
    in_features: int = 4096,
    widths: tuple[int, ...] = (4096, 1024, 1024),  # Q, K and V
    longest: int | None = None,  # tokens of an item; None: as the lengths have it
    levers: Levers = USUAL,
) -> None:
    segments = Segments.build([(((slot, 1.0),), length) for slot, length in enumerate(lengths)])
    assert segments is not None
    slots = len(lengths)
    arena = ArenaView(
        torch.empty(2**20, dtype=dtype),
        torch.empty(slots, 7, len(Part), dtype=torch.int64),
        torch.empty(slots, 7, dtype=torch.int32),
    )
    x = torch.empty(sum(lengths), in_features, dtype=dtype)
    y = torch.empty(sum(lengths), sum(widths), dtype=dtype)
    kernels = TritonKernels(programs=4 * MULTIPROCESSORS, levers=levers)
    prepared = kernels.prepare(segments)
    if longest is not None:
        prepared = replace(segments, work=lora_work(segments, longest))
    kernels.begin(x, Modules(2, widths), prepared, arena).finish(y)


def launch_attention(
    queries: list[int],
    dtype: torch.dtype,
    dim: int = 128,
    context: int = 4096,
    kv_heads: int = 8,
    ratio: int = 4,
    prompts: bool = False,  # as in a captured step with prompts
    levers: Levers = USUAL,
    **options: Any,
) -> None:
    tokens = sum(queries)
    layer = LayerCacheSpec(kv_heads, dim, dim, kv_heads * ratio)
    cache = LayerCache(*(torch.empty(64, kv_heads, 16, dim, dtype=dtype) for _ in "kv"), layer)
    plan = AttentionPlan(
        torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).int(),
        torch.full((len(queries),), context, dtype=torch.int32),
        torch.empty(len(queries), context // 16, dtype=torch.int32),
        torch.empty(tokens, dtype=torch.int64),
        num_seqs=len(queries),
        max_query_len=sum(queries) if prompts else max(queries),
        max_context_len=context,
    )
    # as slices of what one product made
    heads_THD = torch.empty(tokens, (ratio + 2) * kv_heads, dim, dtype=dtype)
    query, key, value = heads_THD.split([ratio * kv_heads, kv_heads, kv_heads], dim=1)
    if options.pop("sinks", False):
        options["sinks"] = torch.empty(kv_heads * ratio, dtype=dtype)
    backend = PagedTritonAttention([layer], dtype, 2 * MULTIPROCESSORS, levers)
    backend.forward(query, key, value, cache, backend.prepare(plan), AttentionOptions(0.1, **options))


def launch_layer(
    dtype: torch.dtype,
    hidden: int = 4096,
    heads: int = 32,
    dim: int = 128,
    rotary_dim: int = 128,
    per_head: bool | None = None,  # norms of Q and K; None: none
    levers: Levers = USUAL,
) -> None:
    kv_heads, tokens, intermediate = 8, 64, 14336
    norm = Norm(torch.empty(hidden), 1e-6)
    x, residual = torch.empty(tokens, hidden, dtype=dtype), torch.empty(tokens, hidden)
    positions = torch.empty(tokens, dtype=torch.int64)
    dependent = levers.dependent_launch
    add_norm(x, residual, norm, x_norm=norm, dependent=dependent)
    add_norm(x, residual, norm, rows_N=positions, dependent=dependent)
    width = (heads + kv_heads) * dim
    head_norm = None
    if per_head is not None:
        head_norm = HeadNorm(torch.empty(2 * dim if per_head else width), 1e-6, per_head)
    cos = torch.empty(4096, rotary_dim, dtype=dtype)
    qkv = torch.empty(tokens, width + kv_heads * dim, dtype=dtype)
    norm_rotate(qkv, heads, kv_heads, dim, head_norm, (cos, cos), positions, dependent=dependent)
    cache = paged_cache(LayerCacheSpec(kv_heads, dim, dim, heads), 64, 16, dtype, torch.device("cpu"))
    rotate_write(qkv, cache, positions, head_norm, (cos, cos), positions, dependent=dependent)
    activate(torch.empty(tokens, 2 * intermediate, dtype=dtype), "gelu", dependent=dependent)


def launch_sampling(dtype: torch.dtype, vocabulary: int = 128256, **cuts: float) -> None:
    rows = [
        SampleRow(SamplingParams(1, temperature=0.8, **cuts), 0, 0, np.zeros(1, np.int64), 1)  # type: ignore[arg-type]  # free-form
    ] * 64
    draws = Draws.of(rows)
    assert draws is not None
    scores = torch.empty(64, vocabulary, dtype=dtype)
    triton_argmax(scores)
    triton_draw(scores, draws)


MIXED = [1] * 63 + [2000]
ALL = Levers.of(["all"])
CASES: dict[str, Callable[[], None]] = {
    "lora rows bf16": lambda: launch_lora([1] * 64, torch.bfloat16),
    "lora rows bf16, one": lambda: launch_lora([1], torch.bfloat16),
    "lora rows bf16, alone": lambda: launch_lora([1] * 64, torch.bfloat16, 14336, (4096,)),
    "lora small tiles bf16": lambda: launch_lora([1, 4, 8], torch.bfloat16),
    "lora tiles bf16": lambda: launch_lora(MIXED, torch.bfloat16),
    "lora tiles fp16": lambda: launch_lora(MIXED, torch.float16),
    "lora small tiles fp32": lambda: launch_lora([1, 4, 8], torch.float32),
    "lora tiles fp32": lambda: launch_lora(MIXED, torch.float32),
    "decode bf16, split": lambda: launch_attention([1] * 4, torch.bfloat16),
    "decode bf16": lambda: launch_attention([1] * 64, torch.bfloat16),
    "mixed bf16": lambda: launch_attention(MIXED, torch.bfloat16),
    "mixed bf16, dim 96": lambda: launch_attention(MIXED, torch.bfloat16, dim=96),
    "mixed bf16, dim 256": lambda: launch_attention(MIXED, torch.bfloat16, dim=256),
    "mixed bf16, all options": lambda: launch_attention(
        MIXED, torch.bfloat16, dim=64, sliding_window=128, softcap=30.0, sinks=True
    ),
    "mixed bf16, dim 512": lambda: launch_attention(MIXED, torch.bfloat16, dim=512),
    "mixed fp32": lambda: launch_attention(MIXED, torch.float32),
    "mixed fp32, dim 256": lambda: launch_attention(MIXED, torch.float32, dim=256),
    "decode fp32, dim 256": lambda: launch_attention([1] * 64, torch.float32, dim=256),
    "layer bf16": lambda: launch_layer(torch.bfloat16),
    "layer bf16, heads normed": lambda: launch_layer(torch.bfloat16, per_head=True),
    "layer bf16, widest": lambda: launch_layer(
        torch.bfloat16, hidden=16384, heads=128, rotary_dim=64, per_head=False
    ),
    "layer fp32, odd widths": lambda: launch_layer(
        torch.float32, hidden=3000, heads=24, dim=80, rotary_dim=32, per_head=True
    ),
    "layer bf16, dependent": lambda: launch_layer(torch.bfloat16, levers=ALL),
    "lora rows bf16, dependent": lambda: launch_lora([1] * 64, torch.bfloat16, levers=ALL),
    "lora tiles bf16, dependent": lambda: launch_lora(MIXED, torch.bfloat16, levers=ALL),
    "decode bf16, dependent": lambda: launch_attention([1] * 4, torch.bfloat16, levers=ALL),
    "sampling bf16": lambda: launch_sampling(torch.bfloat16, top_k=50, top_p=0.9),
    "sampling fp32, whole": lambda: launch_sampling(torch.float32),
}


def compile_only(launch: Callable[[], None]) -> Iterator[Any]:
    """The kernels that `launch` would start, compiled."""
    found: list[Any] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(run(self, *args, grid=grid, warmup=True, **options))

    triton.runtime.driver.set_active(NoDevice())
    JITFunction.run = record
    try:
        launch()
    finally:
        JITFunction.run = run
    yield from found


def distinct(launch: Callable[[], None]) -> set[tuple[str, str]]:
    """Of the kernels that `launch` would start, name and key: what each is compiled for. Compiles nothing."""
    found: set[tuple[str, str]] = set()

    def skip(*, fn: Any, key: Any, **others: Any) -> bool:
        found.add((fn.name, str(key)))
        return True

    triton.knobs.runtime.jit_cache_hook = skip
    try:
        list(compile_only(launch))
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    return found


def read(kernel: Any, *, instructions: bool = True) -> Compiled:
    """Registers and instructions, from the disassembler that Triton carries; listing the latter is slow."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run([tool, option, cubin.name], check=True, capture_output=True, text=True).stdout
            if asked
            else ""
            for option, asked in (("--dump-resource-usage", True), ("--dump-sass", instructions))
        )
    counts = {kind: len(re.findall(pattern, sass)) for kind, pattern in KINDS.items()}
    before, waits, _ = sass.partition("ACQBULK")
    counts["early"] = len(re.findall(r"\bLDG", before)) if waits else 0  # loads before it waits
    number = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Compiled(
        kernel.metadata.name,
        kernel.metadata.num_warps,
        number["REG"],
        number["STACK"],
        kernel.metadata.shared,
        counts,
    )


def main(names: list[str]) -> None:
    print(f"triton {triton.__version__}, sm_90")
    print(
        f"{'case':26}{'kernel':16}{'warps':>6}{'regs':>6}{'stack':>6}{'shared':>8}",
        *(f"{k:>8}" for k in KINDS),
    )
    for name in names or CASES:
        for kernel in compile_only(CASES[name]):
            c = read(kernel)
            counts = (f"{count:8}" for count in c.instructions.values())
            print(
                f"{name:26}{c.kernel:16}{c.warps:6}{c.registers:6}{c.stack:6}{c.shared:8}",
                *counts,
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])

"""The kernels that an engine compiles: those of captured steps, at start, and those of larger steps.

    python -m load_tests.gpu.warmup             # how many, without compiling
    python -m load_tests.gpu.warmup --compile   # all of them for sm_90, and what spills registers

A kernel is compiled once for each choice of types, block sizes and divisibilities, which takes a second or
two: their number is what a first start takes on a card. Needs no GPU; the launches are those of the server.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from load_tests.gpu.compiled import Compiled, compile_only, distinct, launch_attention, launch_lora, read
from server.devices.cuda.graph_inputs import Kind
from server.devices.cuda.graphs import kinds_of, prompt_kinds_of, prompt_sizes_up_to, sizes_up_to
from server.devices.cuda.layer_kernels import HeadNorm, activate, add_norm, rotate_write
from server.devices.cuda.lora_work import SHARED
from server.model.attention.interface import LayerCacheSpec, paged_cache
from server.model.layer_reader import Activation, Norm

Launch = Callable[[], None]
_STEP_TOKENS = 8192  # of an engine by default


@dataclass(frozen=True)
class Model:
    """What the launches of a decoder depend on."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int
    dtype: torch.dtype
    max_num_seqs: int = 256
    attention: tuple[dict[str, Any], ...] = ({},)  # the options of each kind of layer
    per_head: bool | None = None  # norms of Q and K; None: none
    post_norms: bool = False
    activation: Activation = "silu"

    def inputs(self) -> list[tuple[int, tuple[int, ...]]]:
        """What LoRA adds to in one call: features in, and out of each module."""
        queries, keys = self.heads * self.dim, self.kv_heads * self.dim
        return [
            (self.hidden, (queries, keys, keys)),
            (queries, (self.hidden,)),
            (self.hidden, (self.intermediate, self.intermediate)),
            (self.intermediate, (self.hidden,)),
            (self.hidden, (self.vocab,)),
        ]

    def attend(self, queries: list[int], *, prompts: bool = False) -> None:
        """`prompts`: in tiles for prompts, however short they are."""
        shape = {"dim": self.dim, "kv_heads": self.kv_heads, "ratio": self.heads // self.kv_heads}
        for options in self.attention:
            launch_attention(queries, self.dtype, prompts=prompts, **shape, **options)

    def add_deltas(self, lengths: list[int], rows: list[int], kind: Kind | None = None) -> None:
        """Of segments of so many tokens, and at the output head of so many rows."""
        *inside, head = self.inputs()
        longest = of_rows = None if kind is None else kind.longest
        if kind is not None and kind.prompts:
            of_rows = SHARED
        for in_features, widths in inside:
            launch_lora(lengths, self.dtype, in_features, widths, longest=longest)
        launch_lora(rows, self.dtype, *head, longest=of_rows)

    def norms(self, tokens: int = 16) -> None:
        """All that a layer and the end of the model launch besides."""
        norm = Norm(torch.empty(self.hidden), 1e-6)
        x, residual = torch.empty(tokens, self.hidden, dtype=self.dtype), torch.empty(tokens, self.hidden)
        rows = torch.empty(tokens, dtype=torch.int64)
        after = norm if self.post_norms else None
        add_norm(x, residual, norm, begin=True)
        add_norm(x, residual, norm, x_norm=after)
        add_norm(x, residual, norm, x_norm=after, rows_N=rows)
        width = (self.heads + self.kv_heads) * self.dim
        head_norm = None
        if self.per_head is not None:
            head_norm = HeadNorm(torch.empty(2 * self.dim if self.per_head else width), 1e-6, self.per_head)
        cos = torch.empty(64, self.dim, dtype=self.dtype)
        qkv = torch.empty(tokens, width + self.kv_heads * self.dim, dtype=self.dtype)
        spec = LayerCacheSpec(self.kv_heads, self.dim, self.dim, self.heads)
        cache = paged_cache(spec, 64, 16, self.dtype, torch.device("cpu"))
        rotate_write(qkv, cache, rows, head_norm, (cos, cos), rows)
        activate(torch.empty(tokens, 2 * self.intermediate, dtype=self.dtype), self.activation)


MODELS = {
    "llama-3.1-8b": Model(4096, 14336, 32, 8, 128, 128256, torch.bfloat16),
    "qwen2.5-0.5b": Model(896, 4864, 14, 2, 64, 151936, torch.bfloat16),
}
_TINY = Model(
    32, 56, 4, 2, 8, 211, torch.float32, max_num_seqs=6
)  # as tests/model/tiny_models.py builds them
_WINDOW: dict[str, Any] = {"sliding_window": 12}
TINY = {
    "llama": _TINY,
    "qwen3": replace(_TINY, per_head=True),
    "mistral": replace(_TINY, attention=(_WINDOW,)),
    "gemma2": replace(
        _TINY,
        attention=(_WINDOW | {"softcap": 2.0}, {"softcap": 2.0}),
        post_norms=True,
        activation="gelu",
    ),
    "olmo2": replace(_TINY, per_head=False, post_norms=True),
    "gpt_oss": replace(_TINY, attention=(_WINDOW | {"sinks": True}, {"sinks": True})),
}


def decode(model: Model) -> Iterator[Launch]:
    """Of the steps that are captured."""
    yield lambda: model.norms()
    sizes = [kinds_of(size) for size in sizes_up_to(model.max_num_seqs)]
    sizes += [prompt_kinds_of(tokens, model.max_num_seqs) for tokens in prompt_sizes_up_to(_STEP_TOKENS)]
    for kind in (kind for kinds in sizes for kind in kinds):
        rows = [1] * kind.sequences
        lengths = [*rows[1:], kind.tokens - len(rows[1:])]
        if kind.longest:
            yield lambda kind=kind, lengths=lengths, rows=rows: model.add_deltas(lengths, rows, kind)
        else:
            yield lambda kind=kind, lengths=lengths: model.attend(lengths, prompts=kind.prompts)


def prompts(model: Model) -> Iterator[Launch]:
    """Of steps too large to be captured, a prompt beside others that decode: with adapters and without."""
    for others in sorted({0, *(size - 1 for size in sizes_up_to(model.max_num_seqs))}):
        lengths = [1] * others + [2000]
        yield lambda lengths=lengths: model.attend(lengths)
        yield lambda lengths=lengths: model.add_deltas(lengths, [1] * len(lengths))


def kernels(launches: Iterable[Launch]) -> set[tuple[str, str]]:
    """Distinct ones among them: name, and what it is compiled for."""
    return {kernel for launch in launches for kernel in distinct(launch)}


def compiled(launches: Iterable[Launch]) -> list[Compiled]:
    """The distinct ones, compiled."""
    found = {kernel.hash: kernel for launch in launches for kernel in compile_only(launch)}
    return [read(kernel, instructions=False) for kernel in found.values()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", action="store_true", help="compile all of them too (minutes)")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    tiny = {
        f"{name}, {dtype}": replace(model, dtype=dtype) for name, model in TINY.items() for dtype in dtypes
    }
    models = MODELS | tiny
    print(f"{'model':24}{'at start':>9}{'later':>9}")
    for name, model in models.items():
        at_start = kernels(decode(model))
        print(f"{name:24}{len(at_start):9}{len(kernels(prompts(model)) - at_start):9}", flush=True)
    if not parser.parse_args().compile:
        return
    for name, model in models.items():
        for kernel in compiled((*decode(model), *prompts(model))):
            if kernel.stack:
                print(f"{name}: {kernel.kernel} has {kernel.stack} bytes of stack a thread", flush=True)


if __name__ == "__main__":
    main()

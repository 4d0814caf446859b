"""Paged attention for CUDA, in Triton: one kernel writes K and V, one attends, one joins what was cut.

Which tile of query tokens and which of its keys a program takes is read from a list that the host makes once
a step (`prepare`), so that one long context among short ones keeps the whole chip busy and not one program.

A tile in one item is written to the output at once. Those of a cut tile write partial sums, which are joined
in the order of their keys: results do not change from run to run (no atomics).

Grids follow from the plan alone, and items without tokens return at once. So a captured CUDA graph can replay
with other lists: leave rows of zeros where there are fewer items or cuts, and give tokens that belong to no
sequence a negative slot in `slot_mapping`.

Shape suffixes: T tokens, E the head dimension of V, P partial sums of a cut tile, H heads.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache

import torch

from server.devices.cuda.attention_kernels import attend, join, write
from server.devices.cuda.jit import launch_options, power_of_2, triton
from server.devices.cuda.levers import USUAL, Levers
from server.devices.cuda.work_list import work_list
from server.model.attention.interface import (
    AttentionOptions,
    AttentionPlan,
    AttentionWork,
    LayerCache,
    LayerCacheSpec,
    paged_cache,
)

# Bytes of a row of K or V up to which, rows of a prefill tile, keys of a step (which divide
# `work_list.KEY_STEP`), and stages of the pipeline: what fits registers and shared memory. With three stages
# and more, copies of a step are under way while the one before it is computed; decode's tiles leave room for
# one more, as they have little else to wait for.
_SHAPES = ((256, 128, 64, 3), (512, 64, 32, 3), (1 << 30, 16, 32, 2))
_LEAST_ROWS = 16  # that a tensor core takes
# Programs that share the tokens of a cut tile. A captured step launches them for as many tiles as may be cut,
# so that one for each token would be tens of thousands.
_JOINERS = 4


@dataclass(frozen=True)
class Shape:
    """How a layer's tiles look."""

    group: int  # query heads of a KV head, rounded up to a power of two
    small_t: int  # query tokens of a decode tile
    large_t: int  # and of a prefill tile
    block_n: int  # keys of a step
    stages: int  # of a prefill tile's pipeline

    @classmethod
    @cache
    def of(cls, layer: LayerCacheSpec, dtype: torch.dtype) -> Shape:
        group = power_of_2(layer.num_heads // layer.num_kv_heads)
        row = max(layer.k_head_dim, layer.v_head_dim) * dtype.itemsize
        rows, block_n, stages = next(shape for bound, *shape in _SHAPES if row <= bound)
        return cls(group, max(1, _LEAST_ROWS // group), max(1, rows // group), block_n, stages)

    def pipeline(self, block_t: int) -> dict[str, int]:
        """Triton's options for tiles of so many query tokens."""
        deeper = self.stages > 2 and block_t == self.small_t
        return {
            "num_warps": 8 if block_t * self.group > 64 else 4,
            "num_stages": self.stages + deeper,
        }


class PagedTritonAttention:
    """`AttentionBackend` on CUDA, for float32, bfloat16 and float16; any head dimensions and block size.

    `layers`: what it will attend for; one list of items serves them all. `programs` is how many programs fill
    the chip; default: two for each multiprocessor. Raises RuntimeError without Triton.

    Fused layers that have written K and V themselves call `attend` alone.
    """

    new_cache = staticmethod(paged_cache)

    def __init__(
        self,
        layers: Collection[LayerCacheSpec],
        dtype: torch.dtype,
        programs: int | None = None,
        levers: Levers = USUAL,
    ) -> None:
        if triton is None:
            raise RuntimeError(
                "paged attention on CUDA needs Triton, which is not installed: pip install triton"
            )
        shapes = [Shape.of(layer, dtype) for layer in layers]
        self._small_t = min(shape.small_t for shape in shapes)
        self._large_t = min(shape.large_t for shape in shapes)
        self._dependent = launch_options(dependent=levers.dependent_launch)
        self._spare = max(1, (programs or _fill()) // min(layer.num_kv_heads for layer in layers))

    def prepare(self, plan: AttentionPlan) -> AttentionPlan:
        """See `AttentionBackend.prepare`: with the list of items."""
        block_t = self._small_t if plan.max_query_len <= self._small_t else self._large_t
        work = work_list(plan.query_starts.numpy(), plan.context_lens.numpy(), block_t, self._spare)
        return replace(plan, work=work)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`. Enqueues two or three kernels and never waits for them.

        Rows of tokens that belong to no run hold anything. Raises ValueError on a layout or dtype that the
        kernels would misread, and on a plan that was not prepared.
        """
        _check(query, key, value, cache)
        if len(query):
            self._write(key, value, cache, plan)
        return self.attend(query, cache, plan, options)

    def attend(
        self, query: torch.Tensor, cache: LayerCache, plan: AttentionPlan, options: AttentionOptions
    ) -> torch.Tensor:
        """`forward` of a step whose K and V are in the cache already."""
        work = plan.work
        if work is None:
            raise ValueError("the plan has no list of items: `prepare` makes it")
        tokens, heads, _ = query.shape
        out_THE = query.new_empty(tokens, heads, cache.v.shape[3])
        if tokens == 0:
            return out_THE
        # From the caching allocator, so that each captured graph owns its buffers and no stream shares them.
        tile_tokens = min(work.block_t, plan.max_query_len)
        parts_PTHE = out_THE.new_empty((work.parts, tile_tokens, *out_THE.shape[1:]), dtype=torch.float32)
        lse_PTH = parts_PTHE.new_empty(parts_PTHE.shape[:3])
        self._launch_attend(query, cache, plan, work, options, out_THE, parts_PTHE, lse_PTH)
        if len(work.cuts):
            join[(len(work.cuts), min(tile_tokens, _JOINERS), heads)](
                parts_PTHE, lse_PTH, out_THE, work.cuts, tile_tokens,
                V_DIM=cache.v.shape[3], BLOCK_P=16, BLOCK_E=_dim_block(cache.v.shape[3]),
                **self._dependent,
            )  # fmt: skip
        return out_THE

    def _write(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, plan: AttentionPlan) -> None:
        _, kv_heads, block_size, k_dim = cache.k.shape
        v_dim = cache.v.shape[3]
        write[(key.shape[0],)](
            key, value, cache.k, cache.v, plan.slot_mapping,
            *key.stride()[:2], *value.stride()[:2], *cache.k.stride()[:3], *cache.v.stride()[:3],
            KV_HEADS=kv_heads, K_DIM=k_dim, V_DIM=v_dim, BLOCK_SIZE=block_size,
            BLOCK_H=power_of_2(kv_heads), BLOCK_D=_dim_block(k_dim), BLOCK_E=_dim_block(v_dim),
            **self._dependent,
        )  # fmt: skip

    def _launch_attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        work: AttentionWork,
        options: AttentionOptions,
        out_THE: torch.Tensor,
        parts_PTHE: torch.Tensor,
        lse_PTH: torch.Tensor,
    ) -> None:
        _, kv_heads, block_size, k_dim = cache.k.shape
        v_dim, heads = cache.v.shape[3], query.shape[1]
        shape = Shape.of(LayerCacheSpec(kv_heads, k_dim, v_dim, heads), query.dtype)
        block_t = max(work.block_t, shape.small_t)
        attend[(len(work.items), kv_heads)](
            query, cache.k, cache.v, out_THE, parts_PTHE, lse_PTH, work.items, plan.block_tables,
            query if options.sinks is None else options.sinks,
            options.scale, options.softcap or 0.0, options.sliding_window or 0, parts_PTHE.shape[1],
            *query.stride()[:2], *cache.k.stride()[:3], *cache.v.stride()[:3],
            out_THE.stride(0), plan.block_tables.stride(0),
            RATIO=heads // kv_heads, GROUP=shape.group, K_DIM=k_dim, V_DIM=v_dim, BLOCK_SIZE=block_size,
            WINDOW=options.sliding_window is not None, SOFTCAP=options.softcap is not None,
            SINKS=options.sinks is not None,
            BLOCK_T=block_t, BLOCK_N=shape.block_n, BLOCK_D=_dim_block(k_dim), BLOCK_E=_dim_block(v_dim),
            PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",  # a float32 model stays one
            **shape.pipeline(block_t), **self._dependent,
        )  # fmt: skip


def _dim_block(dim: int) -> int:
    return max(16, power_of_2(dim))


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerCache) -> None:
    tensors = (query, key, value, cache.k, cache.v)
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(
            f"query, key, value and cache differ in dtype: {[tensor.dtype for tensor in tensors]}"
        )
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("the last dimension of query, key, value and cache must have stride 1")
    if query.shape[1] % cache.k.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads do not divide among {cache.k.shape[1]} KV heads")


@cache
def _fill() -> int:
    """Programs that fill the current device: two for each multiprocessor."""
    if not torch.cuda.is_available():  # Triton's interpreter
        return 8
    return 2 * torch.cuda.get_device_properties().multi_processor_count

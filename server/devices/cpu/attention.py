"""Paged attention on the CPU through the compiled kernel: one call for each layer of a step."""

from __future__ import annotations

import ctypes

import torch

from server.devices.cpu.native import SUFFIXES, Mirror, compare, library
from server.model.attention.interface import AttentionOptions, AttentionPlan, LayerCache, paged_cache


class PlanStruct(Mirror):
    """`ChorusPlan` of devices/cpu/native/attention.h."""

    c_name = "ChorusPlan"
    _fields_ = (
        ("query_starts", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("slot_mapping", ctypes.c_void_p),
        ("num_seqs", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
    )


class AttentionStruct(Mirror):
    """`ChorusAttention` of devices/cpu/native/attention.h."""

    c_name = "ChorusAttention"
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "k_cache", "v_cache")),
        *((name, ctypes.c_int64) for name in ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "k_dim", "v_dim", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
    )


class Plans:
    """The plan of the step at hand, as compiled code takes it."""

    def __init__(self) -> None:
        self._plan: AttentionPlan | None = None
        self._struct = PlanStruct()

    def struct(self, plan: AttentionPlan, block_size: int) -> PlanStruct:
        """Valid until it is asked for another step's."""
        if self._plan is not plan:
            self._struct = PlanStruct(
                plan.query_starts.data_ptr(),
                plan.context_lens.data_ptr(),
                plan.block_tables.data_ptr(),
                plan.slot_mapping.data_ptr(),
                plan.num_seqs,
                plan.block_tables.stride(0),
                plan.slot_mapping.numel(),
                block_size,
            )
            self._plan = plan  # keeps the tensors behind the pointers alive
        return self._struct


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class PagedCpuAttention:
    """`AttentionBackend` in devices/cpu/native/attention.h."""

    new_cache = staticmethod(paged_cache)

    def __init__(self, lib: ctypes.CDLL) -> None:
        compare(lib, PlanStruct, AttentionStruct)
        self._functions = {dtype: lib[f"chorus_attention_{suffix}"] for dtype, suffix in SUFFIXES.items()}
        for function in self._functions.values():
            function.restype = None
            function.argtypes = [ctypes.POINTER(PlanStruct), ctypes.POINTER(AttentionStruct), ctypes.c_int64]
        self._plans = Plans()

    def prepare(self, plan: AttentionPlan) -> AttentionPlan:
        """See `AttentionBackend.prepare`: adds nothing."""
        return plan

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        options: AttentionOptions,
    ) -> torch.Tensor:
        query, key, value = _rows(query), _rows(key), _rows(value)
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        sinks = None if options.sinks is None else options.sinks.float().contiguous()
        call = AttentionStruct(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
            cache.k.data_ptr(),
            cache.v.data_ptr(),
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            query.shape[1],
            key.shape[1],
            key.shape[2],
            value.shape[2],
            options.sliding_window or 0,
            options.scale,
            options.softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
        )
        struct = self._plans.struct(plan, cache.k.shape[2])
        self._functions[query.dtype](struct, call, torch.get_num_threads())
        return out


def compiled_attention(dtype: torch.dtype) -> PagedCpuAttention | None:
    """The compiled kernel, where it is there and knows `dtype`."""
    lib = library()
    return None if lib is None or dtype not in SUFFIXES else PagedCpuAttention(lib)

"""How much memory the KV cache, the arena and the host copies get when nobody says."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from server.config import Settings
from server.model.loader import LoadedModel

# On the CPU all three come out of the same memory, and the operating system and its page cache want some.
_CPU_KV, _CPU_ARENA, _CPU_HOST = 0.25, 0.20, 0.10
_CPU_CAP = 4 * 2**30  # no more than this each, unless asked for: a laptop is not a server
_CUDA_USE = 0.90  # of what is free after the weights
_CUDA_ARENA = 0.20  # of what is left for KV and adapters
_CUDA_HOST_CAP = 32 * 2**30  # all of it is page-locked at start, which takes time
_PROMPT_TOKENS_PER_CORE = 256  # of a step: fewer cost throughput, more make streams wait longer
_ACTIVATIONS_IN_FLIGHT = 4  # float32 copies of the logits that sampling holds


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, and how many KV blocks they make."""

    kv_blocks: int
    kv_bytes: int
    arena_bytes: int
    host_cache_bytes: int


def plan_memory(settings: Settings, loaded: LoadedModel) -> MemoryPlan:
    """Settings where given, else shares of the memory that is free now, with the weights loaded.

    By default the KV cache is no larger than `max_num_seqs` sequences of full length could fill. Raises
    ValueError when it is too small to serve anything.
    """
    block_bytes = settings.block_size * kv_bytes_per_token(loaded)
    blocks_per_seq = -(-loaded.max_model_len // settings.block_size)
    most_useful = settings.max_num_seqs * blocks_per_seq * block_bytes
    host_free = _available_host_bytes()
    if loaded.device.type == "cuda":
        free = torch.cuda.mem_get_info(loaded.device)[0] * _CUDA_USE - _activation_bytes(settings, loaded)
        arena = settings.arena_bytes or int(max(free, 0) * _CUDA_ARENA)
        kv = settings.kv_cache_bytes or min(int(free) - arena, most_useful)
    else:
        arena = settings.arena_bytes or min(int(host_free * _CPU_ARENA), _CPU_CAP)
        kv = settings.kv_cache_bytes or min(int(host_free * _CPU_KV), _CPU_CAP, most_useful)
    host = settings.host_cache_bytes
    if host is None:
        host = min(int(host_free * _CPU_HOST), _CPU_CAP if loaded.device.type == "cpu" else _CUDA_HOST_CAP)
    blocks = kv // block_bytes
    if blocks < 2:
        raise ValueError(
            f"a KV cache of {max(kv, 0)} bytes is too small for blocks of {block_bytes} (--kv-cache-bytes)"
        )
    return MemoryPlan(blocks, blocks * block_bytes, arena, host)


def kv_bytes_per_token(loaded: LoadedModel) -> int:
    """Over all layers."""
    return sum(s.elements_per_token() for s in loaded.cache_specs.values()) * loaded.dtype.itemsize


def token_budget(settings: Settings, device: torch.device) -> int:
    """Tokens of one step: enough to keep the device's arithmetic busy, few enough to keep streams flowing.

    Agrawal et al. 2024, Sarathi-Serve.
    """
    if settings.max_num_batched_tokens is not None:
        return settings.max_num_batched_tokens
    if device.type == "cuda":
        return 8192
    return _PROMPT_TOKENS_PER_CORE * torch.get_num_threads() + settings.max_num_seqs


def _activation_bytes(settings: Settings, loaded: LoadedModel) -> int:
    """A generous bound of what a step allocates: its widest activations and the logits in float32."""
    tokens = token_budget(settings, loaded.device)
    config = loaded.model.config.get_text_config()
    width = max(getattr(config, "intermediate_size", 0) or 0, 4 * config.hidden_size)
    logits: int = settings.max_num_seqs * loaded.vocab_size * 4
    activations: int = 8 * tokens * width * loaded.dtype.itemsize
    return activations + _ACTIVATIONS_IN_FLIGHT * logits + 2**29


def _available_host_bytes() -> int:
    """Memory this process may still take: what the machine has free, within the container's limit."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0] != "max":
        available = min(available, int(limit[0]) - int(used[0]))
    return max(available, 0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

"""How much memory the KV cache, the arena and the host copies get when nobody says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.config import Settings
from server.messages import LoraTarget
from server.model.device import Device
from server.model.loader import LoadedModel

_RANKS = 1024  # room for compositions on small models
_SCORED_BYTES = 2**28  # of logits in float32, of the prompt tokens that a step scores
_ACTIVATIONS_IN_FLIGHT = 4  # float32 copies of the logits that sampling holds


@dataclass(frozen=True)
class MemorySizes:
    """Bytes, and how many KV blocks they make."""

    kv_blocks: int
    kv_bytes: int
    arena_bytes: int
    host_cache_bytes: int


def memory_sizes(settings: Settings, loaded: LoadedModel, device: Device) -> MemorySizes:
    """Settings where given, else the device's shares of the memory that is free now, with the weights loaded.

    By default the KV cache is no larger than `max_num_seqs` sequences of full length could fill. Raises
    ValueError when it is too small to serve anything.
    """
    block_bytes = settings.block_size * kv_bytes_per_token(loaded)
    blocks_per_seq = -(-loaded.max_model_len // settings.block_size)
    most_useful = settings.max_num_seqs * blocks_per_seq * block_bytes
    activations = _activation_bytes(settings, loaded, token_budget(settings, device))
    default = device.sizes(_available_host_bytes(), activations, settings.arena_bytes)
    kv = settings.kv_cache_bytes or min(default.kv, most_useful)
    host = default.host if settings.host_cache_bytes is None else settings.host_cache_bytes
    blocks = kv // block_bytes
    if blocks < 2:
        raise ValueError(
            f"a KV cache of {max(kv, 0)} bytes is too small for blocks of {block_bytes} (--kv-cache-bytes)"
        )
    return MemorySizes(blocks, blocks * block_bytes, default.arena, host)


def kv_bytes_per_token(loaded: LoadedModel) -> int:
    """Over all layers."""
    return sum(s.elements_per_token() for s in loaded.cache_specs.values()) * loaded.dtype.itemsize


def token_budget(settings: Settings, device: Device) -> int:
    """Tokens of one step."""
    return settings.max_num_batched_tokens or device.step_tokens(settings.max_num_seqs)


def scored_tokens(vocab_size: int) -> int:
    """Of how many prompt tokens a step may have logits."""
    return max(_SCORED_BYTES // (4 * vocab_size), 1)


def rank_limit(settings: Settings, targets: Sequence[LoraTarget], servable: int) -> int:
    """Most that the ranks of one request's adapters may add up to on a module.

    By default what can be of use: a rank above the narrower side of every layer makes a step slower and no
    adapter better. `servable`: what the kernels have scratch for. Raises ValueError when more is asked for.
    """
    if settings.max_lora_rank is None:
        narrow = (min(target.in_features, target.out_features) for target in targets)
        return min(servable, max(_RANKS, *narrow))
    if settings.max_lora_rank > servable:
        raise ValueError(
            f"steps have scratch for ranks up to {servable} in all, not {settings.max_lora_rank} "
            "(--max-lora-rank; fewer --max-num-batched-tokens may leave room for more)"
        )
    return settings.max_lora_rank


def _activation_bytes(settings: Settings, loaded: LoadedModel, tokens: int) -> int:
    """A generous bound of what a step allocates: its widest activations and the logits in float32."""
    config = loaded.model.config.get_text_config()
    width = max(getattr(config, "intermediate_size", 0) or 0, 4 * config.hidden_size)
    logits: int = settings.max_num_seqs * loaded.vocab_size * 4
    activations: int = 8 * tokens * width * loaded.dtype.itemsize
    scored: int = min(scored_tokens(loaded.vocab_size), tokens) * loaded.vocab_size * loaded.dtype.itemsize
    return activations + _ACTIVATIONS_IN_FLIGHT * logits + scored + 2**29


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

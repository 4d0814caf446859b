from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.devices.cpu.device import CpuDevice
from server.messages import LoraTarget
from server.model.loader import LoadedModel, load
from server.model.memory import kv_bytes_per_token, memory_sizes, rank_limit, token_budget
from tests.engine.harness import settings_for
from tests.model.tiny_models import build


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(settings_for(build("llama", tmp_path_factory.mktemp("model"))))


def test_kv_bytes_follow_the_shape(loaded: LoadedModel) -> None:
    assert kv_bytes_per_token(loaded) == 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, dims, float32


def test_what_is_set_is_taken(loaded: LoadedModel, tmp_path: Path) -> None:
    sizes = memory_sizes(
        settings_for(tmp_path, kv_cache_bytes="1MiB", arena_bytes=12345, host_cache_bytes=0),
        loaded,
        CpuDevice(),
    )
    assert sizes.kv_blocks == 2**20 // (16 * kv_bytes_per_token(loaded))
    assert sizes.kv_bytes == sizes.kv_blocks * 16 * kv_bytes_per_token(loaded)
    assert (sizes.arena_bytes, sizes.host_cache_bytes) == (12345, 0)


def test_by_default_the_kv_cache_is_what_can_be_used_at_most(loaded: LoadedModel, tmp_path: Path) -> None:
    unset = {"kv_cache_bytes": None, "arena_bytes": None, "host_cache_bytes": None}
    sizes = memory_sizes(settings_for(tmp_path, max_num_seqs=3, **unset), loaded, CpuDevice())
    assert sizes.kv_blocks == 3 * 256 // 16
    assert 2**20 < sizes.arena_bytes <= 4 * 2**30
    assert 2**20 < sizes.host_cache_bytes <= 4 * 2**30


def test_too_small_a_cache_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--kv-cache-bytes"):
        memory_sizes(settings_for(tmp_path, kv_cache_bytes=100), loaded, CpuDevice())


def test_a_step_has_room_for_every_stream_beside_its_prompt_tokens(tmp_path: Path) -> None:
    for sequences in (1, 300):
        settings = settings_for(tmp_path, max_num_seqs=sequences, max_num_batched_tokens=None)
        budget = token_budget(settings, CpuDevice())
        assert budget == sequences + 256 * torch.get_num_threads()
    assert token_budget(settings_for(tmp_path, max_num_batched_tokens=7), CpuDevice()) == 7


def test_the_highest_rank_is_the_narrow_side_of_a_layer_or_what_is_asked_for(tmp_path: Path) -> None:
    wide = [LoraTarget("a", 4096, 14336), LoraTarget("b", 2048, 2048)]
    assert rank_limit(settings_for(tmp_path), wide, servable=10_000) == 4096
    assert rank_limit(settings_for(tmp_path), wide, servable=512) == 512
    assert rank_limit(settings_for(tmp_path), [LoraTarget("a", 8, 8)], servable=10_000) == 1024
    assert rank_limit(settings_for(tmp_path, max_lora_rank=9_000), wide, servable=10_000) == 9_000
    with pytest.raises(ValueError, match=r"up to 512 .*--max-lora-rank"):
        rank_limit(settings_for(tmp_path, max_lora_rank=513), wide, servable=512)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from load_tests.gpu.figures import Deadline
from load_tests.gpu.subject import SHAPES, SlowEngine, Subject, Version, adapter_bytes, subject
from server.engine.engine import Engine

A, B, WIDE = Version(8, 0), Version(8, 1), Version(16, 0)


@pytest.fixture
def on() -> Iterator[Subject]:
    with subject("tiny", ranks=[8, 16], arena_ranks=24, max_num_seqs=4, kv_tokens=64) as found:
        yield found


def test_a_step_reads_weights_each_distinct_adapter_and_live_kv_once(on: Subject) -> None:
    base = on.step_bytes([None] * 3, 10)
    head = 512 * 64
    assert base.weights == 2 * (on.engine.info.parameters - head)  # an embedding is only looked up
    assert base.adapters == 0
    assert base.kv == 3 * 10 * 2 * (2 * 2 * 2 * 16)  # bytes; K and V, layers, KV heads, size of a head
    one = adapter_bytes("tiny", 8)
    assert on.step_bytes([A, A, None], 10).adapters == one
    assert on.step_bytes([A, B, A, WIDE], 10).adapters == one + one + 2 * one
    tied = replace(on, config=on.config | {"tie_word_embeddings": True})
    assert tied.step_bytes([None], 10).weights == on.engine.info.weights_bytes


def test_versions_of_one_folder_are_adapters_of_their_own(on: Subject) -> None:
    assert on.load([A, B, A])
    stats = on.engine.stats()
    assert (stats.adapter_loads, len(stats.resident)) == (2, 2)
    assert stats.arena_bytes_used == 2 * adapter_bytes("tiny", 8)
    assert on.load([WIDE])  # the arena holds 24 ranks: one of the others goes
    stats = on.engine.stats()
    assert (stats.adapter_evictions, stats.arena_bytes_used) == (1, stats.arena_bytes_total)
    assert stats.host_bytes_used == 0


def test_nothing_is_loaded_after_the_deadline(on: Subject) -> None:
    assert not on.load([A], Deadline(0))
    assert on.engine.stats().adapter_loads == 0


def test_requests_begin_together(on: Subject) -> None:
    ids = [on.add(version, prompt=20, output=50) for version in (None, A, B)]
    assert len(set(ids)) == 3
    on.begin(ids)
    assert on.engine.stats().running == 3
    assert on.engine.stats().generated_tokens >= 3
    on.engine.abort(ids)


@pytest.mark.parametrize("missing", ["fused", "flat", "graphs"])
def test_on_cuda_every_fast_path_is_required(
    on: Subject, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on.require_fast_paths()  # a CPU has no graphs
    paths = {name: name != missing for name in ("fused", "flat", "graphs")}
    monkeypatch.setattr(Engine, "fast_paths", paths)
    monkeypatch.setattr(on.engine, "info", structs.replace(on.engine.info, device="cuda:0"))
    with pytest.raises(SlowEngine, match=f"without {missing};"):
        on.require_fast_paths()
    assert f"{missing} NO" in on.head
    monkeypatch.setitem(paths, missing, True)
    on.require_fast_paths()


def test_a_slow_engine_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(on: Subject) -> None:
        raise SlowEngine

    monkeypatch.setattr(Subject, "require_fast_paths", refuse)
    with pytest.raises(SlowEngine), subject("tiny", ranks=[8], arena_ranks=8, max_num_seqs=1, kv_tokens=8):
        pytest.fail("a slow engine was given out")


def test_an_adapter_that_cannot_be_read_is_an_error(on: Subject) -> None:
    broken = replace(on, folders={8: Path("/nowhere")})
    with pytest.raises(RuntimeError, match="adapter"):
        broken.load([A])


@pytest.mark.parametrize(
    ("shape", "rank", "megabytes"), [("llama-3.1-8b", 16, 83.9), ("qwen2.5-0.5b", 8, 8.8)]
)
def test_real_shapes_have_the_size_of_the_real_models(shape: str, rank: int, megabytes: float) -> None:
    assert adapter_bytes(shape, rank) / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert {"hidden_size", "tie_word_embeddings"} <= SHAPES[shape].keys()

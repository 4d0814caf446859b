"""The engine on CUDA gives the tokens that transformers + PEFT give on the CPU (greedy, float32)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from server.devices.cuda.device import CudaDevice
from tests.engine.harness import assert_at_rest, make_engine
from tests.model.tiny_models import VOCAB, Job, add_adapter, build, expected, serve, targets_of


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(
    "architecture",
    # a capture of gpt-oss fails, and torch's allocator and generators may remember it
    ["llama", "gemma2", "mistral", pytest.param("gpt_oss", marks=pytest.mark.alone)],
)
def test_mixed_batch(architecture: str, eager: bool, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = build(architecture, tmp_path / "model")
    targets = targets_of(architecture)
    adapters = [
        add_adapter(model, tmp_path / f"a{i}", seed=i, rank=rank, target_modules=targets)
        for i, rank in enumerate((3, 8, 16))
    ]
    rng = random.Random(5)
    jobs = [
        Job([rng.randrange(3, VOCAB) for _ in range(length)], adapter, tokens=8)
        for length, adapter in zip((1, 30, 7, 18, 40), [None, *adapters, adapters[0]], strict=True)
    ]
    engine = make_engine(
        model,
        device="cuda",
        max_num_batched_tokens=24,
        max_num_seqs=6,
        arena_bytes=2**20,
        enforce_eager=eager,
    )
    if architecture != "gpt_oss":  # experts may be chosen in a way that cannot be captured
        assert engine.fast_paths["graphs"] != eager
    assert serve(engine, jobs) == expected(model, jobs)
    assert_at_rest(engine)
    engine.close()


@pytest.mark.parametrize("levers", ["none", "rotate-write", "shrink-beside", "dependent-launch", "all"])
def test_the_levers_change_no_token(levers: str, tmp_path: Path) -> None:
    """Eight sequences with adapters of their own and a prompt among them, so that shrink has a branch."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = build("llama", tmp_path / "model")
    targets = targets_of("llama")
    adapters = [
        add_adapter(model, tmp_path / f"a{i}", seed=i, rank=4 + i, target_modules=targets) for i in range(8)
    ]
    jobs = [Job([5 + i, 6, 7, 9 + i], adapter, tokens=12 - i) for i, adapter in enumerate(adapters)]
    jobs.append(Job(list(range(3, 40)), adapters[0], tokens=5))
    engine = make_engine(
        model,
        device="cuda",
        max_num_batched_tokens=24,
        max_num_seqs=9,
        arena_bytes=2**20,
        cuda_levers=levers,
    )
    assert engine.fast_paths["graphs"]
    assert serve(engine, jobs) == expected(model, jobs)
    engine.close()


def test_an_arena_whose_tables_grow_is_captured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    monkeypatch.setattr(CudaDevice, "arena_slots", 1)
    model = build("llama", tmp_path / "model")
    targets = targets_of("llama")
    adapters = [
        add_adapter(model, tmp_path / f"a{i}", seed=i, rank=4, target_modules=targets) for i in range(3)
    ]
    engine = make_engine(model, device="cuda", max_num_seqs=2, arena_bytes=2**20)
    for i, adapter in enumerate(adapters):
        jobs = [Job([5 + i, 6, 7], who, tokens=6) for who in (adapter, adapters[0])]
        assert serve(engine, jobs) == expected(model, jobs)
    assert engine.fast_paths["graphs"]
    engine.close()

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from load_tests import floor
from load_tests.adapters import write_adapters, write_safetensors
from load_tests.scaling import Load, Subject, floors

MODEL = Path(__file__).resolve().parents[2] / "models" / "chorus-tiny"
CONFIG = json.loads((MODEL / "config.json").read_text())


def values_in(path: Path) -> int:
    with safe_open(path, "np") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118 - no dict


def test_a_tied_model_is_read_as_a_whole() -> None:
    assert floor.weight_values(MODEL) == values_in(MODEL / "model.safetensors")


def test_an_embedding_beside_a_head_is_not_read(tmp_path: Path) -> None:
    halves = (
        {
            "model.embed_tokens.weight": np.zeros((50, 4), np.float32),
            "model.norm.weight": np.ones(4, np.float32),
        },
        {"lm_head.weight": np.zeros((50, 4), np.float32)},
    )
    for number, tensors in enumerate(halves):
        write_safetensors(tmp_path / f"model-{number}.safetensors", tensors, "float32")
    assert floor.weight_values(tmp_path) == 204


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        floor.weight_values(tmp_path)


def test_an_adapter_has_as_many_values_as_its_file(tmp_path: Path) -> None:
    for folder, rank in zip(write_adapters(MODEL, tmp_path, ("a", "b"), (1, 6)), (1, 6), strict=True):
        assert floor.adapter_values(CONFIG, rank) == values_in(folder / "adapter_model.safetensors")


def test_kv_of_one_token() -> None:
    assert floor.kv_values(CONFIG) == 2 * 4 * 2 * 64  # K and V, layers, KV heads, size of a head


def test_floors_count_every_distinct_adapter_once() -> None:
    subject = Subject(MODEL, ranks=(8, 16), dtype="bfloat16")
    load = Load(concurrency=10, prompt_tokens=30, output_tokens=20)
    found = floors(subject, load, (1, 3), floor.Machine(read_rate=1e9, multiply_rate=1e15))
    per_rank = 2 * floor.adapter_values(CONFIG, 1)
    assert [found[n].bytes.adapters for n in (1, 3)] == [8 * per_rank, 32 * per_rank]
    for one in found.values():
        assert one.bytes.weights == 2 * values_in(MODEL / "model.safetensors")
        assert one.bytes.kv == 10 * 40 * 2 * floor.kv_values(CONFIG)
        assert one.step_s == one.bytes.total / 1e9
        assert one.tokens_per_s == pytest.approx(10 / one.step_s, rel=1e-3)  # prompts take no time here


def test_floors_count_arithmetic_where_it_is_slower_than_memory() -> None:
    subject = Subject(MODEL, ranks=(8,), dtype="bfloat16")
    load = Load(concurrency=10, prompt_tokens=30, output_tokens=20)
    found = floors(subject, load, (1,), floor.Machine(read_rate=1e15, multiply_rate=1e9))[1]
    per_token = floor.weight_values(MODEL) + floor.adapter_values(CONFIG, 8)
    assert found.step_s == pytest.approx(10 * 2 * per_token / 1e9)
    prompts_s = 300 * 2 * (per_token - CONFIG["vocab_size"] * CONFIG["hidden_size"]) / 1e9
    assert found.tokens_per_s == pytest.approx(200 / (20 * found.step_s + prompts_s))


def test_the_multiply_rate_is_that_of_a_processor() -> None:
    assert 1e8 < floor.multiply_rate("float32", rounds=1) < 1e15


def test_the_read_rate_is_that_of_a_memory() -> None:
    assert 1e8 < floor.read_rate(mebibytes=16, rounds=2) < 1e13

"""Models whose decoder layers CUDA runs fused: their logits agree at load, and weights stay in memory once.

That whole engines then give the right tokens, captured ones too, is tests/gpu/test_engine.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.devices import open_device
from server.model.loader import load
from server.model.runner import Runner
from tests.engine.harness import settings_for
from tests.model.tiny_models import ARCHITECTURES, build


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gpt_oss"])
def test_layers_of_llamas_relatives_are_fused(architecture: str, dtype: str, tmp_path: Path) -> None:
    device = open_device("cuda")
    loaded = load(settings_for(build(architecture, tmp_path / "model"), dtype=dtype), device.torch_device)
    assert Runner(loaded, device.operators(loaded), num_blocks=8, block_size=8).fused


def test_joined_weights_take_no_memory_of_their_own(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", hidden_size=1024, intermediate_size=4096, head_dim=256)
    device = open_device("cuda")
    loaded = load(settings_for(model, dtype="bfloat16"), device.torch_device)
    before = torch.cuda.memory_allocated()
    runner = Runner(loaded, device.operators(loaded), num_blocks=2, block_size=8)
    assert runner.fused
    assert torch.cuda.memory_allocated() - before < 0.1 * loaded.weights_bytes

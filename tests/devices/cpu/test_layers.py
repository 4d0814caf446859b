"""Which models' layers run as one call of compiled code, and that the others are left alone.

That they then give the right tokens, with adapters, is tests/model/test_parity.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from server.devices.cpu.device import CpuDevice
from server.devices.cpu.native import library
from server.lora.kernels.reference import ReferenceKernels
from server.lora.segments import Segments
from server.model.attention.paged_reference import PagedReferenceAttention
from server.model.device import PlainOperators
from server.model.loader import load, probe
from server.model.proof import PagedProbe, relative_error
from server.model.runner import Runner
from tests.engine.harness import settings_for
from tests.lora.kernels import random_arena
from tests.model.tiny_models import ARCHITECTURES, build

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels on this machine")


def runner(
    folder: Path,
    change: Callable[[PreTrainedModel], None] = lambda _: None,
    attention: str = "auto",
    **settings: object,
) -> Runner:
    loaded = load(settings_for(folder, **settings))
    change(loaded.model)
    proof = probe(loaded.model, loaded.vocab_size, loaded.device)[2]  # of the model as it is now
    operators = CpuDevice().operators(loaded, attention)
    return Runner(replace(loaded, proof=proof), operators, num_blocks=8, block_size=8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["compiled", "reference"])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gpt_oss"])
def test_layers_of_llamas_relatives_are_fused(
    architecture: str, attention: str, dtype: str, tmp_path: Path
) -> None:
    assert runner(build(architecture, tmp_path / "model"), attention=attention, dtype=dtype).fused


def test_a_model_that_caps_its_logits_keeps_its_own_forward(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tiny model's logits are far below the cap."""
    with caplog.at_level("INFO"):
        assert runner(build("gemma2", tmp_path / "model")).fused
    assert "transformers' forward stays: without it, the logits differ" in caplog.text


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "phi3", "olmo2", "smollm3"])
def test_nothing_else_stays_of_transformers_forward(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert runner(build(architecture, tmp_path / "model")).fused
    assert "stays" not in caplog.text


def test_gate_and_up_packed_in_one_are_fused_as_whole_panels_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert not runner(build("phi3", tmp_path / "model", intermediate_size=48)).fused
    assert "not whole panels" in caplog.text


def test_a_mixture_of_experts_is_left_to_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert not runner(build("gpt_oss", tmp_path / "model")).fused
    assert "not those of Llama" in caplog.text


@pytest.mark.parametrize("architecture", ["llama", "phi3"])  # phi3 has gate and up in one linear
@pytest.mark.parametrize("attention", ["compiled", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_part_of_an_adapter_reaches_fused_layers(
    architecture: str, attention: str, dtype: str, tmp_path: Path
) -> None:
    folder = build(architecture, tmp_path / "model")
    fused = runner(folder, attention=attention, dtype=dtype)
    loaded = load(settings_for(folder, dtype="float32"))
    usual = Runner(
        loaded, PlainOperators(PagedReferenceAttention(), ReferenceKernels()), num_blocks=8, block_size=8
    )
    assert fused.fast_paths == {"fused": True, "flat": True, "graphs": False}
    assert not usual.fused
    shapes = [(target.in_features, target.out_features) for target in usual.targets]
    ranks = [[(3 * slot + module) % 7 for module in range(len(shapes))] for slot in range(3)]
    batch, _ = PagedProbe(loaded.proof, num_blocks=8, block_size=8).prompts()  # logits of every other token
    mixes = [((0, 1.0),), ((1, 0.5), (2, 1.0))]
    batch = replace(
        batch,
        segments=Segments.build(list(zip(mixes, (5, 10), strict=True))),
        sample_segments=Segments.build(list(zip(mixes, (3, 5), strict=True))),
    )
    arena = random_arena(ranks, shapes, getattr(torch, dtype), seed=1)
    arena.data.mul_(0.3)
    exact = usual.logits(batch, replace(arena, data=arena.data.float()))
    error = relative_error(fused.logits(batch, arena), exact)
    assert error < (1e-5 if dtype == "float32" else 0.05)


def _first(model: PreTrainedModel) -> nn.Module:
    layer = model.get_decoder().layers[0]
    assert isinstance(layer, nn.Module)
    return layer


def _another_activation(model: PreTrainedModel) -> None:
    _first(model).mlp.act_fn = nn.ReLU()


def _a_layer_norm(model: PreTrainedModel) -> None:
    _first(model).input_layernorm = nn.LayerNorm(32)


def _a_gate_on_the_output(model: PreTrainedModel) -> None:
    _first(model).register_parameter("gate", nn.Parameter(torch.ones(1)))


def _twice_the_mlp(model: PreTrainedModel) -> None:
    """What no module shows: only the logits tell."""
    _first(model).mlp.register_forward_hook(lambda module, args, out: 2 * out)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_another_activation, "activation"),
        (_a_layer_norm, "input_layernorm is not an RMSNorm"),
        (_a_gate_on_the_output, "a layer also has gate"),
        (_twice_the_mlp, "logits differ"),
    ],
)
def test_layers_of_another_build_are_left_to_torch(
    change: Callable[[PreTrainedModel], None],
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        changed = runner(build("llama", tmp_path / "model"), change)
    assert not changed.fused
    assert reason in caplog.text

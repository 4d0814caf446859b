"""The decoder layers that CUDA runs, whole engines of them, in Triton's interpreter."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from server.lora.kernels.reference import ReferenceKernels
from server.lora.linear import CurrentLora, LoraLinear
from server.model.layer_reader import NotFusable
from server.model.loader import load, probe
from server.model.runner import Runner
from server.model.step import Step
from tests.devices.cuda.interpreted import cuda_operators, make_interpreted
from tests.engine.harness import settings_for
from tests.model.tiny_models import VOCAB, Job, add_adapter, build, expected, serve, targets_of

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles here: tests/gpu runs these layers", allow_module_level=True)

from server.devices.cuda.graph_inputs import NO_SEQUENCES  # noqa: E402  (after the skip)
from server.devices.cuda.layers import _JointLinear  # noqa: E402  (the same)
from server.devices.cuda.levers import Levers  # noqa: E402  (the same)

# With each: whether transformers' forward around the layers is left out too.
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}, True),
    "qwen2": ("qwen2", {}, True),
    "qwen3": ("qwen3", {}, True),
    "mistral, odd sizes": ("mistral", {"hidden_size": 36, "intermediate_size": 50, "head_dim": 10}, True),
    "phi3, half rotated": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        True,
    ),
    "olmo2": ("olmo2", {}, True),
    "smollm3": ("smollm3", {}, True),
    "gemma2": ("gemma2", {}, False),
    "gemma3_text": ("gemma3_text", {}, False),
    "granite": ("granite", {}, False),
}

# Those that have all the kinds of layers between them; the others take minutes in the interpreter.
FIRST = {"llama, biases", "qwen3", "phi3, half rotated", "gemma2"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FIRST else pytest.mark.long) for name in MODELS]
)
def test_mixed_batches_equal_transformers_and_peft(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    architecture, options, flat = MODELS[name]
    model = build(architecture, tmp_path / "model", **options)
    targets = targets_of(architecture)
    few = [target for target in targets if target in ("k_proj", "up_proj", "qkv_proj", "down_proj")]
    adapters = [
        add_adapter(model, tmp_path / "all", seed=1, rank=6, target_modules=targets),
        add_adapter(model, tmp_path / "few", seed=2, rank=3, target_modules=few),
    ]
    rng = random.Random(3)
    jobs = [
        Job([rng.randrange(3, VOCAB) for _ in range(length)], adapter, tokens=3)
        for length, adapter in ((18, adapters[0]), (3, None), (5, adapters[1]))
    ]
    with caplog.at_level("INFO"):
        engine = make_interpreted(model, max_num_batched_tokens=16)
    assert engine._runner.fused
    assert ("transformers' forward stays" in caplog.text) is not flat
    got = serve(engine, jobs)
    engine.close()
    assert got == expected(model, jobs)


def test_without_the_levers_the_tokens_are_the_same(tmp_path: Path) -> None:
    loaded = load(settings_for(build("qwen3", tmp_path / "model")))
    operators = cuda_operators(loaded, ReferenceKernels(), Levers.of(["none"]))
    assert Runner(loaded, operators, num_blocks=8, block_size=8).fused, "by the proof"


def linears(*out_features: int, bias: tuple[bool, ...] = ()) -> tuple[LoraLinear, ...]:
    torch.manual_seed(0)
    biases = bias or (False,) * len(out_features)
    return tuple(
        LoraLinear(
            nn.Linear(6, out, bias=with_bias), i, ReferenceKernels(), CurrentLora(), is_output_head=False
        )
        for i, (out, with_bias) in enumerate(zip(out_features, biases, strict=True))
    )


@pytest.mark.parametrize("bias", [(False, False, False), (True, True, True), (True, False, True)])
@torch.inference_mode()
def test_joined_linears_share_one_memory(bias: tuple[bool, ...]) -> None:
    parts = linears(5, 1, 3, bias=bias)
    x = torch.randn(4, 6)
    want = [part(x) for part in parts]
    joint, step = _JointLinear(parts), Step(NO_SEQUENCES.attention, None)
    torch.testing.assert_close(joint(x, step), torch.cat(want, dim=1))
    storages = set()
    for part, before in zip(parts, want, strict=True):
        assert torch.equal(part(x), before)
        storages.add(part.weight.untyped_storage().data_ptr())
    assert storages == {joint._weight.untyped_storage().data_ptr()}


def test_a_base_of_another_kind_is_not_joined() -> None:
    class Quantised(nn.Linear):
        pass

    parts = linears(5, 3)
    before = parts[0].weight
    parts[1].base = Quantised(6, 3)
    with pytest.raises(NotFusable, match="Quantised"):
        _JointLinear(parts)
    assert parts[0].weight is before


def test_linears_whose_adapters_lie_apart_are_not_joined() -> None:
    q, k, v = linears(5, 3, 3)
    with pytest.raises(NotFusable, match="neighbours"):
        _JointLinear((q, v, k))


def test_layers_that_compute_something_else_stay_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What no module shows: only the logits tell, when the weights have been joined already."""
    loaded = load(settings_for(build("llama", tmp_path / "model")))
    layer = loaded.model.get_decoder().layers[0]
    assert isinstance(layer, nn.Module)
    layer.mlp.register_forward_hook(lambda module, args, out: 2 * out)
    proof = probe(loaded.model, loaded.vocab_size, loaded.device)[2]  # of the model as it is now
    operators = cuda_operators(loaded, ReferenceKernels())
    plain = layer.mlp.gate_proj.weight.clone()
    with caplog.at_level("INFO"):
        changed = Runner(replace(loaded, proof=proof), operators, num_blocks=8, block_size=8)
    assert not changed.fused
    assert "logits differ" in caplog.text
    assert loaded.model.get_decoder().layers[0] is layer
    assert torch.equal(layer.mlp.gate_proj.weight, plain)


def test_a_mixture_of_experts_is_left_to_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(settings_for(build("gpt_oss", tmp_path / "model")))
    with caplog.at_level("INFO"):
        runner_ = Runner(loaded, cuda_operators(loaded), num_blocks=8, block_size=8)
    assert not runner_.fused
    assert "not those of Llama" in caplog.text

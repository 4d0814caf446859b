"""What fast paths are judged by: the model in float32, and how far its own modules are from that."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from server.devices.cpu.device import CpuDevice
from server.devices.cpu.native import library
from server.model.loader import LoadedModel, load, probe
from server.model.proof import LENGTHS, InFloat32, PagedProbe, Proof, relative_error
from server.model.runner import Runner
from tests.engine.harness import settings_for
from tests.model.tiny_models import ARCHITECTURES, build


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_inside_a_model_computes_as_its_float32_twin(architecture: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        build(architecture, tmp_path / "model"), dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    ids = torch.arange(9)[None] + 20
    want = copy.deepcopy(model).float()(ids, use_cache=False).logits
    with InFloat32():
        got = model(ids, use_cache=False).logits
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 1e-5
    assert relative_error(model(ids, use_cache=False).logits, want) > 1e-4, "the model itself rounds"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_what_is_written_to_stays_itself() -> None:
    kept, other = torch.ones(3).bfloat16(), torch.full((3,), 2.0).bfloat16()
    with InFloat32():
        kept.mul_(other)
        kept[0] = other[0] + 1
        kept += other
        assert (kept + 0).dtype == kept.dtype == torch.float32
    assert kept.dtype == torch.bfloat16
    assert kept.tolist() == [5.0, 4.0, 4.0]


def test_a_fast_path_may_be_off_by_half_more_than_the_modules() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(sum(LENGTHS), 50, generator=generator)

    def off_by(error: float) -> torch.Tensor:
        noise = torch.randn(exact.shape, generator=generator)
        return exact + error * noise * exact.norm() / noise.norm()

    proof = Proof(torch.arange(len(exact)), exact, off_by(0.1).bfloat16())
    rows = torch.arange(len(exact))
    assert proof.objection(off_by(0.14), rows) is None
    assert "off by 0.17, where 0.15 is rounding" in str(proof.objection(off_by(0.17), rows))
    exact_twin = replace(proof, usual=exact.bfloat16())  # modules that hardly round
    assert exact_twin.limit() == pytest.approx(0.01)
    assert replace(proof, usual=exact).limit() == pytest.approx(0.001)
    assert replace(proof, usual=off_by(2.0).bfloat16()).limit() == 0.3
    assert "off by nan" in str(proof.objection(off_by(0.1).fill_(torch.nan), rows))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Random weights as Llama-3.1-8B's, whose matrices amplify what rounding leaves (0.02 * sqrt(4096) = 1.28
    each): fused layers and modules, both right, differ by more than any bound that tells right from wrong.
    """
    width = 256
    sizes = {"hidden_size": width, "intermediate_size": 7 * width // 2, "num_hidden_layers": 32}
    folder = build(
        "llama",
        tmp_path_factory.mktemp("noisy") / "model",
        **sizes,
        head_dim=64,
        initializer_range=1.28 * width**-0.5,
    )
    torch.manual_seed(3)
    loaded = load(settings_for(folder, load_format="dummy", dtype="bfloat16"))
    assert relative_error(loaded.proof.usual, loaded.proof.exact) > 0.02
    return loaded


@pytest.mark.skipif(library() is None, reason="no compiled kernels on this machine")
def test_noise_of_the_model_itself_does_not_keep_it_from_being_fused(noisy: LoadedModel) -> None:
    loaded = replace(noisy, model=copy.deepcopy(noisy.model))
    assert Runner(loaded, CpuDevice().operators(loaded), num_blocks=8, block_size=8).fast_paths == {
        "fused": True,
        "flat": True,
        "graphs": False,
    }


@pytest.mark.skipif(library() is None, reason="no compiled kernels on this machine")
def test_a_layer_that_computes_something_else_shows_through_the_noise(
    noisy: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """One of 32 layers, half more of one MLP, which no module shows."""
    loaded = replace(noisy, model=copy.deepcopy(noisy.model))
    layer = loaded.model.get_decoder().layers[16]
    assert isinstance(layer, nn.Module)
    layer.mlp.register_forward_hook(lambda module, args, out: 1.5 * out)
    proof = probe(loaded.model, loaded.vocab_size, loaded.device)[2]
    assert not Runner(
        replace(loaded, proof=proof), CpuDevice().operators(loaded), num_blocks=8, block_size=8
    ).fused
    assert "their logits differ: off by" in caplog.text


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_paged_probes_fit_the_cache(blocks: int, block_size: int) -> None:
    total = sum(LENGTHS)
    proof = Proof(torch.arange(total) + 100, torch.zeros(total, 1), torch.zeros(total, 1))
    probe_ = PagedProbe(proof, blocks, block_size)
    batch, rows = probe_.prompts()
    assert 0 < len(batch.token_ids) <= total
    assert batch.attention.block_tables.max() < blocks
    assert len(set(batch.attention.slot_mapping.tolist())) == len(batch.token_ids)
    assert torch.equal(batch.token_ids[batch.sample_rows], proof.token_ids[rows])
    steps = list(probe_.prompts_then_tokens())
    assert steps[-1][0].attention.max_query_len == 1
    assert sum(len(step.token_ids) for step, _ in steps) == len(batch.token_ids)
    for step, rows in steps:
        assert torch.equal(step.token_ids[step.sample_rows], proof.token_ids[rows])

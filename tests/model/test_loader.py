"""Models that would be served wrongly are refused at start, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from server.devices import open_device
from server.model.attention.hf import UnsupportedModel
from server.model.loader import load
from tests.engine.harness import settings_for
from tests.model.tiny_models import VOCAB, build


def bare_config(architecture: str, folder: Path, **fields: Any) -> Path:
    """A folder with only a config.json, for dummy weights."""
    folder.mkdir()
    AutoConfig.for_model(architecture, vocab_size=VOCAB, **fields).save_pretrained(folder)
    return folder


def test_dummy_weights_need_only_a_config_and_follow_the_seed(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    folder = bare_config("llama", tmp_path / "m", **sizes, **heads)
    one, same, other = (load(settings_for(folder, load_format="dummy", seed=seed)) for seed in (1, 1, 2))
    weights = [loaded.model.model.layers[0].mlp.up_proj.weight for loaded in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one.parameters == sum(p.numel() for p in one.model.parameters())
    assert {spec.num_kv_heads for spec in one.cache_specs.values()} == {1}


def test_loading_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A bar that redraws itself is noise in a server's log."""
    folder = build("llama", tmp_path / "m")
    capfd.readouterr()
    load(settings_for(folder))
    assert capfd.readouterr().err == ""


def test_linear_attention_is_refused(tmp_path: Path) -> None:
    folder = bare_config(
        "qwen3_next",
        tmp_path / "m",
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    with pytest.raises(UnsupportedModel, match="1 of the model's 4 layers call the attention function"):
        load(settings_for(folder, load_format="dummy"))


def test_encoder_decoder_models_are_refused(tmp_path: Path) -> None:
    folder = bare_config("bart", tmp_path / "m", d_model=16)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        load(settings_for(folder, load_format="dummy"))


def test_batch_dependent_rope_is_allowed_only_within_the_original_length(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build("llama", tmp_path / "m", rope_parameters=rope)
    assert load(settings_for(model)).max_model_len == 256
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["original_max_position_embeddings"] = 64
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="set --max-model-len 64"):
        load(settings_for(model))
    assert load(settings_for(model, max_model_len=64)).max_model_len == 64


def test_a_context_beyond_the_models_own_is_refused(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "m")
    with pytest.raises(UnsupportedModel, match="beyond the model's 256"):
        load(settings_for(model, max_model_len=1000))


def test_a_config_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_architecture"}')
    with pytest.raises(UnsupportedModel, match="config"):
        load(settings_for(tmp_path))


def test_eos_comes_from_the_generation_config(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "m")
    assert load(settings_for(model)).eos_token_ids == (2,)
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load(settings_for(model)).eos_token_ids == (2, 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_cuda_where_there_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        open_device("cuda")

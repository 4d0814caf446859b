from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from load_tests.adapters import DType, projection_shapes, write_adapters, write_safetensors
from load_tests.trace import adapter_names

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return folder


# peft 0.21 reads a property that transformers 5 renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_applies_every_adapter_and_each_differs(base: Path, tmp_path: Path) -> None:
    folders = list(write_adapters(base, tmp_path / "out", adapter_names(4), (4, 8), dtype="float32"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    ids = torch.arange(1, 9)[None]
    outputs = [model(ids).logits]
    linears = {
        name: tuple(module.weight.shape)
        for name, module in model.model.layers[0].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert projection_shapes(CONFIG.to_dict()) == linears
    peft = PeftModel.from_pretrained(model, folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        result = peft.load_adapter(folder, folder.name)
        assert not result.unexpected_keys
        assert not [key for key in result.missing_keys if "lora" in key and folder.name in key]
    with torch.no_grad():
        for folder in folders:
            peft.set_adapter(folder.name)
            outputs.append(peft(ids).logits)
    assert all(torch.isfinite(output).all() for output in outputs)
    for index, one in enumerate(outputs):
        for other in outputs[index + 1 :]:
            assert (one - other).abs().max() > 0.1 * one.std()


def test_ranks_take_turns_and_every_projection_is_there(base: Path, tmp_path: Path) -> None:
    folders = list(write_adapters(base, tmp_path / "out", adapter_names(3), (4, 8)))
    assert [folder.name for folder in folders] == ["adapter-000", "adapter-001", "adapter-002"]
    for folder, rank in zip(folders, (4, 8, 4), strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (rank, rank, "base")
        tensors = load_file(folder / "adapter_model.safetensors")
        assert len(tensors) == 2 * 7 * 2  # layers, projections, A and B
        prefix = "base_model.model.model.layers.1."
        assert tensors[f"{prefix}self_attn.q_proj.lora_A.weight"].shape == (rank, 32)
        assert tensors[f"{prefix}self_attn.q_proj.lora_B.weight"].shape == (64, rank)
        assert tensors[f"{prefix}self_attn.k_proj.lora_B.weight"].shape == (32, rank)
        assert tensors[f"{prefix}mlp.down_proj.lora_A.weight"].shape == (rank, 48)
        assert all(tensor.dtype is torch.bfloat16 and tensor.any() for tensor in tensors.values())


def test_the_seed_alone_decides_the_weights(base: Path, tmp_path: Path) -> None:
    def bytes_of(out: str, seed: int, count: int = 2) -> list[bytes]:
        folders = list(write_adapters(base, tmp_path / out, adapter_names(count), (4,), seed=seed))
        return [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]

    one = bytes_of("a", 1)
    assert bytes_of("b", 1, count=3)[:2] == one
    assert one[0] != one[1]
    assert bytes_of("c", 2)[0] != one[0]


def test_many_small_adapters_all_differ(base: Path, tmp_path: Path) -> None:
    """Or the server's content-addressed store would hold fewer than were asked for."""
    folders = write_adapters(base, tmp_path / "out", adapter_names(500), (1,))
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert len(set(files)) == 500
    assert len({len(file) for file in files}) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_hold_what_torch_would_write(dtype: DType, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((37, 11), np.float32)
    values[0, :6] = (0.0, -0.0, 1.00390625, 1.01171875, 65504.0, 1e-3)  # ties go to even in bfloat16
    tensors = {"first": values[:2], "second": values.T}
    write_safetensors(tmp_path / "x.safetensors", tensors, dtype)
    loaded = load_file(tmp_path / "x.safetensors")
    assert list(loaded) == ["first", "second"]
    for name, array in tensors.items():
        assert torch.equal(loaded[name], torch.from_numpy(array.copy()).to(getattr(torch, dtype)))


def test_a_config_that_is_not_llama_like_is_refused() -> None:
    with pytest.raises(ValueError, match="intermediate_size"):
        projection_shapes({"hidden_size": 8, "num_attention_heads": 2})


def test_nothing_here_imports_torch() -> None:
    code = (
        "import load_tests.__main__, load_tests.report, load_tests.runner; "
        "import load_tests.scaling, load_tests.face, sys; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

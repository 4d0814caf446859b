"""Finding a base model, and telling two of them apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from server.base_model import BaseModel, StartError
from server.config import Settings


def folder(root: Path, **config: object) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    save_file({"w": np.zeros(4, np.float32)}, root / "model.safetensors")
    return root


def resolve(path: Path, **fields: object) -> BaseModel:
    return BaseModel.resolve(Settings(model=str(path), **fields))  # type: ignore[arg-type]  # fields of any type


def test_name_and_folder(tmp_path: Path) -> None:
    model = resolve(folder(tmp_path / "tiny"))
    assert (model.name, model.folder) == ("tiny", tmp_path / "tiny")
    assert resolve(tmp_path / "tiny", served_model_name="base").name == "base"


def test_fingerprint(tmp_path: Path) -> None:
    first = resolve(folder(tmp_path / "a")).fingerprint
    assert resolve(folder(tmp_path / "b")).fingerprint == first
    save_file({"w": np.zeros(5, np.float32)}, tmp_path / "b" / "model.safetensors")
    assert resolve(tmp_path / "b").fingerprint != first
    assert resolve(folder(tmp_path / "c", x=1)).fingerprint != first
    save_file({"w": np.array([0, 0, 0, 1], np.float32)}, tmp_path / "b" / "model.safetensors")
    assert resolve(tmp_path / "b").fingerprint != first  # the same shapes, other weights
    dummies = {resolve(tmp_path / "a", load_format="dummy", seed=seed).fingerprint for seed in (0, 0, 1)}
    assert len(dummies | {first}) == 3


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "not valid JSON"),
        (lambda path: (path / "config.json").write_text("[]"), "not a JSON object"),
        (lambda path: (path / "model.safetensors").unlink(), "no .safetensors"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, spoil: object, reason: str) -> None:
    path = folder(tmp_path / "m")
    spoil(path)  # type: ignore[operator]  # a lambda of the table above
    with pytest.raises(StartError, match=reason):
        resolve(path)


def test_no_such_folders(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no such folder"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(StartError, match="--tokenizer"):
        resolve(folder(tmp_path / "m"), tokenizer=str(tmp_path / "nowhere"))


def test_one_tensor_of_many_tells_two_models_apart(tmp_path: Path) -> None:
    tensors = {f"w{i}": np.full((64, 64), 0.5, np.float32) for i in range(20)}
    path = folder(tmp_path / "a") / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    first = resolve(tmp_path / "a").fingerprint
    tensors["w7"] = tensors["w7"] + np.float32(1e-3)
    save_file(tensors, path, metadata={"format": "pt"})
    assert resolve(tmp_path / "a").fingerprint != first

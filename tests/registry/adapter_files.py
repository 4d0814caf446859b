"""Small random adapters in PEFT layout, for a base model of four Linears."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from server.config import Settings
from server.messages import LoraTarget
from server.registry.data_folder import DataFolder
from server.registry.registry import Registry

TARGETS = [
    LoraTarget(f"model.layers.{layer}.self_attn.{name}", 16, 8)
    for layer in range(2)
    for name in ("q_proj", "v_proj")
]
BASE_NAME = "base-model"
BASE_PARAMETERS = 10_000


def settings(**fields: object) -> Settings:
    return Settings(**{"model": BASE_NAME} | fields)  # type: ignore[arg-type]  # fields of any type


def open_registry(
    data_dir: Path | DataFolder,
    *,
    targets: list[LoraTarget] = TARGETS,
    max_rank: int | None = None,
    options: Settings | None = None,
    base_name: str = BASE_NAME,
) -> Registry:
    """The registry of a server of that base model."""
    limits = dataclasses.replace((options or settings()).limits, max_rank=max_rank)
    folder = data_dir if isinstance(data_dir, DataFolder) else DataFolder(data_dir)
    return Registry.open(folder, targets, BASE_PARAMETERS, limits, base_name)


def config(rank: int = 4, **fields: object) -> bytes:
    default = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": BASE_NAME,
    }
    return json.dumps(default | fields).encode()


def weights(rank: int = 4, seed: int = 0, spoil: float | None = None) -> bytes:
    random = np.random.default_rng(seed)
    tensors = {}
    for target in TARGETS:
        name = f"base_model.model.{target.name}"
        tensors[f"{name}.lora_A.weight"] = random.normal(size=(rank, 16)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = random.normal(size=(8, rank)).astype(np.float32)
    if spoil is not None:
        tensors[f"base_model.model.{TARGETS[0].name}.lora_B.weight"][3, 1] = spoil
    return save(tensors)


def files(rank: int = 4, seed: int = 0) -> dict[str, bytes]:
    return {"adapter_config.json": config(rank), "adapter_model.safetensors": weights(rank, seed)}


def write(folder: Path, content: dict[str, bytes] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (content or files()).items():
        (folder / name).write_bytes(data)
    return folder


def on_disk(data_dir: Path) -> set[str]:
    """Digests of the content that lies in a data folder; nothing else may lie beside it."""
    digests = set()
    for folder in (data_dir / "adapters").glob("*/*"):
        assert sorted(file.name for file in folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        digests.add(folder.name)
    return digests


def staged(data_dir: Path) -> list[str]:
    return [path.name for path in (data_dir / "staging").iterdir()]

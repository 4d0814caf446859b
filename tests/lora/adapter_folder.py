"""Writes small PEFT adapter folders, well-formed or not, byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from server.config import Limits
from server.messages import LoraTarget

TARGETS = tuple(
    LoraTarget(f"model.layers.{layer}.{name}", in_features, out_features)
    for layer in range(2)
    for name, in_features, out_features in (
        ("self_attn.q_proj", 12, 20),
        ("self_attn.v_proj", 12, 6),
        ("mlp.down_proj", 33, 12),
    )
)
LIMITS = Limits(
    max_upload_bytes=1 << 20, max_unpacked_bytes=1 << 20, max_header_bytes=1 << 20, max_tensors=100
)
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}


def config(**fields: object) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    } | fields


def weights(
    targets: Sequence[LoraTarget] = TARGETS, rank: int = 4, seed: int = 0, bias: bool = False
) -> dict[str, np.ndarray]:
    """A and B of every target, and with `bias` one of each B, float32."""
    random = np.random.default_rng(seed)
    tensors = {}
    for target in targets:
        prefix = f"base_model.model.{target.name}"
        tensors[f"{prefix}.lora_A.weight"] = random.standard_normal((rank, target.in_features), np.float32)
        tensors[f"{prefix}.lora_B.weight"] = random.standard_normal((target.out_features, rank), np.float32)
        if bias:
            tensors[f"{prefix}.lora_B.bias"] = random.standard_normal(target.out_features, np.float32)
    return tensors


def encode(tensor: np.ndarray, dtype: str) -> bytes:
    """float32 -> the bytes of a safetensors dtype (bfloat16 by truncation)."""
    if dtype == "BF16":
        return (tensor.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return tensor.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()


def safetensors(tensors: Mapping[str, np.ndarray], dtype: str | Mapping[str, str] = "F32") -> bytes:
    """A safetensors file; `dtype` for all or by name."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        kind = dtype if isinstance(dtype, str) else dtype.get(name, "F32")
        raw = encode(tensor, kind)
        header[name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return file_of(json.dumps(header).encode(), data)


def file_of(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def write(
    folder: Path,
    tensors: Mapping[str, np.ndarray] | None = None,
    fields: Mapping[str, object] | None = None,
    dtype: str | Mapping[str, str] = "F32",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config(**(fields or {}))))
    (folder / "adapter_model.safetensors").write_bytes(
        safetensors(weights() if tensors is None else tensors, dtype)
    )
    return folder

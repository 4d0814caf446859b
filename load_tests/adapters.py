"""Random LoRA adapters in the PEFT layout, for a base model of which only config.json is read.

numpy alone writes them, so making a thousand needs neither torch nor the base model's weights. B is not zero
(as it is in a freshly made PEFT adapter), so every adapter changes the model's output in its own way.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

DType = Literal["float32", "bfloat16", "float16"]
_SAFETENSORS_NAMES: dict[DType, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projection_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) of each of a llama-like layer's seven projections, by module path inside the layer.

    Raises ValueError when config.json lacks a size.
    """
    try:
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        heads = int(config["num_attention_heads"])
    except KeyError as error:
        raise ValueError(f"config.json has no {error.args[0]}; only llama-like models are known") from None
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    return {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def write_adapters(
    model: Path,
    out: Path,
    names: Sequence[str],
    ranks: Sequence[int],
    *,
    dtype: DType = "bfloat16",
    strength: float = 0.5,
    seed: int = 0,
) -> Iterator[Path]:
    """Write one adapter folder for each name, yielding each when it is done; ranks take turns.

    `strength` is the size of an adapter's delta, relative to the module's input (both as root mean square).
    An adapter depends on the seed and its place in `names` alone.
    """
    config = json.loads((model / "config.json").read_text())
    layers = int(config["num_hidden_layers"])
    shapes = projection_shapes(config)

    @cache
    def of_rank(rank: int) -> tuple[bytes, _Layer, str]:
        layer = _Layer.of(shapes, rank, strength)
        header = _header(layer.names(layers), dtype)
        return header, layer, json.dumps(_peft_config(model.name, rank), indent=2) + "\n"

    for index, name in enumerate(names):
        header, layer, peft_config = of_rank(ranks[index % len(ranks)])
        rng = np.random.default_rng([seed, index])
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "adapter_model.safetensors").open("wb") as file:
            file.write(header)
            for _ in range(layers):
                file.write(_little_endian(layer.draw(rng), dtype))
        (folder / "adapter_config.json").write_text(peft_config)
        yield folder


@dataclass(frozen=True)
class _Layer:
    """The LoRA tensors of one layer, drawn all at once: ten thousand small adapters are a matter of seconds.

    A [rank, in] and B [out, rank] are scaled so that B A x has `strength` times the root mean square of x.
    """

    shapes: dict[str, tuple[int, int]]  # of each tensor, by its path inside the layer
    scale: NDArray[np.float32]  # of each value, in the order of the tensors

    @classmethod
    def of(cls, projections: Mapping[str, tuple[int, int]], rank: int, strength: float) -> _Layer:
        tensors: dict[str, tuple[int, int]] = {}
        scales: list[float] = []
        for module, (outputs, inputs) in projections.items():
            tensors[f"{module}.lora_A.weight"] = (rank, inputs)
            tensors[f"{module}.lora_B.weight"] = (outputs, rank)
            scales += (inputs**-0.5, strength * rank**-0.5)
        sizes = [rows * columns for rows, columns in tensors.values()]
        return cls(tensors, np.repeat(np.array(scales, np.float32), sizes))

    def names(self, layers: int) -> dict[str, tuple[int, int]]:
        """The shapes of the tensors of all layers, by full name."""
        return {
            f"base_model.model.model.layers.{layer}.{path}": shape
            for layer in range(layers)
            for path, shape in self.shapes.items()
        }

    def draw(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """The values of one layer's tensors, one after another."""
        return rng.standard_normal(self.scale.size, np.float32) * self.scale


def _peft_config(base_model: str, rank: int) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": rank,  # scaling alpha / r = 1
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(PROJECTIONS),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.float32]], dtype: DType) -> None:
    """Write float32 arrays as `dtype` (safetensors' own numpy writer has no bfloat16)."""
    with path.open("wb") as file:
        file.write(_header({name: values.shape for name, values in tensors.items()}, dtype))
        for values in tensors.values():
            file.write(_little_endian(values, dtype))


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: DType) -> bytes:
    """What comes before the data: an 8-byte little-endian length, then JSON padded to 8 bytes.

    https://github.com/huggingface/safetensors#format
    """
    width = byte_width(dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * width
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def byte_width(dtype: DType) -> int:
    """Bytes of one value."""
    return 4 if dtype == "float32" else 2


def _little_endian(values: NDArray[np.float32], dtype: DType) -> bytes:
    if dtype == "float32":
        return values.astype("<f4").tobytes()
    if dtype == "float16":
        return values.astype("<f2").tobytes()
    # bfloat16 is the upper half of a float32; add what rounds the lower half to nearest, ties to even
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))
    return (rounded >> 16).astype("<u2").tobytes()

"""The least time that a batch can take: what it must read and multiply, at this machine's rates.

A decode step must read the weights, each distinct adapter in use and the live KV entries once
(`load_tests.gpu` counts in the same way), and multiply the weights and the adapters' with every token; a
prompt must be multiplied only. Activations, attention's arithmetic and what is written are left out, so no
batch can be faster than this, unless what it reads stays in the processor's caches from step to step: it says
nothing of a small model.
"""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from load_tests.adapters import projection_shapes


class Machine(msgspec.Struct, frozen=True):
    """What this machine's cores do together at best."""

    read_rate: float  # bytes/s from memory
    multiply_rate: float  # floating-point operations/s in products of matrices of the served type

    def step_s(self, read: StepBytes, multiplications: float) -> float:
        """The floor of a decode step's time: reading and multiplying may overlap."""
        return max(read.total / self.read_rate, self.multiply_s(multiplications))

    def multiply_s(self, multiplications: float) -> float:
        return 2 * multiplications / self.multiply_rate


class StepBytes(msgspec.Struct, frozen=True):
    """What one decode step of a batch reads, in bytes."""

    weights: int
    adapters: int  # of all distinct ones together
    kv: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.kv


def measure(dtype: str) -> Machine:
    """Both rates, of this process's cores. Needs torch."""
    return Machine(read_rate(), multiply_rate(dtype))


def read_rate(mebibytes: int = 1024, rounds: int = 9) -> float:
    """Bytes/s that this process's cores together read from memory.

    The best of `rounds`, so that the floor is a true one even when something else ran beside it.

    One thread for each core takes the largest of its part of an array far larger than any cache. numpy lets
    go of the interpreter lock meanwhile, and its kernel keeps up with memory: torch's sum with as many
    threads reads at the same rate.
    """
    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(mebibytes * 2**17, np.int64), threads)
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            began = time.perf_counter()
            list(pool.map(np.maximum.reduce, parts))
            best = min(best, time.perf_counter() - began)
    return sum(part.nbytes for part in parts) / best


def multiply_rate(dtype: str = "bfloat16", rounds: int = 20) -> float:
    """Floating-point operations/s in [512, 2048] times [2048, 2048]: the best of torch and our kernel."""
    import torch  # the other commands of load_tests do without it

    from server.devices.cpu.linear import packed

    linear = torch.nn.Linear(2048, 2048, bias=False, dtype=getattr(torch, dtype)).requires_grad_(False)
    x = torch.randn(512, 2048).to(linear.weight.dtype)
    best = math.inf
    for layer in (linear, packed(linear)):
        for _ in range(rounds):
            began = time.perf_counter()
            layer(x)
            best = min(best, time.perf_counter() - began)
    return 2 * 512 * 2048 * 2048 / best


def head_values(config: Mapping[str, Any]) -> int:
    """How many weights the output head has: a prompt's last token alone is multiplied with them."""
    return int(config["vocab_size"]) * int(config["hidden_size"])


def weight_values(model: Path) -> int:
    """How many weights of the model in folder `model` a decode step reads, by its safetensors' headers.

    An embedding with an output head beside it is left out: a step looks up a row of it for each sequence.
    Tied to the head it is read as a whole. Raises ValueError when the folder has no safetensors.
    """
    sizes: dict[str, int] = {}
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        sizes |= {name: math.prod(tensor["shape"]) for name, tensor in header.items()}
    if not sizes:
        raise ValueError(f"{model} has no .safetensors file")
    if any(name.endswith("lm_head.weight") for name in sizes):
        sizes = {name: size for name, size in sizes.items() if not name.endswith("embed_tokens.weight")}
    return sum(sizes.values())


def adapter_values(config: Mapping[str, Any], rank: int) -> int:
    """How many values an adapter of `rank` on all seven projections has, all read in each step."""
    widths = sum(sum(shape) for shape in projection_shapes(config).values())
    return rank * widths * int(config["num_hidden_layers"])


def kv_values(config: Mapping[str, Any]) -> int:
    """How many values of K and V the cache holds for one token."""
    kv_width, _ = projection_shapes(config)["self_attn.k_proj"]
    return 2 * kv_width * int(config["num_hidden_layers"])

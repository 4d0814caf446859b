"""The least time that a decode step can take: the bytes it must read, at the rate at which memory gives them.

A step must read the weights, each distinct adapter in use and the live KV entries once; `load_tests.gpu`
counts in the same way. Activations and what is written are left out, so no step can be faster than this,
unless what it reads stays in the processor's caches from step to step: it says nothing of a small model.
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


class StepBytes(msgspec.Struct, frozen=True):
    """What one decode step of a batch reads, in bytes."""

    weights: int
    adapters: int  # of all distinct ones together
    kv: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.kv

    def seconds(self, rate: float) -> float:
        """The floor of the step's time at `rate` bytes/s."""
        return self.total / rate


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

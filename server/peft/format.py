"""Reads and judges a PEFT LoRA adapter: its config and its safetensors header, never a pickle, no torch.

Format: PEFT's `adapter_config.json` (every field of `peft.LoraConfig`, 0.21) and safetensors
(https://github.com/huggingface/safetensors#format). What is not supported is refused by the name of the
field or tensor, never ignored in silence. No message holds a path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from server.config import Limits
from server.errors import TooLarge, UnsupportedMedia
from server.messages import LoraTarget
from server.peft.header import DTYPES, TensorSpan, read_header
from server.peft.patterns import bad
from server.peft.rules import Rules, check_fields, parse_config

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PREFIX = "base_model.model."
_A, _B, _BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"  # the tensors of a module
_CHUNK_BYTES = 1 << 18  # stays in the second-level cache


@dataclass(frozen=True)
class LoraModule:
    """The delta of one Linear: `scaling * (B A x + bias)`."""

    target: int  # index into the targets that the adapter was judged against
    name: str
    rank: int
    scaling: float
    a: TensorSpan  # [rank, in_features]
    b: TensorSpan  # [out_features, rank]
    bias: TensorSpan | None = None  # [out_features]

    @property
    def spans(self) -> tuple[TensorSpan, ...]:
        """Of all that there are."""
        return (self.a, self.b) if self.bias is None else (self.a, self.b, self.bias)


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter that fits the base model."""

    modules: tuple[LoraModule, ...]  # in the order of the targets
    rank: int  # the largest
    alpha: float  # lora_alpha of the config; alpha_pattern may say otherwise for some modules
    target_modules: tuple[str, ...]  # last parts of the modules' names, sorted
    parameters: int
    weight_bytes: int  # of the tensors as they lie in the file


def is_pickle(name: str) -> bool:
    """Whether a file's name says that it is a pickle."""
    return name.lower().endswith(PICKLES)


def holds_pickle(folder: Path) -> bool:
    """Whether a file in `folder`, if that is there, is a pickle by its name."""
    return folder.is_dir() and any(is_pickle(entry.name) for entry in folder.iterdir())


def pickle_refused(param: str) -> UnsupportedMedia:
    return UnsupportedMedia(f"Pickles are never read; send {WEIGHTS_NAME}.", param=param)


def judge(folder: Path, targets: Sequence[LoraTarget], limits: Limits) -> LoraAdapter:
    """Read `folder`'s config and tensor header, and check both against the base model's Linears.

    No weight is read (see `check_finite`). Raises InvalidAdapter with the field or tensor at fault in
    `param`, TooLarge for an oversized config, UnsupportedMedia when there are only pickles.
    """
    if not (folder / WEIGHTS_NAME).is_file() and holds_pickle(folder):
        raise pickle_refused(WEIGHTS_NAME)
    config = _read_config(folder)
    check_fields(config)
    tensors = read_header(folder / WEIGHTS_NAME, limits)
    rules = Rules(config)
    modules = _match(tensors, targets, rules)
    widest = max(modules, key=lambda module: module.rank)
    if limits.max_rank is not None and widest.rank > limits.max_rank:
        raise bad(widest.a.name, f"has rank {widest.rank}, the limit of this server is {limits.max_rank}")
    spans = [span for module in modules for span in module.spans]
    return LoraAdapter(
        modules=modules,
        rank=widest.rank,
        alpha=rules.alpha,
        target_modules=tuple(sorted({module.name.rpartition(".")[2] for module in modules})),
        parameters=sum(math.prod(span.shape) for span in spans),
        weight_bytes=sum(span.nbytes for span in spans),
    )


def check_finite(folder: Path, adapter: LoraAdapter) -> None:
    """Read every weight once. Raises InvalidAdapter that names the first tensor with a NaN or Inf."""
    masks = {name: (np.dtype(f"<u{width}"), mask) for name, width, mask in DTYPES.values()}
    raw = bytearray(_CHUNK_BYTES)
    scratch = np.empty(_CHUNK_BYTES, np.uint8)
    spans = [span for module in adapter.modules for span in module.spans]
    with (folder / WEIGHTS_NAME).open("rb", buffering=0) as file:
        for span in sorted(spans, key=lambda span: span.offset):
            dtype, mask = masks[span.dtype]
            file.seek(span.offset)
            for start in range(0, span.nbytes, _CHUNK_BYTES):
                nbytes = min(_CHUNK_BYTES, span.nbytes - start)
                _read_exactly(file, memoryview(raw)[:nbytes])
                exponents = scratch[:nbytes].view(dtype)
                np.bitwise_and(np.frombuffer(raw, dtype, nbytes // dtype.itemsize), mask, out=exponents)
                if exponents.max() == mask:
                    raise bad(span.name, "holds a NaN or Inf; every weight must be finite")


def _read_exactly(file: BinaryIO, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]  # typeshed: raw files have it
        if not count:
            raise bad(WEIGHTS_NAME, "ends before the last of its tensors")
        done += count


def _read_config(folder: Path) -> dict[str, object]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise bad(CONFIG_NAME, "is missing")
    with path.open("rb") as file:
        raw = file.read(MAX_CONFIG_BYTES + 1)
    if len(raw) > MAX_CONFIG_BYTES:
        raise TooLarge(f"{CONFIG_NAME} is larger than {MAX_CONFIG_BYTES} bytes", param=CONFIG_NAME)
    return parse_config(raw)


def _split(name: str) -> tuple[str, str]:
    """`base_model.model.<module>.lora_A.weight` -> (module, "lora_A.weight")."""
    stem, _, kind = name.rpartition(".")
    module, _, matrix = stem.removesuffix(".default").rpartition(".")
    part = f"{matrix}.{kind}"
    if name.startswith(_PREFIX) and part in (_A, _B, _BIAS):
        return module.removeprefix(_PREFIX), part
    for mark, what in (
        ("lora_magnitude_vector", "belongs to DoRA, which is not supported"),
        ("lora_embedding_", "belongs to an embedding; only Linear layers can have an adapter"),
    ):
        if mark in name:
            raise bad(name, what)
    if name.startswith(_PREFIX) and name.endswith((".weight", ".bias")) and ".lora_" not in name:
        raise bad(
            name,
            "is a weight of the base model, which all adapters share here. PEFT adds a copy when embeddings "
            "or lm_head are targets or were resized; if they were not trained themselves, leave it out with "
            "save_pretrained(..., save_embedding_layers=False)",
        )
    raise bad(name, f"is unexpected; tensors are named {_PREFIX}<module>.lora_A.weight or .lora_B.weight")


def _match(
    tensors: Mapping[str, TensorSpan], targets: Sequence[LoraTarget], rules: Rules
) -> tuple[LoraModule, ...]:
    parts: dict[str, dict[str, TensorSpan]] = {}
    for name, span in tensors.items():
        module, part = _split(name)
        if part in parts.setdefault(module, {}):
            raise bad(name, "is there twice, with and without `default`")
        parts[module][part] = span
    columns = {target.name: column for column, target in enumerate(targets)}
    modules = []
    wanted = {_A, _B, _BIAS} if rules.lora_bias else {_A, _B}
    for name, found in parts.items():
        span = next(iter(found.values()))
        if name not in columns:
            raise bad(span.name, "changes a module that is not a Linear layer of the base model")
        if _BIAS in found.keys() - wanted:
            raise bad(found[_BIAS].name, "is a bias, and the config does not say lora_bias")
        if missing := sorted(wanted - found.keys()):
            raise bad(span.name, f"has no partner {missing[0]}")
        if not rules.targets(name):
            raise bad(span.name, "changes a module that target_modules and exclude_modules leave out")
        target = targets[columns[name]]
        rank, scaling = rules.rank_and_scaling(name)
        inputs, outputs = target.in_features, target.out_features
        _check_shape(found[_A], [rank, inputs], f"[rank {rank}, {inputs} inputs]")
        _check_shape(found[_B], [outputs, rank], f"[{outputs} outputs, rank {rank}]")
        if rules.lora_bias:
            _check_shape(found[_BIAS], [outputs], f"[{outputs} outputs]")
        spans = found[_A], found[_B], found.get(_BIAS)
        modules.append(LoraModule(columns[name], name, rank, scaling, *spans))
    return tuple(sorted(modules, key=lambda module: module.target))


def _check_shape(span: TensorSpan, expected: list[int], meaning: str) -> None:
    if list(span.shape) != expected:
        raise bad(span.name, f"has shape {list(span.shape)}, expected {expected}: {meaning}")

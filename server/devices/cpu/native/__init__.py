"""Loads the compiled CPU kernels, if this machine has them.

The libraries are built by setup.py at install. They use OpenMP without linking a runtime of their own:
torch's is made visible to them first, so that both share one pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import ClassVar

import torch

_AVX512_BF16 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}
_VARIANTS = {  # best first: library, and the processor flags it needs
    "_amx": _AVX512_BF16 | {"amx_tile", "amx_bf16"},
    "_avx512bf16": _AVX512_BF16,
    "_avx2": {"avx2", "fma", "bmi2", "f16c"},
}

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}  # of the functions' names, by what they compute in

log = logging.getLogger(__name__)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _open_torch_openmp() -> None:
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def libraries() -> Iterator[ctypes.CDLL]:
    """Opens the compiled kernels that this processor can run, best first."""
    flags = _cpu_flags()
    names = [name for name, needs in _VARIANTS.items() if needs <= flags] + ["_generic"]
    folder = Path(__file__).parent
    for path in (folder / f"{name}{suffix}" for name in names for suffix in EXTENSION_SUFFIXES):
        if not path.exists():
            continue
        try:
            _open_torch_openmp()
            lib = ctypes.CDLL(str(path))
        except OSError as error:
            log.warning("compiled CPU kernels %s could not be loaded: %s", path.name, error)
            continue
        if lib.chorus_permitted():
            yield lib
        else:
            log.warning("the system refuses what the compiled CPU kernels %s need", path.name)


def constant(lib: ctypes.CDLL, name: str) -> int:
    """A number that the compiled code was built with and its callers count on."""
    return ctypes.c_int64.in_dll(lib, f"chorus_{name}").value


class Mirror(ctypes.Structure):
    """A struct of the compiled code, field by field in order; `c_name` is its name there."""

    c_name: ClassVar[str]


def compare(lib: ctypes.CDLL, *mirrors: type[Mirror]) -> None:
    """Raises RuntimeError where a struct of the library is another than its mirror: it would be misread."""
    for mirror in mirrors:
        here = [ctypes.sizeof(mirror), *(getattr(mirror, name).offset for name, *_ in mirror._fields_)]
        found = (ctypes.c_int64 * (2 * len(here)))()
        count = lib[f"chorus_layout_{mirror.c_name}"](found, ctypes.c_int64(len(found)))
        if here != found[: min(count, len(found))]:
            raise RuntimeError(
                f"the compiled CPU kernels have another {mirror.c_name} than this code: run `make setup`"
            )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The best compiled kernels for this processor, or None: then torch paths are used."""
    best = next(libraries(), None)
    if best is None:
        log.warning("no compiled CPU kernels for this machine; using the slower torch paths")
    return best

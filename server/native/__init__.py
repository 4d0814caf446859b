"""Loads the compiled CPU kernels, if this machine has them.

The libraries are built by setup.py at install. They use OpenMP without linking a runtime of their own:
torch's is made visible to them first, so that both share one pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_VARIANTS = {  # best first: library, and the processor flags it needs
    "_avx512bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
    "_avx2": {"avx2", "fma", "bmi2", "f16c"},
}

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


@functools.cache
def library() -> ctypes.CDLL | None:
    """The best compiled kernels for this processor, or None: then torch paths are used."""
    flags = _cpu_flags()
    names = [name for name, needs in _VARIANTS.items() if needs <= flags] + ["_generic"]
    folder = Path(__file__).parent
    for path in (folder / f"{name}{suffix}" for name in names for suffix in EXTENSION_SUFFIXES):
        if not path.exists():
            continue
        try:
            _open_torch_openmp()
            return ctypes.CDLL(str(path))
        except OSError as error:
            log.warning("compiled CPU kernels %s could not be loaded: %s", path.name, error)
    log.warning("no compiled CPU kernels for this machine; using the slower torch paths")
    return None

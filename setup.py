"""Builds the optional CPU kernels; everything else is in pyproject.toml.

One source, one library for each instruction set; `server.devices.cpu.native` loads the best
one the machine can run.
They are plain C++ with a C interface (no Python or torch headers), so they build in seconds. Each is
optional: without a compiler, Chorus installs all the same and uses its torch paths.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup

COMMON = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
COMMON += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC 12 warns about its own AVX-512 headers
UNITS = ("attention", "decoder", "linear", "lora", "sampling")
VARIANTS = {"_generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    AVX512 = ["-march=x86-64-v4", "-mavx512bf16"]
    VARIANTS |= {
        "_avx2": ["-march=x86-64-v3"],
        "_avx512bf16": AVX512,
        "_amx": [*AVX512, "-mamx-tile", "-mamx-bf16"],
    }

setup(
    ext_modules=[
        Extension(
            f"server.devices.cpu.native.{name}",
            sources=[f"server/devices/cpu/native/{unit}.cpp" for unit in UNITS],
            depends=[str(header) for header in Path("server/devices/cpu/native").glob("*.h")],
            extra_compile_args=COMMON + flags,
            optional=True,
        )
        for name, flags in VARIANTS.items()
    ]
)

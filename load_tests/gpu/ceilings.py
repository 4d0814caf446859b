"""The machine, the versions, and the three rates that everything else is held against.

- Copy: within the device's memory, bytes read and written counted alike. Most of a decode step is reading.
- Product: 8192 x 8192 x 8192 in bfloat16 on random data (zeros run faster). Most of a prefill is this.
- Page-locked copy: from the host to the device. An adapter's way into the arena.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
from functools import partial
from importlib import metadata

import torch

from load_tests.gpu.context import Context
from load_tests.gpu.figures import Figure
from load_tests.gpu.timing import clocked, copy_rate, device, median_seconds

PACKAGES = ("torch", "triton", "transformers", "peft")


def card() -> str:
    """As nvidia-smi lists it; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return (listed.stdout or listed.stderr).strip()


def versions() -> dict[str, str]:
    """Of Python, CUDA and the packages that set the times."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def product_rate(size: int) -> float:
    """Floating-point operations/s of a square product in bfloat16, four in a row."""
    a, b = (torch.randn(size, size, device=device()).bfloat16() for _ in "ab")
    out = torch.empty_like(a)

    def work() -> None:
        for _ in range(4):  # long enough for the card to leave its idle clock
            torch.mm(a, b, out=out)

    return 4 * 2 * size**3 / median_seconds(work)


def upload_rate(nbytes: int) -> float:
    """Bytes/s from host memory, page-locked on CUDA, to the device; median of nine."""
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=device() == "cuda")
    target = torch.zeros_like(source, device=device())
    copy = partial(target.copy_, source, non_blocking=True)
    return nbytes / statistics.median(clocked(copy) for _ in range(9))


def measure(context: Context) -> None:
    results, work = context.results, context.workload
    found = versions()
    results.add(card=card(), versions=found)
    results.say(card() or "no card")
    results.say(", ".join(f"{name} {version}" for name, version in found.items()))
    for name, unit, rate in (
        ("copy on the device", "TB/s", partial(copy_rate, work.copy_bytes)),
        (f"product of {work.product_size}, bf16", "TFLOP/s", partial(product_rate, work.product_size)),
    ):
        results.add(figures=[Figure(f"{name}: {unit}", (rate() / 1e12,))])
    results.add(figures=[Figure("page-locked copy: GB/s", (upload_rate(work.copy_bytes // 8) / 1e9,))])

"""The kinds of device: which one a name stands for."""

from __future__ import annotations

from collections.abc import Collection

import torch

from server.model.device import Device


def read_device(name: str) -> None:
    """Import what `open_device` will, as far as that is known without asking for CUDA."""
    if name in ("auto", "cpu"):
        import server.devices.cpu.device  # noqa: F401  # for its side: the next import finds it there


def open_device(name: str, cuda_levers: Collection[str] = ()) -> Device:
    """`auto`, `cpu` or `cuda`. Raises ValueError where there is no such device or lever."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        from server.devices.cpu.device import CpuDevice

        return CpuDevice()
    if not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but torch finds no CUDA device")
    from server.devices.cuda.device import CudaDevice  # a CPU install need not wait for Triton
    from server.devices.cuda.levers import USUAL, Levers

    return CudaDevice(torch.device(name), Levers.of(cuda_levers) if cuda_levers else USUAL)

"""Which attention backend a name stands for. Each device has a table of those that compute there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

import torch

from server.model.attention.interface import AttentionBackend, LayerCacheSpec

log = logging.getLogger(__name__)

# Layers' shapes and the model's type -> a backend for them; None where this machine has none.
NewBackend = Callable[[Collection[LayerCacheSpec], torch.dtype], AttentionBackend | None]


def open_attention(
    name: str,
    backends: Mapping[str, NewBackend],
    specs: Collection[LayerCacheSpec],
    dtype: torch.dtype,
) -> AttentionBackend:
    """The backend called `name`; `auto` is the first of the table that there is.

    Raises ValueError, with the names there are, where that is none.
    """
    for each, new_backend in backends.items():
        if name in ("auto", each) and (backend := new_backend(specs, dtype)) is not None:
            log.info("attention: %s", each)
            return backend
    if name in backends:
        raise ValueError(f"attention {name} was asked for, but it cannot run here with {dtype}")
    raise ValueError(f"attention {name} was asked for; this device has auto, {', '.join(backends)}")

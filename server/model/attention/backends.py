"""Which attention backend a name stands for. Each device has a table of those that compute there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from server.model.attention.interface import AttentionBackend, AttentionOptions, LayerCacheSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layers:
    """What a model's layers ask of their attention."""

    specs: Collection[LayerCacheSpec]
    options: Collection[AttentionOptions]
    dtype: torch.dtype


# A backend for a model's layers; None where this machine has none, or none for such layers.
NewBackend = Callable[[Layers], AttentionBackend | None]


def open_attention(name: str, backends: Mapping[str, NewBackend], layers: Layers) -> AttentionBackend:
    """The backend called `name`; `auto` is the first of the table that there is.

    Raises ValueError, with the names there are, where that is none.
    """
    for each, new_backend in backends.items():
        if name in ("auto", each) and (backend := new_backend(layers)) is not None:
            log.info("attention: %s", each)
            return backend
    if name in backends:
        raise ValueError(
            f"attention {name} was asked for, but it cannot run here, or not this model in {layers.dtype}"
        )
    raise ValueError(f"attention {name} was asked for; this device has auto, {', '.join(backends)}")

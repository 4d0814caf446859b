"""What all layers of one forward share."""

from __future__ import annotations

from dataclasses import dataclass

from server.lora.linear import LoraStep
from server.model.attention.interface import AttentionPlan


@dataclass(frozen=True, eq=False)
class Step:
    """One step, on the device."""

    attention: AttentionPlan  # prepared by the backend
    lora: LoraStep | None  # None: base model only

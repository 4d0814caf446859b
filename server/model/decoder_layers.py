"""The seam between a model and the fused code that runs its decoder layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from server.model.attention.hf import PagedStep
from server.model.layer_reader import Norm
from server.model.step import Step

Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [rows, rotary_dim], in the model's dtype


class DecoderLayers(ABC):
    """All decoder layers of one model over its KV cache.

    Used in one of two ways. `slots` stand where transformers' layers stood: what is around the layers stays
    transformers' own, and each layer gets the step's rotary tables (Gemma 2 and 3, Granite). Or `sample`
    takes the tables of all positions (`keep_positions`) and the final norm too (flat_model.py).

    `rotated`: for each layer, whether it rotates at all.
    """

    def __init__(self, rotated: Sequence[bool], dtype: torch.dtype) -> None:
        self._rotated = rotated
        self._dtype = dtype
        self.one_table = False  # whether all layers of the last forward got the same rotary tables
        self._embeddings: Tables | None = None  # the layer before's
        self._tables: Tables | None = None  # the same as they are used
        self._of_layers: list[Tables | None] = [None] * len(rotated)

    def slots(self) -> tuple[LayerSlot, ...]:
        """What to put in the place of the layers."""
        last = len(self._rotated) - 1
        return tuple(LayerSlot(self, i, last=i == last) for i in range(last + 1))

    def take_positions(self, layer: int, embeddings: Tables | None) -> None:
        """The step's rotary tables of one layer, cos and sin, each [1, T, rotary_dim]."""
        if embeddings is None or not self._rotated[layer]:
            return
        if embeddings is not self._embeddings:  # most models hand all layers the same
            self.one_table = self._embeddings is None
            self._embeddings = embeddings
            cos, sin = (table[0].to(self._dtype).contiguous() for table in embeddings)
            self._tables = cos, sin
        self._of_layers[layer] = self._tables

    def forward(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        """hidden: [1, T, hidden_size], the embedded tokens -> the same after the last layer."""
        out_TH = self._all(hidden[0], self._of_layers, step)
        self._embeddings = self._tables = None
        self._of_layers = [None] * len(self._rotated)
        return out_TH[None]

    @abstractmethod
    def _all(self, hidden_TH: torch.Tensor, tables: Sequence[Tables | None], step: Step) -> torch.Tensor:
        """The embedded tokens -> the same after the last layer.

        `tables`: each layer's, a row for each token; None where it does not rotate.
        """

    @abstractmethod
    def keep_positions(self, tables: Tables) -> None:
        """Rotary tables of all positions, for all later calls of `sample`."""

    @abstractmethod
    def sample(
        self, hidden_TH: torch.Tensor, positions_T: torch.Tensor, norm: Norm, rows_N: torch.Tensor, step: Step
    ) -> torch.Tensor:
        """The embedded tokens (lost after) -> those in `rows_N` after the last layer and `norm`: [N, H]."""


class LayerSlot:
    """Stands where a layer stood: hands over its rotary tables; the last one runs them all."""

    def __init__(self, layers: DecoderLayers, index: int, *, last: bool) -> None:
        self._layers, self._index, self._last = layers, index, last

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        attention_step: PagedStep,
        position_embeddings: Tables | None = None,
        **__: Any,
    ) -> torch.Tensor:
        self._layers.take_positions(self._index, position_embeddings)
        return self._layers.forward(hidden_states, attention_step.step) if self._last else hidden_states

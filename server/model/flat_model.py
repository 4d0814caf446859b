"""Token ids to logits around fused layers, without transformers' own outer forward.

That forward builds masks, rotary tables and output objects, which takes a millisecond beside layers of five.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from server.model.fused_layers import FusedLayers
from server.model.layer_reader import LayerReader, NotFusable


class FlatModel:
    """Embedding, fused layers, final norm and output head of one model.

    Raises NotFusable where the model shows that it does more. Whether that is all, the caller checks by
    comparing logits.
    """

    def __init__(self, model: PreTrainedModel, fused: FusedLayers, max_model_len: int) -> None:
        decoder = model.get_decoder()
        self._embed, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self._fused = fused
        self._reader = LayerReader()  # keeps the norm's weights
        self._norm = self._reader.norm(decoder, "norm")
        if not self._norm.weight:
            raise NotFusable("it has no final norm")
        rotary = getattr(decoder, "rotary_emb", None)
        if rotary is None or not fused.one_table:
            raise NotFusable("its layers have different rotary tables")
        like = self._embed(torch.zeros(1, 1, dtype=torch.long))
        cos, sin = rotary(like, torch.arange(max_model_len)[None])
        fused.keep_positions(cos[0].to(like.dtype).contiguous(), sin[0].to(like.dtype).contiguous())

    def __call__(self, ids_T: torch.Tensor, positions_T: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
        """Token ids and positions [T], rows whose logits are wanted [N] -> logits [N, V]."""
        hidden_TH = self._embed(ids_T)
        logits: torch.Tensor = self._head(self._fused.sample(hidden_TH, positions_T, self._norm, rows_N))
        return logits

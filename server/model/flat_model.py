"""Token ids to logits around fused layers, without transformers' own outer forward.

That forward builds masks, rotary tables and output objects, which takes a millisecond beside layers of five.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from server.model.decoder_layers import DecoderLayers
from server.model.layer_reader import LayerReader, NotFusable
from server.model.step import Step


class FlatModel:
    """Embedding, fused layers, final norm and output head of one model.

    Raises NotFusable where the model shows that it does more. Whether that is all, the caller checks by
    comparing logits.
    """

    def __init__(self, model: PreTrainedModel, fused: DecoderLayers, max_model_len: int) -> None:
        decoder = model.get_decoder()
        self._embed, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self._fused = fused
        norm = LayerReader().norm(decoder, "norm")
        if norm is None:
            raise NotFusable("it has no final norm")
        self._norm = norm
        rotary = getattr(decoder, "rotary_emb", None)
        if rotary is None or not fused.one_table:
            raise NotFusable("its layers have different rotary tables")
        device = norm.weight.device
        like = self._embed(torch.zeros(1, 1, dtype=torch.long, device=device))
        cos, sin = (
            table[0].to(like.dtype).contiguous()
            for table in rotary(like, torch.arange(max_model_len, device=device)[None])
        )
        fused.keep_positions((cos, sin))

    def __call__(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, rows_N: torch.Tensor, step: Step
    ) -> torch.Tensor:
        """Token ids and positions [T], rows whose logits are wanted [N] -> logits [N, V]."""
        hidden_TH = self._embed(ids_T)
        sampled_NH = self._fused.sample(hidden_TH, positions_T, self._norm, rows_N, step)
        logits: torch.Tensor = self._head(sampled_NH)
        return logits

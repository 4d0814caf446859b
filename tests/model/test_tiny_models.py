"""The oracle of the parity tests computes what the models are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model.tiny_models import ARCHITECTURES, add_adapter, build, oracle, targets_of


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_is_eager(architecture: str, tmp_path: Path) -> None:
    """Under sdpa some releases of transformers drop a softcap, and the oracle would be another model."""
    model = build(architecture, tmp_path / "model")
    assert oracle(model, None).config._attn_implementation == "eager"


@torch.inference_mode()
def test_a_softcap_shows(tmp_path: Path) -> None:
    """Without it gemma2 is another model, with an adapter and without."""
    capped = build("gemma2", tmp_path / "capped")
    free = build("gemma2", tmp_path / "free", attn_logit_softcapping=None)
    ids = torch.tensor([[3, 50, 7, 120]])
    for adapter in (
        None,
        add_adapter(capped, tmp_path / "a", seed=1, rank=4, target_modules=targets_of("gemma2")),
    ):
        near, far = (oracle(folder, adapter)(ids, use_cache=False).logits for folder in (capped, free))
        assert (near - far).norm() > 0.01 * far.norm()

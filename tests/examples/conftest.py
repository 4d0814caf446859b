"""A base model of a few thousand weights, trained for a few steps: enough to drive every script."""

from __future__ import annotations

import pytest
import torch

from examples import train_base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    tokenizer = train_base.train_tokenizer(vocabulary=700, seed=0, documents=500)
    model = train_base.new_model(tokenizer, hidden=32, layers=2)
    batches = train_base.batches(tokenizer, rows=2, block=64, drill_steps=2, seed=0)
    train_base.train(model, batches, steps=20, peak_learning_rate=2e-2)
    train_base.save(model, tokenizer, folder)
    return folder

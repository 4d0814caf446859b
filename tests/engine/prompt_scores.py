"""Requests for the log-probabilities of prompts, and what transformers and PEFT say of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from server.messages import Logprobs, Request, TokenOutput
from tests.engine.harness import adapter_ref, greedy
from tests.model.tiny_models import VOCAB, oracle


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def scoring(
    name: str, ids: list[int], adapter: Path | None = None, top: int = 3, tokens: int = 2, **sampling: object
) -> Request:
    refs = [adapter_ref(adapter)] if adapter else []
    return greedy(name, ids, tokens, refs, prompt_logprobs=top, **sampling)


def scores_of(outputs: list[TokenOutput]) -> list[Logprobs]:
    """Also that they come before the first token, in outputs of their own."""
    with_tokens = [bool(output.token_ids) for output in outputs]
    assert with_tokens == sorted(with_tokens)
    assert not any(output.prompt_logprobs and output.token_ids for output in outputs)
    return [entry for output in outputs for entry in output.prompt_logprobs or ()]


@torch.inference_mode()
def assert_right(model: Path, request: Request, got: list[Logprobs], adapter: Path | None = None) -> None:
    ids = request.prompt_token_ids
    want_TV = oracle(model, adapter)(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    assert [entry.token_id for entry in got] == ids[1:]
    for at, entry in enumerate(got):
        row = want_TV[at]
        assert entry.logprob == pytest.approx(float(row[ids[at + 1]]), abs=1e-4)
        top = row.topk(request.sampling.prompt_logprobs or 0)
        assert [token for token, _ in entry.top] == top.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert entry.rank == int((row >= row[ids[at + 1]]).sum())

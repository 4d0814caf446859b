"""Attention backends by name."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from server.model.attention.backends import NewBackend, open_attention
from server.model.attention.interface import AttentionBackend, LayerCacheSpec
from server.model.attention.paged_reference import PagedReferenceAttention
from tests.engine.harness import greedy, make_engine, run, tokens_of
from tests.model.tiny_models import build

SPECS = [LayerCacheSpec(2, 16, 16, 4)]


class Fast(PagedReferenceAttention):
    """One that is not on every machine, and knows no float16."""


def fast(specs: Collection[LayerCacheSpec], dtype: torch.dtype) -> AttentionBackend | None:
    assert specs is SPECS
    return Fast() if dtype is not torch.float16 else None


BACKENDS: dict[str, NewBackend] = {"fast": fast, "reference": lambda specs, dtype: PagedReferenceAttention()}


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("auto", torch.float32, Fast),
        ("auto", torch.float16, PagedReferenceAttention),
        ("fast", torch.float32, Fast),
        ("reference", torch.float32, PagedReferenceAttention),
    ],
)
def test_a_name_stands_for_a_backend(name: str, dtype: torch.dtype, kind: type) -> None:
    assert type(open_attention(name, BACKENDS, SPECS, dtype)) is kind


def test_a_backend_that_was_asked_for_is_not_replaced_in_silence() -> None:
    with pytest.raises(ValueError, match="attention fast was asked for, but it cannot run here"):
        open_attention("fast", BACKENDS, SPECS, torch.float16)


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(ValueError, match=r"attention flash .* has auto, fast, reference"):
        open_attention("flash", BACKENDS, SPECS, torch.float32)


def test_the_engine_takes_the_one_in_the_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = build("llama", tmp_path / "model")
    outputs = {}
    for name in ("auto", "reference"):
        with caplog.at_level(logging.INFO):
            engine = make_engine(folder, attention=name)
        engine.add(greedy("0", [3, 1, 4, 1, 5], 12))
        outputs[name] = tokens_of(run(engine)["0"])
    assert "attention: reference" in caplog.text
    assert outputs["auto"] == outputs["reference"]
    with pytest.raises(ValueError, match=r"attention triton .* has auto, compiled, reference"):
        make_engine(folder, attention="triton")

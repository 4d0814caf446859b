"""Attention backends by name."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from server.devices.cpu import device
from server.devices.cpu.native import library
from server.messages import Fork
from server.model.attention.backends import Layers, NewBackend, open_attention
from server.model.attention.hf import UnsupportedModel
from server.model.attention.interface import (
    AttentionBackend,
    AttentionOptions,
    AttentionPlan,
    LayerCache,
    LayerCacheSpec,
)
from server.model.attention.paged_reference import PagedReferenceAttention
from tests.engine.harness import greedy, make_engine, run, tokens_of
from tests.model.tiny_models import build

LAYERS = Layers([LayerCacheSpec(2, 16, 16, 4)], [AttentionOptions(0.25)], torch.float32)
HALF = replace(LAYERS, dtype=torch.float16)
CAPPED = replace(LAYERS, options=[AttentionOptions(0.25), AttentionOptions(0.25, softcap=30.0)])


class Fast(PagedReferenceAttention):
    """One that knows no float16 and no softcap."""

    def forward(self, *arguments: Any) -> torch.Tensor:
        if arguments[-1].sinks is not None:
            raise ValueError("there is no attention sink here")
        return super().forward(*arguments)


def fast(layers: Layers) -> AttentionBackend | None:
    capped = any(options.softcap is not None for options in layers.options)
    return None if capped or layers.dtype is torch.float16 else Fast()


BACKENDS: dict[str, NewBackend] = {"fast": fast, "reference": lambda layers: PagedReferenceAttention()}


@pytest.mark.parametrize(
    ("name", "layers", "kind"),
    [
        ("auto", LAYERS, Fast),
        ("auto", HALF, PagedReferenceAttention),
        ("auto", CAPPED, PagedReferenceAttention),
        ("fast", LAYERS, Fast),
        ("reference", LAYERS, PagedReferenceAttention),
    ],
)
def test_a_name_stands_for_a_backend(name: str, layers: Layers, kind: type) -> None:
    assert type(open_attention(name, BACKENDS, layers)) is kind


def test_a_backend_that_was_asked_for_is_not_replaced_in_silence() -> None:
    for layers in (HALF, CAPPED):
        with pytest.raises(ValueError, match="attention fast was asked for, but it cannot run here"):
            open_attention("fast", BACKENDS, layers)


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(ValueError, match=r"attention flash .* has auto, fast, reference"):
        open_attention("flash", BACKENDS, LAYERS)


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


class TokenMajor(PagedReferenceAttention):
    """Keeps what is one token's together, all in float32: [blocks, block_size, kv_heads * dim]."""

    @staticmethod
    def new_cache(
        spec: LayerCacheSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        heads, (k_dim, v_dim) = spec.num_kv_heads, (spec.k_head_dim, spec.v_head_dim)
        k, v = (torch.zeros(num_blocks, block_size, heads * dim, device=device) for dim in (k_dim, v_dim))
        return LayerCache(k, v, spec)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        options: AttentionOptions,
    ) -> torch.Tensor:
        k, v = (
            tensor.unflatten(2, (cache.spec.num_kv_heads, -1)).transpose(1, 2)
            for tensor in (cache.k, cache.v)
        )
        as_usual = LayerCache(k, v, cache.spec)
        return super().forward(query, key.float(), value.float(), as_usual, plan, options)


@pytest.mark.skipif(library() is None, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_is_laid_out_as_its_backend_likes(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers are fused all the same; block copies, for choices of one prompt, too."""
    monkeypatch.setitem(device._ATTENTION, "token-major", lambda layers: TokenMajor())
    folder = build("llama", tmp_path / "model")
    outputs = {}
    for name in ("reference", "token-major"):
        engine = make_engine(folder, attention=name, dtype=dtype, block_size=4)
        assert engine.fast_paths == {"fused": True, "flat": True, "graphs": False}
        request = greedy("0", [3, 1, 4, 1, 5], 12)
        engine.add(msgspec.structs.replace(request, forks=(Fork("1"),)))
        outputs[name] = {one: tokens_of(of_one) for one, of_one in run(engine).items()}
    assert outputs["token-major"] == outputs["reference"]
    assert outputs["reference"].keys() == {"0", "1"}


def test_a_backend_that_raises_or_is_wrong_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused layers or not: gpt-oss has none."""
    monkeypatch.setattr(device, "_ATTENTION", BACKENDS)
    with pytest.raises(ValueError, match="no attention sink here"):
        make_engine(build("gpt_oss", tmp_path / "sinks"), attention="fast")
    monkeypatch.setattr(Fast, "forward", lambda self, query, *_: torch.ones_like(query))
    with pytest.raises(UnsupportedModel, match=r"off by .* where .* is rounding"):
        make_engine(build("llama", tmp_path / "llama"), attention="fast")

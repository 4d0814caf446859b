"""The decode attention benchmark: what it measures is what it says; in Triton's interpreter here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("load_tests/gpu/run.sh measures it", allow_module_level=True)

from load_tests.gpu import attention
from load_tests.gpu.attention import BATCHES, BLOCK, HEAD, KV_HEADS, Row, decode_plan, measure


def test_every_sequence_has_blocks_of_its_own_and_a_place_for_its_token() -> None:
    contexts = [40, 16, 1]
    plan = decode_plan(contexts)
    used = [plan.block_tables[s, : -(-n // BLOCK)].tolist() for s, n in enumerate(contexts)]
    assert sorted(block for blocks in used for block in blocks) == list(range(5))
    assert plan.slot_mapping.tolist() == [
        blocks[-1] * BLOCK + (n - 1) % BLOCK for blocks, n in zip(used, contexts, strict=True)
    ]


def test_one_batch_is_uneven() -> None:
    uneven = [contexts for contexts in BATCHES if len(set(contexts)) > 1]
    assert [(len(contexts), min(contexts), max(contexts)) for contexts in uneven] == [(64, 144, 8192)]


def test_the_floor_is_one_read_of_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "median_seconds", lambda work: (work(), 4e-6)[1])
    row = measure([200, 17], rate=1e9, cold_bytes=0)
    assert row == Row(2, 17, 200, items=3, floor_us=pytest.approx(4 * 217 * KV_HEADS * 128 / 1e3), us=2.0)


def test_a_row_is_a_line_of_the_table() -> None:
    line = str(Row(64, 144, 8192, 95, floor_us=20.0, us=40.0))
    assert len(line) == len(HEAD)
    assert line.split() == ["64", "144..8192", "95", "40.0", "20.0", "50%"]

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from load_tests.__main__ import app
from load_tests.face import Stream

EVENTS = b"".join(b'5c\r\ndata: {"choices":[{"token_ids":[%d]}]}\n\n\r\n' % token for token in range(3))
WHOLE = b"HTTP/1.1 200 OK\r\n\r\n" + EVENTS + b"5c\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [(WHOLE, 3), (WHOLE[:-30], 0), (WHOLE.replace(b" 200 ", b" 503 "), 0), (b"", 0)],
)
async def test_only_whole_streams_count(answer: bytes, tokens: int) -> None:
    stream = Stream(b"", asyncio.get_running_loop().create_future())
    for start in range(0, len(answer), 7):
        stream.data_received(answer[start : start + 7])
    stream.connection_lost(None)
    await stream.ended
    assert stream.tokens() == tokens


def test_the_face_streams_what_the_engine_gives(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    options = ("--clients", 3, "--tokens", 40, "--step-ms", 2, "--rounds", 2)
    files = ("--log", tmp_path / "log", "--out", tmp_path / "face.json")
    result = CliRunner().invoke(app, ["face", *map(str, (*options, *files))])
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "face.json").read_text())
    assert [(run["tokens"], run["failed"]) for run in measured["runs"]] == [(120, 0), (120, 0)]
    assert all(run["offered_tokens_per_s"] == 1500 for run in measured["runs"])
    assert all(0 < run["tokens"] / run["wall_s"] < 1500 for run in measured["runs"])
    assert measured["pinned"] == (len(before) > 1)
    assert os.sched_getaffinity(0) == before

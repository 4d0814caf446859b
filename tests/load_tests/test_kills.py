"""The engine killed under traffic, in short: three times."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from load_tests.kills import Held, Kills, KillsResult, as_json, serving, table
from tests.e2e.server import ADAPTERS, MODEL

HELD = Held(descriptors=20, children=1, zombies=0, folders=1, rss_bytes=10**8)


def test_the_engine_killed_under_traffic_loses_and_leaks_nothing(tmp_path: Path) -> None:
    with serving(MODEL, ADAPTERS, tmp_path / "run") as server:
        kills = Kills(server, tmp_path / "run" / "tmp", "Anna saw two red apples =>\n", seed=1)
        result = asyncio.run(kills.run(kills=3, clients=6, pause_s=1.0))
    assert result.wrong == []
    assert result.leaked == []
    assert result.outcomes.keys() & {"answered", "cut"}
    assert len(result.ready_s) == 3
    assert json.loads(as_json(result))["leaked"] == []
    assert table(result).row_count > 5


def test_what_is_held_longer_is_told() -> None:
    more = Held(descriptors=21, children=1, zombies=1, folders=1, rss_bytes=10**9)
    assert KillsResult(before=HELD, after=HELD).leaked == []
    assert KillsResult(before=HELD, after=more).leaked == ["descriptors", "zombies"]

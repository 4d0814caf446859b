"""Plays cases one after the other, and writes down what was seen."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from load_tests.drills.case import CannotPlay, Case, PromiseBroken
from load_tests.drills.site import Books, Site
from load_tests.drills.watch import MOST_HELD_MS, Hold, Watch
from load_tests.serving import chorus_serve

_SECOND_LOOK_S = 5.0

Verdict = Literal["kept", "broken", "not played"]


@dataclass(frozen=True)
class Result:
    """What came of one case. `hold`: of `/health/live` meanwhile."""

    number: int
    title: str
    promise: str
    verdict: Verdict
    seen: str
    hold: Hold = field(default_factory=Hold)
    memory_mib: tuple[int, int] = (0, 0)  # before and after
    leaks: list[str] = field(default_factory=list)


def play_all(
    cases: Sequence[Case], model: Path, adapters: Path, out: Path, most_held_ms: float = MOST_HELD_MS
) -> Iterator[Result]:
    """One server for each set of flags, and one for each case that wants its own; yields as they end.

    `out` gets the servers' logs and data folders, in place of those of an earlier run. A case that holds the
    loop longer than `most_held_ms` is broken.
    """
    alone = [case for case in cases if case.own_server or case.model]
    shared = sorted((case for case in cases if case not in alone), key=_flags)
    groups = [list(group) for _, group in itertools.groupby(shared, key=_flags)]
    groups += [[case] for case in alone]
    for at, group in enumerate(groups):
        folder = _emptied(out / f"server-{at}")
        try:
            served = group[0].model(model, folder) if group[0].model else model
        except CannotPlay as reason:
            yield _unplayed(group[0], reason)
            continue
        flags, data_dir = group[0].flags, folder / "data"
        with chorus_serve(served, data_dir, adapters, flags, folder / "serve.log") as server:
            playing = _Playing(most_held_ms)
            for case in group:
                scratch = folder / f"case-{case.number}"
                scratch.mkdir()
                site = Site(server, data_dir, scratch, _first(adapters), _key(flags))
                yield asyncio.run(playing.play(case, site))


def _emptied(folder: Path) -> Path:
    """Without what an earlier run has left there, which a case would take for its own."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def _unplayed(case: Case, reason: CannotPlay) -> Result:
    return Result(case.number, case.title, case.promise, "not played", str(reason))


def _flags(case: Case) -> tuple[str, ...]:
    return case.flags


def _key(flags: Sequence[str]) -> str | None:
    return flags[flags.index("--api-key") + 1] if "--api-key" in flags else None


def _first(adapters: Path) -> Path:
    return min(path.parent for path in adapters.glob("*/adapter_config.json"))


class _Playing:
    """Cases one after the other on one server."""

    def __init__(self, most_held_ms: float) -> None:
        self._most_held_ms = most_held_ms
        self._books: Books | None = None  # as the last case left them

    async def play(self, case: Case, site: Site) -> Result:
        async with site:
            before = self._books or await self._opened(site)
            with Watch(site.host, site.port, site.server.pid) as watch:
                verdict, seen = await _verdict(case, site)
            if case.own_server:  # it may be gone, or another
                return Result(case.number, case.title, case.promise, verdict, seen, watch.hold)
            after = await site.books()
            if after.leaks(before):  # a connection may still be on its way out
                await asyncio.sleep(_SECOND_LOOK_S)
                after = await site.books()
            self._books = after
        leaks = after.leaks(before)
        if verdict == "kept" and (leaks or watch.hold.loop_ms > self._most_held_ms):
            verdict = "broken"
        memory = before.memory_mib, after.memory_mib
        return Result(case.number, case.title, case.promise, verdict, seen, watch.hold, memory, leaks)

    async def _opened(self, site: Site) -> Books:
        await site.warm_up()
        return await site.books()


async def _verdict(case: Case, site: Site) -> tuple[Verdict, str]:
    try:
        return "kept", await asyncio.wait_for(case.play(site), case.limit_s)
    except CannotPlay as reason:
        return "not played", str(reason)
    except PromiseBroken as seen:
        return "broken", str(seen)
    except Exception as error:  # whatever it is, the next case is played
        traceback.print_exc()
        return "broken", f"{type(error).__name__}: {error}"


def table(results: Sequence[Result]) -> str:
    """Markdown, a row each, by number."""
    lines = ["| # | case | promise | seen | longest hold, ms | memory, MiB | verdict |", "|" + "---|" * 7]
    for result in sorted(results, key=lambda result: result.number):
        seen = "; ".join([result.seen, *result.leaks]).replace("|", "\\|")
        memory = f"{result.memory_mib[0]} → {result.memory_mib[1]}"
        lines.append(
            f"| {result.number} | {result.title} | {result.promise} | {seen} "
            f"| {result.hold} | {memory} | {result.verdict} |"
        )
    return "\n".join(lines) + "\n"


def write(results: Sequence[Result], out: Path) -> None:
    """`drills.json` and `drills.md`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "drills.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    (out / "drills.md").write_text(table(results))

"""The engine dies or hangs, the server is told to stop, the machine runs out of something."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path

import httpx

from load_tests.drills.case import CannotPlay, case, expect
from load_tests.drills.cases.adapters import scaled
from load_tests.drills.cases.requests import refused
from load_tests.drills.site import Site

_LOADED_AT_ONCE = 32


async def streams(site: Site, count: int, tokens: int = 400) -> list[asyncio.Task[httpx.Response]]:
    """Running requests: each gives a long answer, not streamed."""
    tasks = [
        asyncio.create_task(site.complete(prompt=[7 + i, 8], max_tokens=tokens, ignore_eos=True))
        for i in range(count)
    ]

    async def all_run() -> bool:
        metrics = await site.metrics()
        return metrics.get("vllm:num_requests_running", 0) >= count

    await site.until(all_run, f"{count} running requests", 20)
    return tasks


async def _not_ready(site: Site, most_s: float) -> None:
    """Until it says so."""

    async def over() -> bool:
        return not await site.ready()

    await site.until(over, "not ready", most_s)


async def back(site: Site) -> float:
    """Seconds until it is ready again."""
    began = time.monotonic()
    await site.until(site.ready, "the engine to be back", 60)
    return time.monotonic() - began


@case(24, "finite weights that overflow in use", "that request errors; its neighbours' tokens are unchanged")
async def overflow(site: Site) -> str:
    await site.upload("loud", scaled(site.adapter_files(), 1e30))
    quiet = (await site.complete(max_tokens=60, ignore_eos=True)).json()["choices"][0]["text"]
    beside = [asyncio.create_task(site.complete(max_tokens=60, ignore_eos=True)) for _ in range(4)]
    loud = [await site.complete("loud", max_tokens=8) for _ in range(4)]
    texts = {answer.json()["choices"][0]["text"] for answer in await asyncio.gather(*beside)}
    await site.http.delete("/v1/adapters/loud")
    statuses = {answer.status_code for answer in loud}
    expect(statuses == {500} and "non_finite" in loud[0].text, f"{statuses} {loud[0].text[:100]}")
    expect(texts == {quiet}, "its neighbours' answers changed")
    return "500 non_finite_logits; four neighbours unchanged"


@case(
    32,
    "more hot adapters than fit",
    "queue, fair, no starvation; pinned ones stay",
    "--arena-bytes",
    "2MiB",
    "--host-cache-bytes",
    "64MiB",
)
async def small_arena(site: Site) -> str:
    names = [model["id"] for model in (await site.http.get("/v1/models")).json()["data"]]
    pinned = names[-1]
    pin = await site.http.post(f"/v1/adapters/{pinned}/load", json={"pin": True})
    expect(pin.status_code == 200, pin.text[:100])
    alone = {name: (await site.complete(name)).json() for name in names}
    answers = await asyncio.gather(*(site.complete(name) for name in names * 12))
    wrong = [
        answer.text[:100]
        for name, answer in zip(names * 12, answers, strict=True)
        if answer.status_code != 200 or answer.json()["choices"] != alone[name]["choices"]
    ]
    expect(not wrong, f"{len(wrong)} wrong, as {wrong[:1]}")
    where = {one["name"]: one["residency"] for one in (await site.http.get("/v1/adapters")).json()["data"]}
    out = [name for name, place in where.items() if place != "arena"]
    expect(out and where[pinned] == "arena", f"residency of {pinned}, which is pinned, and others: {where}")
    await site.http.post(f"/v1/adapters/{pinned}/unload")
    return f"{len(answers)} requests for {len(names)} models, all as alone"


@case(34, "out of memory in a step", "preempt, once more, then fail only that request")
async def no_memory_in_a_step(site: Site) -> str:
    raise CannotPlay(
        "on a CPU torch takes a step's memory from what it has freed: with no more address space allowed to "
        "the engine none failed; tests/engine/test_out_of_memory.py has a device that says that none is left"
    )


@case(
    35,
    "the engine process dies",
    "open requests end with an error within 1 s; not ready; restarted",
    own_server=True,
)
async def engine_dies(site: Site) -> str:
    running = await streams(site, 4)
    site.engine.kill()
    began = time.monotonic()
    answers = await asyncio.gather(*running)
    ended = time.monotonic() - began
    expect({answer.status_code for answer in answers} == {503}, answers[0].text[:150])
    expect(ended < 1.0, f"open requests ended after {ended:.2f} s")
    late = await site.complete()
    seconds = await back(site)
    expect((await site.complete()).status_code == 200, "no answer afterwards")
    told = f"{late.status_code} retry-after {late.headers.get('retry-after')}"
    return f"503 after {ended:.2f} s; meanwhile {told}; back after {seconds:.1f} s"


@case(
    36,
    "the engine hangs",
    "not ready and 503 at once; killed, and back",
    "--watchdog-s",
    "1",
    own_server=True,
)
async def engine_hangs(site: Site) -> str:
    site.engine.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    await _not_ready(site, 5)
    noticed = time.monotonic() - began
    answer = await asyncio.wait_for(site.complete(), 2)
    seen = refused(answer, 503)
    seconds = await back(site)
    expect((await site.complete()).status_code == 200, "no answer afterwards")
    return f"not ready after {noticed:.1f} s, then {seen}; back after {noticed + seconds:.1f} s"


@case(
    37,
    "SIGTERM under load",
    "not ready first, new ones 503, running ones finish within the grace, then an error and [DONE]; exit 0",
    "--shutdown-grace-s",
    "10",
    own_server=True,
)
async def sigterm(site: Site) -> str:
    running = await streams(site, 4, tokens=40)
    endless = asyncio.create_task(_streamed(site))
    await asyncio.sleep(0.3)
    site.face.terminate()
    await asyncio.sleep(0.2)
    ready, late = await site.ready(), await site.complete()
    answers, cut = await asyncio.gather(asyncio.gather(*running), endless)
    expect(not ready, "it says that it is ready")
    expect({answer.status_code for answer in answers} == {200}, answers[0].text[:150])
    last = cut[-400:].rpartition('data: {"error"')[2]
    expect(
        last != cut[-400:] and last.endswith("data: [DONE]\n\n"), f"the long one ended with {cut[-200:]!r}"
    )
    code = await asyncio.to_thread(site.server.process.wait, 30)
    expect(code == 0, f"exit {code}")
    return f"not ready, new ones {refused(late, 503)}; 4 finished; a long one: error and [DONE]; exit 0"


async def _streamed(site: Site) -> str:
    """All that came of a stream that takes longer than a drain."""
    body = {"model": site.base, "prompt": "x", "n": 60, "max_tokens": 1900, "ignore_eos": True}
    answer = await site.http.post("/v1/completions", json=body | {"stream": True, "temperature": 1})
    return answer.text


async def _while_unresponsive(site: Site) -> str:
    """The engine stands still for a while, less than it may: what is asked then, and afterwards."""
    engine = site.engine
    engine.send_signal(signal.SIGSTOP)
    try:
        await _not_ready(site, 8)
        calls = [site.complete(), site.complete("sentiment"), site.http.post("/v1/adapters/sentiment/load")]
        calls += [site.complete(stream=True)]
        answers = await asyncio.wait_for(asyncio.gather(*calls), 5)
    finally:
        engine.send_signal(signal.SIGCONT)
    for answer in answers:
        refused(answer, 503)
        expect("retry-after" in answer.headers, f"no Retry-After: {dict(answer.headers)}")
    await back(site)
    expect((await site.complete()).status_code == 200, "no answer afterwards")
    return f"unresponsive: {len(answers)} times 503"


@case(
    60,
    "uploads while draining; requests while unresponsive; SIGHUP; second SIGTERM",
    "503; drain; clean exit",
    "--watchdog-s",
    "2",
    own_server=True,
)
async def other_signals(site: Site) -> str:
    unresponsive = await _while_unresponsive(site)
    running = await streams(site, 1, tokens=1500)
    site.face.send_signal(signal.SIGHUP)
    await asyncio.sleep(0.5)
    seen = refused(await site.complete(), 503, code="shutting_down")
    upload = (await site.upload("late", site.adapter_files())).status_code
    expect(upload == 503, f"an upload while draining: {upload}")
    site.face.terminate()
    began = time.monotonic()
    code = await asyncio.to_thread(site.server.process.wait, 30)
    await asyncio.gather(*running, return_exceptions=True)
    log = site.server.log_text()
    expect("Traceback" not in log, "a traceback in the log")
    expect(code == 143, f"exit {code}")
    return (
        f"{unresponsive}; draining: {seen}, upload 503; second signal: exit {code} after "
        f"{time.monotonic() - began:.1f} s"
    )


def small_disk(model: Path, folder: Path) -> Path:
    """A data folder of 16 MiB. Raises CannotPlay without the right to mount."""
    data = folder / "data"
    data.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(data)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        raise CannotPlay("needs the right to mount a file system")
    return model


@case(27, "disk full", "507; what was there still serves", own_server=True, model=small_disk)
async def disk_full(site: Site) -> str:
    try:
        return await _fill_disk(site)
    finally:
        await asyncio.create_subprocess_exec("umount", "-l", str(site.data_dir))


async def _fill_disk(site: Site) -> str:
    files = site.adapter_files()
    statuses = []
    for k in range(40):
        statuses.append((await site.upload(f"many-{k}", scaled(files, 1 + k / 100))).status_code)
        if statuses[-1] != 201:
            break
    expect(statuses[-1] == 507, f"{statuses}")
    answer = await site.complete("many-0")
    expect(answer.status_code == 200, answer.text[:100])
    gone = await site.http.delete("/v1/adapters/many-0")
    expect(gone.status_code in (200, 202), f"a delete on the full disk: {gone.status_code}")
    return f"{len(statuses) - 1} times 201, then 507; serves; delete {gone.status_code}"


@case(
    26,
    "SIGKILL in mid-upload or mid-load",
    "restart sweeps staging; the old version serves",
    "--host-cache-bytes",
    "0",
    own_server=True,
)
async def killed_in_mid_upload(site: Site) -> str:
    files = site.adapter_files()
    await site.upload("kept", files)
    loading = [f"loading-{k}" for k in range(_LOADED_AT_ONCE)]
    for k, name in enumerate(loading):
        expect((await site.upload(name, scaled(files, 1 + k / 100))).status_code == 201, "no upload")
    before = (await site.complete("kept")).json()["choices"][0]["text"]
    writer = await site.half_an_upload("kept", sent=200_000)
    await asyncio.sleep(0.5)
    loads = [asyncio.create_task(site.http.post(f"/v1/adapters/{name}/load")) for name in loading]
    await asyncio.wait(loads, return_when=asyncio.FIRST_COMPLETED)
    unanswered = sum(not load.done() for load in loads)
    site.face.kill()
    writer.transport.abort()
    await asyncio.gather(*loads, return_exceptions=True)
    expect(unanswered, "every load was over before the kill")
    await asyncio.to_thread(site.server.process.wait, 10)
    await asyncio.sleep(1)  # the engine sees that its parent is gone, the port is free
    await asyncio.to_thread(site.server.__enter__)
    after = (await site.complete("kept")).json()["choices"][0]["text"]
    staged = len(os.listdir(site.data_dir / "staging"))
    expect(after == before and not staged, f"staged {staged}, same answer: {after == before}")
    loaded = [(await site.http.post(f"/v1/adapters/{name}/load")).status_code for name in loading]
    expect(set(loaded) == {200}, f"loads afterwards: {loaded}")
    return (
        f"killed with {unanswered} of {len(loads)} loads and an upload on their way: staging empty, the old "
        "version answers, all load"
    )

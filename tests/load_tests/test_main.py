"""The commands that load any server, as a user types them."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from load_tests.__main__ import app
from load_tests.runner import read_result
from load_tests.trace import read_trace
from tests.load_tests.fake_server import FakeServer, until


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


async def start(*arguments: object) -> asyncio.subprocess.Process:
    """The command as a process of its own: it owns its event loop and its signals."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "load_tests", *map(str, arguments), stderr=subprocess.PIPE
    )


async def run(*arguments: object) -> tuple[int | None, str]:
    process = await start("run", *arguments)
    _, stderr = await process.communicate()
    return process.returncode, stderr.decode()


def write_trace(path: Path, *options: object) -> Path:
    lengths = ("--prompt-tokens", "uniform:2:5", "--output-tokens", "uniform:2:6")
    status, output = invoke("trace", "--out", path, "--adapters", 6, *lengths, *options)
    assert status == 0, output
    return path


def test_trace_command(tmp_path: Path) -> None:
    trace = read_trace(write_trace(tmp_path / "t.jsonl", "--requests", 30, "--rate", 5, "--base-share", 0.3))
    assert len(trace) == 30
    assert trace[-1].arrival_s > 0
    assert {request.adapter for request in trace} <= {None, *(f"adapter-00{n}" for n in range(6))}


def test_trace_takes_names_from_a_folder_and_prompts_from_a_file(tmp_path: Path) -> None:
    for name in ("sql", "json"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").touch()
    (tmp_path / "adapters" / "notes").mkdir()
    (tmp_path / "prompts.txt").write_text("count the ships\n\nlist the towns\n")
    options = ("--adapters-dir", tmp_path / "adapters", "--prompts", tmp_path / "prompts.txt")
    trace = read_trace(write_trace(tmp_path / "t.jsonl", *options))
    assert {request.adapter for request in trace} == {"sql", "json"}
    assert {request.prompt for request in trace} == {"count the ships", "list the towns"}


def test_bad_options_are_named(tmp_path: Path) -> None:
    out = ("trace", "--out", tmp_path / "t.jsonl")
    for options, word in (
        (("--output-tokens", "uniform:9:3"), "rising order"),
        (("--rate", "0"), "rate"),
        (("--token-ids", "5:2"), "token_ids"),
        (("--token-ids", "5"), "int"),
    ):
        status, output = invoke(*out, *options)
        assert (status, word in output) == (2, True), output
    trace = write_trace(tmp_path / "t.jsonl")
    status, output = invoke("run", trace, "--out", tmp_path / "r.json")
    assert (status, "--concurrency" in output) == (2, True)
    status, output = invoke("report", trace, "--out", tmp_path / "report")
    assert (status, "t.jsonl" in output) == (2, True)


def test_adapters_command(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    options = ("--count", 3, "--ranks", "2,4", "--dtype", "float16")
    status, output = invoke("adapters", "--model", tmp_path, "--out", tmp_path / "out", *options)
    assert status == 0, output
    ranks = [json.loads(path.read_text())["r"] for path in sorted((tmp_path / "out").glob("*/*.json"))]
    assert ranks == [2, 4, 2]


async def test_record_expect_and_report(server: FakeServer, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", "--requests", 30)
    answers, url = tmp_path / "answers.json", ("--url", server.url)
    status, errors = await run(trace, *url, "--out", tmp_path / "alone.json", "--record", answers)
    assert status == 0, errors
    assert server.most_in_flight == 1

    server.token_delay_s = 0.002
    batch = (trace, *url, "--concurrency", 6, "--expect", answers)
    status, errors = await run(*batch, "--out", tmp_path / "batch.json")
    assert status == 0, errors
    assert "30 / 30" in errors

    server.lies.add("adapter-000")
    status, errors = await run(*batch, "--out", tmp_path / "wrong.json", "--label", "wrong")
    assert status == 1, errors
    wrong = read_result(tmp_path / "wrong.json").check
    assert wrong is not None
    assert wrong.wrong

    files = (tmp_path / "batch.json", tmp_path / "wrong.json")
    status, output = await asyncio.to_thread(invoke, "report", *files, "--out", tmp_path / "report")
    assert status == 0, output
    runs = json.loads((tmp_path / "report" / "report.json").read_text())["runs"]
    assert [(one["label"], one["answered"]) for one in runs] == [("batch", 30), ("wrong", 30)]
    assert (runs[0]["wrong_answers"], runs[1]["wrong_answers"]) == (0, len(wrong.wrong))


async def test_interrupted_once_it_ends_what_is_in_flight(server: FakeServer, tmp_path: Path) -> None:
    server.token_delay_s = 0.02
    trace = write_trace(tmp_path / "t.jsonl", "--requests", 500)
    process = await start("run", trace, "--url", server.url, "--out", tmp_path / "r.json", "--concurrency", 3)
    await until(lambda: len(server.bodies) >= 6)
    process.send_signal(signal.SIGINT)
    _, stderr = await process.communicate()
    assert process.returncode == 130, stderr.decode()
    result = read_result(tmp_path / "r.json")
    assert result.interrupted
    assert 3 <= len(result.records) < 500
    assert all(record.error is None for record in result.records)
    assert len(result.records) == len(server.bodies)


async def test_interrupted_twice_it_drops_what_is_in_flight(server: FakeServer, tmp_path: Path) -> None:
    server.hangs.add("base")
    trace = write_trace(tmp_path / "t.jsonl", "--requests", 20, "--adapters", 0)
    process = await start("run", trace, "--url", server.url, "--out", tmp_path / "r.json", "--concurrency", 3)
    await until(lambda: server.in_flight == 3)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    await process.stderr.readuntil(b"Stopping")  # two signals at once would be delivered as one
    process.send_signal(signal.SIGINT)
    _, stderr = await process.communicate()
    assert process.returncode == 130, stderr.decode()
    result = read_result(tmp_path / "r.json")
    assert (result.interrupted, result.planned, result.records) == (True, 20, [])

"""Log lines as JSON: one object a line, with what is known of the request."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from server.log import JsonFormatter, configure, lines_of


@pytest.fixture
def lines() -> Iterator[Any]:
    """Reads what was logged by `test.log` since, as JSON."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("test.log")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = (
        False  # half a pair of surrogates is no text that pytest could pass from process to process
    )
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.propagate = True
    logger.removeHandler(handler)


log = logging.getLogger("test.log")


def test_a_line_is_one_object_whatever_the_message(lines: Any) -> None:
    log.warning('two\nlines, a quote " and half a pair \ud800 of %s', "characters \x1b[31m")
    (line,) = lines()
    assert line["message"] == 'two\nlines, a quote " and half a pair \ud800 of characters \x1b[31m'
    assert (line["level"], line["logger"]) == ("warning", "test.log")
    assert line["time"][10] == "T"
    assert line["time"].endswith("Z")
    assert "request_id" not in line


def test_facts_and_exceptions_are_fields(lines: Any) -> None:
    try:
        raise ValueError("no\nway")
    except ValueError:
        log.exception("failed", extra={"facts": {"status": 500, "odd": object}})
    (line,) = lines()
    assert line["status"] == 500
    assert "Traceback" in line["exception"]
    assert "no\nway" in line["exception"]


async def test_lines_name_the_request_they_are_of_in_tasks_and_threads(lines: Any) -> None:
    async def serve(name: str) -> None:
        state: dict[str, Any] = {"request_id": name, "trace_id": None}
        with lines_of(state):
            state["tenant"] = f"tenant of {name}"  # known later than the request
            await asyncio.sleep(0)
            log.info("task")
            await asyncio.to_thread(log.info, "thread")

    await asyncio.gather(serve("a"), serve("b"))
    log.info("of no request")
    *of_requests, other = lines()
    assert sorted((line["request_id"], line["tenant"], line["message"]) for line in of_requests) == [
        (name, f"tenant of {name}", message) for name in "ab" for message in ("task", "thread")
    ]
    assert not any("trace_id" in line for line in of_requests)
    assert "request_id" not in other


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_configure(log_format: Any, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure("info", log_format)
        logging.getLogger("x.y").info("hello")
        logging.getLogger("x.y").debug("not shown")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    (line,) = capsys.readouterr().err.splitlines()
    if log_format == "json":
        assert json.loads(line)["message"] == "hello"
    else:
        assert line.endswith("Z INFO    x.y: hello")

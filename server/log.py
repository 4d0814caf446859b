"""Log lines: one format for the whole server, to standard error, as text or as one JSON object a line."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

LogFormat = Literal["text", "json"]

_NO_FACTS: Mapping[str, Any] = {}
_request: ContextVar[Mapping[str, Any]] = ContextVar("request", default=_NO_FACTS)
_REQUEST_FACTS = ("request_id", "tenant", "key_id", "trace_id")


def configure(level: str, log_format: LogFormat = "text") -> None:
    """Sets the format and level of the root logger; libraries that talk much are held at warning."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else _text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)


def set_level(level: str) -> None:
    root = logging.getLogger()
    root.setLevel(level.upper())
    for name in ("httpx", "httpcore", "uvicorn", "huggingface_hub", "asyncio", "multipart", "urllib3"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


@contextmanager
def lines_of(state: Mapping[str, Any]) -> Iterator[None]:
    """Lines written inside, also by tasks and threads started there, name the request whose state this is."""
    token = _request.set(state)
    try:
        yield
    finally:
        _request.reset(token)


def request_facts(state: Mapping[str, Any]) -> dict[str, Any]:
    """Whose request it is: its id, and tenant, key and trace where it has them."""
    return {name: state[name] for name in _REQUEST_FACTS if state.get(name)}


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, what is known of the request, and the `facts`
    that a line was given by `extra={"facts": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **request_facts(_request.get()),
            **getattr(record, "facts", _NO_FACTS),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def utc(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601 with milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03}Z"


def _text() -> logging.Formatter:
    formatter = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    return formatter

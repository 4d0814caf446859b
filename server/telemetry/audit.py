"""The audit log: who changed which adapter or key, when, and what came of it.

A route says what is asked for (`audit`); the record is written when the answer is out, so that what was
refused stands there too. What the start changes is written at once (`AuditLog.record`).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request

from server.log import request_facts, utc

logger = logging.getLogger("server.audit")

_ATTRIBUTE = "audit"
_LONGEST = 255  # characters of a fact, which may be whatever a client sent


def audit(event: str, request: Request, **facts: object) -> None:
    """This request asks for a change: `event`, such as `adapter.delete`, and what is known of it.

    Called again, it adds to the facts. Neither keys nor contents belong there.
    """
    record = request.scope.setdefault("state", {}).setdefault(_ATTRIBUTE, {})
    record["event"] = event
    for name, value in facts.items():
        record[name] = _cut(value)


def _cut(value: object) -> object:
    return value[:_LONGEST] if isinstance(value, str) else value


class AuditLog:
    """Writes records as log lines of `server.audit`, and to a file of JSON lines where one is named.

    The file is made for its owner alone (0600), only appended to, and opened again when it was moved away.
    Raises OSError when it cannot be opened.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._file = -1
        if path is not None:
            self._open(path)

    def write(self, state: Mapping[str, Any], client: str | None, status: int, outcome: str) -> None:
        """The record of a request that is over, if it asked for a change. Never raises OSError.

        `status` is 0 when the client went away before it had an answer.
        """
        asked: Mapping[str, Any] | None = state.get(_ATTRIBUTE)
        if asked is None:
            return
        facts = {**asked, "outcome": outcome, "status": status, "client": client, **request_facts(state)}
        if state.get("error_code"):
            facts["error"] = state["error_code"]
        self._write(facts)

    def record(self, event: str, **facts: object) -> None:
        """A change that no request asked for, with its `name` and `outcome`. Never raises OSError."""
        self._write({"event": event} | {name: _cut(value) for name, value in facts.items()})

    def _write(self, facts: dict[str, Any]) -> None:
        name = ascii(facts.get("name", ""))[1:-1]  # a log line stays one line
        logger.info("%s %s %s", facts["event"], name, facts["outcome"], extra={"facts": facts})
        if self._path is not None:
            self._append(self._path, {"time": utc(time.time()), **facts})

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        line = json.dumps(record, default=str) + "\n"
        try:
            if self._moved(path):
                self.close()
                self._open(path)
            os.write(self._file, line.encode())  # one call: lines of several writers do not mix
        except OSError as error:
            logger.error("the audit file cannot be written (%s): %s", error.strerror, line.rstrip())

    def _moved(self, path: Path) -> bool:
        try:
            return not os.path.samestat(path.stat(), os.fstat(self._file))
        except OSError:
            return True

    def _open(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o600)

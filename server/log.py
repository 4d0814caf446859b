"""Log lines: one format for the whole server, to standard error."""

from __future__ import annotations

import logging
import time


def configure(level: str) -> None:
    """Sets the format and level of the root logger; libraries that talk much are held at warning."""
    handler = logging.StreamHandler()
    formatter = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)


def set_level(level: str) -> None:
    root = logging.getLogger()
    root.setLevel(level.upper())
    for name in ("httpx", "httpcore", "uvicorn", "huggingface_hub", "asyncio", "multipart"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))

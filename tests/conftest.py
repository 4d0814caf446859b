"""What all tests share: threads that wait without spinning, Triton's interpreter, and a log that is as it was
after each of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.api.adapter_app import Site

# Tests share the cores with one another, where OpenMP's threads must not spin until there is work: that took
# more than half of the tests' time. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Triton reads it once, when it is imported, so it is set before any test module is. Without a GPU its
# interpreter runs the kernels' tests on the CPU; with one, tests/gpu runs them compiled.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A command that is run inside a test leaves a handler behind, on a stream that is closed by then."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """The adapter routes on a real registry, for commands that talk to a server."""
    from tests.api.adapter_app import Site  # tests of other rooms need no HTTP
    from tests.registry import adapter_files

    site = Site(tmp_path / "data", adapter_files.settings())
    yield site
    site.close()

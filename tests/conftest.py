"""What all tests share: threads that wait without spinning, Triton's interpreter, and a log that is as it was
after each of them."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

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

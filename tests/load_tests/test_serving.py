from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from load_tests.serving import ServerProcess, free_port


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"]
    with pytest.raises(RuntimeError, match="ended with 3:\nno such model"):
        ServerProcess(command, free_port(), tmp_path / "log").__enter__()


def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    server = ServerProcess(command, free_port(), tmp_path / "log", ready_within_s=0.1)
    with pytest.raises(RuntimeError, match=r"not ready after 0\.1 s"):
        server.__enter__()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)

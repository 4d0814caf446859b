"""The folders of the engine's sockets: what a killed server leaves goes when the next one starts."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server.border.private_folder import PrivateFolder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def killed(temporary: Path) -> Path:
    """The folder of a process that was killed."""
    code = (
        "import os, signal, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from server.border.private_folder import PrivateFolder\n"
        "print(PrivateFolder().name, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(temporary)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return Path(done.stdout.strip())


def test_what_a_killed_server_left_is_swept(temporary: Path) -> None:
    left = killed(temporary)
    (left / "to-engine").touch()
    living = PrivateFolder()
    assert not left.exists()
    assert Path(living.name).stat().st_mode & 0o777 == 0o700
    living.cleanup()
    living.cleanup()
    assert list(temporary.iterdir()) == []


def test_what_lives_and_what_is_not_ours_stays(temporary: Path) -> None:
    first = PrivateFolder()
    (temporary / "chorus-of-somebody").mkdir()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    (temporary / "chorus-link").symlink_to(elsewhere)
    second = PrivateFolder()
    for path in (Path(first.name), Path(second.name), temporary / "chorus-of-somebody", elsewhere / "lock"):
        assert path.exists()
    first.cleanup()
    second.cleanup()


def test_a_long_path_for_temporary_files(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = temporary / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    folder = PrivateFolder()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder.name}/from-engine")
    folder.cleanup()
    assert not Path(folder.name).exists()
    assert list(long.iterdir()) == []

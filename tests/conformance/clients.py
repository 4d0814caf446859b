"""Clients that nobody here wrote, each in a virtual environment of its own: `make conformance` makes them.

`NAME.txt` beside this file pins what `build/clients/NAME` has beside the packages of the project's own.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
_HERE = Path(__file__).parent


def python_of(client: str) -> Path:
    """The interpreter that has the client. Skips the test where it is not installed."""
    path = REPOSITORY / "build" / "clients" / client / "bin" / "python"
    if not path.exists():
        pytest.skip(f"{client} is not installed: make conformance")
    return path


def run(client: str, script: str, request: dict[str, Any], folder: Path, within_s: float = 600) -> Any:
    """What `script`, a file beside this one, writes as JSON for `request`. It works in `folder`, offline."""
    ask, answer = folder / "request.json", folder / "answer.json"
    ask.write_text(json.dumps(request))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    program = [str(python_of(client)), str(_HERE / script), str(ask), str(answer)]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "TOKENIZERS_PARALLELISM": "false", **offline}
    environment["OMP_NUM_THREADS"] = "1"  # more wait for each other where the machine is shared
    ended = subprocess.run(
        program, cwd=folder, env=environment, capture_output=True, text=True, timeout=within_s, check=False
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    return json.loads(answer.read_text())

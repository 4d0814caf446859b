"""The `chorus` command: its flags are the settings, and what it says when one is wrong."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import server
from server.cli import app
from server.config import Settings

runner = CliRunner()


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.output == f"chorus {server.__version__}\n"


def test_help_has_every_setting() -> None:
    text = runner.invoke(app, ["serve", "--help"], env={"COLUMNS": "300"}).output
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
    assert "--no-prefix-caching" in text
    assert "seconds. (default: 30.0)" in text


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        ([], {}, "chorus: --model is missing (or CHORUS_MODEL)\n"),
        (["--model", "m", "--port", "99999"], {}, "chorus: --port: "),
        (["--model", "m", "--kv-cache-bytes", "much"], {}, "chorus: --kv-cache-bytes: 'much' is not a size"),
        (["--model", "m", "--dtype", "int3"], {}, "chorus: --dtype: "),
        (["--model", "m"], {"CHORUS_PORT": "x"}, "chorus: CHORUS_PORT: "),
        (["--model", "m"], {"CHORUS_ALLOWED_LORA_ROOTS": "x"}, "chorus: "),
        ([], {"CHORUS_MODEL": ""}, "chorus: --model is missing (or CHORUS_MODEL)\n"),
        (["--model", ""], {}, "chorus: --model: must not be empty\n"),
        (
            ["--model", "m", "--allowed-lora-roots", ""],
            {},
            "chorus: --allowed-lora-roots: must not be empty\n",
        ),
    ],
)
def test_bad_values_are_one_line(arguments: list[str], environment: dict[str, str], line: str) -> None:
    result = runner.invoke(app, ["serve", *arguments], env=environment)
    assert result.exit_code == 2
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1


def test_a_flag_wins_over_the_environment(tmp_path: Path) -> None:
    result = runner.invoke(app, ["serve", "--model", str(tmp_path)], env={"CHORUS_MODEL": "elsewhere"})
    assert result.exit_code == 1
    assert result.stderr == f"chorus: --model {tmp_path}: the folder has no config.json\n"


def test_port_in_use(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = ["serve", "--model", str(tmp_path), "--load-format", "dummy", "--port", port]
        result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert "in use" in result.stderr


def test_the_face_needs_no_torch() -> None:
    code = "import sys, server.cli, server.api.listen; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

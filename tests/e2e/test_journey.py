"""The user's journey: train an adapter, upload it with curl, call it, replace it, delete it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from examples import tasks
from tests.e2e.server import REPOSITORY, Server, adapter_files


def train(out: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "examples.train_adapter", "--out", str(out), *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def curl(*arguments: str) -> str:
    return subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, check=True).stdout


def test_train_upload_call_replace_delete(bundled: Server, tmp_path: Path) -> None:
    printed = train(tmp_path / "pirate", "--steps", "100")
    assert "curl" in printed
    train(tmp_path / "worse", "--steps", "5", "--seed", "3")
    forms = {
        name: [part for file in adapter_files(tmp_path / name) for part in ("-F", f"files=@{file}")]
        for name in ("pirate", "worse")
    }
    assert '"pirate"' in curl(f"{bundled.url}/v1/adapters", "-F", "name=pirate", *forms["pirate"])
    examples = tasks.NEW_JOB.examples("heldout", 20, seed=99)

    def score() -> float:
        answers = [
            bundled.complete("pirate", tasks.completion_prompt(e.prompt))["choices"][0]["text"]
            for e in examples
        ]
        return sum(a == e.completion for a, e in zip(answers, examples, strict=True)) / len(examples)

    assert score() >= 0.8
    assert '"version":2' in curl("-X", "PUT", f"{bundled.url}/v1/adapters/pirate", *forms["worse"]).replace(
        " ", ""
    )
    assert score() < 0.5
    curl("-X", "DELETE", f"{bundled.url}/v1/adapters/pirate")
    assert "model_not_found" in curl(
        f"{bundled.url}/v1/completions", "-H", "content-type: application/json",
        "-d", '{"model": "pirate", "prompt": "x"}',
    )  # fmt: skip

"""Runs lm-eval's tasks on one backend after the other: `python run_lm_eval.py REQUEST.json ANSWER.json`.

For the interpreter of build/clients/lm-eval. REQUEST: {"tasks": folder, "names": [task], "backends": [[kind,
arguments]]}. ANSWER: for each backend, for each task, what the backend said to each question.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager


def main(ask: Path, answer: Path) -> None:
    request = json.loads(ask.read_text())
    manager = TaskManager(include_path=request["tasks"], include_defaults=False)
    answers: list[dict[str, Any]] = []
    for kind, arguments in request["backends"]:
        found = lm_eval.simple_evaluate(
            model=kind,
            model_args=arguments,
            batch_size=16,
            tasks=request["names"],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
        )
        samples = found["samples"]
        answers.append({name: [sample["resps"] for sample in samples[name]] for name in request["names"]})
    answer.write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

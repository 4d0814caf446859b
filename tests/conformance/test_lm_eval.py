"""lm-eval over HTTP says of each question what it says with transformers and PEFT in its own process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples import tasks
from tests.conformance.clients import python_of, run
from tests.e2e.server import ADAPTERS, MODEL, Server

MODELS = (MODEL.name, "upper", "sql", "sentiment")
QUESTIONS = 3  # of each adapter's job
SEED = 20_261_128

_CHOICE = """
task: chorus_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: 0
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
_ROLLING = """
task: chorus_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def write_tasks(folder: Path) -> None:
    rows = []
    for job in tasks.JOBS.values():
        examples = job.examples("heldout", QUESTIONS, SEED)
        for at, example in enumerate(examples):
            others = [examples[(at + k) % QUESTIONS].completion for k in (1, 2)]
            choices = [example.completion, *others, example.prompt]
            rows.append(
                {
                    "prompt": tasks.completion_prompt(example.prompt),
                    "choices": choices,
                    "text": tasks.completion_prompt(example.prompt) + example.completion,
                }
            )
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", _CHOICE), ("rolling", _ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))


@pytest.mark.timeout(900)
def test_loglikelihoods_are_those_of_transformers_and_peft(tmp_path: Path) -> None:
    python_of("lm-eval")  # or the test is skipped before a server is started
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_tasks(folder)
    ours, theirs = [], []
    with Server(tmp_path / "data") as server:
        for name in MODELS:
            url = f"{server.url}/v1/completions"
            client = {"model": name, "base_url": url, "tokenizer": str(MODEL), "max_length": 2048}
            ours.append(["local-completions", client | {"num_concurrent": 2, "tokenized_requests": True}])
            peft = {} if name == MODEL.name else {"peft": str(ADAPTERS / name)}
            theirs.append(["hf", {"pretrained": str(MODEL), "dtype": "float32", "device": "cpu", **peft}])
        names = ["chorus_choice", "chorus_rolling"]
        request: dict[str, Any] = {"tasks": str(folder), "names": names, "backends": [*ours, *theirs]}
        answers = run("lm-eval", "run_lm_eval.py", request, tmp_path, within_s=800)
    compared = 0
    for got, want in zip(answers[: len(MODELS)], answers[len(MODELS) :], strict=True):
        for name in names:
            for mine, other in zip(_numbers(got[name]), _numbers(want[name]), strict=True):
                assert mine == pytest.approx(other, abs=1e-4)
                compared += 1
    assert compared == len(MODELS) * len(tasks.JOBS) * QUESTIONS * (4 * 2 + 1)


def _numbers(answers: Any) -> list[float]:
    """Every log-likelihood and every word on whether it was the greedy answer, in order."""
    if isinstance(answers, list):
        return [number for answer in answers for number in _numbers(answer)]
    return [float(answers)]

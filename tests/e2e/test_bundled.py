"""What ships works: each bundled adapter does its job through the running server, and as PEFT does."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import torch

from examples import tasks, training
from tests.e2e.server import ADAPTERS, MODEL, Server

HELD_OUT = 40  # examples a job, each in both prompt formats
SEED = 20_261_122  # not one that the adapters were trained or chosen with


async def ask(server: Server, asks: list[tuple[str, str]]) -> list[str]:
    """All at once, so that they share batches: (model, prompt) -> text."""
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=server.url, timeout=240, limits=limits) as http:

        async def one(model: str, prompt: str) -> str:
            body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 80}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            text: str = answer.json()["choices"][0]["text"]
            return text

        return await asyncio.gather(*(one(model, prompt) for model, prompt in asks))


def accuracy(answers: list[str], wanted: list[str]) -> float:
    return sum(a == b for a, b in zip(answers, wanted, strict=True)) / len(wanted)


async def test_every_adapter_does_its_job(bundled: Server) -> None:
    rows = []  # (adapter, prompt, right answer); neighbours use different adapters
    held_out = {name: job.examples("heldout", HELD_OUT, SEED) for name, job in tasks.JOBS.items()}
    for wrap in tasks.PROMPT_FORMATS:
        for i in range(HELD_OUT):
            rows += [
                (name, wrap(held_out[name][i].prompt), held_out[name][i].completion) for name in held_out
            ]
    got = await ask(bundled, [(name, prompt) for name, prompt, _ in rows])
    right: dict[str, list[bool]] = {name: [] for name in held_out}
    for (name, _, completion), answer in zip(rows, got, strict=True):
        right[name].append(answer == completion)
    scores = {name: sum(marks) / len(marks) for name, marks in right.items()}
    assert len(scores) >= 6
    assert min(scores.values()) >= 0.9, scores


async def test_the_base_model_does_not_know_the_jobs(bundled: Server) -> None:
    for name, job in tasks.JOBS.items():
        examples = job.examples("heldout", 20, SEED)
        rows = [(wrap(e.prompt), e.completion) for wrap in tasks.PROMPT_FORMATS for e in examples]
        got = await ask(bundled, [(MODEL.name, prompt) for prompt, _ in rows])
        assert accuracy(got, [completion for _, completion in rows]) < 0.2, name


def test_tokens_equal_transformers_and_peft(bundled: Server) -> None:
    from peft import PeftModel

    base, tokenizer = training.load_base(MODEL)
    base = base.to(torch.float32)
    model = None
    for name, job in tasks.JOBS.items():
        path = str(ADAPTERS / name)
        if model is None:
            model = PeftModel.from_pretrained(base, path, adapter_name=name).eval()
        else:
            model.load_adapter(path, adapter_name=name)
        model.set_adapter(name)
        for example, wrap in zip(job.examples("heldout", 4, SEED), tasks.PROMPT_FORMATS * 2, strict=True):
            prompt = wrap(example.prompt)
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                want = model.generate(input_ids=ids, do_sample=False, max_new_tokens=64)[0, ids.shape[1] :]
            answer = bundled.complete(name, prompt, return_token_ids=True)["choices"][0]
            assert answer["prompt_token_ids"] == ids[0].tolist()
            assert answer["token_ids"] == want.tolist(), f"{name}: {prompt}"


async def test_one_prompt_many_answers_in_one_batch(bundled: Server) -> None:
    sentence_jobs = [name for name in tasks.JOBS if name not in ("sql", "sort")]
    example = tasks.JOBS[sentence_jobs[0]].examples("heldout", 1, SEED)[0]
    prompt = tasks.completion_prompt(example.prompt)
    answers = await ask(bundled, [(name, prompt) for name in (*sentence_jobs, MODEL.name)])
    assert len(set(answers)) == len(sentence_jobs) + 1


def test_chat_uses_the_bundled_template(bundled: Server) -> None:
    example = tasks.JOBS["upper"].examples("heldout", 1, SEED)[0]
    answer = bundled.http.post(
        "/v1/chat/completions",
        json={"model": "upper", "messages": [{"role": "user", "content": example.prompt}], "temperature": 0},
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == example.completion
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/health", "/metrics", "/v1/models"])
def test_plain_routes_answer(bundled: Server, path: str) -> None:
    assert bundled.http.get(path).status_code == 200

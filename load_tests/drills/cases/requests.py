"""Requests that ask for too much, or for nonsense."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from load_tests.drills.case import case, expect
from load_tests.drills.site import PROMPT, Site

_MIB = 2**20


def refused(answer: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """What was seen, in a few words. Raises PromiseBroken when it is not this refusal."""
    seen = f"{answer.status_code} {answer.text[:160]}"
    expect(answer.status_code == status, seen)
    error = answer.json()["error"]
    expect(param is None or str(error["param"]).startswith(param), seen)
    expect(code is None or error["code"] == code, seen)
    expect("x-request-id" in answer.headers, f"{seen}: no request id")
    return f"{status} param={error['param']}"


async def _all_refused(site: Site, wanted: Mapping[str, Mapping[str, Any]], status: int = 400) -> str:
    """Each of these bodies is refused, naming the field that is its key."""
    for param, body in wanted.items():
        refused(await site.complete(**body), status, param.partition(" ")[0])
    return f"{len(wanted)} times {status}, each naming its field"


@case(1, "n = 10^6", "400 param=n, before any allocation")
async def many_choices(site: Site) -> str:
    return refused(await site.complete(n=10**6), 400, "n")


@case(2, "max_tokens beyond the context", "400 that states the limit; omitted: as many as fit")
async def beyond_the_context(site: Site) -> str:
    models = (await site.http.get("/v1/models")).json()["data"]
    context = models[0]["max_model_len"]
    answer = await site.complete(max_tokens=context)
    seen = refused(answer, 400, "max_tokens", "context_length_exceeded")
    expect(str(context) in answer.text, answer.text)
    body = {"model": site.base, "messages": [{"role": "user", "content": "hi"}]}
    free = await site.http.post("/v1/chat/completions", json=body | {"ignore_eos": True})
    usage = free.json()["usage"]
    expect(usage["total_tokens"] == context, f"without max_tokens: {usage}")
    return f"{seen}, says {context}; omitted: {usage['total_tokens']} in all"


@case(3, "longer than the whole KV cache", '400 "can never fit", not queued', "--kv-cache-bytes", "512KiB")
async def longer_than_the_cache(site: Site) -> str:
    return refused(await site.complete(prompt=[5] * 200, max_tokens=300), 400, code="never_fits")


@case(4, "logprobs = vocabulary", "400, limit 20")
async def all_logprobs(site: Site) -> str:
    answer = await site.complete(logprobs=50000)
    expect("20" in answer.text, answer.text)
    return refused(answer, 400, "logprobs")


@case(5, "10^4 prompts, stops or logit_bias entries", "400 with the cap of that field")
async def long_lists(site: Site) -> str:
    wanted = {
        "prompt": {"prompt": ["x"] * 10_000},
        "stop": {"stop": ["x"] * 10_000},
        "stop_token_ids": {"stop_token_ids": [1] * 10_000},
        "logit_bias": {"logit_bias": {str(i): 1 for i in range(10_000)}},
    }
    return await _all_refused(site, wanted)


@case(6, "NaN, Inf, huge floats, wrong token ids", "400")
async def no_numbers(site: Site) -> str:
    wanted: dict[str, dict[str, Any]] = {
        f"{field} {value}": {field: value}
        for field in ("temperature", "top_p", "presence_penalty", "repetition_penalty")
        for value in (1e300, -1e300)
    }
    wanted |= {
        "prompt negative": {"prompt": [-1]},
        "prompt large": {"prompt": [2**40]},
        "logit_bias ids": {"logit_bias": {"99999999": 1}},
        "seed": {"seed": 2**70},
    }
    seen = await _all_refused(site, wanted)
    for literal in ("NaN", "Infinity", "1e999"):
        body = f'{{"model": "{site.base}", "prompt": "x", "temperature": {literal}}}'
        answer = await site.http.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        refused(answer, 400, "temperature")
    return seen + "; NaN, Infinity and 1e999 as literals too"


@case(7, "200 MB or deeply nested JSON", "413 or 400")
async def large_bodies(site: Site) -> str:
    json_type = {"content-type": "application/json"}
    seen = []
    for content in (
        b'{"prompt": "' + b"x" * (200 * 10**6) + b'"}',
        b'{"prompt": ' + b"[" * 4_000_000 + b"]" * 4_000_000 + b"}",
        b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_000,
        b'{"prompt": [' + b"1," * 3_900_000 + b"1]}",
        b"{" + b'"k": 1, ' * 900_000 + b'"z": 1}',
    ):
        answer = await site.http.post("/v1/completions", content=content, headers=json_type)
        expect(answer.status_code in (400, 413), f"{answer.status_code} {answer.text[:100]}")
        seen.append(str(answer.status_code))
    return ", ".join(seen)


def with_template(template: str) -> Any:
    """A model folder like the given one, with this chat template."""

    def changed(model: Path, out: Path) -> Path:
        copy = out / "model"
        shutil.copytree(model, copy)
        (copy / "chat_template.jinja").write_text(template)
        return copy

    return changed


_LOOPS = (
    "{% for message in messages %}{{ message.content }}{% for a in message.content %}"
    "{% for b in message.content %}{% for c in message.content %}{% endfor %}{% endfor %}{% endfor %}"
    "{% endfor %}"
)


@case(9, "a hostile chat template", "sandboxed and timed: 400", model=with_template(_LOOPS))
async def hostile_template(site: Site) -> str:
    body = {"model": site.base, "messages": [{"role": "user", "content": "x" * 2000}], "max_tokens": 1}
    return refused(await site.http.post("/v1/chat/completions", json=body), 400, "messages")


@case(10, "unknown model", "404 model_not_found, param=model")
async def unknown_model(site: Site) -> str:
    return refused(await site.complete("nobody"), 404, "model", "model_not_found")


@case(42, "8 MiB of text in prompt, messages, /tokenize; four at once", "400 by a bound before tokenising")
async def much_text(site: Site) -> str:
    text = ("some words and 12345 " * 500_000)[: 8 * _MIB - 4096]
    chat = {"model": site.base, "messages": [{"role": "user", "content": text}]}
    calls = [
        *(site.complete(prompt=text) for _ in range(2)),
        site.http.post("/v1/chat/completions", json=chat),
        site.http.post("/tokenize", json={"prompt": text}),
    ]
    answers = await asyncio.gather(*calls)
    for answer in answers:
        refused(answer, 400)
    return "four times 400"


@case(43, "16 stops of 1,024 characters, n=64", "constant work per token, or 400 by a cap on their sum")
async def long_stops(site: Site) -> str:
    stops = ["a" * 1023 + chr(97 + i) for i in range(16)]
    answer = await site.complete(n=64, stop=stops, max_tokens=200, ignore_eos=True, temperature=1.0)
    expect(answer.status_code in (200, 400), answer.text[:200])
    short = [stop[-60:] for stop in stops]
    fits = await site.complete(n=64, stop=short, max_tokens=200, ignore_eos=True, temperature=1.0)
    expect(fits.status_code == 200, fits.text[:200])
    return f"{answer.status_code}; with 60 characters each 200"


@case(53, "chat_template_kwargs that collide", "400")
async def colliding_kwargs(site: Site) -> str:
    for name in ("messages", "add_generation_prompt", "tools", "bos_token", "self"):
        body = {
            "model": site.base,
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 1,
            "chat_template_kwargs": {name: 1},
        }
        answer = await site.http.post("/v1/chat/completions", json=body)
        expect(answer.status_code in (200, 400), f"{name}: {answer.status_code} {answer.text[:100]}")
        expect(name != "messages" or answer.status_code == 400, f"{name}: {answer.status_code}")
    return "400 for messages, no 5xx for others"


@case(54, "temperature 1e-46, repetition_penalty 1e-38", "greedy, or 400")
async def denormals(site: Site) -> str:
    greedy = (await site.complete(prompt=PROMPT)).json()["choices"][0]["text"]
    seen = []
    for body in ({"temperature": 1e-46}, {"temperature": 1e-310}, {"repetition_penalty": 1e-38}):
        answer = await site.complete(**body)
        same = answer.status_code == 200 and answer.json()["choices"][0]["text"] == greedy
        expect(same or answer.status_code == 400, f"{body}: {answer.status_code} {answer.text[:100]}")
        seen.append("greedy" if same else "400")
    return ", ".join(seen)

"""Requests that cannot be served as asked: each refused with the name of the field."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pydantic
import pytest

from server.api.inference import parsing, schemas, spec
from server.errors import InvalidRequest
from server.messages import SamplingParams
from server.text.tokenizer import Tokenizer
from tests.api.face_site import Site, open_site
from tests.api.fake_engine import VOCABULARY, FakeEngine


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        site.say("the quick brown fox")
        yield site


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 10**6}, "n"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"n": 128, "prompt": ["a", "b", "c"]}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"min_tokens": 20}, "min_tokens"),
    ({"logprobs": VOCABULARY}, "logprobs"),
    ({"prompt": ["a"] * 10**4}, "prompt"),
    ({"prompt": [[5]] * 257}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [5, -1]}, "prompt"),
    ({"prompt": [5, VOCABULARY]}, "prompt"),
    ({"prompt": [5, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"stop": ["x"] * 10**4}, "stop"),
    ({"stop": ["x" * 2000]}, "stop[0]"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["x" * 1000] * 5}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids"),
    ({"logit_bias": {str(i): 0 for i in range(10**4)}}, "logit_bias"),
    ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 1e9}}, "logit_bias.5"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": 1e308}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-38}, "repetition_penalty"),
    ({"repetition_penalty": 1e-3}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"seed": 2**64}, "seed"),
    ({"priority": 10}, "priority"),
    ({"priority": -1}, "priority"),
    ({"timeout": 0}, "timeout"),
    ({"timeout": 1e9}, "timeout"),
    ({"timeout": float("nan")}, "timeout"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"nonsense": 1}}, "stream_options.nonsense"),
    ({"best_of": 3, "n": 4}, "best_of"),
    ({"best_of": 3, "stream": True}, "best_of"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"allowed_token_ids": [VOCABULARY]}, "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]"),
    ({"bad_words": ["x"] * 65}, "bad_words"),
    ({"bad_words": [""]}, "bad_words[0]"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 3, "truncation_side": "middle"}, "truncation_side"),
    ({"request_id": "a b"}, "request_id"),
    ({"cache_salt": "x" * 1025}, "cache_salt"),
    ({"detokenize": False, "stop": "x"}, "stop"),
    ({"adapter": "sql", "lora_path": "team/json"}, "adapter"),
    ({"model": "sql", "adapter_id": "team/json"}, "adapter_id"),
    ({"adapters": [{"name": "sql"}], "lora_path": "sql"}, "adapters"),
    ({"chat_template": "x"}, "chat_template"),
    ({"suffix": "x"}, "suffix"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": ""}}},
        "response_format.json_schema.name",
    ),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": "(("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag.structures"),
    ({"guided_choice": ["a"] * 2000}, "guided_choice"),
    ({"guided_choice": [""]}, "guided_choice[0]"),
    ({"guided_json": 5}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": {"type": "strin"}}, "guided_json"),
    ({"guided_regex": "x" * 20_000}, "guided_regex"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
    ({"regex": "(("}, "regex"),
    ({"ebnf": "start: nowhere"}, "ebnf"),
    ({"json_schema": {"type": "object"}}, "json_schema"),
    ({"no_such_field": 0}, "no_such_field"),
    ({"model": None}, "model"),
    ({"adapter_scale": 1}, "adapter_scale"),
    ({"adapter_scale": float("inf"), "adapter": "sql"}, "adapter_scale"),
    ({"model": "sql", "adapter": "team/json"}, "adapter"),
    ({"model": "sql", "adapters": [{"name": "team/json"}]}, "adapters"),
    ({"adapters": [{"name": "sql"}, {"name": "sql"}]}, "adapters"),
    ({"adapters": [{"name": "sql", "weight": float("nan")}]}, "adapters[0].weight"),
    ({"adapters": [{"name": "sql"}] * 17}, "adapters"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:40])
async def test_bad_fields(site: Site, fields: dict[str, Any], param: str) -> None:
    body = json.dumps({"model": "base", "prompt": "hello"} | fields)
    error = error_of(await site.client.post("/v1/completions", content=body))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert site.engine.requests == []


CALLING = {
    "role": "assistant",
    "content": "wait",
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"continue_final_message": True, "messages": [CALLING]}, "continue_final_message"),
        (
            {"continue_final_message": True, "messages": [{"role": "assistant", "content": ""}]},
            "continue_final_message",
        ),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": {"a": [{"b": float("nan")}]}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
        ),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"prompt": "x"}, "prompt"),
    ],
)
async def test_bad_chats(site: Site, fields: dict[str, Any], param: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    body = json.dumps({"model": "base", "messages": messages} | fields)
    assert error_of(await site.client.post("/v1/chat/completions", content=body))["param"] == param


async def test_what_asks_for_nothing_is_accepted(site: Site) -> None:
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "tools": None,
        "response_format": {"type": "text"}, "temperature": None, "stop": None, "logit_bias": None, "n": None,
    }  # fmt: skip
    earlier = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [{"role": "developer", "content": [{"type": "text", "text": "be kind"}]}, earlier]
    assert (await site.chat(**harmless, messages=messages)).status_code == 200
    assert (await site.complete(best_of=2, n=2, suffix=None)).status_code == 200


async def test_sampling_reaches_the_engine(site: Site) -> None:
    await site.complete(temperature=0, top_k=-1, top_p=0.5, logit_bias={"7": -100}, seed=3, ignore_eos=True)
    sampling = site.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0, 0, 0.5)
    assert (sampling.logit_bias, sampling.seed, sampling.ignore_eos) == ({7: -100}, 3, True)
    await site.complete()
    assert site.engine.requests[1].sampling.temperature == 1.0


async def test_no_sampling_field_is_accepted_and_forgotten(site: Site) -> None:
    given = {
        "max_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "repetition_penalty": 1.1, "logit_bias": {"7": -100}, "seed": 3,
        "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [4], "logprobs": 2, "prompt_logprobs": 3,
        "allowed_token_ids": [5, 7], "regex": "a+",
    }  # fmt: skip
    await site.complete(**given, logprobs_mode="processed", bad_words=["quick"])
    sampling = msgspec.to_builtins(site.engine.requests[0].sampling)
    assert "start: /a+/" in sampling["grammar"]
    assert sampling.pop("processed_logprobs") is True
    assert len(sampling.pop("bad_words")) == 2
    del given["regex"]
    given |= {
        "logit_bias": {7: -100},
        "stop_token_ids": (4,),
        "allowed_token_ids": (5, 7),
        "grammar": sampling["grammar"],
    }
    assert sampling == given
    assert {*sampling, "processed_logprobs", "bad_words"} == set(SamplingParams.__struct_fields__)


async def test_log_probabilities_of_one_answer_are_bounded(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec, "MAX_LOGPROB_ENTRIES", 1000)
    error = error_of(await site.complete(logprobs=20, n=5, max_tokens=10))
    assert (error["param"], error["type"]) == ("logprobs", "invalid_request_error")
    assert "9 tokens" in error["message"]
    asked = {"logprobs": True, "top_logprobs": 4}
    assert error_of(await site.chat(**asked, n=4, max_tokens=51))["param"] == "top_logprobs"
    assert error_of(await site.complete(logprobs=0, prompt=[[5]] * 100, max_tokens=11))["param"] == "logprobs"
    assert site.engine.requests == []
    assert (await site.complete(logprobs=20, n=5, max_tokens=9)).status_code == 200
    assert (await site.chat(**asked, n=4)).status_code == 200  # as many as fit, and as are allowed
    assert site.engine.requests[-1].sampling.max_tokens == 50


_TEXT = {"model": "base", "prompt": "x"}
_CHAT = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
SURROGATES = [
    ("/v1/completions", _TEXT | fields)
    for fields in (
        {"model": "?"}, {"prompt": "?"}, {"prompt": ["x", "?"]}, {"stop": "?"}, {"stop": ["?"]},
        {"user": "?"}, {"metadata": {"a": "?"}}, {"logit_bias": {"?": 1}}, {"?": 1},
        {"model": None, "adapter": "?"}, {"model": None, "adapters": [{"name": "?"}]},
    )
] + [
    ("/v1/chat/completions", _CHAT | fields)
    for fields in (
        {"messages": [{"role": "user", "content": "?"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}]},
        {"messages": [{"role": "user", "content": "x", "name": "?"}]},
        {"messages": [{"role": "?", "content": "x"}]},
        {"chat_template_kwargs": {"?": 1}},
        {"chat_template_kwargs": {"a": "?"}},
    )
] + [("/tokenize", {"prompt": "?"}), ("/tokenize", {"model": "?", "prompt": "x"})]  # fmt: skip


@pytest.mark.parametrize("half", ["\\ud800", "\\udc00", "\\ud800\\ud800", "\\udfff\\ud800"])
async def test_half_characters(site: Site, half: str) -> None:
    """JSON can write them, UTF-8 and a tokenizer cannot."""
    for path, fields in SURROGATES:
        error_of(await site.client.post(path, content=json.dumps(fields).replace("?", half)))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", '{"model": "base", "prompt": "x", "temperature": 1e400}'),
        ("/v1/completions", '{"model": "base", "prompt": "x", "n": 1e400}'),
        ("/v1/completions", '{"model": "base", "prompt": "x", "seed": -1e400}'),
        ("/v1/completions", '{"model": "base", "prompt": "x", "logit_bias": {"1": 1e400}}'),
        ("/v1/completions", '{"model": "base", "prompt": [1e400]}'),
        ("/v1/completions", '{"model": "base", "prompt": [%s]}' % ("9" * 4000)),
        (
            "/v1/chat/completions",
            '{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs":{"a":1e400}}',
        ),
        ("/detokenize", '{"tokens": [1e400]}'),
        ("/detokenize", '{"tokens": [%s]}' % ("9" * 4000)),
        ("/detokenize", '{"tokens": [4294967296]}'),
        ("/detokenize", '{"tokens": [18446744073709551617]}'),
        ("/detokenize", '{"tokens": [-1]}'),
        ("/detokenize", '{"tokens": [%s1]}' % ("1," * 128)),
        ("/detokenize", '{"tokens": [%s1]}' % ("1," * 10**6)),
    ],
    ids=lambda value: value[:60],
)
async def test_numbers_that_nothing_can_hold(site: Site, path: str, body: str) -> None:
    assert len(error_of(await site.client.post(path, content=body))["message"]) < 300


async def test_the_last_of_equal_keys_counts(site: Site) -> None:
    """As in every JSON reader of an SDK; in a large body, too."""
    for blank in (" ", " " * 20_000):
        first, last = (
            '{"model": "nobody", "prompt": "x", "n": 0,',
            '"n": 1, "prompt": "hello", "model": "base"}',
        )
        body = first + blank + last
        assert (await site.client.post("/v1/completions", content=body)).status_code == 200
    assert site.engine.requests[0].prompt_token_ids == site.engine.requests[1].prompt_token_ids


MANY_FAULTS = [
    (schemas.CompletionRequest, {"prompt": "x", "stop": [5] * 5000}),
    (schemas.CompletionRequest, {"prompt": "x", "stop_token_ids": ["x"] * 5000}),
    (schemas.CompletionRequest, {"prompt": "x", "adapters": [{}] * 5000}),
    (schemas.CompletionRequest, {"prompt": "x", "logit_bias": {str(i): [] for i in range(5000)}}),
    (schemas.ChatRequest, {"messages": [{}] * 5000}),
    (schemas.ChatRequest, {"messages": [{"role": "user", "content": [{}] * 5000}]}),
    (schemas.ChatRequest, {"messages": [], "chat_template_kwargs": {str(i): [] for i in range(5000)}}),
    (schemas.TokenizeRequest, {"messages": [{}] * 5000}),
    (schemas.DetokenizeRequest, {"tokens": ["x"] * 5000}),
]


@pytest.mark.parametrize(("kind", "fields"), MANY_FAULTS, ids=lambda value: str(value)[:50])
def test_a_body_of_faults_is_refused_at_the_first(
    kind: type[pydantic.BaseModel], fields: dict[str, Any]
) -> None:
    """An error of each of 600,000 takes 15 s and half a gigabyte."""
    with pytest.raises(pydantic.ValidationError) as caught:
        kind.model_validate(fields)
    assert caught.value.error_count() <= 4


async def test_context_is_stated(site: Site) -> None:
    error = error_of(await site.complete(prompt=[5] * 20, max_tokens=109))
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    assert "128" in error["message"]
    assert "20" in error["message"]
    assert error_of(await site.complete(prompt=[5] * 128))["param"] == "prompt"
    assert (await site.complete(prompt=[5] * 120)).status_code == 200  # omitted: what fits


async def test_what_can_never_fit(tmp_path: Path) -> None:
    async with open_site(tmp_path, FakeEngine(kv_blocks=2)) as site:
        site.engine.tokens = [7] * 100
        error = error_of(await site.complete(prompt=[5] * 20, max_tokens=20))
        assert error["code"] == "never_fits"
        assert "never fit" in error["message"]
        assert error_of(await site.complete(prompt=[5] * 40))["code"] == "never_fits"
        answer = (await site.chat(messages=[{"role": "user", "content": "h"}])).json()
        assert answer["usage"]["total_tokens"] == 32


@pytest.mark.parametrize("name", ["nobody", "../x", "a\0b", "x" * 10_000, "sql@99", "sql@", "Team/json"])
async def test_unknown_model(site: Site, name: str) -> None:
    error = error_of(await site.complete(model=name), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert len(error["message"]) < 300
    assert error_of(await site.complete(adapter=name), 404)["param"] == "adapter"
    listed = error_of(await site.complete(adapters=[{"name": "sql"}, {"name": name}]), 404)
    assert listed["param"] == "adapters[1].name"
    assert site.leases() == 0


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1]", b"null", b'{"prompt": "\xff"}', b'{"model": "base", "prompt": ' + b"[" * 10**5,
        b"[" * 10**6, b'{"model":"base","prompt":"x","n":' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
async def test_bodies_that_are_not_json_objects(site: Site, body: bytes) -> None:
    error_of(await site.client.post("/v1/completions", content=body))


async def test_body_over_the_limit(tmp_path: Path) -> None:
    async with open_site(tmp_path, max_request_bytes=100_000) as site:
        read = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal read
            for _ in range(2_000):
                read += 100_000
                yield b"[" * 100_000

        error = error_of(await site.client.post("/v1/completions", content=endless()), 413)
        assert error["code"] == "too_large"
        assert read <= 300_000
        announced = await site.client.post("/v1/completions", content=b"x" * 100_001)
        error_of(announced, 413)


_N = 4 * 2**20
LARGE = {
    "nested lists": (b'{"model":"base","prompt":[' + b"[]," * (_N // 3) + b"[]]}", "prompt"),
    "strings": (b'{"model":"base","prompt":[' + b'"",' * (_N // 3) + b'""]}', "prompt"),
    "one string then lists": (b'{"model":"base","prompt":["",' + b"[]," * (_N // 3) + b"[]]}", "prompt"),
    "numbers": (b'{"model":"base","prompt":[' + b"1," * (_N // 2) + b"1]}", "prompt"),
    "objects": (b'{"model":"base","prompt":[' + b"{}," * (_N // 3) + b"{}]}", "prompt"),
    "messages": (b'{"model":"base","messages":[' + b"{}," * (_N // 3) + b"{}]}", "messages"),
    "keys": (b"{" + b",".join(b'"%d":1' % i for i in range(_N // 10)) + b"}", None),
    "stops": (b'{"prompt":"x","stop":[' + b'"",' * (_N // 3) + b'""]}', None),
    "twice": (b'{"prompt":[' + b"[]," * (_N // 3) + b'[]],"prompt":"x"}', None),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_bodies_are_refused_before_they_become_objects(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(_: bytes) -> None:
        raise AssertionError("the body reached the parser")

    monkeypatch.setattr(parsing.pydantic_core, "from_json", parsed)
    body, param = LARGE[name]
    with pytest.raises(InvalidRequest) as caught:
        parsing.parse(schemas.CompletionRequest, body, longest=4096)
    assert caught.value.param == param


async def test_a_text_that_is_surely_too_long_is_never_tokenised(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To tokenise 8 MiB takes gigabytes."""

    def tokenised(*_: object) -> None:
        raise AssertionError("the text reached the tokenizer")

    monkeypatch.setattr(Tokenizer, "_encode", tokenised)
    text = "the quick brown fox " * 2000
    messages = [{"role": "user", "content": text}]
    for response, param in (
        (await site.complete(prompt=text), "prompt"),
        (await site.chat(messages=messages), "messages"),
        (await site.client.post("/tokenize", json={"prompt": text}), "prompt"),
        (await site.client.post("/tokenize", json={"messages": messages}), "messages"),
    ):
        error = error_of(response)
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert "128 tokens" in error["message"]


async def test_errors_of_routing(site: Site) -> None:
    assert error_of(await site.client.get("/v1/nothing"), 404)["code"] == "not_found"
    wrong = await site.client.get("/v1/completions")
    error_of(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    error_of(await site.client.post("//v1/completions", json={}), 404)


async def test_unexpected_errors_say_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(type(site.face), "require_engine", broken)
    error = error_of(await site.complete(), 500)
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]


async def test_request_ids(site: Site) -> None:
    kept = await site.client.get("/health", headers={"x-request-id": "abc-1.2:3"})
    assert kept.headers["x-request-id"] == "abc-1.2:3"
    for strange in ("a b", "x" * 200, "é".encode()):
        made = await site.client.get("/health", headers={"x-request-id": strange})
        assert len(made.headers["x-request-id"]) == 32

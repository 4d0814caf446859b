"""Fields beyond the common ones: what asks for nothing is accepted, what is known works, the rest named."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.api.inference import field_lists
from server.api.inference.schemas import ChatRequest, CompletionRequest
from server.messages import Logprobs
from tests.api.face_site import Site, events, open_site

LISTS = {"OpenAI 3.54": field_lists.OPENAI, "vLLM": field_lists.VLLM, "SGLang": field_lists.SGLANG}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        site.say("the quick brown fox")
        yield site


@pytest.mark.parametrize("server", LISTS)
async def test_the_defaults_of_other_servers_are_accepted(site: Site, server: str) -> None:
    for name, values in LISTS[server].items():
        for value in (None, "", [], {}, *values):
            for response in (await site.complete(**{name: value}), await site.chat(**{name: value})):
                assert response.status_code == 200, (name, value, response.text)
        known = name in CompletionRequest.model_fields.keys() & ChatRequest.model_fields.keys()
        for asking in (7, True, False, "x", ["x"], {"x": 1}):
            if not known and not field_lists.is_neutral(asking, values):
                error = (await site.complete(**{name: asking})).json()["error"]
                assert (error["param"], error["code"]) == (name, "unsupported"), (name, asking)


@pytest.mark.parametrize("empty", [None, "", [], {}])
async def test_an_unknown_field_that_is_empty_asks_for_nothing(site: Site, empty: Any) -> None:
    assert (await site.complete(no_such_field=empty)).status_code == 200
    tokens = await site.client.post("/tokenize", json={"prompt": "hello", "no_such_field": empty})
    assert tokens.status_code == 200


async def test_unknown_fields_are_ignored_where_the_server_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        async with open_site(tmp_path, unknown_fields="ignore") as site:
            for _ in range(2):
                assert (await site.complete(no_such_field=1)).status_code == 200
                assert (await site.chat(no_such_field=1, other=[{}])).status_code == 200
            assert (await site.complete(logits_processors=["x"])).status_code == 400  # known, and not done
    told = [record.getMessage() for record in caplog.records if "unknown field" in record.getMessage()]
    assert [message.split("'")[1] for message in told] == ["no_such_field", "other"]


async def test_every_name_of_an_adapter(site: Site) -> None:
    digest = site.digest("sql")
    for fields in (
        {"model": "base:sql"},
        {"model": "base", "lora_path": "sql"},
        {"model": "base", "adapter_id": "sql"},
        {"model": "base:sql", "lora_path": "sql", "adapter": "sql"},
    ):
        assert (await site.complete(**fields)).json()["adapter_version"] == digest
        assert (await site.chat(**fields)).json()["adapter_version"] == digest
    for fields, param in (
        ({"model": "base:nobody"}, "model"),
        ({"lora_path": "nobody"}, "lora_path"),
        ({"adapter_id": "nobody"}, "adapter_id"),
    ):
        error = (await site.complete(**fields)).json()["error"]
        assert (error["param"], error["code"]) == (param, "model_not_found")


async def test_usage_in_every_chunk(site: Site) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for response in (
        await site.complete(stream=True, stream_options=options),
        await site.chat(stream=True, stream_options=options),
    ):
        usages = [chunk["usage"] for chunk in events(response.text)]
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts == sorted(counts)
        assert counts[0] == 1
        assert counts[-1] == len(site.engine.tokens) + 1
        assert len({usage["prompt_tokens"] for usage in usages}) == 1


async def test_the_best_of_several(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = site.engine._outputs
    likely = {0: -3.0, 1: -1.0, 2: -2.0, 3: -4.0}

    def of_different_worth(request: Any) -> Any:
        index = int(request.request_id.rsplit("-")[-1]) % 4
        logprobs = [Logprobs(10 + index, likely[index], [])]
        return [
            msgspec.structs.replace(output, token_ids=[10 + index], stop_token=None, logprobs=logprobs)
            for output in outputs(request)
        ]

    monkeypatch.setattr(site.engine, "_outputs", of_different_worth)
    asked = {"best_of": 4, "n": 2, "max_tokens": 3, "return_token_ids": True}
    answer = (await site.complete(**asked, prompt=["hello", "world"])).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["token_ids"][0] for choice in answer["choices"]] == [11, 12, 11, 12]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 2 * 4 * 3
    assert (await site.complete(best_of=2, n=2, stream=True, logprobs=0)).status_code == 200


async def test_ids_of_the_answer(site: Site) -> None:
    assert (await site.complete(request_id="mine.1")).json()["id"] == "cmpl-mine.1"
    assert (await site.chat(rid="mine:2")).json()["id"] == "chatcmpl-mine:2"


async def test_a_salt_reaches_the_prefix_cache(site: Site) -> None:
    await site.complete(cache_salt="a")
    await site.chat(cache_salt="b", n=2)
    assert [request.cache_salt for request in site.engine.requests] == ["a", "b", "b"]


async def test_without_text(site: Site) -> None:
    choice = (await site.complete(detokenize=False, return_token_ids=True)).json()["choices"][0]
    assert choice["text"] == ""
    assert choice["token_ids"] == [*site.engine.tokens, 1]


async def test_bad_words_are_tokenised_in_both_places(site: Site) -> None:
    await site.complete(bad_words=["quick", " quick"])
    tokenizer = site.face.tokenizer
    assert tokenizer is not None
    found = [tokenizer.decode(ids) for ids in site.engine.requests[0].sampling.bad_words]
    assert found == ["quick", " quick"]


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"truncate_prompt_tokens": 2}, [8, 9]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, [8, 9]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [5, 6]),
        ({"truncate_prompt_tokens": 99}, [5, 6, 7, 8, 9]),
        ({"truncate_prompt_tokens": -1}, [5, 6, 7, 8, 9]),
        ({"truncation_side": "left"}, [5, 6, 7, 8, 9]),
    ],
)
async def test_truncated_prompts(site: Site, fields: dict[str, Any], want: list[int]) -> None:
    response = await site.complete(prompt=[5, 6, 7, 8, 9], echo=True, **fields)
    assert site.engine.requests[0].prompt_token_ids == want
    tokenizer = site.face.tokenizer
    assert tokenizer is not None
    assert response.json()["choices"][0]["text"].startswith(tokenizer.decode(want))


async def test_a_text_longer_than_the_context_may_be_truncated(site: Site) -> None:
    text = "the quick brown fox " * 30  # some 300 tokens; the context is 128
    assert (await site.complete(prompt=text)).status_code == 400
    response = await site.complete(prompt=text, truncate_prompt_tokens=-1, max_tokens=8)
    assert response.json()["usage"]["prompt_tokens"] == 120
    assert text.endswith(site.prompts[0])
    response = await site.chat(
        messages=[{"role": "user", "content": text}], truncate_prompt_tokens=20, max_tokens=8
    )
    assert response.json()["usage"]["prompt_tokens"] == 20
    error = (await site.complete(prompt=text * 100, truncate_prompt_tokens=5)).json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the quick"}]


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, "<s><|user|>hello</s><|assistant|>"),
        ({"add_generation_prompt": False}, "<s><|user|>hello</s>"),
        ({"messages": TURNS}, "<s><|user|>hello</s><|assistant|>the quick</s><|assistant|>"),
        (
            {"messages": TURNS, "continue_final_message": True},
            "<s><|user|>hello</s><|assistant|>the quick",
        ),
        ({"messages": [{"role": "critic", "content": "hello"}]}, "<s><|critic|>hello</s><|assistant|>"),
        ({"add_special_tokens": False}, "<s><|user|>hello</s><|assistant|>"),
    ],
)
async def test_rendered_chats(site: Site, fields: dict[str, Any], want: str) -> None:
    assert (await site.chat(**fields)).status_code == 200
    assert site.prompts == [want]


async def test_echo_in_a_chat(site: Site) -> None:
    fields = {"messages": TURNS, "continue_final_message": True, "echo": True}
    answer = (await site.chat(**fields)).json()
    assert answer["choices"][0]["message"]["content"] == "the quickthe quick brown fox"
    deltas = [chunk["choices"][0]["delta"] for chunk in events((await site.chat(stream=True, **fields)).text)]
    assert "".join(delta.get("content", "") for delta in deltas) == "the quickthe quick brown fox"
    answer = (await site.chat(echo=True)).json()  # the last message is the user's
    assert answer["choices"][0]["message"]["content"] == "the quick brown fox"


TEMPLATE = (
    "{{ messages[0].content }}|{{ messages[0].mood }}|{{ documents }}|{{ enable_thinking }}|"
    "{{ reasoning_effort }}|{% if extra %}{{ extra.a[1].b }}{% endif %}"
)


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"documents": [{"title": "t", "text": "x"}]}, "hi|glad|[{'title': 't', 'text': 'x'}]||||"),
        ({"enable_thinking": True}, "hi|glad|None|True||"),
        ({"reasoning_effort": "high"}, "hi|glad|None||high|"),
        ({"reasoning_effort": "none"}, "hi|glad|None|False|none|"),
        ({"reasoning_effort": 0.5}, "hi|glad|None||0.5|"),
        (
            {
                "reasoning_effort": "none",
                "enable_thinking": False,
                "chat_template_kwargs": {"enable_thinking": True},
            },
            "hi|glad|None|True|none|",
        ),
        ({"chat_template_kwargs": {"extra": {"a": [1, {"b": "deep"}]}}}, "hi|glad|None|||deep"),
    ],
)
async def test_what_a_template_is_given(tmp_path: Path, fields: dict[str, Any], want: str) -> None:
    messages = [{"role": "user", "content": "hi", "mood": "glad", "name": None}]
    async with open_site(tmp_path, trust_request_chat_template=True) as site:
        site.say("yes")
        response = await site.chat(messages=messages, chat_template=TEMPLATE, **fields)
        assert response.status_code == 200, response.text
        assert site.prompts[0].rstrip("|") == want.rstrip("|")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages",
        "{% for x in y %}",
        "{{ x | no_such_filter }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if a %}" * 300 + "{% endif %}" * 300,
    ],
    ids=lambda template: template[:20],
)
async def test_bad_templates_of_requests(tmp_path: Path, template: str) -> None:
    async with open_site(tmp_path, trust_request_chat_template=True) as site:
        response = await site.chat(chat_template=template)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] in ("chat_template", "messages")


async def test_a_last_message_that_the_template_changes_cannot_be_continued(tmp_path: Path) -> None:
    async with open_site(tmp_path, trust_request_chat_template=True) as site:
        response = await site.chat(
            messages=TURNS, continue_final_message=True, chat_template="{{ messages[-1].content | upper }}"
        )
        assert response.json()["error"]["param"] == "continue_final_message"


async def test_what_a_chat_may_leave_out_or_say_twice(site: Site) -> None:
    assert (await site.chat(top_logprobs=0)).status_code == 200
    assert (await site.chat(stream_options=None)).status_code == 200
    for kind in ("image_url", "input_audio"):
        messages = [{"role": "user", "content": [{"type": kind, kind: {}}]}]
        error = (await site.chat(messages=messages)).json()["error"]
        assert error["param"] == "messages[0].content[0].type"
        assert kind in error["message"]
    null = (await site.chat(messages=[{"role": "user", "content": None}])).json()["error"]
    assert null["message"] == "messages[0].content: must be a text or a list of parts"


async def test_special_tokens_may_be_shown(site: Site) -> None:
    site.engine.tokens = [0, *site.engine.tokens]
    assert (await site.complete()).json()["choices"][0]["text"] == "the quick brown fox"
    shown = (await site.complete(skip_special_tokens=False)).json()["choices"][0]["text"]
    assert shown == "<s>the quick brown fox"

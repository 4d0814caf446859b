"""Log-probabilities as clients see them: of outputs and prompts, in a body and in a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from server.api.inference import spec
from tests.api.face_site import Site, events, open_site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        site.say("the quick")
        yield site


def prompt_of(site: Site) -> list[int]:
    return site.engine.requests[0].prompt_token_ids


def text_of(site: Site, token_id: int) -> str:
    assert site.face.tokenizer is not None
    return site.face.tokenizer.token_bytes(token_id).decode()


ECHO = {"echo": True, "logprobs": 1, "max_tokens": 1}


async def test_echo_lists_the_prompt_before_the_output(site: Site) -> None:
    choice = (await site.complete(**ECHO)).json()["choices"][0]
    ids = prompt_of(site)
    columns = choice["logprobs"]
    assert len(ids) >= 3
    assert [len(column) for column in columns.values()] == [len(ids) + 1] * 4
    assert columns["token_logprobs"] == [None, *(-0.25 * at for at in range(1, len(ids))), -0.25]
    assert columns["tokens"] == [text_of(site, token) for token in (*ids, site.engine.tokens[0])]
    assert columns["top_logprobs"][0] is None
    assert columns["top_logprobs"][1] == {columns["tokens"][1]: -0.25, text_of(site, 2): -0.125}
    assert columns["text_offset"] == sorted(columns["text_offset"])
    assert columns["text_offset"][0] == 0
    assert columns["text_offset"][-1] == len("hello")
    assert choice["text"].startswith("hello")


async def test_echo_of_several_prompts_and_choices(site: Site) -> None:
    answer = (await site.complete(prompt=["hello", "world the"], n=2, **ECHO)).json()
    choices = answer["choices"]
    assert choices[0]["logprobs"] == choices[1]["logprobs"] != choices[2]["logprobs"]
    assert choices[2]["logprobs"] == choices[3]["logprobs"]
    asked = [request.sampling.prompt_logprobs for request in site.engine.requests]
    assert asked == [1] * 4


async def test_a_prompt_alone(site: Site) -> None:
    answer = (await site.complete(**ECHO | {"max_tokens": 0})).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hello", "length")
    assert len(choice["logprobs"]["tokens"]) == len(prompt_of(site))
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["prompt_tokens"] == len(prompt_of(site))


async def test_a_prompt_of_one_token(site: Site) -> None:
    for stream in (False, True):
        response = await site.complete(prompt=[5], stream=stream, **ECHO)
        if stream:
            lists = [chunk["choices"][0]["logprobs"] for chunk in events(response.text)]
            lists = [columns["token_logprobs"] for columns in lists if columns]
        else:
            lists = [response.json()["choices"][0]["logprobs"]["token_logprobs"]]
        assert [*chain(*lists)] == [None, -0.25]


async def test_a_stream_says_the_same_as_a_body(site: Site) -> None:
    asked: dict[str, Any] = {"prompt": ["hello", "world the"], "n": 2, "return_token_ids": True} | ECHO
    asked["max_tokens"] = 5
    whole = (await site.complete(**asked)).json()["choices"]
    chunks = [chunk["choices"][0] for chunk in events((await site.complete(stream=True, **asked)).text)]
    for choice in whole:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        for name, column in choice["logprobs"].items():
            assert [*chain(*(chunk["logprobs"][name] for chunk in mine if chunk["logprobs"]))] == column
        assert [*chain(*(chunk["token_ids"] for chunk in mine))] == choice["token_ids"]
        assert [chunk["prompt_token_ids"] for chunk in mine if "prompt_token_ids" in chunk] == [
            choice["prompt_token_ids"]
        ]


async def test_prompt_logprobs_in_vllms_shape(site: Site) -> None:
    choice = (await site.complete(prompt_logprobs=2, max_tokens=1)).json()["choices"][0]
    ids = prompt_of(site)
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == len(ids)
    entry = choice["prompt_logprobs"][1]
    assert entry[str(ids[1])] == {"logprob": -0.25, "rank": 1, "decoded_token": text_of(site, ids[1])}
    assert entry["2"] == {"logprob": -0.125, "rank": 1, "decoded_token": text_of(site, 2)}
    assert list(entry) == [str(ids[1]), "2", "3"]
    answer = (await site.chat(prompt_logprobs=0, max_tokens=1, return_token_ids=True)).json()
    asked = site.engine.requests[-1].prompt_token_ids
    assert [list(each) for each in answer["prompt_logprobs"][1:]] == [[str(i)] for i in asked[1:]]
    assert answer["prompt_token_ids"] == asked
    assert "prompt_logprobs" not in answer["choices"][0]
    assert "prompt_logprobs" not in (await site.complete()).json()["choices"][0]


async def test_each_list_has_as_many_as_it_was_asked_for(site: Site) -> None:
    choice = (await site.complete(**ECHO, prompt_logprobs=3)).json()["choices"][0]
    assert site.engine.requests[0].sampling.prompt_logprobs == 3
    assert {len(top) for top in choice["logprobs"]["top_logprobs"][1:]} == {2}
    assert {len(entry) for entry in choice["prompt_logprobs"][1:]} == {4}


async def test_the_first_chunk_of_a_chat_has_the_prompts_tokens(site: Site) -> None:
    chunks = events((await site.chat(stream=True, n=2, return_token_ids=True)).text)
    assert ["prompt_token_ids" in chunk for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert chunks[0]["prompt_token_ids"] == prompt_of(site)


async def test_zero_logprobs_list_the_sampled_token_alone(site: Site) -> None:
    columns = (await site.complete(logprobs=0)).json()["choices"][0]["logprobs"]
    assert columns["top_logprobs"] == [{token: -0.25} for token in columns["tokens"]]
    content = (await site.chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in content)


async def test_tokens_as_token_ids(site: Site) -> None:
    asked = {"return_tokens_as_token_ids": True}
    columns = (await site.complete(logprobs=1, **asked)).json()["choices"][0]["logprobs"]
    ids = [*site.engine.tokens, 1]
    assert columns["tokens"] == [f"token_id:{token}" for token in ids]
    assert columns["top_logprobs"][0] == {f"token_id:{ids[0]}": -0.25, "token_id:2": -0.5}
    content = (await site.chat(logprobs=True, top_logprobs=1, **asked)).json()["choices"][0]["logprobs"]
    assert [entry["token"] for entry in content["content"]] == [f"token_id:{token}" for token in ids]
    assert content["content"][0]["top_logprobs"][0]["token"] == "token_id:2"


@pytest.mark.parametrize("mode", [None, "raw", "raw_logprobs", "processed", "processed_logprobs"])
async def test_modes(site: Site, mode: str | None) -> None:
    assert (await site.complete(logprobs=1, logprobs_mode=mode)).status_code == 200
    assert site.engine.requests[0].sampling.processed_logprobs is (mode or "").startswith("processed")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"logprobs_mode": "raw_logits"}, "logprobs_mode"),
        ({"prompt": [5] * 129, "max_tokens": 0}, "prompt"),
    ],
)
async def test_what_is_refused(site: Site, fields: dict[str, Any], param: str) -> None:
    response = await site.complete(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert site.engine.requests == []


async def test_a_prompt_alone_may_fill_the_context(site: Site) -> None:
    assert (await site.complete(prompt=[5] * 128, max_tokens=0)).status_code == 200


async def test_they_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every choice; what is left is for the output."""
    monkeypatch.setattr(spec, "MAX_LOGPROB_ENTRIES", 100)
    asked = {"prompt": [5] * 10, "max_tokens": 5, "echo": True}
    assert (await site.complete(logprobs=1, n=3, **asked)).status_code == 200  # 3 * (10 + 5) * 2
    for fields, param in (
        ({"logprobs": 1, "n": 6}, "logprobs"),
        ({"logprobs": 1, "n": 4}, "logprobs"),
        ({"logprobs": 0, "n": 3, "prompt_logprobs": 2}, "prompt_logprobs"),
    ):
        error = (await site.complete(**asked | fields)).json()["error"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error")

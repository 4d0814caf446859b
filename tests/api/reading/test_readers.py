"""Bodies that are read in processes: the same as here, and hostile ones that end there."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.api.reading import readers as module
from server.api.reading.messages import ReaderStart, ReadJob
from server.api.reading.process import ReaderProcess
from server.api.reading.reader import Reader
from server.api.reading.readers import Readers
from server.errors import InvalidRequest, Unavailable
from server.text.tokenizer import Tokenizer
from tests.api.face_site import eventually
from tests.api.fake_engine import engine_info
from tests.text import tiny_tokenizer

# What a message says decides what the template does.
TEMPLATE = """\
{%- set said = messages[0].content -%}
{%- if said == 'spin' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{%- elif said == 'nest' %}
{%- macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}
{{- twice(60) }}
{%- elif said == 'power' %}{{ 10 ** (10 ** 8) }}
{%- elif said == 'pad' %}{{ ('x' | center(10 ** 10)) | length }}
{%- elif said == 'write' %}{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}
{%- endif -%}
<s>{{ said }}{{ added }}"""
INFO = engine_info(max_model_len=500)
LIMITS = {"render_s": 0.3, "job_s": 5.0, "memory_bytes": 2**30}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_tokenizer.write(tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
async def readers(folder: Path) -> AsyncIterator[Readers]:
    readers = Readers(ReaderStart(str(folder), **LIMITS), Tokenizer.load(folder))
    yield readers
    await readers.close()


def chat(said: str, **fields: Any) -> bytes:
    return json.dumps({"model": "base", "messages": [{"role": "user", "content": said}]} | fields).encode()


async def text_of(readers: Readers, said: str, **fields: Any) -> str:
    (prompt,) = (await readers.chat(chat(said, **fields), INFO)).prompts
    return tiny_tokenizer.byte_level().decode(prompt)


async def test_a_process_reads_as_this_one_does(readers: Readers, folder: Path) -> None:
    given = {
        "model": "base", "prompt": ["hello " * 100, "world"], "n": 2, "echo": True, "stop": ["a", "b"],
        "adapters": [{"name": "x", "weight": 2}], "temperature": 1, "logit_bias": {"5": 1}, "top_p": None,
        "stream_options": {"include_usage": True}, "seed": -3, "metadata": {"a": "b" * 2000},
    }  # fmt: skip
    body = json.dumps(given).encode()
    there = await readers.completions(body, INFO)
    here = Reader(Tokenizer.load(folder), None).completions(
        ReadJob("completions", INFO.max_model_len, INFO.vocab_size, body)
    )
    assert (there.prompts, there.echoes) == (here.prompts, here.echoes)
    left_out = {"prompt", "messages"}
    assert there.request.model_dump(exclude=left_out) == here.request.model_dump(exclude=left_out)
    assert there.request.model_fields_set == here.request.model_fields_set


async def test_small_bodies_need_no_process(readers: Readers, monkeypatch: pytest.MonkeyPatch) -> None:
    async def started(_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(ReaderProcess, "start", started)
    body = b'{"model": "base", "prompt": "hello"}'
    assert (await readers.completions(body, INFO)).prompts == [
        tiny_tokenizer.byte_level().encode("hello").ids
    ]
    assert await readers.detokenize(b'{"tokens": []}', INFO) == b'{"prompt":""}'
    with pytest.raises(AssertionError, match="started"):
        await readers.chat(chat("hello"), INFO)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("spin", "longer than 0.3 s"),
        ("nest", "longer than 0.3 s"),
        ("power", "longer than 0.3 s"),
        ("pad", "memory"),
        ("write", "more than"),
    ],
)
async def test_a_template_that_does_not_end_is_ended(readers: Readers, said: str, reason: str) -> None:
    """And the loop has its turns meanwhile; the next chat is answered as ever."""
    assert await text_of(readers, "hello") == "hello"
    asked = asyncio.create_task(readers.chat(chat(said), INFO))
    turns = 0
    while not asked.done():
        await asyncio.sleep(0.001)
        turns += 1
    with pytest.raises(InvalidRequest, match=reason) as caught:
        await asked
    assert caught.value.param == "messages"
    assert turns > 3 or not reason.startswith("longer")  # the others end at once
    assert await text_of(readers, "hello", chat_template_kwargs={"added": 7}) == "hello7"


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tools", "bos_token", "eos_token"])
async def test_template_options_that_collide(readers: Readers, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await readers.chat(chat("hello", chat_template_kwargs={name: 1}), INFO)
    assert caught.value.param == f"chat_template_kwargs.{name}"


async def test_a_text_without_a_bound_leaves_the_loop_alone(tmp_path: Path) -> None:
    """Of a tokenizer that is not understood all must be tokenised: elsewhere, and not for ever."""
    folder = tiny_tokenizer.write(tmp_path)
    description = json.loads((folder / "tokenizer.json").read_text())
    description["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(description))
    readers = Readers(ReaderStart(str(folder), job_s=0.5), Tokenizer.load(folder))
    body = json.dumps({"model": "base", "prompt": "the quick brown fox " * 200_000}).encode()
    asked = asyncio.create_task(readers.completions(body, INFO))
    turns = 0
    while not asked.done():
        await asyncio.sleep(0.001)
        turns += 1
    with pytest.raises(InvalidRequest, match="longer than") as caught:
        await asked
    assert caught.value.param == "prompt"
    assert turns > 20
    await readers.close()


async def test_too_many_that_wait_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_SMALL", 3)
    readers = Readers(ReaderStart(str(folder)), None)
    asked = await asyncio.gather(
        *(readers.chat(chat("hello"), INFO) for _ in range(5)), return_exceptions=True
    )
    refused = [answer for answer in asked if isinstance(answer, Unavailable)]
    assert [error.code for error in refused] == ["overloaded"] * 2
    assert refused[0].retry_after_s
    assert await text_of(readers, "again") == "again"
    await readers.close()


async def test_an_answer_that_nobody_waits_for_is_not_anothers(readers: Readers) -> None:
    assert await text_of(readers, "first") == "first"
    left = asyncio.create_task(readers.chat(chat("left alone" * 20), INFO))
    await asyncio.sleep(0)
    left.cancel()
    assert await text_of(readers, "second") == "second"
    await asyncio.wait([left])
    assert left.cancelled()


async def test_the_process_ends_with_its_input(folder: Path) -> None:
    """As when the server is killed."""
    process = ReaderProcess(ReaderStart(str(folder)))
    await process.ask(ReadJob("chat", 100, 300, chat("hello")))
    child = process._child
    assert child is not None
    pid = child.pid
    assert child.stdin is not None
    child.stdin.close()
    assert await asyncio.wait_for(child.wait(), 30) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    await process.end()


async def test_a_process_that_grew_is_replaced(readers: Readers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.reading.process._ENOUGH_BYTES", 0)
    assert await text_of(readers, "one") == "one"
    assert readers._small._process._child is None
    assert await text_of(readers, "two") == "two"


async def test_a_process_that_was_killed_is_replaced(readers: Readers) -> None:
    assert await text_of(readers, "one") == "one"
    child = readers._small._process._child
    assert child is not None
    os.kill(child.pid, 9)
    await eventually(lambda: child.returncode is not None)
    assert await text_of(readers, "two") == "two"


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "base", "prompt": "hello"} | fields).encode()


async def test_a_grammar_is_compiled_where_nobody_else_waits(
    readers: Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    ask = module._Line.ask

    async def noted(line: Any, job: ReadJob) -> Any:
        asked.append((line, job.compiles))
        return await ask(line, job)

    monkeypatch.setattr(module._Line, "ask", noted)
    plain = completion(guided_regex="a+")
    other_spelling = plain.replace(b"guided_regex", b"guided\\u005fregex")
    for body in (plain, other_spelling):
        reading = await readers.completions(body, INFO)
        assert reading.grammar is not None
        assert "a+" in reading.grammar
        assert reading.request.guided_regex is None  # said in other words
    small, guided = readers._small, readers._guided
    assert asked == [(guided, True), (small, False), (guided, True)]
    assert (await readers.chat(chat("hi", guided_choice=["yes"]), INFO)).grammar


async def test_a_grammar_that_takes_too_long_ends_its_process_with_an_answer(folder: Path) -> None:
    readers = Readers(ReaderStart(str(folder), grammar_s=0.2), Tokenizer.load(folder))
    many = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
    try:
        await readers.completions(completion(guided_regex="a"), INFO)
        process = readers._guided._process
        pid = pid_of(process)
        with pytest.raises(InvalidRequest) as refused:
            await readers.completions(completion(guided_json=many), INFO)
        assert (refused.value.param, refused.value.code) == ("guided_json", "invalid_grammar")
        assert "longer than 0.2 s" in refused.value.message
        assert (await readers.completions(completion(guided_regex="b"), INFO)).grammar
        assert pid_of(process) != pid
    finally:
        await readers.close()


def pid_of(process: ReaderProcess) -> int:
    assert process._child is not None
    return process._child.pid


async def test_a_grammar_needs_a_tokenizer(folder: Path) -> None:
    readers = Readers(ReaderStart(str(folder.parent / "none")), None)
    with pytest.raises(InvalidRequest) as refused:
        await readers.completions(completion(prompt=[5], guided_regex="a"), INFO)
    assert refused.value.param == "guided_regex"
    await readers.close()

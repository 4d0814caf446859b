"""Chat templates as Hugging Face models bring them, and hostile ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.errors import InvalidRequest
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer
from tests.text import tiny_tokenizer

HELLO = [{"role": "user", "content": "hi <b>"}]


def test_special_tokens_and_generation_prompt(tmp_path: Path) -> None:
    folder = tiny_tokenizer.write(tmp_path)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    template = ChatTemplate.load(folder, tokenizer.special_tokens)
    assert template is not None
    assert template.render(HELLO) == "<s><|user|>hi <b></s><|assistant|>"
    assert tokenizer.encode_chat(template.render(HELLO))[0] == tiny_tokenizer.BOS


def test_template_file_wins_and_lists_have_a_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path, {})
    assert template is not None
    assert template.render(HELLO) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    template = ChatTemplate.load(tmp_path, {})
    assert template is not None
    assert template.render(HELLO) == "file"


def test_none_without_a_template(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path, {}) is None


def test_names_that_templates_use() -> None:
    source = (
        "{{ messages | tojson }}|{{ strftime_now('%Y') | length }}|"
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}|"
        "{% generation %}said{% endgeneration %}|{{ thinking }}"
    )
    text = ChatTemplate(source).render(HELLO, {"thinking": False})
    assert text == json.dumps(HELLO) + "|4|1|said|False"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_refuses_names_messages(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source).render(HELLO)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tools", "documents", "bos_token"])
def test_options_cannot_take_the_names_that_have_a_meaning(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate("{{ messages }}", {"bos_token": "<s>"}).render(HELLO, {name: 1})
    assert caught.value.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize("name", ["self", "range", "", "loop", "a b", "caller", "namespace", "context"])
def test_other_options_are_only_names(name: str) -> None:
    assert ChatTemplate("{{ messages[0].content }}").render(HELLO, {name: 1}) == "hi <b>"


def test_what_a_template_writes_is_bounded() -> None:
    endless = ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}")
    with pytest.raises(InvalidRequest, match="more than 5000 characters") as caught:
        endless.render(HELLO, most=5000)
    assert caught.value.param == "messages"


def test_invalid_template() -> None:
    with pytest.raises(ValueError, match="not valid"):
        ChatTemplate("{% for %}")

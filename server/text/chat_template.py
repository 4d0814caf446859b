"""Chat messages to one prompt, by the Jinja template that comes with the base model."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import InvalidRequest
from server.text.tokenizer import read_json

MOST_RENDERED = 16 * 2**20  # characters of one prompt; a body has half as many bytes by default


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; for a prompt its body is just text."""

    tags = {"generation"}  # noqa: RUF012 (the attribute is Jinja's)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Unfolded(CodeGenerator):
    """Leaves constant expressions to the rendering, which has a limit to its time; the compiler has none."""

    def _output_child_to_const(
        self, node: jinja2.nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo
    ) -> str:
        if not isinstance(node, jinja2.nodes.TemplateData):
            raise jinja2.nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML, which a prompt must not have.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


class ChatTemplate:
    """A compiled template, in a sandbox and with the names that Hugging Face templates expect."""

    def __init__(self, source: str, special_tokens: dict[str, str] | None = None) -> None:
        """Raises ValueError when the template is not valid Jinja."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.code_generator_class = _Unfolded
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid: {error}") from error
        self._special_tokens = special_tokens or {}

    @classmethod
    def load(cls, folder: Path, special_tokens: dict[str, str]) -> ChatTemplate | None:
        """`chat_template.jinja`, or `chat_template` of tokenizer_config.json; None where there is neither."""
        source = cls.source(folder)
        return None if source is None else cls(source, special_tokens)

    @staticmethod
    def source(folder: Path) -> str | None:
        """The text of what `load` takes."""
        path = folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        source = read_json(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in source}
            source = named.get("default")
        return source if isinstance(source, str) else None

    @classmethod
    def of_request(cls, source: str, special_tokens: dict[str, str]) -> ChatTemplate:
        """A client's own. Raises InvalidRequest where it is no template."""
        try:
            return cls(source, special_tokens)
        except MemoryError:
            raise
        except Exception as error:  # Jinja makes Python of it, which may refuse it for reasons of its own
            reason = str(error)[:300] or type(error).__name__
            raise InvalidRequest(f"chat_template: {reason}", param="chat_template") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        options: Mapping[str, Any] | None = None,
        *,
        given: Mapping[str, Any] | None = None,
        most: int = MOST_RENDERED,
    ) -> str:
        """The prompt, ending where the assistant's answer begins.

        `options` are extra names for the template, `given` values of those that mean something here, `most`
        the characters that it may write. Raises InvalidRequest for options with a name that means something
        (param `chat_template_kwargs.NAME`), and (param `messages`) when the template refuses the messages,
        fails on them or writes too much. How long it takes is the caller's affair: see api/reading/child.py.
        """
        names: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens}
        names |= {"messages": messages, "add_generation_prompt": True, **(given or {})}
        for name in options or ():
            if name in names:
                raise InvalidRequest(
                    f"chat_template_kwargs: the name {name} is taken", param=f"chat_template_kwargs.{name}"
                )
        pieces, written = [], 0
        try:
            for piece in self._template.generate(names | dict(options or {})):
                pieces.append(piece)
                written += len(piece)
                if written > most:
                    raise jinja2.TemplateError(f"it writes more than {most} characters")
        except MemoryError:
            raise
        except Exception as error:  # a template is a program that came with the model: anything may happen
            reason = str(error)[:300] or type(error).__name__
            raise InvalidRequest(
                f"The chat template refused these messages: {reason}", param="messages"
            ) from error
        return "".join(pieces)


def cut_after(text: str, content: str) -> str:
    """A rendered prompt up to the end of its last message, whose `content` is still to be continued.

    Raises InvalidRequest (param `messages`) where the template has not written it.
    """
    content = content.rstrip() if content.rstrip() and content not in text else content
    at = text.rfind(content)
    if at < 0:
        raise InvalidRequest(
            "continue_final_message: the chat template does not write the last message as it is",
            param="continue_final_message",
        )
    return text[: at + len(content)]

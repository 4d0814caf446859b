"""The messages of a chat, as clients write them and as chat templates read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from server.api.inference.strict import Strict
from server.api.inference.tools import MAX_TOOLS, CalledFunction, CalledTool

MAX_MESSAGES = 4096
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}  # by what clients say
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal")


def _text_alone(kind: object) -> object:
    if isinstance(kind, str) and kind != "text":
        raise ValueError(f"{kind[:40]}: this server reads text alone")
    return kind


class TextPart(Strict):
    type: Annotated[Literal["text"], BeforeValidator(_text_alone)]
    text: str


def _content(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(Strict):
    """One message of a chat. What an SDK sends back of an earlier answer is accepted; keys that are not known
    here are the template's."""

    model_config = pydantic.ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]  # the template knows which there are
    name: str | None = None
    refusal: str | None = None
    audio: None = None
    function_call: CalledFunction | None = None
    tool_calls: Annotated[list[CalledTool] | None, Field(max_length=MAX_TOOLS, fail_fast=True)] = None
    tool_call_id: str | None = None
    annotations: Annotated[list[Any] | None, Field(max_length=0)] = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    content: Annotated[  # after those that may stand in its place
        Annotated[list[TextPart], Field(fail_fast=True)] | None,
        BeforeValidator(_content, json_schema_input_type=str | list[TextPart] | None),
    ] = Field(None, validate_default=True)

    @field_validator("tool_calls", "function_call")
    @classmethod
    def _of_an_assistant(cls, calls: object, info: ValidationInfo) -> object:
        if calls and info.data.get("role") not in (None, "assistant"):
            raise ValueError("only an assistant calls tools")
        return calls

    @field_validator("content")
    @classmethod
    def _says_something(cls, content: object, info: ValidationInfo) -> object:
        if content is None and not any(info.data.get(name) for name in _INSTEAD_OF_CONTENT):
            raise ValueError("must be a text or a list of parts")
        return content

    @property
    def text(self) -> str:
        """What it says, or why it says nothing."""
        return self.refusal or "" if self.content is None else "\n".join(part.text for part in self.content)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """As chat templates read calls of tools."""
        if self.function_call is not None:
            return [{"type": "function", "function": self.function_call.for_template()}]
        return [
            {"id": call.id, "type": "function", "function": call.function.for_template()}
            for call in self.tool_calls or ()
        ]

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: role, content (one string), what else is known, and the other keys."""
        known = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": self.calls or None,
            "reasoning_content": self.reasoning_content or self.reasoning,
        }
        told = {name: value for name, value in known.items() if value is not None}
        own = {"role": _TEMPLATE_ROLES.get(self.role, self.role), "content": self.text}
        return (self.model_extra or {}) | own | told


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]

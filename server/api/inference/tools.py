"""Tools in chats: what a client offers, which of it the model may call, and what is told of calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, PlainValidator

from server.api.inference.strict import Strict
from server.errors import InvalidRequest
from server.guidance import grammars
from server.text.tool_calls import ToolStyle

MAX_TOOLS = 128
_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionTool(Strict):
    """A function that the model may call. `strict` has no effect: forced calls always follow the schema."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Strict):
    name: _Name


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Strict):
    name: str
    arguments: str  # JSON, as the model wrote it

    def for_template(self) -> dict[str, Any]:
        """With the arguments as an object, which templates write in their own way."""
        try:
            return {"name": self.name, "arguments": json.loads(self.arguments or "{}")}
        except ValueError:
            return {"name": self.name, "arguments": self.arguments}


class CalledTool(Strict):
    """A call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


def _choice_of(words: tuple[str, ...], kind: type[Strict]) -> PlainValidator:
    def judge(value: object) -> object:
        if value in words or isinstance(value, kind):
            return value
        try:
            return kind.model_validate(value)
        except pydantic.ValidationError:
            raise ValueError(f"must be {', '.join(words)} or the name of a function") from None

    return PlainValidator(judge, json_schema_input_type=Literal[words] | kind)


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
Functions = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolChoice = Annotated[Any, _choice_of(("none", "auto", "required"), NamedTool)]
FunctionChoice = Annotated[Any, _choice_of(("none", "auto"), NamedFunction)]


class Offer(Strict):
    """The fields of a chat that offer tools. `functions` and `function_call` are their first names."""

    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Functions | None = None
    function_call: FunctionChoice | None = None


@dataclass(frozen=True)
class ToolUse:
    """What the model may call in one answer. `forced`: it must."""

    tools: Sequence[FunctionTool]
    forced: bool
    most: int  # calls
    as_function_call: bool = False  # told as `function_call`, as it was asked for

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools)

    def for_template(self) -> list[dict[str, Any]]:
        return [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"strict"})}
            for tool in self.tools
        ]

    def grammar(self, style: ToolStyle) -> str:
        """Of an answer that is nothing but calls."""
        tools = [(tool.name, json.dumps(tool.parameters or {"type": "object"})) for tool in self.tools]
        return grammars.of_calls(
            tools,
            style.arguments,
            begin="" if style.bare else f"{style.begin}\n",
            end="" if style.bare else f"\n{style.end}",
            many=self.most > 1,
        )


def tool_use(offer: Offer) -> ToolUse | None:
    """None where nothing may be called. Raises InvalidRequest for a choice of what is not offered."""
    field, tools, choice = "tool_choice", [tool.function for tool in offer.tools or []], offer.tool_choice
    if offer.functions:
        if tools:
            raise InvalidRequest("functions: not together with tools", param="functions")
        field, tools, choice = "function_call", offer.functions, offer.function_call
    if len({tool.name for tool in tools}) < len(tools):
        raise InvalidRequest("tools: two have the same name", param="tools")
    named = choice.function.name if isinstance(choice, NamedTool) else getattr(choice, "name", None)
    if named is not None:
        tools = [tool for tool in tools if tool.name == named]
        if not tools:
            raise InvalidRequest(f"{field}: no function {named} is offered", param=field)
    if choice == "required" and not tools:
        raise InvalidRequest("tool_choice: no tools are offered", param="tool_choice")
    if choice == "none" or not tools:
        return None
    one = bool(offer.functions) or offer.parallel_tool_calls is False or named is not None
    return ToolUse(
        tools, named is not None or choice == "required", 1 if one else MAX_TOOLS, bool(offer.functions)
    )

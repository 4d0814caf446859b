"""What a chat's text says: plain content, reasoning, calls of tools."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from server.api.inference.replies import CalledPart, ChatDelta, ChatFinishReason, ChatMessage, ToolCallPart
from server.api.inference.tools import ToolUse
from server.text.thinking import Thinking
from server.text.tool_calls import CallArguments, CallBegin, CallPiece, ToolCalls, ToolStyle


@dataclass(frozen=True)
class ChatStyle:
    """How the model writes what is not plain text, by its chat template."""

    tools: ToolStyle | None = None
    thinks: bool = False


@dataclass
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)  # in pieces


class ChatText:
    """One choice's text, taken in as it comes. `use`: None where it may call nothing."""

    def __init__(self, style: ChatStyle, use: ToolUse | None, *, thinks: bool, inside: bool) -> None:
        """`inside`: the prompt has begun the reasoning."""
        self._thinking = Thinking(inside=inside) if thinks else None
        self._tools = ToolCalls(style.tools, use.names, use.most) if use and style.tools else None
        self._use = use
        self._short_ids = style.tools is not None and style.tools.name == "mistral"  # its templates want 9
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []

    def push(self, text: str, *, last: bool) -> ChatDelta:
        """What it adds, `last` with the end."""
        reasoning, plain = self._thinking.push(text) if self._thinking else ("", text)
        if last and self._thinking is not None:
            more, rest = self._thinking.flush()
            reasoning, plain = reasoning + more, plain + rest
        pieces: Iterable[CallPiece] = [plain] if plain else []
        if self._tools is not None:
            pieces = self._tools.push(plain) + (self._tools.flush() if last else [])
        delta = self._told(pieces)
        if reasoning:
            self._reasoning.append(reasoning)
            delta.reasoning = delta.reasoning_content = reasoning
        return delta

    def message(self) -> ChatMessage:
        """All of it."""
        content = "".join(self._content)
        message = ChatMessage(content if content or not self._calls else None)
        if self._reasoning:
            message.reasoning = message.reasoning_content = "".join(self._reasoning)
        parts = [
            ToolCallPart(UNSET, call.id, "function", CalledPart(call.name, "".join(call.arguments)))
            for call in self._calls
        ]
        if self._use is not None and self._use.as_function_call:
            message.function_call = parts[0].function if parts else UNSET
        elif parts:
            message.tool_calls = parts
        return message

    def finish_reason(self, reason: ChatFinishReason | None) -> ChatFinishReason | None:
        """As OpenAI has it where tools were called."""
        if reason != "stop" or not self._calls or self._use is None:
            return reason
        return "function_call" if self._use.as_function_call else "tool_calls"

    def _told(self, pieces: Iterable[CallPiece]) -> ChatDelta:
        content: list[str] = []
        parts: list[ToolCallPart] = []
        for piece in pieces:
            match piece:
                case CallBegin():
                    parts.append(self._begin(piece.name))
                case CallArguments():
                    self._go_on(piece.text, parts)
                case _:
                    content.append(piece)
        self._content += content
        delta = ChatDelta(content="".join(content) or UNSET)
        if parts and self._use is not None and self._use.as_function_call:
            delta.function_call = parts[0].function
        elif parts:
            delta.tool_calls = parts
        return delta

    def _begin(self, name: str) -> ToolCallPart:
        random = uuid.uuid4().hex
        call = _Call(random[:9] if self._short_ids else f"call_{random[:24]}", name)
        self._calls.append(call)
        return ToolCallPart(len(self._calls) - 1, call.id, "function", CalledPart(name, ""))

    def _go_on(self, arguments: str, parts: list[ToolCallPart]) -> None:
        self._calls[-1].arguments.append(arguments)
        if parts:
            parts[-1].function.arguments += arguments
        else:
            at: int | UnsetType = len(self._calls) - 1
            parts.append(ToolCallPart(at, function=CalledPart(arguments=arguments)))

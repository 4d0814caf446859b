"""Calls of tools in what a model writes, in the styles of several families, read as it comes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from server.text.call_object import CallObject
from server.text.markers import split_at

_BETWEEN = " \t\r\n[],;"  # beside calls: spaces, and what joins several of them


@dataclass(frozen=True)
class ToolStyle:
    """How a family of models writes calls, each a JSON object."""

    name: str
    begin: str | None  # before calls; None: the answer is nothing but calls
    end: str = ""  # after each, where there is a begin
    bare: bool = False  # whether an answer that begins with JSON is calls, too
    arguments: str = "arguments"  # the key of a call's arguments, as its templates have it
    special: bool = False  # whether markers are special tokens, which texts leave out


STYLES = {
    style.name: style
    for style in (
        ToolStyle("hermes", "<tool_call>", "</tool_call>"),
        ToolStyle("llama3", "<|python_tag|>", bare=True, arguments="parameters", special=True),
        ToolStyle("mistral", "[TOOL_CALLS]", bare=True, special=True),
        ToolStyle("json", None, bare=True),
    )
}


def style_of(template: str) -> ToolStyle | None:
    """The style that a chat template asks for; None where it shows no tools."""
    for style in STYLES.values():
        if style.begin is not None and style.begin in template:
            return style
    return STYLES["json"] if "tools" in template else None


@dataclass(frozen=True)
class CallBegin:
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next part of the newest call's arguments."""

    text: str


CallPiece = str | CallBegin | CallArguments


class ToolCalls:
    """Takes an answer's text in pieces, gives its plain text and its calls. However it is cut into pieces,
    what comes out is the same.

    `names`: of the tools that there are. `most`: calls; those beyond are left out.
    """

    def __init__(self, style: ToolStyle, names: Collection[str], most: int = 128) -> None:
        self._style, self._names, self._most = style, names, most
        self.calls = 0
        self._held = ""  # text that may be the beginning of something
        self._call: CallObject | None = None
        self._in_calls = False
        self._begun = False  # whether any plain text was given
        self._told = False  # whether the call that is read was

    def push(self, text: str) -> list[CallPiece]:
        """What becomes certain with this text."""
        pieces: list[CallPiece] = []
        text, self._held = self._held + text, ""
        while text:
            if self._call is not None:
                text = self._read_call(self._call, text, pieces)
            elif self._in_calls:
                text = self._read_between(text, pieces)
            else:
                text = self._read_text(text, pieces)
        return pieces

    def flush(self) -> list[CallPiece]:
        """The rest, when no more text comes."""
        rest, self._held = self._held, ""
        if self._call is not None and not self._told:
            rest = self._call.raw
        nothing = not rest.strip(_BETWEEN if self._in_calls else None)
        return [] if not rest or (nothing and self.calls) else [rest]

    def _read_text(self, text: str, pieces: list[CallPiece]) -> str:
        if self._style.bare and not self._begun:
            start = text.lstrip()
            if not start:
                self._held = text
                return ""
            if start[0] in "{[":
                self._in_calls = True
                return start
        if self._style.begin is None:
            self._give(text, pieces)
            return ""
        before, marker, rest = split_at(text, [self._style.begin])
        if marker is None:
            blank = len(before) if self.calls and not before.strip() else 0
            self._give(before[blank:], pieces)
            self._held = before[:blank] + rest
            return ""
        if before.strip() or not self.calls:
            self._give(before, pieces)
        self._in_calls = True
        return rest

    def _give(self, text: str, pieces: list[CallPiece]) -> None:
        if text:
            pieces.append(text)
            self._begun = True

    def _read_between(self, text: str, pieces: list[CallPiece]) -> str:
        rest = text.lstrip(_BETWEEN)
        if not rest:
            self._held = text
            return ""
        if rest[0] == "{":
            self._call, self._told = CallObject(self._names if self._style.bare else None), False
            return rest
        end, begin = self._style.end, self._style.begin or ""
        if end and rest.startswith(end):
            self._in_calls, self._begun = False, True
            return rest[len(end) :]
        if begin and rest.startswith(begin):
            return rest[len(begin) :]
        if (end and end.startswith(rest)) or (begin and begin.startswith(rest)):
            self._held = text
            return ""
        self._in_calls, self._begun = False, True
        return text

    def _read_call(self, call: CallObject, text: str, pieces: list[CallPiece]) -> str:
        certain, at = "", 0
        while at < len(text) and not (call.done or call.failed):
            certain += call.push(text[at])
            at += 1
        self._tell(call, certain, pieces)
        if call.done:
            self._call = None
        elif call.failed:
            self._call, self._in_calls, self._begun = None, False, True
            if not self._told:
                self._give(call.raw, pieces)
        return text[at:]

    def _tell(self, call: CallObject, arguments: str, pieces: list[CallPiece]) -> None:
        if call.name is not None and not self._told and not call.failed:
            self._told = True
            self.calls += 1
            if self.calls <= self._most:
                pieces.append(CallBegin(call.name))
        if arguments and self._told and self.calls <= self._most:
            pieces.append(CallArguments(arguments))

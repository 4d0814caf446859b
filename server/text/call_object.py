"""One call of a tool as models write it, a JSON object, read as it comes."""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto

_ARGUMENTS = ("arguments", "parameters")
_KEYS = frozenset({"name", "type", "id", *_ARGUMENTS})
_SPACE = " \t\r\n"


class _At(Enum):
    KEY = auto()  # before a key, or the end
    IN_KEY = auto()
    COLON = auto()
    VALUE = auto()


class CallObject:
    """`{"name": NAME, "arguments": {...}}`, character by character, from its brace on.

    `name` is known once its value is complete. Arguments are handed out as they are written, once the name
    is known. `done`: it is complete; `failed`: it is something else, `raw` is all of it.
    `names`: those that a call may have; None: any.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        self.name: str | None = None
        self._raw: list[str] = []
        self.done = self.failed = False
        self._names = names
        self._at = _At.KEY
        self._depth = 0
        self._in_string = self._escaped = False
        self._key = self._value = ""
        self._space = ""  # in the arguments, perhaps after them
        self._arguments = ""  # written before the name
        self._has_arguments = False

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def push(self, char: str) -> str:
        """The part of the arguments that this makes certain."""
        self._raw.append(char)
        if not self._depth:
            self._depth = 1  # its own brace
            return ""
        match self._at:
            case _At.KEY:
                self._before_key(char)
            case _At.IN_KEY:
                self._in_key(char)
            case _At.COLON:
                self.failed |= char not in _SPACE + ":"
                self._at = _At.VALUE if char == ":" else self._at
            case _At.VALUE:
                self._in_value(char)
        return self._certain()

    def _before_key(self, char: str) -> None:
        if char == '"':
            self._at, self._key = _At.IN_KEY, ""
        elif char == "}":
            self._end()
        else:
            self.failed |= char not in _SPACE + ","

    def _in_key(self, char: str) -> None:
        if char != '"':
            self._key += char
            return
        self.failed |= self._key not in _KEYS
        self._has_arguments |= self._key in _ARGUMENTS
        self._at, self._value = _At.COLON, ""

    def _in_value(self, char: str) -> None:
        if not self._in_string and self._depth == 1 and char in ",}":
            self._value_ended()
            self._at = _At.KEY
            if char == "}":
                self._end()
            return
        self._nest(char)
        if self._key in _ARGUMENTS and not self._in_text():
            self._keep(char)
        else:
            self._value += char

    def _nest(self, char: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = not self._escaped and char == "\\"
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1

    def _in_text(self) -> bool:
        """Some models write the arguments as a string that holds JSON: shown when it is complete."""
        return bool(self._value) or (self._in_string and not self._arguments and self._depth == 1)

    def _keep(self, char: str) -> None:
        if char in _SPACE and not self._in_string:
            self._space += char if self._arguments or self._depth > 1 else ""
            return
        self._arguments += self._space + char
        self._space = ""

    def _value_ended(self) -> None:
        if self._key == "name":
            self._name_ended()
        elif self._key in _ARGUMENTS and self._value:
            try:
                self._arguments += str(json.loads(self._value))
            except ValueError:
                self._arguments += self._value
        self._space = ""

    def _name_ended(self) -> None:
        try:
            name = json.loads(self._value)
        except ValueError:
            name = None
        if isinstance(name, str) and (self._names is None or name in self._names):
            self.name = name
        else:
            self.failed = True

    def _end(self) -> None:
        self.done = self.name is not None
        self.failed |= self.name is None
        if self.done and not self._has_arguments:
            self._arguments = "{}"

    def _certain(self) -> str:
        if self.name is None:
            return ""
        certain, self._arguments = self._arguments, ""
        return certain

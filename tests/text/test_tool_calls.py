"""Calls of tools and reasoning in texts, whole and cut into any pieces."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.markers import split_at
from server.text.thinking import Thinking
from server.text.tool_calls import STYLES, CallArguments, CallBegin, CallPiece, ToolCalls, style_of

NAMES = ["find", "sum"]
FIND = '{"name": "find", "arguments": {"item": "a \\"b\\" }", "n": [1, {"x": 2}]}}'
ARGUMENTS = '{"item": "a \\"b\\" }", "n": [1, {"x": 2}]}'


def read(style: str, pieces: list[str], most: int = 128) -> list[CallPiece]:
    """What comes out, with neighbours of one kind joined."""
    parser = ToolCalls(STYLES[style], NAMES, most)
    found: list[CallPiece] = []
    for piece in [part for text in pieces for part in parser.push(text)] + parser.flush():
        last = found[-1] if found else None
        if isinstance(piece, str) and isinstance(last, str):
            found[-1] = last + piece
        elif isinstance(piece, CallArguments) and isinstance(last, CallArguments):
            found[-1] = CallArguments(last.text + piece.text)
        else:
            found.append(piece)
    return found


CALL = [CallBegin("find"), CallArguments(ARGUMENTS)]
SUM = [CallBegin("sum"), CallArguments("{}")]
CASES: list[tuple[str, str, list[Any]]] = [
    ("hermes", f"<tool_call>\n{FIND}\n</tool_call>", CALL),
    (
        "hermes",
        f'Wait.<tool_call>{FIND}</tool_call>\n<tool_call>\n{{"name": "sum"}}</tool_call>\n',
        ["Wait.", *CALL, *SUM],
    ),
    ("hermes", f"<tool_call>{FIND}</tool_call> done", [*CALL, " done"]),
    ("hermes", "a < b <tool_cal", ["a < b <tool_cal"]),
    ("hermes", "<tool_call>no call</tool_call>", ["no call</tool_call>"]),
    (
        "hermes",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        [CallBegin("other"), CallArguments("{}")],
    ),
    (
        "hermes",
        '<tool_call>{"name": "find", "arguments": {"a": 1',
        [CallBegin("find"), CallArguments('{"a": 1')],
    ),
    ("hermes", '<tool_call>{"na', ['{"na']),
    (
        "hermes",
        '<tool_call>{"arguments": {"a": 1}, "name": "find"}</tool_call>',
        [CallBegin("find"), CallArguments('{"a": 1}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "find", "arguments": "{\\"a\\": 1}"}</tool_call>',
        [CallBegin("find"), CallArguments('{"a": 1}')],
    ),
    ("llama3", '{"name": "find", "parameters": {"a": 1}}', [CallBegin("find"), CallArguments('{"a": 1}')]),
    (
        "llama3",
        '<|python_tag|>{"name": "find", "parameters": { "a" : 1 } }; {"name": "sum"}',
        [CallBegin("find"), CallArguments('{ "a" : 1 }'), *SUM],
    ),
    ("mistral", f'[TOOL_CALLS] [{FIND}, {{"name": "sum", "arguments": {{}}}}]', [*CALL, *SUM]),
    ("mistral", "[1, 2] is a list", ["[1, 2] is a list"]),
    ("json", f" {FIND}", CALL),
    ("json", f"[{FIND}]", CALL),
    ("json", '{"who": "Anna"}', ['{"who": "Anna"}']),
    ("json", '{"name": "Anna", "age": 3}', ['{"name": "Anna", "age": 3}']),
    ("json", "plain { text }", ["plain { text }"]),
]


@pytest.mark.parametrize(("style", "text", "want"), CASES)
def test_whole_texts(style: str, text: str, want: list[Any]) -> None:
    assert read(style, [text]) == want


@given(case=st.sampled_from(CASES), data=st.data())
def test_any_pieces_give_the_same(case: tuple[str, str, list[Any]], data: st.DataObject) -> None:
    style, text, want = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(style, pieces) == want


_PARTS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    FIND,
    "{",
    "}",
    "[",
    '"',
    "\\",
    ",",
    '"name"',
    ":",
    '"sum"',
    '"arguments"',
    " ",
    "\n",
    "x",
    "<",
    "tool_call>",
]


@given(st.sampled_from(sorted(STYLES)), st.lists(st.sampled_from(_PARTS), max_size=12), st.data())
def test_noise_in_any_pieces_gives_the_same(style: str, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(style, pieces) == read(style, [text])


def test_calls_beyond_the_most_are_left_out() -> None:
    text = f"<tool_call>{FIND}</tool_call><tool_call>{FIND}</tool_call>"
    assert read("hermes", [text], most=1) == CALL


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{{ tools }}<|python_tag|>", "llama3"),
        ("[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]", "mistral"),
        ("{{ tools | tojson }}", "json"),
        ("{{ messages }}", None),
    ],
)
def test_the_template_says_the_style(template: str, style: str | None) -> None:
    found = style_of(template)
    assert (found and found.name) == style


def thoughts(pieces: list[str], *, inside: bool) -> tuple[str, str]:
    thinking = Thinking(inside=inside)
    parts = [thinking.push(piece) for piece in pieces] + [thinking.flush()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@given(st.sampled_from([
    ("<think>so</think>yes", False, ("so", "yes")), ("\n<think>so", False, ("so", "")),
    ("so</think>\nyes", True, ("so", "\nyes")), ("yes <think>", False, ("", "yes <think>")),
    ("<thin", False, ("", "<thin")), ("a </thin", True, ("a </thin", "")), ("  ", False, ("", "  ")),
]), st.data())  # fmt: skip
def test_reasoning_in_any_pieces(case: tuple[str, bool, tuple[str, str]], data: st.DataObject) -> None:
    text, inside, want = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert thoughts(pieces, inside=inside) == want


def test_the_first_marker_counts() -> None:
    assert split_at("a<b>c<d>", ["<d>", "<b>"]) == ("a", "<b>", "c<d>")
    assert split_at("a<", ["<d>", "<b>"]) == ("a", None, "<")

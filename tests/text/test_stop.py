"""Stop strings in pieces against a search over the whole text."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from server.text.stop import StopAutomaton, StopStrings


def oracle(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """Letter by letter: the first moment at which the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end if include else end - max(map(len, ending))], True
    return text, False


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    st.booleans(),
)
@example(["aaa", "b"], ["ab", "aab"], False)
def test_against_the_oracle(pieces: list[str], stops: list[str], include: bool) -> None:
    checker = StopStrings(StopAutomaton(stops), include=include)
    shown = ""
    for piece in pieces:
        shown += checker.push(piece)
        if checker.stopped:
            break
    else:
        shown += checker.flush()
    assert (shown, checker.stopped) == oracle("".join(pieces), stops, include)


def test_holds_back_only_what_may_become_a_stop_string() -> None:
    checker = StopStrings(StopAutomaton(["###"]))
    assert checker.push("one #") == "one "
    assert checker.push("#") == ""
    assert checker.push(" two") == "## two"
    assert checker.push("###") == ""
    assert checker.stopped


class Counted(StopAutomaton):
    """Counts the look-ups."""

    looks = 0

    def __init__(self, stops: list[str]) -> None:
        super().__init__(stops)
        table, counted = self._next, self

        class Looks(dict):  # type: ignore[type-arg]  # as the one it stands for
            def get(self, key, default=None):  # type: ignore[no-untyped-def]  # as its base
                counted.looks += 1
                return table.get(key, default)

        self._next = Looks()


@given(
    st.lists(st.text("ab", min_size=1, max_size=60), min_size=1, max_size=4),
    st.text("ab", max_size=300),
)
@example(["a" * 1000 + "b"], "a" * 5000)
@example(["ab" * 500 + "c", "b" + "ab" * 400 + "d"], "ab" * 4000)
def test_a_character_costs_the_same_whatever_came_before(stops: list[str], text: str) -> None:
    """An adversary's text makes no state fall back more often than it has grown."""
    automaton = Counted(stops)
    checker = StopStrings(automaton)
    for char in text:
        checker.push(char)
        if checker.stopped:
            break
    assert automaton.looks <= 2 * len(text)


def test_memory_grows_with_the_characters_and_is_shared() -> None:
    stops = [chr(200 + i) + "x" * 1023 for i in range(4)]
    automaton = StopAutomaton(stops)
    assert len(automaton.length) == len(automaton.found) == 4 * 1024 + 1
    one, other = StopStrings(automaton), StopStrings(automaton)
    assert one.push("xx") == "xx"
    assert other.push(stops[1][:5]) == ""
    assert one.push("y") == "y"
    assert other.flush() == stops[1][:5]

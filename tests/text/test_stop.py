"""Stop strings in pieces against a search over the whole text."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from server.text.stop import StopStrings


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
    checker = StopStrings(stops, include=include)
    shown = ""
    for piece in pieces:
        shown += checker.push(piece)
        if checker.stopped:
            break
    else:
        shown += checker.flush()
    assert (shown, checker.stopped) == oracle("".join(pieces), stops, include)


def test_holds_back_only_what_may_become_a_stop_string() -> None:
    checker = StopStrings(["###"])
    assert checker.push("one #") == "one "
    assert checker.push("#") == ""
    assert checker.push(" two") == "## two"
    assert checker.push("###") == ""
    assert checker.stopped

"""What a drill is: something that goes wrong, what Chorus promises of it, and how to play it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from load_tests.drills.site import Site

Play = Callable[[Site], Awaitable[str]]
ModelOf = Callable[[Path, Path], Path]

CASES: dict[int, Case] = {}


class PromiseBroken(Exception):
    """What was seen is not what was promised."""


class CannotPlay(Exception):
    """This machine lacks what the case needs; says what."""


@dataclass(frozen=True)
class Case:
    """`number`: in docs/reliability.md. `flags`: of the server; cases with equal flags share one.

    `play` does it and returns what was seen; it raises PromiseBroken, or CannotPlay. `own_server`: nobody
    may share the server, because the case ends it or damages it. `model`: makes, of the base model's folder
    and an empty one, the folder to serve instead.
    """

    number: int
    title: str
    promise: str
    play: Play
    flags: tuple[str, ...] = ()
    own_server: bool = False
    model: ModelOf | None = None
    limit_s: float = 120.0


def case(
    number: int,
    title: str,
    promise: str,
    *flags: str,
    own_server: bool = False,
    model: ModelOf | None = None,
    limit_s: float = 120.0,
) -> Callable[[Play], Play]:
    """Puts what it decorates among the cases."""

    def add(play: Play) -> Play:
        if number in CASES:
            raise ValueError(f"case {number} is there twice")
        CASES[number] = Case(number, title, promise, play, flags, own_server, model, limit_s)
        return play

    return add


def expect(condition: object, seen: str) -> None:
    """Raises PromiseBroken with what was seen instead."""
    if not condition:
        raise PromiseBroken(seen)

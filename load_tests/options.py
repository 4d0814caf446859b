"""How the commands read options that are more than a number or a path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TypeVar

import typer

S = TypeVar("S")
T = TypeVar("T")


class DTypeOption(StrEnum):
    """Types that adapters can be written in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@contextmanager
def judged() -> Iterator[None]:
    """Around what reads options: a ValueError is shown as a wrong one."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def parsed(parse: Callable[[S], T], source: S) -> T:
    """`parse(source)`, with a ValueError shown as a wrong option."""
    with judged():
        return parse(source)


def token_range(text: str) -> tuple[int, int]:
    """`LOW:HIGH`."""
    low, _, high = text.partition(":")
    return int(low), int(high)


def counts(text: str) -> list[int]:
    """`8,16,32`. Raises ValueError when one is below 1."""
    numbers = [int(number) for number in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(f"{text!r}: every number must be at least 1")
    return numbers

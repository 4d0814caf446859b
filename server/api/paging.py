"""Lists a page at a time, in OpenAI's shape: `limit`, `after`, `first_id`, `last_id`, `has_more`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Self

import msgspec
from starlette.requests import Request

from server.errors import InvalidRequest

_ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True)
class Page:
    """Which part of a list is asked for: at most `limit` items of those after the one with id `after`."""

    limit: int
    after: str

    @classmethod
    def of(cls, request: Request, *, default: int, most: int) -> Self:
        """Raises InvalidRequest for a limit that is none, or is over `most`."""
        text = request.query_params.get("limit", str(default))
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and 0 < int(text) <= most):
            raise InvalidRequest(f"limit: a number from 1 to {most}", param="limit")
        return cls(int(text), request.query_params.get("after", ""))

    @property
    def wanted(self) -> int:
        """How many items to look for: one more tells that there are more."""
        return self.limit + 1

    def encode(self, items: Iterable[tuple[str, object]]) -> bytes:
        """The body, of up to `wanted` items with their ids. Item after item, for a thread beside the event
        loop: to encode thousands in one call would let no other thread run meanwhile."""
        iterator = iter(items)
        ids, encoded = [], []
        for item_id, item in islice(iterator, self.limit):
            ids.append(item_id)
            encoded.append(_ENCODER.encode(item))
        end = {
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
            "has_more": next(iterator, None) is not None,
        }
        head = b'{"object":"list","data":[' + b",".join(encoded) + b"],"
        return head + _ENCODER.encode(end)[1:]

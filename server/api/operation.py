"""What is said of a route beside its path: what it takes and gives, and how it shows in figures and logs.

The routes read their own bodies (bounded, beside the event loop) and encode their own answers, so FastAPI
sees neither. The facts stand at the route, where `/openapi.json`, the request log and the tests find them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import pydantic
from fastapi import APIRouter
from starlette.routing import Route

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

_ATTRIBUTE = "chorus_operation"


@dataclass(frozen=True)
class Operation:
    """The facts of one endpoint, which it decorates below its route."""

    answers: Mapping[int, Any]  # status -> type of the JSON, or `str` for text
    body: type[pydantic.BaseModel] | None = None
    body_required: bool = True
    form: Mapping[str, Any] | None = None  # JSON schema of a multipart body
    chunk: Any = None  # type of the events of a stream
    counted: bool = False  # one of the inference requests in `/metrics`
    quiet: bool = False  # asked for all the time, so its log lines are for debugging

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _ATTRIBUTE, self)
        return endpoint

    @classmethod
    def of(cls, endpoint: object) -> Self | None:
        """None of what is not decorated: FastAPI's own routes, and a request that met no route."""
        return getattr(endpoint, _ATTRIBUTE, None)


def operations(*routers: APIRouter) -> Iterator[tuple[str, str, Operation]]:
    """Path, method and facts of every route. Raises ValueError for one without facts."""
    for router in routers:
        for route in router.routes:
            assert isinstance(route, Route)  # nothing is mounted here
            facts = Operation.of(route.endpoint)
            if facts is None:
                raise ValueError(f"{route.path} has no Operation")
            for method in sorted(route.methods or ()):
                yield route.path_format, method, facts

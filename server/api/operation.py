"""What is said of a route beside its path: what it takes and gives, and how it shows in figures and logs.

The routes read their own bodies (bounded, beside the event loop) and encode their own answers, so FastAPI
sees neither. The facts stand at the route, where `/openapi.json`, the request log and the tests find them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import pydantic
from fastapi import APIRouter
from starlette.routing import Route

from server.access.caller import Scope
from server.api.caller import caller_of

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

SEE_ADAPTERS: tuple[Scope, ...] = ("infer", "upload", "manage")

_ATTRIBUTE = "chorus_operation"


@dataclass(frozen=True)
class Operation:
    """The facts of one endpoint, which it decorates below its route."""

    answers: Mapping[int, Any]  # status -> type of the JSON, or `str` for text
    scopes: tuple[Scope, ...] = field(kw_only=True)  # a key needs one of them
    body: type[pydantic.BaseModel] | None = None
    body_required: bool = True
    form: Mapping[str, Any] | None = None  # JSON schema of a multipart body
    chunk: Any = None  # type of the events of a stream
    counted: bool = False  # one of the inference requests in `/metrics`
    quiet: bool = False  # asked for all the time, so its log lines are for debugging
    open: bool = False  # asks for no key

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint behind its scopes: whatever way the router came to it, a key needs one of them."""

        @functools.wraps(endpoint)
        async def guarded(**arguments: Any) -> Any:
            if not self.open:
                caller_of(arguments["request"]).require(*self.scopes)
            return await endpoint(**arguments)

        setattr(guarded, _ATTRIBUTE, self)
        return guarded  # type: ignore[return-value]  # the same to its callers

    @classmethod
    def of(cls, endpoint: object) -> Self | None:
        """None of what is not decorated: FastAPI's own routes, and a request that met no route."""
        return getattr(endpoint, _ATTRIBUTE, None)


def open_paths(*routers: APIRouter) -> frozenset[str]:
    """The paths that ask for no key."""
    return frozenset(path for path, _, facts in operations(*routers) if facts.open)


def operations(*routers: APIRouter) -> Iterator[tuple[str, str, Operation]]:
    """Path, method and facts of every route. Raises ValueError for one without facts."""
    for router in routers:
        for route in router.routes:
            assert isinstance(route, Route)  # nothing is mounted here
            facts = Operation.of(route.endpoint)
            if facts is None:
                raise ValueError(f"{route.path} has no Operation")
            if bool(facts.scopes) == facts.open:
                raise ValueError(f"{route.path} must name scopes, or be open")
            for method in sorted(route.methods or ()):
                yield route.path_format, method, facts

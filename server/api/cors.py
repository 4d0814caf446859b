"""Which pages of other sites may call this server from a browser: those that `--cors-origins` names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from server.base_model import StartError

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_SHOWN = ("x-request-id", "retry-after", "x-should-retry")  # headers of an answer that a page may read
_REMEMBERED_S = 600


@dataclass(frozen=True)
class AllowedOrigins:
    """Origins as browsers send them; `any`: whatever they send."""

    names: frozenset[str]
    any: bool = False

    @classmethod
    def of(cls, given: Iterable[str]) -> Self:
        """Raises StartError for what is no origin."""
        names = {name.strip().lower().rstrip("/") for name in given}
        for name in names - {"*"}:
            parts = urlsplit(name)
            if not parts.netloc or name != f"{parts.scheme}://{parts.netloc}":
                raise StartError(f"--cors-origins {name}: must be like https://app.example, or *")
        return cls(frozenset(names - {"*"}), "*" in names)

    def have(self, headers: Headers) -> bool:
        """Whether a request says that it is of a page of theirs, and of no other."""
        origins = headers.getlist("origin")
        return bool(origins) and all(self.any or origin.strip().lower() in self.names for origin in origins)


class Cors:
    """ASGI middleware, before the door: a browser asks without a key whether a page may use one."""

    def __init__(self, app: ASGIApp, origins: AllowedOrigins) -> None:
        self._app = app
        self._origins = origins
        self._cors = CORSMiddleware(
            app,
            allow_origins=["*"] if origins.any else sorted(origins.names),
            allow_methods=_METHODS,
            allow_headers=["*"],
            expose_headers=_SHOWN,
            max_age=_REMEMBERED_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        theirs = scope["type"] == "http" and self._origins.have(Headers(scope=scope))
        await (self._cors if theirs else self._app)(scope, receive, send)

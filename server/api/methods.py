"""The methods that paths take, and HEAD and OPTIONS of the routes that there are."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
_FOUND = ("endpoint", "route", "path_params")  # what the router says of a request, for its log line


def methods_of(routes: Iterable[BaseRoute], scope: Scope) -> list[str]:
    """All that a path takes (RFC 9110, 15.5.6). A route tells its own only, and a path may have several."""
    routes = list(routes)
    return [
        method
        for method in _METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)
    ]


class HeadAndOptions:
    """ASGI middleware. HEAD is GET without a body; OPTIONS names the methods that a path takes."""

    def __init__(self, app: ASGIApp, routers: Iterable[APIRouter]) -> None:
        self._app = app
        self._routes = [route for router in routers for route in router.routes if isinstance(route, Route)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"] if scope["type"] == "http" else ""
        if method == "HEAD":
            await self._head(scope, receive, send)
        elif method == "OPTIONS" and (methods := self._methods(scope)):
            await Response(status_code=204, headers={"allow": ", ".join(methods)})(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The server looks at the method of its own scope when it sends: the app gets another."""

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, receive, without_body)
        finally:
            scope.update({name: asked[name] for name in _FOUND if name in asked})

    def _methods(self, scope: Scope) -> list[str]:
        methods = methods_of(self._routes, scope)
        added = {"OPTIONS", "HEAD"} if "GET" in methods else {"OPTIONS"}
        return sorted(added.union(methods)) if methods else []

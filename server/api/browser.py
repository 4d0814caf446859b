"""What a page of some other site may not do through its visitor's browser.

A browser on the server's machine or network reaches the server although its attacker does not. Three checks
need no secret: a name that the attacker made to point here is not one of the server's (DNS rebinding), a
browser says which site a request comes from, and it sends JSON across sites only after asking.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from fastapi import APIRouter
from starlette.datastructures import Headers
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.cors import AllowedOrigins
from server.api.drain import changes_something
from server.api.operation import Operation
from server.config import Settings
from server.errors import Forbidden, InvalidRequest, UnsupportedMedia, WrongHost

ANY = "*"

_LOOPBACK_NAMES = {"localhost"}


@dataclass(frozen=True)
class HostNames:
    """Which names the server answers to.

    `extra` is what the operator gave, with and without ports. `.example.com` is that and all that end so.
    """

    own: frozenset[str]
    extra: frozenset[str]
    any_address: bool  # listens on all of the machine's addresses, which are not known here

    @classmethod
    def of(cls, settings: Settings) -> Self:
        bound = settings.host.strip("[]").lower()
        everywhere = _is_address(bound) and ipaddress.ip_address(bound).is_unspecified
        own = _LOOPBACK_NAMES | ({socket.gethostname().lower()} if everywhere else {bound})
        given = {name.lower() for name in settings.allowed_hosts}
        return cls(frozenset(own), frozenset(given | {_name_of(name) for name in given}), everywhere)

    def has(self, name: str) -> bool:
        if name in self.own or self.lists(name) or ANY in self.extra:
            return True
        if not _is_address(name):
            return name.endswith(".localhost")
        return self.any_address or ipaddress.ip_address(name).is_loopback

    def lists(self, name: str) -> bool:
        """Whether the operator gave it; a name with a port only if it was given with that."""
        return name in self.extra or any(
            each.startswith(".") and (name.endswith(each) or name == each[1:]) for each in self.extra
        )


class BrowserGuard:
    """ASGI middleware. Raises WrongHost, Forbidden and UnsupportedMedia."""

    def __init__(
        self, app: ASGIApp, hosts: HostNames, routers: Iterable[APIRouter], origins: AllowedOrigins
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = origins
        self._forms = [
            route
            for router in routers
            for route in router.routes
            if isinstance(route, Route) and (facts := Operation.of(route.endpoint)) and facts.form
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host = self._check_host(headers, scope)
            if changes_something(scope):
                self._check_origin(headers, host)
                self._check_type(headers, scope)
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers, scope: Scope) -> str:
        given = headers.getlist("host")
        if not given and scope["http_version"] == "1.0":
            return ""  # some probes; no browser speaks that
        if len(given) != 1:
            raise InvalidRequest("host: a request has exactly one.", param="host")
        name = _name_of(given[0])
        if not self._hosts.has(name):
            raise WrongHost(
                f"host: {name[:100]!a} is not a name of this server (--allowed-hosts).", param="host"
            )
        return given[0].lower()

    def _check_origin(self, headers: Headers, host: str) -> None:
        if self._origins.have(headers):
            return
        if headers.get("sec-fetch-site", "").strip().lower() == "cross-site":
            raise Forbidden("sec-fetch-site: pages of other sites may change nothing here.", param="origin")
        for origin in headers.getlist("origin"):
            authority = urlsplit(origin.strip().lower()).netloc if origin.isascii() else ""
            if not authority or (authority != host and not self._hosts.lists(authority)):
                raise Forbidden("origin: pages of other sites may change nothing here.", param="origin")

    def _check_type(self, headers: Headers, scope: Scope) -> None:
        given = headers.getlist("content-type")
        if not given:
            if "transfer-encoding" not in headers and headers.get("content-length", "0") == "0":
                return
            raise UnsupportedMedia("content-type: must be application/json.", param="content-type")
        types = {each.partition(";")[0].strip().lower() for each in given}
        if types == {"application/json"} or (types == {"multipart/form-data"} and self._takes_form(scope)):
            return
        allowed = "application/json" + (" or multipart/form-data" if self._takes_form(scope) else "")
        raise UnsupportedMedia(
            f"content-type: must be {allowed}, not {given[0][:100]!a}.", param="content-type"
        )

    def _takes_form(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] is Match.FULL for route in self._forms)


def _name_of(host: str) -> str:
    """`Example.com:8000` -> `example.com`, `[::1]:8000` -> `::1`."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name = host.partition(":")[0] if host.count(":") == 1 else host
    return name.removesuffix(".") if name != "." else name


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

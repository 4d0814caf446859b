"""Who asks: a tenant, by a key or without one, and what he may do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self, get_args

from server.errors import InsufficientScope, InvalidRequest

Scope = Literal["infer", "upload", "manage", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

DEFAULT_TENANT = "default"  # the operator's, and everybody's on a server without keys

_TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_OF_THE_OPERATOR: frozenset[Scope] = frozenset(("metrics", "admin"))


@dataclass(frozen=True)
class Caller:
    """Whoever makes a request. `key_id` is None where no key was asked for, or a static one was given."""

    tenant: str
    key_id: str | None
    scopes: frozenset[Scope]

    def may(self, *scopes: Scope) -> bool:
        """Whether he has one of them. `admin` is all of them."""
        return "admin" in self.scopes or not self.scopes.isdisjoint(scopes)

    def require(self, *scopes: Scope) -> None:
        """Raises InsufficientScope unless he has one of them."""
        if not self.may(*scopes):
            raise InsufficientScope(scopes)

    def acting_for(self, tenant: str) -> Self:
        """The same as one of `tenant`. Raises InvalidRequest for a bad name, InsufficientScope for all but
        admins."""
        check_tenant(tenant, "x-chorus-tenant")
        if tenant != self.tenant:
            self.require("admin")
        return dataclasses.replace(self, tenant=tenant)


def anybody() -> Caller:
    """Who asks a server that wants no keys: there everyone may do everything."""
    return Caller(DEFAULT_TENANT, None, frozenset(SCOPES))


def check_tenant(tenant: str, param: str = "tenant") -> None:
    """Raises InvalidRequest unless it follows the rule."""
    if not _TENANT.fullmatch(tenant):
        raise InvalidRequest(
            f"{param}: 1 to 63 lowercase letters, digits and . _ -, beginning with a letter or digit",
            param=param,
        )


def check_scopes(scopes: Iterable[str], tenant: str) -> tuple[Scope, ...]:
    """The scopes in their order, each once. Raises InvalidRequest for unknown ones, none, and those that see
    all of the server where the tenant is not the operator's."""
    wanted = set(scopes)
    if unknown := wanted - set(SCOPES):
        raise InvalidRequest(
            f"scopes: {sorted(unknown)[0][:40]!r} is none of {', '.join(SCOPES)}", param="scopes"
        )
    if not wanted:
        raise InvalidRequest(f"scopes: at least one of {', '.join(SCOPES)}", param="scopes")
    if tenant != DEFAULT_TENANT and (beyond := wanted & _OF_THE_OPERATOR):
        raise InvalidRequest(
            f"scopes: {sorted(beyond)[0]} is for keys of the tenant `{DEFAULT_TENANT}` alone, because it "
            "shows the whole server",
            param="scopes",
        )
    return tuple(scope for scope in SCOPES if scope in wanted)

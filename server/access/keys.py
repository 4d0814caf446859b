"""API keys: what one looks like, and what is kept of it.

A key is `chorus-<id>-<secret>`. The id is public and finds the key; the secret is 256 random bits, so its
SHA-256 can be kept as it is: a slow hash (bcrypt, argon2) makes guessing a *chosen* word dear, here there is
nothing to guess, and it would make every request dear instead.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Literal, TypedDict

from server.access.caller import Caller, Scope

KeyState = Literal["active", "expired", "revoked"]

_ID_BYTES = 6
_SECRET_BYTES = 32
_KEY = re.compile(rf"chorus-([0-9a-f]{{{2 * _ID_BYTES}}})-[A-Za-z0-9_-]{{43}}")


@dataclass(frozen=True)
class ApiKey:
    """What is kept of a key. Times are seconds since 1970."""

    id: str
    digest: str  # hex SHA-256 of the whole key
    tenant: str
    name: str  # what it is for, in its maker's words
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    last_used: float | None = None

    @property
    def caller(self) -> Caller:
        return Caller(self.tenant, self.id, frozenset(self.scopes))

    def usable(self, now: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class KeyView(TypedDict):
    """What is known of a key. Times are seconds since 1970; `last_used` is written now and then."""

    object: Literal["api_key"]
    id: str
    name: str
    tenant: str
    scopes: list[Scope]
    state: KeyState
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used: float | None


def new_key() -> tuple[str, str]:
    """An id and the key itself, which is told once and not kept."""
    key_id = secrets.token_hex(_ID_BYTES)
    return key_id, f"chorus-{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"


def id_of(text: str) -> str | None:
    """The id in a key; None of what does not look like one."""
    match = _KEY.fullmatch(text)
    return match[1] if match else None


def digest_of(text: str) -> str:
    """Hex SHA-256, of anything."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def view(key: ApiKey, now: float) -> KeyView:
    """What is shown of it."""
    return {
        "object": "api_key",
        "id": key.id,
        "name": key.name,
        "tenant": key.tenant,
        "scopes": list(key.scopes),
        "state": "revoked" if key.revoked_at is not None else "active" if key.usable(now) else "expired",
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used": key.last_used,
    }

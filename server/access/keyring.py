"""The keys that this server takes, and whose they are."""

from __future__ import annotations

import dataclasses
import hmac
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from server.access.caller import DEFAULT_TENANT, SCOPES, Caller, anybody, check_scopes, check_tenant
from server.access.flusher import Flusher
from server.access.keys import ApiKey, digest_of, id_of, new_key
from server.errors import InvalidRequest, NotFound, Unauthorized

_MAX_NAME = 200  # characters
_MAX_KEY = 512  # characters; what is longer is not hashed
_NOTE_SECONDS = 60.0  # between two writes of when keys were used

_NO_DIGEST = "0" * 64  # compared with where there is no key of that id, so that finding none takes as long

_log = logging.getLogger(__name__)


class KeyStore(Protocol):
    """Where keys survive a restart. Every call may wait for a disk, and belongs in a thread."""

    def load(self) -> list[ApiKey]: ...

    def insert(self, key: ApiKey) -> None: ...

    def revoke(self, key_id: str, at: float) -> None: ...

    def note_used(self, used: dict[str, float]) -> None: ...


class Keyring:
    """Static keys of the settings and those of the registry; all of them in memory. Thread-safe.

    A static key has every scope and belongs to the default tenant. `wanted` False: nobody needs a key.
    """

    def __init__(self, static: Sequence[str], store: KeyStore, *, wanted: bool = True) -> None:
        self._static = tuple(map(digest_of, static))
        self._store = store
        self._wanted = wanted
        self._keys = {key.id: key for key in store.load()}
        self._writer = threading.Lock()
        self._used: dict[str, float] = {}  # id -> when, of what is not written yet
        self._closed = False
        self._noter = Flusher(self.flush, _NOTE_SECONDS, "key-use")

    @property
    def asks(self) -> bool:
        """Whether a request needs a key: from the first key on, even when all are revoked."""
        return self._wanted and bool(self._static or self._keys)

    @property
    def usable(self) -> int:
        """How many keys open the door now."""
        now = time.time()
        return len(self._static) + sum(key.usable(now) for key in list(self._keys.values()))

    def identify(self, presented: str | None) -> Caller:
        """Whose key it is. Raises Unauthorized for none, a wrong, a revoked and an expired one, all alike.

        Memory only, and the same work for every key: one hash, one look-up by the public id, one comparison
        in constant time for each static key and one more.
        """
        if not self.asks:
            return anybody()
        if not presented:
            raise Unauthorized("This server needs an API key.", wrong=False)
        text = presented if len(presented) <= _MAX_KEY else ""
        digest = digest_of(text)
        static = [hmac.compare_digest(digest, known) for known in self._static]
        key = self._keys.get(id_of(text) or "")
        stored = hmac.compare_digest(digest, key.digest if key else _NO_DIGEST)
        now = time.time()
        if key is not None and stored and key.usable(now):
            self._note(key.id, now)
            return key.caller
        if any(static):
            return Caller(DEFAULT_TENANT, None, frozenset(SCOPES))
        raise Unauthorized("This API key is not valid.", wrong=True)

    def known(self) -> list[ApiKey]:
        """All, revoked ones too, oldest first, with when they were used last as it is known in memory."""
        known = list(self._keys.values())
        used = dict(self._used)
        return sorted(
            (dataclasses.replace(key, last_used=used.get(key.id, key.last_used)) for key in known),
            key=lambda key: (key.created_at, key.id),
        )

    def create(
        self,
        name: str,
        scopes: Iterable[str],
        *,
        tenant: str = DEFAULT_TENANT,
        lifetime_s: float | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key and its text, which is not kept. Raises InvalidRequest. Writes: in a thread.

        From the first one on every request needs a key, so that one must be able to make others.
        """
        check_tenant(tenant)
        wanted = check_scopes(scopes, tenant)
        if len(name) > _MAX_NAME or not name.isprintable():
            raise InvalidRequest(f"name: at most {_MAX_NAME} printable characters", param="name")
        key_id, text = new_key()
        now = time.time()
        expires_at = None if lifetime_s is None else now + lifetime_s
        key = ApiKey(key_id, digest_of(text), tenant, name, wanted, now, expires_at)
        with self._writer:
            if not self._static and not self._keys and ("admin" not in wanted or expires_at is not None):
                raise InvalidRequest(
                    "scopes: the first key needs `admin` and no end, or nobody could make another",
                    param="scopes",
                )
            self._store.insert(key)
            self._keys[key_id] = key
        return key, text

    def revoke(self, key_id: str) -> ApiKey:
        """Refused from now on; what runs by it goes on to its end. Idempotent. Raises NotFound.

        Writes: in a thread."""
        with self._writer:
            key = self._keys.get(key_id)
            if key is None:
                raise NotFound("There is no key of this id.", param="id")
            if key.revoked_at is None:
                key = dataclasses.replace(key, revoked_at=time.time())
                self._store.revoke(key_id, key.revoked_at or 0.0)
                self._keys[key_id] = key
        return dataclasses.replace(key, last_used=self._used.get(key_id, key.last_used))

    def flush(self) -> None:
        """Write when keys were used, now. Belongs in a thread."""
        used = dict(self._used)
        try:
            if used and not self._closed:
                self._store.note_used(used)
        except Exception:  # a full disk, say: the next flush has it
            _log.exception("could not write when the API keys were used")

    def close(self) -> None:
        """Idempotent. Before the store is."""
        self._noter.close()
        self._closed = True

    def _note(self, key_id: str, now: float) -> None:
        self._used[key_id] = now
        self._noter.when_due()

"""Which source an adapter's URI leads to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from server.config import Limits, Settings
from server.errors import Forbidden, InvalidRequest
from server.registry.sources.interface import Source
from server.registry.sources.local import LocalSource
from server.registry.store import Staging


class Sources:
    """Sources by the scheme of their URIs, and one itself. What has no scheme is a path: `file`."""

    def __init__(self, by_scheme: Mapping[str, Source]) -> None:
        self._by_scheme = by_scheme

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The table. What a source may read is settled here, once."""
        return cls(
            {
                "file": LocalSource(settings.lora_roots),
            }
        )

    def fill(self, uri: str, staging: Staging, limits: Limits) -> str:
        """See `Source`. Raises Forbidden for http, InvalidRequest for any other scheme that is not here."""
        source = self._by_scheme.get(scheme := _scheme(uri))
        if source is not None:
            return source.fill(uri, staging, limits)
        if scheme in ("http", "https"):
            raise Forbidden("This server does not fetch adapters over http.", param="source")
        raise InvalidRequest(f"Sources of the kind `{scheme[:20]}://` are not supported.", param="source")


def _scheme(uri: str) -> str:
    scheme, colon, rest = uri.partition(":")
    return scheme if colon and (scheme == "file" or rest.startswith("//")) else "file"

"""The seam between the registry and the places that adapters come from."""

from __future__ import annotations

from typing import Protocol

from server.config import Limits
from server.registry.store import Staging


class Source(Protocol):
    """A place that adapter files are fetched from. Each stands in the table of `table.py` by its scheme.

    An upload is not fetched: its bytes come when the client sends them, and a `fill` that waited for them
    would keep a thread for every slow client. So `upload.Upload` is fed piece by piece, and its `finish` ends
    as a `fill` does, with the files in staging and their provenance; `Publication.publish` judges both alike.
    """

    def fill(self, uri: str, staging: Staging, limits: Limits) -> str:
        """Put the two adapter files that `uri` names into `staging`; belongs in a thread.

        Returns the provenance that the version's record keeps, and that clients see. Nothing is judged here
        but size. Raises Forbidden, NotFound, InvalidRequest, TooLarge, UnsupportedMedia with `param`
        "source" or the name of a file, InsufficientStorage. No message holds a path.
        """
        ...

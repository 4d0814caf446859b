"""Which base model a data folder was made for: its adapters mean nothing beside other weights."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from server.registry.catalogue import Catalogue

_FACT = "base_model"


class OtherBaseModelError(RuntimeError):
    """This data folder was made for another base model."""


def check_base_model(data_dir: Path, fingerprint: str) -> None:
    """Note whose folder it is, if nobody has yet. By the holder of its lock, before the model is loaded.

    Raises OtherBaseModelError that names the file and what to do.
    """
    path = data_dir / "registry.db"
    with closing(Catalogue(path)) as catalogue:
        known = catalogue.fact(_FACT)
        if known is None:
            catalogue.set_fact(_FACT, fingerprint)
        elif known != fingerprint:
            raise OtherBaseModelError(
                f"{path} belongs to a base model with other weights ({known[:12]}, this one is "
                f"{fingerprint[:12]}), whose adapters would answer wrongly here: choose another --data-dir, "
                "or start the model that it belongs to."
            )

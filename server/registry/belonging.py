"""Which base model a data folder was made for: its adapters mean nothing beside other weights."""

from __future__ import annotations

from server.registry.data_folder import DataFolder
from server.registry.store import DataFolderError

_FACT = "base_model"


class OtherBaseModelError(DataFolderError):
    """This data folder was made for another base model."""


def check_base_model(folder: DataFolder, fingerprint: str) -> None:
    """Note whose folder it is, if nobody has yet. Before the model is loaded.

    Raises OtherBaseModelError that names the file and what to do.
    """
    known = folder.catalogue.fact(_FACT)
    if known is None:
        folder.catalogue.set_fact(_FACT, fingerprint)
    elif known != fingerprint:
        raise OtherBaseModelError(
            f"{folder.store.data_dir / 'registry.db'} belongs to a base model with other weights "
            f"({known[:12]}, this one is {fingerprint[:12]}), whose adapters would answer wrongly here: "
            "choose another --data-dir, or start the model that it belongs to."
        )

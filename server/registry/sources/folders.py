"""The adapters folder: what lies in it is registered at start. It is read, never written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from server.errors import ChorusError, Conflict
from server.peft.format import CONFIG_NAME
from server.registry.records import Published
from server.registry.registry import Registry
from server.registry.sources.local import copy_folder
from server.registry.store import FILE_NAMES

FOLDER_SOURCE = "folder:"
_DEPTH = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderOutcome:
    """What came of one folder. `error`: why it was refused. `published`: None where nothing was written, as
    when it was registered before. `gone`: it is there no longer, and its name is not served any more."""

    name: str
    error: str | None = None
    published: Published | None = None
    gone: bool = False


def register_tree(registry: Registry, root: Path | None) -> list[FolderOutcome]:
    """Make each PEFT folder under `root` an adapter named by its path below `root`.

    Unchanged folders are not read again, changed ones become a new version, and names that came from a
    folder alone go when it is there no longer. A name that was uploaded is left alone. Nothing in a folder
    stops the start: what is wrong is logged, listed as failed and returned.
    """
    if root is not None and not root.is_dir():
        _log.error("the adapters folder %s does not exist; what came from it before is kept", root)
        return []
    folders = dict(adapter_folders(root)) if root is not None else {}
    stamps = registry.folder_stamps()

    def register(name: str) -> FolderOutcome:
        outcome = _register(registry, name, folders[name], stamps.get(name))
        if outcome.error is not None:
            _log.error("adapter folder %s was not registered: %s", name, outcome.error)
            registry.failed(name, outcome.error)
        return outcome

    with ThreadPoolExecutor(4, thread_name_prefix="adapter-folder") as pool:
        outcomes = list(pool.map(register, folders))
    for name in stamps.keys() - folders.keys():
        sources = [version.version.source for version in registry.get(name).versions]
        if all(source.startswith(FOLDER_SOURCE) for source in sources):
            _log.info("adapter %s: its folder is gone, so it is not served any more", name)
            registry.delete(name)
            outcomes.append(FolderOutcome(name, gone=True))
    return outcomes


def _register(registry: Registry, name: str, folder: Path, known_stamp: str | None) -> FolderOutcome:
    try:
        stamp = folder_stamp(folder)
        if stamp is not None and stamp == known_stamp:
            return FolderOutcome(name)
        with registry.publication(create=True, replace=known_stamp is not None) as publication:
            publication.begin(name)
            copy_folder(folder, publication.staging)
            published = publication.publish(FOLDER_SOURCE + name, stamp=stamp)
        return FolderOutcome(name, published=published)
    except Conflict:
        return FolderOutcome(name, "an adapter of this name was uploaded and is served instead of the folder")
    except ChorusError as error:
        return FolderOutcome(name, error.message)
    except OSError as error:
        return FolderOutcome(name, f"its files cannot be read: {error.strerror}")


def folder_stamp(folder: Path) -> str | None:
    """Changes whenever one of the two files is written or replaced; None when one is missing."""
    try:
        stats = [(folder / name).stat() for name in FILE_NAMES]
    except FileNotFoundError:
        return None
    return " ".join(f"{s.st_dev}:{s.st_ino}:{s.st_size}:{s.st_mtime_ns}" for s in stats)


def adapter_folders(root: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder) of everything under `root` that holds an adapter_config.json, by name.

    The name is the path below `root`. Hidden folders are passed over.
    """

    def walk(folder: Path, name: str, depth: int) -> Iterator[tuple[str, Path]]:
        if name and (folder / CONFIG_NAME).exists():
            yield name, folder
        elif depth:
            try:
                entries = sorted(folder.iterdir())
            except OSError:  # unreadable; what lies beside it is still registered
                return
            for entry in entries:
                if entry.is_dir() and not entry.name.startswith("."):
                    yield from walk(entry, f"{name}/{entry.name}".lstrip("/"), depth - 1)

    return walk(root, "", _DEPTH)

"""The adapters folder: what lies in it is registered at start. It is read, never written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from server.errors import ChorusError, Conflict
from server.peft.format import CONFIG_NAME
from server.registry.registry import Registry
from server.registry.sources.local import copy_folder
from server.registry.store import FILE_NAMES

FOLDER_SOURCE = "folder:"
_DEPTH = 4

_log = logging.getLogger(__name__)


def register_tree(registry: Registry, root: Path | None) -> list[tuple[str, str | None]]:
    """Make each PEFT folder under `root` an adapter named by its path below `root`.

    Unchanged folders are not read again, changed ones become a new version, and names that came from a
    folder alone go when it is there no longer. A name that was uploaded is left alone. Nothing in a folder
    stops the start: what is wrong is logged, listed as failed and returned, by name (None: all is well).
    """
    if root is not None and not root.is_dir():
        _log.error("the adapters folder %s does not exist; what came from it before is kept", root)
        return []
    folders = dict(adapter_folders(root)) if root is not None else {}
    stamps = registry.folder_stamps()

    def register(name: str) -> str | None:
        reason = _register(registry, name, folders[name], stamps.get(name))
        if reason is not None:
            _log.error("adapter folder %s was not registered: %s", name, reason)
            registry.failed(name, reason)
        return reason

    with ThreadPoolExecutor(4, thread_name_prefix="adapter-folder") as pool:
        outcome = list(zip(folders, pool.map(register, folders), strict=True))
    for name in stamps.keys() - folders.keys():
        sources = [version.version.source for version in registry.get(name).versions]
        if all(source.startswith(FOLDER_SOURCE) for source in sources):
            _log.info("adapter %s: its folder is gone, so it is not served any more", name)
            registry.delete(name)
    return outcome


def _register(registry: Registry, name: str, folder: Path, known_stamp: str | None) -> str | None:
    """Returns why it failed."""
    try:
        stamp = folder_stamp(folder)
        if stamp is not None and stamp == known_stamp:
            return None
        with registry.publication(create=True, replace=known_stamp is not None) as publication:
            publication.begin(name)
            copy_folder(folder, publication.staging)
            publication.publish(FOLDER_SOURCE + name, stamp=stamp)
        return None
    except Conflict:
        return "an adapter of this name was uploaded and is served instead of the folder"
    except ChorusError as error:
        return error.message
    except OSError as error:
        return f"its files cannot be read: {error.strerror}"


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

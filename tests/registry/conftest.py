from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.registry.records import Published
from server.registry.registry import Registry
from server.registry.sources.local import copy_folder
from tests.registry import adapter_files

Publish = Callable[..., Published]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def reopen(data_dir: Path) -> Iterator[Callable[[], Registry]]:
    """Opens the registry; called again, closes it first, as a restart does."""
    open_now: list[Registry] = []

    def reopen() -> Registry:
        if open_now:
            open_now.pop().close()
        open_now.append(adapter_files.open_registry(data_dir))
        return open_now[0]

    yield reopen
    for registry in open_now:
        registry.close()


@pytest.fixture
def registry(reopen: Callable[[], Registry]) -> Registry:
    return reopen()


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    """`publish(registry, name, seed=..., replace=...)` of a random adapter."""

    def publish(registry: Registry, name: str, *, seed: int = 0, replace: bool = True) -> Published:
        folder = adapter_files.write(tmp_path / uuid.uuid4().hex, adapter_files.files(seed=seed))
        with registry.publication(create=True, replace=replace) as publication:
            publication.begin(name)
            copy_folder(folder, publication.staging)
            return publication.publish("upload")

    return publish

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.server import Server


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model and adapters, in float32; tests leave it as they found it."""
    with Server(tmp_path_factory.mktemp("bundled") / "data") as server:
        yield server

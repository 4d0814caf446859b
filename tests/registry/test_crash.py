"""A server that is killed at any point of a publication: staging is swept, the old version serves."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from server.registry.registry import Registry
from tests.registry import adapter_files
from tests.registry.conftest import Publish

# Replaces version 1 of `a`, and is killed at the n-th of the calls that make it durable.
CHILD = """
import os, signal, sys
from pathlib import Path
from server.registry.sources.local import copy_folder
from tests.registry import adapter_files
import sqlalchemy as sa

data_dir, source, point = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def dies(real):
    def call(*args, **kwargs):
        if point == "before " + real.__name__:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if point == "after " + real.__name__:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

registry = adapter_files.open_registry(data_dir)
os.copy_file_range, os.fsync, Path.rename = dies(os.copy_file_range), dies(os.fsync), dies(Path.rename)
sa.event.listen(sa.Engine, "commit", dies(lambda connection: None))
with registry.publication(create=True, replace=True) as publication:
    publication.begin("a")
    copy_folder(source, publication.staging)
    publication.publish("upload")
    if point == "published":
        os.kill(os.getpid(), signal.SIGKILL)
print("done")
"""


@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("after copy_file_range", 1),
        ("before rename", 1),
        ("after rename", 1),
        ("before <lambda>", 1),
        ("published", 2),
    ],
)
def test_killed_while_it_publishes(
    data_dir: Path, tmp_path: Path, publish: Publish, point: str, number: int
) -> None:
    def reopened() -> Registry:
        return adapter_files.open_registry(data_dir)

    registry = reopened()
    publish(registry, "a", seed=1)
    registry.close()
    source = adapter_files.write(tmp_path / "new", adapter_files.files(seed=2))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(data_dir), str(source), point],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    registry = reopened()
    with registry.acquire("a") as lease:
        assert lease.version.number == number
        weights = (lease.version.path / "adapter_model.safetensors").read_bytes()
        assert weights == adapter_files.weights(seed=number)
    assert len(adapter_files.on_disk(data_dir)) == number
    assert adapter_files.staged(data_dir) == []
    assert publish(registry, "a", seed=3).version.number == number + 1
    registry.close()


def test_an_older_database_costs_no_adapter(data_dir: Path, publish: Publish) -> None:
    """An operator puts a backup of registry.db back, sees what it lacks, and puts the newer one back."""
    database, older, newer = (data_dir / name for name in ("registry.db", "older", "newer"))
    with closing(adapter_files.open_registry(data_dir)) as registry:
        publish(registry, "a", seed=1)
    shutil.copy(database, older)
    with closing(adapter_files.open_registry(data_dir)) as registry:
        publish(registry, "b", seed=2)
    shutil.copy(database, newer)
    shutil.copy(older, database)
    for _ in range(2):  # a second start leaves it where it is
        with closing(adapter_files.open_registry(data_dir)) as registry:
            assert [version.name for version in registry.current_versions()] == ["a"]
        assert len(list((data_dir / "orphans").iterdir())) == 1
    shutil.copy(newer, database)
    with closing(adapter_files.open_registry(data_dir)) as registry, registry.acquire("b") as lease:
        weights = (lease.version.path / "adapter_model.safetensors").read_bytes()
        assert weights == adapter_files.weights(seed=2)

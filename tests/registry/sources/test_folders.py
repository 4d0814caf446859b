"""The adapters folder at start."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from server.errors import ModelNotFound
from server.registry.registry import Registry
from server.registry.sources.folders import FolderOutcome, register_tree
from tests.registry import adapter_files
from tests.registry.conftest import Publish

Reopen = Callable[[], Registry]


def test_a_folder_tree_is_registered(
    reopen: Reopen, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "adapters"
    adapter_files.write(root / "sql", adapter_files.files(seed=1))
    adapter_files.write(root / "team" / "json", adapter_files.files(seed=2))
    adapter_files.write(root / "bad", {"adapter_config.json": adapter_files.config(r=5)} | {
        "adapter_model.safetensors": adapter_files.weights()
    })  # fmt: skip
    adapter_files.write(root / "not a name", adapter_files.files(seed=3))
    adapter_files.write(root / "pickle", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    adapter_files.write(root / ".hidden", adapter_files.files(seed=4))
    (root / "README.md").write_text("not an adapter")
    registry = reopen()
    with caplog.at_level(logging.ERROR):
        outcome = {each.name: each.error for each in register_tree(registry, root)}
    assert outcome["sql"] is None
    assert outcome["team/json"] is None
    assert {name for name, error in outcome.items() if error} == {"bad", "not a name", "pickle"}
    assert "safetensors" in (outcome["pickle"] or "")
    assert str(tmp_path) not in "".join(filter(None, outcome.values()))
    assert [v.name for v in registry.current_versions()] == ["sql", "team/json"]
    assert registry.get("bad").state == "failed"
    assert registry.get("bad").reason == outcome["bad"]
    assert "bad" in caplog.text
    registry.delete("bad")
    with pytest.raises(ModelNotFound):
        registry.get("bad")


def test_only_changed_folders_are_read_again(
    reopen: Reopen, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "adapters"
    adapter_files.write(root / "a", adapter_files.files(seed=1))
    adapter_files.write(root / "b", adapter_files.files(seed=2))
    registry = reopen()
    register_tree(registry, root)
    publish(registry, "a", seed=7)  # somebody replaced what came from the folder

    read: list[str] = []
    real = Registry.look
    monkeypatch.setattr(
        Registry, "look", lambda self, name, **kw: (read.append(name.name), real(self, name, **kw))[1]
    )
    registry = reopen()
    assert register_tree(registry, root) == [FolderOutcome("a"), FolderOutcome("b")]
    assert read == []
    assert registry.acquire("a").version.number == 2

    adapter_files.write(root / "b", adapter_files.files(seed=3))
    registry = reopen()
    register_tree(registry, root)
    assert read == ["b"]
    assert registry.acquire("b").version.number == 2


def test_folders_that_went_are_not_served_any_more(reopen: Reopen, publish: Publish, tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    for seed, name in enumerate(("stays", "goes", "was-replaced")):
        adapter_files.write(root / name, adapter_files.files(seed=seed))
    registry = reopen()
    register_tree(registry, root)
    publish(registry, "was-replaced", seed=7)
    publish(registry, "uploaded", seed=8)
    for name in ("goes", "was-replaced"):
        (root / name / "adapter_config.json").unlink()
    registry = reopen()
    gone = [each.name for each in register_tree(registry, root) if each.gone]
    assert gone == ["goes"]
    assert [v.name for v in registry.current_versions()] == ["stays", "uploaded", "was-replaced"]
    register_tree(registry, tmp_path / "mistyped")
    assert len(registry.current_versions()) == 3


def test_an_uploaded_name_is_not_taken_over_by_a_folder(
    registry: Registry, publish: Publish, tmp_path: Path
) -> None:
    version = publish(registry, "a", seed=1).version
    root = tmp_path / "adapters"
    adapter_files.write(root / "a", adapter_files.files(seed=2))
    (outcome,) = register_tree(registry, root)
    assert outcome.error is not None
    assert "uploaded" in outcome.error
    assert registry.acquire("a").version == version

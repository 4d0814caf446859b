"""Names, versions, leases, restarts: what an operator and a running request see of the registry."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from pathlib import Path

import pytest

from server.errors import ChorusError, Conflict, InvalidAdapter, InvalidRequest, ModelNotFound
from server.messages import LoraTarget
from server.peft.format import LoraAdapter
from server.registry.catalogue import Catalogue
from server.registry.registry import KEPT_VERSIONS, Registry
from server.registry.sources.local import copy_folder
from server.registry.store import DataDirInUseError
from tests.registry import adapter_files
from tests.registry.conftest import Publish

Reopen = Callable[[], Registry]


def test_a_published_adapter_can_be_acquired(registry: Registry, publish: Publish) -> None:
    published = publish(registry, "team/sql")
    assert published.outcome == "created"
    with registry.acquire("team/sql") as lease:
        version = lease.version
        assert (version.name, version.number, version.rank, version.alpha) == ("team/sql", 1, 4, 8.0)
        assert version.targets == ("q_proj", "v_proj")
        assert version.parameters == 4 * (16 + 8) * len(adapter_files.TARGETS)
        assert version.bytes == 4 * version.parameters
        assert (version.path / "adapter_model.safetensors").read_bytes() == adapter_files.weights()
        assert version.path.name == version.digest
    record = registry.get("team/sql")
    assert (record.state, record.current) == ("ready", version)


def test_unknown_names_are_not_found(registry: Registry, publish: Publish) -> None:
    publish(registry, "a")
    for name in ("b", "a@2", "a@", "@1", "a@0", "a@abcdef", "", "A", "a/", "../a", "a@" + "9" * 5000):
        with pytest.raises(ModelNotFound):
            registry.acquire(name)


def test_versions_by_number_and_digest(registry: Registry, publish: Publish) -> None:
    first = publish(registry, "a", seed=1).version
    second = publish(registry, "a", seed=2)
    assert second.outcome == "replaced"
    assert registry.acquire("a").version == second.version
    assert registry.acquire("a@1").version == first
    assert registry.acquire(f"a@{first.digest[:8]}").version == first
    assert registry.acquire(f"a@{first.digest}").version == first
    with pytest.raises(ModelNotFound):
        registry.acquire(f"a@{first.digest[:3]}")


def test_equal_content_makes_no_new_version(registry: Registry, publish: Publish, data_dir: Path) -> None:
    first = publish(registry, "a")
    again = publish(registry, "a")
    assert again.outcome == "unchanged"
    assert again.version == first.version
    other = publish(registry, "b")  # another name, the same content: one copy
    assert other.version.digest == first.version.digest
    assert adapter_files.on_disk(data_dir) == {first.version.digest}
    assert adapter_files.staged(data_dir) == []


def test_a_shared_copy_outlives_the_first_of_its_names(
    registry: Registry, publish: Publish, data_dir: Path
) -> None:
    digest = publish(registry, "a").version.digest
    publish(registry, "b")
    registry.delete("a")
    assert registry.holds(digest)
    with registry.acquire("b") as lease:
        assert (lease.version.path / "adapter_config.json").is_file()
    for retired in registry.delete("b"):
        retired.gone.result(timeout=10)
    assert adapter_files.on_disk(data_dir) == set()


BAD_NAMES = ["", "../x", "a/../b", "a//b", "/a", "a/", "-a", ".a", "a b", "a\0b", "a\n", "é", "a@1"]


@pytest.mark.parametrize("name", [*BAD_NAMES, "x" * 129, "x/" * 200 + "x"])
def test_bad_names_are_refused(registry: Registry, publish: Publish, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        publish(registry, name)
    assert caught.value.param == "name"
    assert list(registry.records()) == []


def test_the_base_models_name_is_taken(registry: Registry, publish: Publish) -> None:
    with pytest.raises(InvalidRequest, match="base model"):
        publish(registry, "base-model")


def test_only_the_name_that_clients_know_the_base_model_by_is_taken(data_dir: Path, publish: Publish) -> None:
    options = adapter_files.settings(model="org/llama")
    with closing(adapter_files.open_registry(data_dir, options=options, base_name="org/llama")) as registry:
        publish(registry, "llama")
        with pytest.raises(InvalidRequest, match="base model"):
            publish(registry, "org/llama")


def test_create_only_conflicts_with_a_known_name(registry: Registry, publish: Publish) -> None:
    publish(registry, "a")
    with pytest.raises(Conflict):
        publish(registry, "a", seed=1, replace=False)


def test_the_books_are_free_while_all_names_are_read(registry: Registry, publish: Publish) -> None:
    """Thousands of names take a while, in which requests still get their adapters and deletes go on."""
    for name in ("a", "b", "c"):
        publish(registry, name)
    records = registry.records()
    assert next(records).name == "a"
    assert registry.acquire("b").version.name == "b"
    registry.delete("c")
    assert [record.name for record in records] == ["b"]


def test_one_writer_per_name(registry: Registry, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is judged and stored: no other writes it and nobody deletes it."""
    publish(registry, "a")
    real = registry.judge

    def judge(folder: Path) -> LoraAdapter:
        monkeypatch.undo()
        assert [record.state for record in registry.records()] == ["ready", "validating"]
        for attempt in (lambda: publish(registry, "new"), lambda: registry.delete("new")):
            with pytest.raises((Conflict, ModelNotFound)):
                attempt()
        publish(registry, "b")
        return real(folder)

    monkeypatch.setattr(registry, "judge", judge)
    assert publish(registry, "new").outcome == "created"
    assert [record.name for record in registry.records()] == ["a", "b", "new"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("between", ["publish", "delete", "both"])
def test_who_publishes_first_wins(
    registry: Registry, publish: Publish, tmp_path: Path, known: bool, between: str
) -> None:
    """An upload that takes long holds the name from nobody, and undoes nothing that was done meanwhile."""
    if known:
        publish(registry, "a", seed=1)
    folder = adapter_files.write(tmp_path / "slow", adapter_files.files(seed=2))
    with registry.publication(create=True, replace=True) as slow:
        slow.begin("a")
        copy_folder(folder, slow.staging)
        if between != "delete":
            publish(registry, "a", seed=3)
        if between != "publish":
            with suppress(ModelNotFound):
                registry.delete("a")
        changed = known or between == "publish"
        with pytest.raises(Conflict, match="meanwhile") if changed else nullcontext():
            slow.publish("upload")
    assert registry._books.claims == set()
    publish(registry, "a", seed=4)


def test_fifty_writers_of_one_name(registry: Registry, publish: Publish, data_dir: Path) -> None:
    def attempt(_: int) -> str:
        try:
            return publish(registry, "a", replace=False).outcome
        except Conflict:
            return "conflict"

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(attempt, range(50)))
    assert sorted(outcomes) == ["conflict"] * 49 + ["created"]
    assert len(adapter_files.on_disk(data_dir)) == 1
    assert adapter_files.staged(data_dir) == []


def test_what_is_refused_leaves_nothing(registry: Registry, tmp_path: Path, data_dir: Path) -> None:
    content = adapter_files.files() | {"adapter_model.safetensors": adapter_files.weights(spoil=float("nan"))}
    folder = adapter_files.write(tmp_path / "bad", content)
    with registry.publication(create=True, replace=True) as publication:
        publication.begin("a")
        copy_folder(folder, publication.staging)
        with pytest.raises(InvalidAdapter) as caught:
            publication.publish("upload")
    assert caught.value.param == f"base_model.model.{adapter_files.TARGETS[0].name}.lora_B.weight"
    assert list(registry.records()) == []
    assert adapter_files.on_disk(data_dir) == set()
    assert adapter_files.staged(data_dir) == []


# leases


def test_a_deleted_adapter_stays_until_its_last_lease(
    registry: Registry, publish: Publish, data_dir: Path
) -> None:
    publish(registry, "a")
    first, second = registry.acquire("a"), registry.acquire("a")
    (retired,) = registry.delete("a")
    with pytest.raises(ModelNotFound):
        registry.acquire("a")
    assert registry.get("a").state == "draining"
    first.release()
    first.release()
    assert not retired.gone.done()
    assert (second.version.path / "adapter_model.safetensors").is_file()
    second.release()
    retired.gone.result(timeout=10)
    assert adapter_files.on_disk(data_dir) == set()
    with pytest.raises(ModelNotFound):
        registry.get("a")
    with pytest.raises(ModelNotFound):
        registry.delete("a")


def test_a_name_can_be_made_again_while_it_drains(
    registry: Registry, publish: Publish, data_dir: Path
) -> None:
    publish(registry, "a", seed=1)
    old = registry.acquire("a")
    registry.delete("a")
    new = publish(registry, "a", seed=2)
    assert new.outcome == "created"
    assert registry.acquire("a").version.digest != old.version.digest
    assert len(adapter_files.on_disk(data_dir)) == 2
    old.release()
    registry.acquire("a").release()
    assert registry.get("a").state == "ready"


def test_old_versions_are_kept_up_to_the_cap(registry: Registry, publish: Publish, data_dir: Path) -> None:
    lease = None
    for seed in range(KEPT_VERSIONS + 2):
        published = publish(registry, "a", seed=seed)
        lease = lease or registry.acquire("a@1")
    assert [v.version.number for v in registry.get("a").versions] == [3, 4, 5, 6, 7]
    with pytest.raises(ModelNotFound):
        registry.acquire("a@1")
    assert published.retired[0].version.number == 2
    published.retired[0].gone.result(timeout=10)
    assert len(adapter_files.on_disk(data_dir)) == KEPT_VERSIONS + 1
    assert lease is not None
    lease.release()
    publish(registry, "b", seed=100)  # the same thread removes in order
    for retired in registry.delete("b"):
        retired.gone.result(timeout=10)
    assert len(adapter_files.on_disk(data_dir)) == KEPT_VERSIONS


# restarts


def test_everything_is_back_after_a_restart(reopen: Reopen, publish: Publish, data_dir: Path) -> None:
    registry = reopen()
    publish(registry, "a", seed=1)
    version = publish(registry, "a", seed=2).version
    publish(registry, "b", seed=3)
    registry.set_pinned("a", True)
    registry.served(version, tokens=7)
    registry.served(version, tokens=5)
    before = registry.get("a")
    assert (before.requests, before.tokens) == (2, 12)
    registry = reopen()
    assert registry.get("a") == before
    assert [v.name for v in registry.current_versions()] == ["a", "b"]
    assert registry.pinned() == [version]
    assert registry.acquire("a@1").version.number == 1
    assert len(adapter_files.on_disk(data_dir)) == 3


def test_deleted_adapters_stay_deleted(reopen: Reopen, publish: Publish, data_dir: Path) -> None:
    registry = reopen()
    publish(registry, "a")
    registry.acquire("a")  # still in use when the server goes
    registry.delete("a")
    assert len(adapter_files.on_disk(data_dir)) == 1
    registry = reopen()
    assert list(registry.records()) == []
    assert adapter_files.on_disk(data_dir) == set()


def test_counters_of_a_deleted_name_do_not_reach_its_successor(registry: Registry, publish: Publish) -> None:
    old = publish(registry, "a", seed=1).version
    registry.delete("a")
    publish(registry, "a", seed=2)
    registry.served(old, tokens=3)
    assert registry.get("a").requests == 0


def test_missing_files_are_told_and_can_be_mended(reopen: Reopen, publish: Publish) -> None:
    registry = reopen()
    version = publish(registry, "a").version
    (version.path / "adapter_model.safetensors").unlink()
    registry = reopen()
    record = registry.get("a")
    assert record.state == "failed"
    assert "missing" in (record.reason or "")
    assert registry.current_versions() == []
    with pytest.raises(ModelNotFound):
        registry.acquire("a")
    assert publish(registry, "a").outcome == "replaced"
    assert registry.get("a").state == "ready"
    registry = reopen()
    assert registry.get("a").state == "ready"
    for retired in registry.delete("a"):
        retired.gone.result(timeout=10)
    assert list(registry.records()) == []


def test_another_base_model_judges_again(reopen: Reopen, publish: Publish, data_dir: Path) -> None:
    registry = reopen()
    publish(registry, "a")
    registry.close()
    wider = [LoraTarget(t.name, 32, 8) for t in adapter_files.TARGETS]
    for _ in range(2):
        registry = adapter_files.open_registry(data_dir, targets=wider)
        record = registry.get("a")
        assert record.state == "failed"
        assert "does not fit" in (record.reason or "")
        registry.close()
    registry = reopen()
    assert registry.get("a").state == "ready"


def test_a_rank_that_can_never_run_is_refused(data_dir: Path, publish: Publish) -> None:
    registry = adapter_files.open_registry(data_dir, max_rank=3)
    with closing(registry), pytest.raises(InvalidAdapter, match="has rank 4, the limit of this server is 3"):
        publish(registry, "a")


def test_a_second_server_is_refused_by_the_name_of_the_lock(registry: Registry, data_dir: Path) -> None:
    with pytest.raises(DataDirInUseError, match=str(data_dir / "lock")):
        adapter_files.open_registry(data_dir)


def test_a_newer_catalogue_is_refused_and_the_lock_given_back(reopen: Reopen, data_dir: Path) -> None:
    reopen().close()
    with closing(sqlite3.connect(data_dir / "registry.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="newer"):
            adapter_files.open_registry(data_dir)


def test_a_failed_commit_leaves_the_old_version(
    registry: Registry, publish: Publish, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish(registry, "a", seed=1).version

    def fail(*_: object) -> None:
        raise ChorusError("the commit failed")

    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "publish", fail)
        with pytest.raises(ChorusError):
            publish(registry, "a", seed=2)
    assert registry.acquire("a").version == first
    publish(registry, "b", seed=9)
    for retired in registry.delete("b"):
        retired.gone.result(timeout=10)
    assert adapter_files.on_disk(data_dir) == {first.digest}
    assert publish(registry, "a", seed=2).version.number == 2


def test_a_lease_has_its_files_whatever_others_do(
    registry: Registry, publish: Publish, data_dir: Path
) -> None:
    """Two threads use names that two others publish and delete all the time."""
    stop = threading.Event()
    names = ("a", "b")

    def use() -> int:
        used = 0
        while not stop.is_set():
            for name in names:
                try:
                    lease = registry.acquire(name)
                except ModelNotFound:
                    continue
                with lease:
                    assert (lease.version.path / "adapter_config.json").is_file()
                    assert (lease.version.path / "adapter_model.safetensors").is_file()
                    used += 1
        return used

    def change(seed: int) -> None:
        for turn in range(15):
            for name in names:  # both names share contents, so one's deletion meets the other's arrival
                with suppress(Conflict):
                    publish(registry, name, seed=turn % 2)
                with suppress(Conflict, ModelNotFound):
                    registry.delete(name)

    with ThreadPoolExecutor(4) as pool:
        users = [pool.submit(use) for _ in range(2)]
        changers = [pool.submit(change, seed) for seed in range(2)]
        try:
            for changer in changers:
                changer.result(timeout=60)
        finally:
            stop.set()
        assert sum(user.result(timeout=60) for user in users) > 0
    for version in registry.current_versions():
        registry.delete(version.name)
    registry.close()
    assert adapter_files.on_disk(data_dir) == set()
    assert adapter_files.staged(data_dir) == []
    assert list(registry.records()) == []


def test_damaged_files_are_not_served_until_they_are_uploaded_again(
    registry: Registry, publish: Publish
) -> None:
    version = publish(registry, "a").version
    publish(registry, "twin")
    other = publish(registry, "b", seed=1).version
    registry.damage.recheck(version)
    assert registry.get("a").state == "ready"
    weights = version.path / "adapter_model.safetensors"
    sound = weights.read_bytes()
    flip(weights)
    for each in (version, other):
        registry.damage.recheck(each)
    for name in ("a", "twin"):
        assert registry.get(name).state == "failed"
        with pytest.raises(ModelNotFound, match="damaged"):
            registry.acquire(name)
    assert publish(registry, "a").outcome == "replaced"
    assert [registry.get(name).state for name in ("a", "twin", "b")] == ["ready"] * 3
    with registry.acquire("twin") as lease:
        assert (lease.version.path / weights.name).read_bytes() == sound


def flip(file: Path) -> None:
    """One bit, in the middle."""
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)

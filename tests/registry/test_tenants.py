"""Names live in a tenant; what is shared is seen by all; of the rest there is no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from server.errors import Conflict, Forbidden, ModelNotFound
from server.peft.format import LoraAdapter
from server.registry.records import LastLoad, Published
from server.registry.registry import Registry
from server.registry.sources.local import copy_folder
from tests.registry import adapter_files

Reopen = Callable[[], Registry]
Put = Callable[..., Published]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    def put(registry: Registry, tenant: str, name: str, seed: int = 0, *, replace: bool = True) -> Published:
        folder = adapter_files.write(tmp_path / f"source-{seed}", adapter_files.files(seed=seed))
        with registry.publication(create=True, replace=replace, tenant=tenant) as publication:
            publication.begin(name)
            copy_folder(folder, publication.staging)
            return publication.publish("upload")

    return put


def names(registry: Registry, tenant: str) -> tuple[list[str], list[str]]:
    """As records, and as what can be asked for."""
    return (
        [record.name for record in registry.records(tenant=tenant)],
        [version.name for version in registry.current_versions(tenant=tenant)],
    )


def test_two_tenants_may_use_the_same_name(registry: Registry, put: Put, data_dir: Path) -> None:
    mine = put(registry, "acme", "a", 1, replace=False).version
    theirs = put(registry, "other", "a", 2, replace=False).version
    assert (mine.number, theirs.number) == (1, 1)
    assert registry.acquire("a", tenant="acme").version == mine
    assert registry.acquire("a", tenant="other").version == theirs
    with pytest.raises(ModelNotFound):
        registry.acquire("a")
    registry.delete("a", tenant="other")
    assert registry.acquire("a", tenant="acme").version == mine
    with pytest.raises(ModelNotFound):
        registry.acquire("a", tenant="other")


def test_another_tenants_adapter_leaves_no_trace(registry: Registry, put: Put) -> None:
    digest = put(registry, "acme", "secret", 1).version.digest
    registry.acquire("secret", tenant="acme")
    for wanted in ("secret", "secret@1", f"secret@{digest}", f"secret@{digest[:8]}"):
        with pytest.raises(ModelNotFound):
            registry.acquire(wanted, tenant="other")
    for call in (registry.get, registry.delete):
        with pytest.raises(ModelNotFound):
            call("secret", tenant="other")
    with pytest.raises(ModelNotFound):
        registry.set_pinned("secret", True, tenant="other")
    assert names(registry, "other") == names(registry, "default") == ([], [])
    assert put(registry, "other", "secret", 2, replace=False).outcome == "created"  # the name is free for it


def test_a_writer_of_another_tenant_is_not_seen(
    registry: Registry, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = registry.judge

    def judge(folder: Path) -> LoraAdapter:
        monkeypatch.undo()
        assert names(registry, "acme") == (["a"], [])
        assert names(registry, "other") == ([], [])
        with pytest.raises(ModelNotFound):
            registry.get("a", tenant="other")
        assert put(registry, "other", "a").outcome == "created"
        with pytest.raises(Conflict, match="being written"):
            put(registry, "acme", "a")
        return real(folder)

    monkeypatch.setattr(registry, "judge", judge)
    assert put(registry, "acme", "a", 1).outcome == "created"


def test_who_of_one_tenant_publishes_first_wins(registry: Registry, put: Put) -> None:
    """What other tenants do with the same name meanwhile is nothing to it."""
    for meanwhile, outcome in (("other", "created"), ("acme", "conflict")):
        with registry.publication(create=True, replace=True, tenant="acme") as slow:
            slow.begin(meanwhile)
            put(registry, meanwhile, meanwhile, 1)
            copy_folder(adapter_files.write(slow.staging.scratch, adapter_files.files(seed=2)), slow.staging)
            if outcome == "created":
                assert slow.publish("upload").outcome == outcome
            else:
                with pytest.raises(Conflict, match="meanwhile"):
                    slow.publish("upload")


def test_damage_is_one_tenants(registry: Registry, put: Put) -> None:
    """Equal files of another are others on disk, and those to whom a damaged one is shared learn nothing."""
    mine, theirs = (put(registry, tenant, "a", 1).version for tenant in ("acme", "other"))
    registry.set_shared("a", True, tenant="acme")
    registry.damage.recheck(mine)
    assert registry.get("a", tenant="acme").state == "ready"
    weights = mine.path / "adapter_model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    for version in (mine, theirs):
        registry.damage.recheck(version)
    with pytest.raises(ModelNotFound, match="damaged"):
        registry.acquire("a", tenant="acme")
    with pytest.raises(ModelNotFound, match="does not exist"):
        registry.acquire("a", tenant="third")
    assert registry.acquire("a", tenant="other").version == theirs
    put(registry, "other", "b", 1)
    assert registry.get("a", tenant="acme").state == "failed"
    assert put(registry, "acme", "a", 1).outcome == "replaced"
    assert weights.read_bytes() == sound
    assert registry.acquire("a", tenant="third").version.digest == mine.digest


def test_a_draining_adapter_is_its_own_tenants_to_see(registry: Registry, put: Put) -> None:
    put(registry, "acme", "a")
    lease = registry.acquire("a", tenant="acme")
    registry.delete("a", tenant="acme")
    assert registry.get("a", tenant="acme").state == "draining"
    assert names(registry, "other") == ([], [])
    with pytest.raises(ModelNotFound):
        registry.get("a", tenant="other")
    lease.release()


def test_equal_content_of_two_tenants_is_two_versions(registry: Registry, put: Put, data_dir: Path) -> None:
    """Else residency, load times and prefixes of one would tell what the other has."""
    versions = [put(registry, tenant, "a").version for tenant in ("default", "acme", "other")]
    assert len({version.digest for version in versions}) == 3
    assert {version.content for version in versions} == {versions[0].digest}
    assert adapter_files.on_disk(data_dir) == {version.digest for version in versions}
    assert {put(registry, tenant, "a").outcome for tenant in ("default", "acme", "other")} == {"unchanged"}
    registry.loaded(versions[1].digest, LastLoad(2.0))
    assert registry.get("a", tenant="acme").versions[0].load.milliseconds == 2.0
    assert registry.get("a", tenant="other").versions[0].load.milliseconds is None


def test_shared_is_for_everybody_to_use_and_its_owners_to_change(registry: Registry, put: Put) -> None:
    version = put(registry, "acme", "a", 1).version
    registry.set_shared("a", True, tenant="acme")
    assert registry.acquire("a", tenant="other").version == version
    assert registry.acquire("a@1", tenant="default").version == version
    assert names(registry, "other") == (["a"], ["a"])
    with pytest.raises(Forbidden):
        registry.delete("a", tenant="other")
    with pytest.raises(Forbidden):
        registry.set_shared("a", False, tenant="other")
    with pytest.raises(Forbidden):
        registry.acquire("a", tenant="other", own=True)
    registry.acquire("a", tenant="acme", own=True)
    registry.set_shared("a", False, tenant="acme")
    assert names(registry, "other") == ([], [])
    with pytest.raises(ModelNotFound):
        registry.acquire("a", tenant="other")


def test_its_own_comes_first(registry: Registry, put: Put) -> None:
    shared = put(registry, "default", "a", 1).version
    registry.set_shared("a", True)
    own = put(registry, "acme", "a", 2, replace=False)
    assert own.outcome == "created"
    assert registry.acquire("a", tenant="acme").version == own.version
    assert registry.acquire("a", tenant="other").version == shared
    assert names(registry, "acme") == (["a"], ["a"])
    for wanted in ("a@2", f"a@{shared.digest}"):  # no way around its own
        with pytest.raises(ModelNotFound):
            registry.acquire(wanted, tenant="acme")
    registry.delete("a", tenant="acme")
    assert registry.acquire("a", tenant="acme").version == shared


def test_no_two_shared_ones_have_the_same_name(registry: Registry, put: Put) -> None:
    put(registry, "acme", "a", 1)
    put(registry, "other", "a", 2)
    registry.set_shared("a", True, tenant="acme")
    registry.set_shared("a", True, tenant="acme")
    with pytest.raises(Conflict):
        registry.set_shared("a", True, tenant="other")
    registry.delete("a", tenant="acme")
    registry.set_shared("a", True, tenant="other")


def test_a_failed_write_shares_nothing(registry: Registry, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put(registry, "acme", "a", 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr("server.registry.catalogue.Catalogue.update", fail)
        with pytest.raises(OSError, match="no"):
            registry.set_shared("a", True, tenant="acme")
    assert names(registry, "other") == ([], [])


def test_tenants_and_sharing_survive_a_restart(reopen: Reopen, put: Put) -> None:
    registry = reopen()
    version = put(registry, "acme", "a", 1).version
    put(registry, "acme", "b", 2)
    put(registry, "other", "b", 3)
    registry.set_shared("a", True, tenant="acme")
    registry.served(version, tokens=3)
    before = {tenant: list(registry.records(tenant=tenant)) for tenant in ("default", "acme", "other")}
    assert before["acme"][0].tokens == 3
    registry = reopen()
    assert {tenant: list(registry.records(tenant=tenant)) for tenant in before} == before
    assert names(registry, "default") == (["a"], ["a"])


def test_pages_are_cut_from_all_names_in_order(registry: Registry, put: Put) -> None:
    for name in ("d", "b", "a", "c"):
        put(registry, "acme", name)
    put(registry, "default", "bb")
    registry.set_shared("bb", True)
    for read in (registry.records, registry.current_versions):

        def page(after: str, most: int, read: Callable[..., object] = read) -> list[str]:
            return [each.name for each in read(tenant="acme", after=after, most=most)]  # type: ignore[attr-defined]

        assert page("", 3) == ["a", "b", "bb"]
        assert page("bb", 3) == ["c", "d"]
        assert page("bc", 1) == ["c"]
        assert page("d", 3) == []

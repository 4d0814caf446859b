"""Random traces of publish, acquire, release and delete against a plain model of what should be there."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from server.errors import ModelNotFound
from server.registry.records import Lease, Retired
from server.registry.registry import KEPT_VERSIONS, Registry
from server.registry.sources.local import copy_folder
from tests.registry import adapter_files

SEEDS = 4
# With its tenant: `a` is two adapters.
Name = tuple[str, str]
NAMES = st.sampled_from([("default", "a"), ("acme", "a"), ("default", "b"), ("other", "team/c")])
TENANTS = ("default", "acme", "other")


class RegistryTrace(RuleBasedStateMachine):
    """`model`: name -> the (number, seed) of its versions that can be asked for, oldest first."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        self.sources = [
            adapter_files.write(root / str(seed), adapter_files.files(seed=seed)) for seed in range(SEEDS)
        ]
        self.data_dir = root / "data"
        self.registry = self.open()
        self.model: dict[Name, list[tuple[int, int]]] = {}
        self.held: list[Lease] = []
        self.retired: list[Retired] = []

    def open(self) -> Registry:
        return adapter_files.open_registry(self.data_dir)

    @rule(name=NAMES, seed=st.integers(0, SEEDS - 1))
    def publish(self, name: Name, seed: int) -> None:
        with self.registry.publication(create=True, replace=True, tenant=name[0]) as publication:
            publication.begin(name[1])
            copy_folder(self.sources[seed], publication.staging)
            published = publication.publish("upload")
        self.retired += published.retired
        versions = self.model.setdefault(name, [])
        if versions and versions[-1][1] == seed:
            assert published.outcome == "unchanged"
            return
        versions.append((versions[-1][0] + 1 if versions else 1, seed))
        del versions[:-KEPT_VERSIONS]
        assert published.version.number == versions[-1][0]

    @rule(target=leases, name=NAMES, back=st.integers(0, KEPT_VERSIONS))
    def acquire(self, name: Name, back: int) -> Lease | None:
        versions = self.model.get(name, [])
        if back >= len(versions):
            back = 0
        wanted = f"{name[1]}@{versions[-1 - back][0]}" if versions else name[1]
        try:
            lease = self.registry.acquire(wanted, tenant=name[0])
        except ModelNotFound:
            assert not versions
            return None
        self.held.append(lease)
        seed = versions[-1 - back][1]
        config = (self.sources[seed] / "adapter_config.json").read_bytes()
        assert (lease.version.path / "adapter_config.json").read_bytes() == config
        return lease

    @rule(lease=consumes(leases), twice=st.booleans())
    def release(self, lease: Lease | None, twice: bool) -> None:
        if lease is not None:
            lease.release()
            if twice:
                lease.release()
            if lease in self.held:  # else it is of a server that is gone, and must not touch this one
                self.held.remove(lease)

    @rule(name=NAMES)
    def delete(self, name: Name) -> None:
        try:
            self.retired += self.registry.delete(name[1], tenant=name[0])
        except ModelNotFound:
            assert name not in self.model
            return
        del self.model[name]

    @rule()
    def restart(self) -> None:
        """Whoever held a lease is gone with the server."""
        self.registry.close()
        self.registry = self.open()
        self.held.clear()
        self.retired.clear()

    @invariant()
    def listed_as_modelled(self) -> None:
        for tenant in TENANTS:
            names = [v.name for v in self.registry.current_versions(tenant=tenant)]
            assert names == sorted(name for owner, name in self.model if owner == tenant)
        for name, versions in self.model.items():
            record = self.registry.get(name[1], tenant=name[0])
            assert [v.version.number for v in record.versions] == [number for number, _ in versions]
            assert record.current == record.versions[-1].version

    @invariant()
    def files_are_those_in_use(self) -> None:
        digests = {
            v.version.digest
            for name in self.model
            for v in self.registry.get(name[1], tenant=name[0]).versions
        }
        digests |= {lease.version.digest for lease in self.held}
        for retired in self.retired:
            if all(lease.version != retired.version for lease in self.held):
                retired.gone.result(timeout=10)
        assert adapter_files.on_disk(self.data_dir) == digests

    def teardown(self) -> None:
        for lease in self.held:
            lease.release()
        for name in list(self.model):
            self.retired += self.registry.delete(name[1], tenant=name[0])
        for retired in self.retired:
            retired.gone.result(timeout=10)
        assert [list(self.registry.records(tenant=tenant)) for tenant in TENANTS] == [[], [], []]
        self.registry.close()
        assert adapter_files.on_disk(self.data_dir) == set()
        assert adapter_files.staged(self.data_dir) == []
        self.folder.cleanup()


RegistryTrace.TestCase.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestRegistryTrace = RegistryTrace.TestCase

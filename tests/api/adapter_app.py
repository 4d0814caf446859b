"""The adapter routes on a real registry, beside an engine that keeps books only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec

from load_tests.fake_engine import empty_stats
from server.access.keyring import Keyring
from server.api import errors, keys
from server.api.adapters import routes as adapters
from server.api.door import Door
from server.api.face import AdapterNames, Face
from server.api.openapi import DescribedApp
from server.base_model import BaseModel
from server.config import Settings
from server.messages import AdapterRef, AdapterResult, EngineStats, ErrorCode
from server.registry.data_folder import DataFolder
from server.registry.sources.table import Sources
from server.telemetry.metrics import Metrics
from tests.registry import adapter_files


class FakeEngine:
    """Answers load and unload as an engine does. `in_use`: digests that running sequences hold."""

    def __init__(self) -> None:
        self.resident: dict[str, bool] = {}  # digest -> pinned
        self.on_host: set[str] = set()
        self.in_use: set[str] = set()
        self.forgotten: list[str] = []
        self.refusal: ErrorCode | None = None
        self.most_pinned = 1000
        self.state = "ready"
        self.healthy = True
        self.retry_after_s = 1

    @property
    def stats(self) -> EngineStats:
        return msgspec.structs.replace(
            empty_stats(), resident=tuple(self.resident), on_host=tuple(self.on_host)
        )

    def restart(self) -> None:
        """Another life: nothing is loaded."""
        self.resident.clear()
        self.on_host.clear()

    async def load_adapter(self, ref: AdapterRef, pin: bool = False) -> AdapterResult:
        await asyncio.sleep(0)
        if self.refusal is not None:
            return AdapterResult(0, "disk", error=self.refusal, message=f"cannot load {ref.path}")
        assert (Path(ref.path) / "adapter_model.safetensors").is_file()
        if pin and sum(self.resident.values()) >= self.most_pinned and not self.resident.get(ref.digest):
            return AdapterResult(0, "disk", error=ErrorCode.PIN_LIMIT, message="pins hold their share")
        self.resident[ref.digest] = self.resident.get(ref.digest, False) or pin
        self.on_host.add(ref.digest)
        return AdapterResult(0, "arena", milliseconds=1.5)

    async def unload_adapter(self, digest: str, forget: bool = False) -> AdapterResult:
        await asyncio.sleep(0)
        if digest in self.in_use:
            return AdapterResult(0, "arena")
        self.resident.pop(digest, None)
        if forget:
            self.on_host.discard(digest)
            self.forgotten.append(digest)
        return AdapterResult(0, "disk" if forget else "host")


class Site:
    """One server: `client` talks to it."""

    def __init__(self, data_dir: Path, settings: Settings) -> None:
        self.data_dir = data_dir
        self.engine = FakeEngine()
        folder = DataFolder(data_dir)
        self.registry = adapter_files.open_registry(folder, options=settings)
        base = BaseModel(adapter_files.BASE_NAME, data_dir, data_dir, "")
        names = AdapterNames()
        metrics = Metrics(self.engine, names.name_of)
        sources = Sources.of(settings)
        self.keyring = Keyring([], folder.keys)
        self.face = Face(
            settings, base, self.engine, None, None, metrics, sources,
            keyring=self.keyring, registry=self.registry,
        )  # fmt: skip
        self.app = DescribedApp(adapters.router, keys.router)
        self.app.add_middleware(Door)
        self.app.state.face = self.face
        errors.install(self.app)
        transport = httpx.ASGITransport(self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://chorus")

    @classmethod
    @asynccontextmanager
    async def open(cls, data_dir: Path, **settings: object) -> AsyncIterator[Site]:
        site = cls(data_dir, adapter_files.settings(**settings))
        try:
            async with site.client:
                yield site
        finally:
            await site.face.background.close()
            site.close()

    def close(self) -> None:
        self.keyring.close()
        self.registry.close()

    async def upload(
        self, name: str, content: dict[str, bytes] | None = None, *, method: str = "POST"
    ) -> httpx.Response:
        """The two files as a form; PUT names it in the URL."""
        parts = [("files", (file, data)) for file, data in (content or adapter_files.files()).items()]
        if method == "PUT":
            return await self.client.put(f"/v1/adapters/{name}", files=parts)
        return await self.client.post("/v1/adapters", data={"name": name}, files=parts)

    def assert_clean(self, *digests: str) -> None:
        """Exactly these contents are on disk, and nothing is being received."""
        assert adapter_files.on_disk(self.data_dir) == set(digests)
        assert adapter_files.staged(self.data_dir) == []

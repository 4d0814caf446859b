"""The HTTP face as one ASGI app, and what happens between its start and the first request."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager

from fastapi import FastAPI

import server
from server.api import errors, health, models
from server.api.adapters import routes as adapters
from server.api.browser import BrowserGuard, HostNames
from server.api.drain import RefuseWhileDraining
from server.api.face import AdapterNames, Face
from server.api.inference import chat, completions
from server.api.openapi import DescribedApp
from server.api.scope import RequestScope
from server.base_model import BaseModel, StartError, default_data_dir
from server.border.client import EngineClient, EngineStartFailed
from server.config import Settings
from server.registry.registry import Registry
from server.registry.sources.folders import register_tree
from server.registry.sources.table import Sources
from server.registry.store import ContentStore, DataDirInUseError
from server.telemetry.metrics import Metrics
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

ROUTERS = (completions.router, chat.router, models.router, adapters.router, health.router)


def create_app(
    settings: Settings,
    engine: EngineClient,
    base: BaseModel,
    *,
    on_ready: Callable[[Face], None] | None = None,
    on_failed: Callable[[str], None] | None = None,
) -> FastAPI:
    """The app. Its lifespan locks the data folder, starts the engine, opens the registry, calls `on_ready`.

    `on_failed` gets the reason, one line, when that cannot be. Raises StartError for a tokenizer or chat
    template that cannot be read.
    """
    tokenizer, template = _load_text(settings, base)
    names = AdapterNames()
    metrics = Metrics(engine, names.name_of)
    face = Face(settings, base, engine, tokenizer, template, metrics, Sources.of(settings), names=names)
    engine.on_ready = face.restore_pins

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        boot = asyncio.create_task(_boot(face, on_ready, on_failed), name="boot")
        try:
            yield
        finally:
            boot.cancel()
            await asyncio.gather(boot, return_exceptions=True)
            await face.background.close()
            await engine.stop()
            if face.registry is not None:
                await asyncio.to_thread(face.registry.close)

    app = DescribedApp(
        *ROUTERS, title="Chorus", version=server.__version__, lifespan=lifespan, redirect_slashes=False
    )
    app.state.face = face
    errors.install(app)
    app.add_middleware(RefuseWhileDraining, drain=face.drain)  # the last added is the first to be asked
    app.add_middleware(BrowserGuard, hosts=HostNames.of(settings), routers=ROUTERS)
    app.add_middleware(RequestScope, metrics=metrics)
    return app


def _load_text(settings: Settings, base: BaseModel) -> tuple[Tokenizer | None, ChatTemplate | None]:
    folder = base.tokenizer_folder
    try:
        tokenizer = Tokenizer.load(folder)
        if tokenizer is None and settings.load_format != "dummy":
            raise StartError(f"{folder} has no tokenizer.json; name a folder that has by --tokenizer")
        template = ChatTemplate.load(folder, tokenizer.special_tokens) if tokenizer else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartError(f"the tokenizer files in {folder} cannot be read: {error}") from error
    return tokenizer, template


async def _boot(
    face: Face, on_ready: Callable[[Face], None] | None, on_failed: Callable[[str], None] | None
) -> None:
    try:
        with ExitStack() as undo:
            store = _open_store(face)  # first: to load a model in vain may take minutes
            undo.callback(store.close)
            await face.engine.start()
            await face.engine.wait_ready()
            undo.pop_all()  # from here on it is the registry's, whose thread ends even if this task does not
            registry = await asyncio.to_thread(_open_registry, face, store)
    except Exception as error:
        expected = isinstance(error, (EngineStartFailed, DataDirInUseError, OSError))
        logger.log(logging.DEBUG if expected else logging.ERROR, "the start failed", exc_info=error)
        if on_failed is not None:
            on_failed(str(error) or type(error).__name__)
        return
    face.registry = registry
    try:
        await face.restore_pins()
    except Exception:  # an engine without its pinned adapters is better than none
        logger.exception("pinned adapters could not be loaded")
    if on_ready is not None:
        on_ready(face)


def _open_store(face: Face) -> ContentStore:
    """Raises DataDirInUseError, OSError."""
    return ContentStore(face.settings.data_dir or default_data_dir(face.base.fingerprint))


def _open_registry(face: Face, store: ContentStore) -> Registry:
    """Takes the store over. Reads and writes files: in a thread."""
    info = face.engine.info
    if info is None:
        store.close()
        raise EngineStartFailed("the engine ended before it was ready")
    limits = dataclasses.replace(face.settings.limits, max_rank=info.max_mix_rank)
    registry = Registry.open(store, info.lora_targets, info.parameters, limits, face.base.name)
    try:
        register_tree(registry, face.settings.adapters)
    except BaseException:
        registry.close()
        raise
    return registry

"""The HTTP face as one ASGI app, and what happens between its start and the first request."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager

from fastapi import FastAPI

import server
from server.access.keyring import Keyring
from server.api import errors, health, keys, models, quotas, reload, usage
from server.api.adapters import routes as adapters
from server.api.adapters.changes import audit_folders
from server.api.browser import BrowserGuard, HostNames
from server.api.cors import AllowedOrigins, Cors
from server.api.door import Door, check_host
from server.api.drain import RefuseWhileDraining
from server.api.face import AdapterNames, Face
from server.api.inference import chat, completions
from server.api.inference.chat_text import ChatStyle
from server.api.methods import HeadAndOptions
from server.api.openapi import DescribedApp
from server.api.operation import open_paths
from server.api.reading.messages import ReaderStart, ReadRules
from server.api.reading.readers import Readers
from server.api.scope import RequestScope
from server.base_model import BaseModel, StartError, default_data_dir
from server.border.client import RESTORE_S, EngineClient, EngineStartFailed
from server.config import Settings
from server.errors import Unavailable
from server.registry.belonging import check_base_model
from server.registry.data_folder import DataFolder
from server.registry.registry import Registry
from server.registry.sources.folders import register_tree
from server.registry.sources.table import Sources
from server.registry.store import DataFolderError
from server.telemetry.audit import AuditLog
from server.telemetry.metrics import Metrics
from server.telemetry.traces import Traces, TracesError
from server.text import thinking
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer
from server.text.tool_calls import STYLES, style_of
from server.usage.ledger import UsageLedger
from server.usage.quotas import Quotas

logger = logging.getLogger(__name__)

ROUTERS = (
    completions.router, chat.router, models.router, adapters.router, keys.router, usage.router,
    quotas.router,
    health.router, reload.router,
)  # fmt: skip


def create_app(
    settings: Settings,
    engine: EngineClient,
    base: BaseModel,
    *,
    on_ready: Callable[[Face], None] | None = None,
    on_failed: Callable[[str], None] | None = None,
) -> DescribedApp:
    """The app. Its lifespan locks the data folder, starts the engine, opens the registry, calls `on_ready`.

    `on_failed` gets the reason, one line, when that cannot be. Raises StartError for a tokenizer or chat
    template that cannot be read, an audit file that cannot be opened, and traces that cannot be sent.
    """
    tokenizer = _load_text(settings, base)
    style = _chat_style(settings, base)
    start = ReaderStart(str(base.tokenizer_folder), style.tools.name if style.tools else None)
    rules = ReadRules(settings.unknown_fields == "ignore", settings.trust_request_chat_template)
    readers = Readers(start, tokenizer, rules)
    origins = AllowedOrigins.of(settings.cors_origins)
    names = AdapterNames()
    metrics = Metrics(engine, names.name_of, base.name)
    audit_log, traces = _open_records(settings)
    face = Face(settings, base, engine, tokenizer, readers, metrics, Sources.of(settings), style, names=names)
    face.audit_log = audit_log
    engine.on_ready = face.restore_adapters

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        folder = _open_data(face, on_failed)  # before anybody is let in, or a model loaded in vain
        boot = asyncio.create_task(_boot(face, folder, on_ready, on_failed), name="boot") if folder else None
        try:
            yield
        finally:
            if boot is not None:
                boot.cancel()
                await asyncio.gather(boot, return_exceptions=True)
            await face.background.close()
            await face.readers.close()
            await engine.stop()
            await asyncio.to_thread(_close, face)
            if traces is not None:
                await traces.close()
            audit_log.close()

    app = DescribedApp(
        *ROUTERS, title="Chorus", version=server.__version__, lifespan=lifespan, redirect_slashes=False
    )
    app.state.face = face
    errors.install(app)
    app.add_middleware(HeadAndOptions, routers=ROUTERS)  # the last added is the first to be asked
    app.add_middleware(RefuseWhileDraining, drain=face.drain)
    app.add_middleware(BrowserGuard, hosts=HostNames.of(settings), routers=ROUTERS, origins=origins)
    app.add_middleware(Door, open_paths=open_paths(*ROUTERS))
    if settings.cors_origins:
        app.add_middleware(Cors, origins=origins)
    app.add_middleware(RequestScope, metrics=metrics, audit_log=audit_log, traces=traces)
    return app


def _open_records(settings: Settings) -> tuple[AuditLog, Traces | None]:
    """The audit log, and traces where they are asked for."""
    try:
        return AuditLog(settings.audit_log), Traces.of(settings, server.__version__)
    except OSError as error:
        raise StartError(f"--audit-log {settings.audit_log}: {error.strerror or error}") from error
    except TracesError as error:
        raise StartError(str(error)) from error


def _load_text(settings: Settings, base: BaseModel) -> Tokenizer | None:
    """The tokenizer; a chat template is looked at as well, but run by the readers alone."""
    folder = base.tokenizer_folder
    try:
        tokenizer = Tokenizer.load(folder)
        if tokenizer is None and settings.load_format != "dummy":
            raise StartError(f"{folder} has no tokenizer.json; name a folder that has by --tokenizer")
        if tokenizer is not None:
            ChatTemplate.load(folder, tokenizer.special_tokens)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartError(f"the tokenizer files in {folder} cannot be read: {error}") from error
    return tokenizer


def _chat_style(settings: Settings, base: BaseModel) -> ChatStyle:
    """By the chat template, unless the settings say it."""
    template = ChatTemplate.source(base.tokenizer_folder) or ""
    parser = settings.tool_parser
    tools = style_of(template) if parser == "auto" else STYLES.get(parser)
    return ChatStyle(tools, settings.reasoning_parser == "auto" and thinking.END in template)


def _open_data(face: Face, on_failed: Callable[[str], None] | None) -> DataFolder | None:
    """The data folder, and the keys in it. None where that cannot be; `on_failed` knows why then."""
    try:
        with ExitStack() as undo:
            folder = DataFolder(face.settings.data_dir or default_data_dir(face.base.fingerprint))
            undo.callback(folder.close)
            check_base_model(folder, face.base.fingerprint)
            static = [key.get_secret_value() for key in face.settings.api_key]
            keyring = Keyring(static, folder.keys, wanted=face.settings.auth)
            check_host(face.settings, keyring, folder.store.data_dir)
            journals = folder.store.data_dir / "usage"
            face.usage = UsageLedger(journals, folder.usage, face.settings.usage_retention_days)
            face.quotas = Quotas(folder.quotas, face.usage)
            undo.pop_all()
    except Exception as error:
        _fail(error, on_failed)
        return None
    face.keyring = keyring
    return folder


async def _boot(
    face: Face,
    folder: DataFolder,
    on_ready: Callable[[Face], None] | None,
    on_failed: Callable[[str], None] | None,
) -> None:
    try:
        with ExitStack() as undo:
            undo.callback(folder.close)
            undo.callback(_close, face)
            await face.engine.start()
            await face.engine.wait_ready()
            undo.pop_all()  # from here on it is the registry's, whose thread ends even if this task does not
            registry = await asyncio.to_thread(_open_registry, face, folder)
    except Exception as error:
        _fail(error, on_failed)
        return
    face.registry = registry
    await _bring_pinned(face)
    face.started = True
    if on_ready is not None:
        on_ready(face)


async def _bring_pinned(face: Face) -> None:
    """Before anybody is served; for as long as a later engine would get for it."""
    try:
        async with asyncio.timeout(RESTORE_S):
            await face.restore_adapters()
    except TimeoutError:
        logger.error("the pinned adapters were not loaded within %g s; the server starts without", RESTORE_S)
    except Unavailable as error:  # a new engine asks for them itself
        logger.warning("the engine ended while pinned adapters were loaded: %s", error.message)
    except Exception:  # an engine without its pinned adapters is better than none
        logger.exception("pinned adapters could not be loaded")


def _fail(error: Exception, on_failed: Callable[[str], None] | None) -> None:
    expected = isinstance(error, (EngineStartFailed, DataFolderError, StartError, OSError))
    logger.log(logging.DEBUG if expected else logging.ERROR, "the start failed", exc_info=error)
    if on_failed is not None:
        on_failed(str(error) or type(error).__name__)


def _open_registry(face: Face, folder: DataFolder) -> Registry:
    """Takes the folder over. Reads and writes files: in a thread."""
    info = face.engine.info
    if info is None:
        folder.close()
        raise EngineStartFailed("the engine ended before it was ready")
    limits = dataclasses.replace(face.settings.limits, max_rank=info.max_mix_rank)
    registry = Registry.open(
        folder, info.lora_targets, info.parameters, limits, face.base.name, quota_of=face.quota_of
    )
    try:
        audit_folders(face.audit_log, register_tree(registry, face.settings.adapters))
    except BaseException:
        registry.close()
        raise
    return registry


def _close(face: Face) -> None:
    """What writes to the data folder, then the folder. In a thread."""
    if face.keyring is not None:
        face.keyring.close()
    if face.usage is not None:
        face.usage.close()
    if face.registry is not None:
        face.registry.close()

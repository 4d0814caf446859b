"""What is known of one adapter: the immutable version, the books kept about it, and the view given out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from server.access.caller import DEFAULT_TENANT
from server.errors import InvalidRequest
from server.messages import AdapterRef
from server.registry.catalogue import AdapterId, AdapterRow, VersionRow

AdapterState = Literal["validating", "ready", "draining", "failed"]

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*")
_MAX_NAME = 255  # characters
_MIN_PREFIX = 6  # hex digits of a digest


def check_name(name: str) -> None:
    """Raises InvalidRequest unless `name` follows the rule. A name is never used as a path all the same."""
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"`name` must be 1 to {_MAX_NAME} characters: parts of letters, digits and . _ - (at most 128 "
            "each, beginning with a letter or digit) with single / between them.",
            param="name",
        )


def split_version(name: str) -> tuple[str, str | None]:
    """`sql@2` -> the adapter's name, and which of its versions is meant; None: the current one."""
    base, at, wanted = name.partition("@")
    return base, wanted if at else None


def identity(content: str, tenant: str) -> str:
    """The digest that a version is known by: that of its content, within its tenant.

    So equal files of two tenants are two versions everywhere, in the store, in memory and in prefix keys, and
    nothing tells one of them (a load that is there already, a quick upload) what the other has.
    """
    if tenant == DEFAULT_TENANT:
        return content
    return hashlib.sha256(f"chorus tenant 1\n{tenant}\n{content}\n".encode()).hexdigest()


@dataclass(frozen=True)
class AdapterVersion:
    """An immutable set of LoRA weights. The digest of its content is its identity, not its name."""

    name: str
    number: int
    digest: str
    path: Path  # folder with adapter_config.json and adapter_model.safetensors
    rank: int  # the largest of its modules
    alpha: float
    targets: tuple[str, ...]  # short module names
    parameters: int
    bytes: int  # of the weights
    source: str  # its provenance: "upload", "folder:<name>", "file:<path>", or what another source says
    created_at: float  # seconds since 1970
    tenant: str = DEFAULT_TENANT
    content: str = ""  # the digest of its files alone; see `identity`

    @property
    def id(self) -> AdapterId:
        return AdapterId(self.tenant, self.name)

    @property
    def label(self) -> str:
        """Its name where those of all tenants stand side by side: in figures and logs of the operator."""
        return self.name if self.tenant == DEFAULT_TENANT else f"{self.tenant}:{self.name}"

    def ref(self, weight: float = 1.0) -> AdapterRef:
        """What the engine is told of it."""
        return AdapterRef(self.digest, str(self.path), weight, self.content)


class Lease:
    """Keeps one version's files in place while a request uses it. Release is idempotent and thread-safe."""

    def __init__(self, version: AdapterVersion, give_back: Callable[[], None]) -> None:
        self.version = version
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True)
class LastLoad:
    """How the last load went that was asked for, or that brought it back. All None: there was none."""

    milliseconds: float | None = None
    error: str | None = None


_NO_LOAD = LastLoad()


@dataclass(frozen=True)
class VersionRecord:
    """A version with what it has served so far. `error` says why it cannot be used."""

    version: AdapterVersion
    requests: int
    tokens: int
    last_used: float | None
    load: LastLoad
    error: str | None


@dataclass(frozen=True)
class AdapterRecord:
    """A snapshot of one name. `current` is None while its first version is judged, and after it failed."""

    name: str
    state: AdapterState
    reason: str | None
    current: AdapterVersion | None
    versions: tuple[VersionRecord, ...] = ()  # oldest first
    description: str = ""
    pinned: bool = False
    created_at: float | None = None
    tenant: str = DEFAULT_TENANT
    shared: bool = False  # every tenant may use it

    @property
    def requests(self) -> int:
        return sum(version.requests for version in self.versions)

    @property
    def tokens(self) -> int:
        return sum(version.tokens for version in self.versions)

    @property
    def last_used(self) -> float | None:
        return max((v.last_used for v in self.versions if v.last_used is not None), default=None)


@dataclass(frozen=True)
class Retired:
    """A version that no name leads to any more. `gone` is done when its last user left and its files went."""

    version: AdapterVersion
    gone: Future[None]


@dataclass(frozen=True)
class Published:
    """What a write came to. `retired`: versions beyond the number that is kept."""

    version: AdapterVersion
    outcome: Literal["created", "replaced", "unchanged"]
    retired: tuple[Retired, ...] = ()
    pinned: bool = False  # the name is to stay in accelerator memory


@dataclass(eq=False)
class VersionBooks:
    """The registry's books on one version; guarded by the registry's lock."""

    info: AdapterVersion
    requests: int = 0
    tokens: int = 0
    last_used: float | None = None
    leases: int = 0
    listed: bool = True  # a name leads to it
    stored: bool = True  # it holds its content in the store
    freed: bool = False  # nobody uses it and its hold is given back
    error: str | None = None
    gone: Future[None] | None = None  # once no name leads to it; see `Retired`

    @classmethod
    def of_row(cls, row: VersionRow, path: Path) -> VersionBooks:
        fields = vars(row) | {"path": path}
        counters = [fields.pop(key) for key in ("requests", "tokens", "last_used")]
        return cls(AdapterVersion(**fields), *counters)

    def row(self) -> VersionRow:
        fields = {key: value for key, value in vars(self.info).items() if key != "path"}
        return VersionRow(**fields, requests=self.requests, tokens=self.tokens, last_used=self.last_used)

    def retire(self) -> Retired:
        self.listed = False
        self.gone = Future()
        self.gone.set_running_or_notify_cancel()  # whoever waits for it can no longer cancel it
        return Retired(self.info, self.gone)


@dataclass(eq=False)
class AdapterBooks:
    """The registry's books on one name; guarded by the registry's lock."""

    row: AdapterRow
    versions: dict[int, VersionBooks] = field(default_factory=dict)  # by number, oldest first

    @property
    def current(self) -> VersionBooks:
        return self.versions[self.row.current]

    def find(self, wanted: str | None) -> VersionBooks | None:
        """The version with this number, or with a digest that begins like this; the current one for None."""
        if wanted is None:
            return self.current
        if wanted.isascii() and wanted.isdigit() and len(wanted) < 10 and int(wanted) in self.versions:
            return self.versions[int(wanted)]
        if len(wanted) < _MIN_PREFIX:
            return None
        matches = {v.info.digest: v for v in self.versions.values() if v.info.digest.startswith(wanted)}
        return next(iter(matches.values())) if len(matches) == 1 else None

    def record(self, state: AdapterState, loads: Mapping[str, LastLoad]) -> AdapterRecord:
        """A snapshot; `loads` by digest."""
        return AdapterRecord(
            name=self.row.name,
            state=state,
            reason=self.current.error,
            current=self.current.info,
            versions=tuple(
                VersionRecord(
                    v.info,
                    v.requests,
                    v.tokens,
                    v.last_used,
                    loads.get(v.info.digest, _NO_LOAD),
                    v.error,
                )
                for v in self.versions.values()
            ),
            description=self.row.description,
            pinned=self.row.pinned,
            created_at=self.row.created_at,
            tenant=self.row.tenant,
            shared=self.row.shared,
        )

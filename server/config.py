"""The one settings tree. Every option can be a flag of `chorus serve` or `CHORUS_<NAME>` in the environment.

The environment is read nowhere else in the package. `tests/test_config.py` pins the list of options, so
that a new one is a decision.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, SecretStr, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

# What a running server takes over when its --config file is read again. All else is read once, at start.
RELOADABLE = frozenset({
    "max_upload_bytes", "max_unpacked_bytes", "upload_timeout_s", "max_request_bytes", "max_unread_bytes",
    "max_waiting_requests", "request_timeout_s", "shutdown_grace_s", "watchdog_s", "log_level",
})  # fmt: skip

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: object) -> object:
    """`"512MiB"`, `"2GB"`, `"1.5g"` or a number -> bytes. Raises ValueError on anything else."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", value.lower())
    if match is None or match[2] == "i":
        raise ValueError(f"{value!r} is not a size; write it like 512MiB or 2GB")
    return int(float(match[1]) * (_UNITS | _BINARY_UNITS)[match[2]])


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("must not be empty")
    return value


def _split(value: object) -> object:
    """`"a,b"` of the environment, or a flag given several times -> a list of names."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(each, str) for each in values):
        return value
    return [name.strip() for each in values for name in each.split(",") if name.strip()]


def _split_keys(value: object) -> object:
    """The text of a variable or flag -> keys. Raises ValueError for what no header could carry."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return value
    keys = [key.strip() for text in texts for key in _text_of(text).split(",")]
    if not all(re.fullmatch(r"[!-~]{1,512}", key) for key in keys):
        raise ValueError("a key is 1 to 512 letters, digits and signs of ASCII, without spaces and commas")
    return tuple(keys)


def _text_of(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
File = Annotated[Path, BeforeValidator(_not_empty)]
ApiKeys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_keys)]
Folder = Annotated[Path, BeforeValidator(_not_empty)]  # Path("") is the working directory
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]  # separated by commas


@dataclass(frozen=True)
class Limits:
    """How large an adapter may be. Its numbers stand in the settings alone."""

    max_upload_bytes: int
    max_unpacked_bytes: int  # of what comes out of an archive
    max_header_bytes: int  # of the safetensors file
    max_tensors: int
    max_rank: int | None = None  # of the engine; None: it is not known


@dataclass(frozen=True, eq=False)
class Origin:
    """Where settings came from, which makes no difference between them."""

    given: dict[str, Any]  # the arguments
    read: dict[str, Any]  # the values that came of them, the environment and the file

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return 0


class Settings(BaseSettings):
    """Everything that can be set. Sizes accept `512MiB` or `2GB`. An empty value is as good as none.

    A value comes from the arguments, else the environment, else the file that `config` names.
    """

    model_config = SettingsConfigDict(
        env_prefix="CHORUS_", env_ignore_empty=True, extra="forbid", frozen=True
    )

    _origin: Origin = PrivateAttr(default_factory=lambda: Origin({}, {}))

    config: Path | None = Field(
        None, description="TOML file with any of these settings, named as the variables are, in lower case."
    )

    # base model
    model: str = Field(description="Base model: a local folder, or a Hugging Face hub id.")
    revision: str | None = Field(None, description="Hub revision of the base model.")
    served_model_name: str | None = Field(
        None, description="Name that clients put in `model` for the base model. Default: the folder's name."
    )
    tokenizer: str | None = Field(
        None, description="Folder with tokenizer.json, if it is not the model's own."
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="auto: read the weights; dummy: random weights from config.json alone."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of weights and activations. auto: the checkpoint's own."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one.")
    threads: int = Field(0, ge=0, description="CPU threads of the engine. 0: one for each core.")
    seed: int = Field(0, description="Seed of dummy weights.")

    # adapters
    adapters: Path | None = Field(
        None, description="Folder whose sub-folders (PEFT layout) are registered at start. Only read."
    )
    data_dir: Path | None = Field(
        None, description="Registry and uploaded adapters. Default: the user's data folder, by base model."
    )
    allowed_lora_roots: tuple[Folder, ...] = Field(
        (), description="Folders that clients may register adapters from, besides --adapters."
    )
    max_upload_bytes: Bytes = Field(2 * 2**30, gt=0, description="Largest upload, bytes.")
    upload_timeout_s: float = Field(
        3600.0, gt=0, description="Longest that an upload may take to come, seconds."
    )
    max_unpacked_bytes: Bytes = Field(4 * 2**30, gt=0, description="Largest archive unpacked, bytes.")
    max_header_bytes: Bytes = Field(
        4 * 2**20, gt=0, description="Largest safetensors header of an adapter, bytes."
    )
    max_adapter_tensors: int = Field(20_000, gt=0, description="Most tensors in one adapter.")
    max_lora_rank: int | None = Field(
        None,
        gt=0,
        description="Most that ranks of one request's adapters may add up to. Default: what can be served.",
    )

    # engine
    max_model_len: int | None = Field(
        None, gt=0, description="Longest prompt and output together, tokens. Default: what the model allows."
    )
    max_num_seqs: int = Field(64, gt=0, description="Most sequences that run at once.")
    max_num_batched_tokens: int | None = Field(
        None,
        gt=0,
        description="Token budget of one step. Default: 8192 on CUDA; on CPU 256 a core and one a sequence.",
    )
    block_size: int = Field(16, gt=0, description="Tokens in one block of the KV cache.")
    kv_cache_bytes: Bytes | None = Field(
        None, gt=0, description="Size of the KV cache, bytes. Default: from free memory."
    )
    arena_bytes: Bytes | None = Field(
        None, gt=0, description="Size of the adapter arena, bytes. Default: from free memory."
    )
    host_cache_bytes: Bytes | None = Field(
        None, ge=0, description="Packed adapters kept in host memory, bytes. Default: from free memory."
    )
    attention: str = Field(
        "auto", description="Attention backend, by the device's name for it; auto: its fastest."
    )
    enforce_eager: bool = Field(
        False, description="On CUDA, run decode steps kernel by kernel, not as captured graphs."
    )
    cuda_levers: Names = Field(
        (),
        description="On CUDA, which of rotate-write, shrink-beside and dependent-launch are on, separated by "
        "commas; all; none. Default: the first two.",
    )
    prefix_caching: bool = Field(True, description="Reuse KV blocks of equal prompt prefixes.")
    scheduling_policy: Literal["fair", "fcfs"] = Field(
        "fair", description="fair: by service had so far, of tenants and their adapters; fcfs: by arrival."
    )
    max_pinned_share: float = Field(0.5, ge=0, le=1, description="Most of the arena that pins may hold.")
    spare_engine: bool = Field(
        True, description="Keep a process that is ready to load the model, for when the engine dies."
    )
    tool_parser: Literal["auto", "none", "hermes", "llama3", "mistral", "json"] = Field(
        "auto", description="How the model writes calls of tools; auto: by its chat template."
    )
    reasoning_parser: Literal["auto", "none"] = Field(
        "auto", description="auto: <think> parts reasoning from the answer, where the template has it."
    )

    # HTTP face
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on. 0: a free one.")
    api_key: ApiKeys = Field(
        (), description="A key that clients must give; it may do everything. Several: again, or with commas."
    )
    auth: bool = Field(True, description="--no-auth: ask nobody for a key, whatever keys there are.")
    unknown_fields: Literal["refuse", "ignore"] = Field(
        "refuse", description="ignore: unknown fields of a request are logged once, and go without."
    )
    trust_request_chat_template: bool = Field(
        False, description="Take `chat_template` from requests: a program, in a sandbox, against the clock."
    )
    max_request_bytes: Bytes = Field(8 * 2**20, gt=0, description="Largest JSON body, bytes.")
    allowed_hosts: Names = Field(
        (),
        description="Host names that requests may be for, besides loopback's and --host's, separated by "
        "commas; *: any.",
    )
    cors_origins: Names = Field(
        (), description="Origins of pages that may call from a browser, separated by commas; *: any."
    )
    ssl_certfile: File | None = Field(None, description="Certificate chain for HTTPS, a PEM file.")
    ssl_keyfile: File | None = Field(
        None, description="Its private key, a PEM file. Default: in --ssl-certfile."
    )
    ssl_keyfile_password: SecretStr | None = Field(
        None, description="Password of the private key. Better in the environment: flags are seen by all."
    )
    ssl_ca_certs: File | None = Field(
        None,
        description="Certificates that a client's own must be signed by, a PEM file. Default: none is asked.",
    )
    max_connections: int = Field(4096, gt=0, description="Most open connections.")
    max_request_head_bytes: Bytes = Field(
        32 * 2**10, gt=0, description="Largest request line and headers together, bytes."
    )
    max_request_headers: int = Field(100, gt=0, description="Most headers of a request.")
    max_pipelined_requests: int = Field(
        16, gt=0, description="Most requests that wait on a connection behind the one being answered."
    )
    read_timeout_s: float = Field(
        8.0,
        gt=0,
        description="How long headers may take, and a body before --min-rate-bytes counts, seconds.",
    )
    min_rate_bytes: Bytes = Field(
        16 * 2**10, gt=0, description="Slowest rate of a body or an answer, bytes in each second."
    )
    keep_alive_s: float = Field(75.0, gt=0, description="How long an idle connection stays open, seconds.")
    unread_timeout_s: float = Field(
        30.0, gt=0, description="How long an answer may wait for a client that does not read it, seconds."
    )
    max_unread_bytes: Bytes = Field(
        4 * 2**20, gt=0, description="How much of a stream may wait for its client, bytes."
    )
    max_waiting_requests: int = Field(
        512, gt=0, description="Most sequences without a first token yet; what is more is refused (503)."
    )
    request_timeout_s: float = Field(
        3600.0, gt=0, description="Longest time of a request from its arrival to its last token, seconds."
    )
    shutdown_grace_s: float = Field(
        30.0, ge=0, description="On SIGTERM, how long running requests may go on, seconds."
    )
    watchdog_s: float = Field(
        60.0, gt=0, description="A step that takes longer makes the server not ready, seconds."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Log level.")
    log_format: Literal["text", "json"] = Field("text", description="json: one object a line.")
    audit_log: Path | None = Field(
        None, description="File that changes of adapters and keys are appended to, as JSON lines."
    )
    usage_retention_days: int = Field(
        400, gt=0, le=36500, description="How long usage by hour is kept, days."
    )
    otlp_endpoint: str | None = Field(
        None, description="Collector that traces go to (OTLP/HTTP), a URL. Default: as OTEL_* says, or none."
    )

    def __init__(self, **given: Any) -> None:
        """Raises pydantic.ValidationError, and SettingsError where the file or a variable cannot be read."""
        super().__init__(**given)
        self._origin = Origin(given, self.model_dump())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        *others: PydanticBaseSettingsSource,
        **more: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        named = init_settings().get("config", env_settings().get("config"))
        if not named:
            return init_settings, env_settings
        return init_settings, env_settings, _file(settings_cls, Path(named))

    def reread(self) -> Self:
        """The same arguments and environment with the file as it is now. Raises as the constructor does."""
        return type(self)(**self._origin.given)

    def taking(self, new: Self) -> tuple[Self, dict[str, Any], list[str]]:
        """These settings with those of `new`, which were read again, that a running server can take over.

        Returns them, what changed, and the names of what else has changed since the start.
        """
        before = self._origin.read
        differing = {name: value for name, value in new._origin.read.items() if value != before[name]}
        changed = {name: value for name, value in differing.items() if name in RELOADABLE}
        taken = self.model_copy(update=changed)
        taken._origin = Origin(self._origin.given, before | changed)
        return taken, changed, [name for name in differing if name not in changed]

    @property
    def limits(self) -> Limits:
        """Of every adapter, wherever it comes from."""
        return Limits(
            max_upload_bytes=self.max_upload_bytes,
            max_unpacked_bytes=self.max_unpacked_bytes,
            max_header_bytes=self.max_header_bytes,
            max_tensors=self.max_adapter_tensors,
        )

    @property
    def lora_roots(self) -> tuple[Path, ...]:
        """The folders that adapters may be read from when a client names a path."""
        return (*self.allowed_lora_roots, *([self.adapters] if self.adapters else []))

    @field_validator("auth")
    @classmethod
    def _one_of_both(cls, auth: bool, info: ValidationInfo) -> bool:
        if not auth and info.data.get("api_key"):
            raise ValueError("a key is given, and nobody is to be asked for one; take one of them away")
        return auth

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_default(cls, value: object, info: ValidationInfo) -> object:
        """Of flags, as `env_ignore_empty` is of the environment."""
        if value != "" or info.field_name is None:
            return value
        field = cls.model_fields[info.field_name]
        return _not_empty(value) if field.is_required() else field.get_default()


def client_key() -> str | None:
    """The key that the commands show a running server: the first of $CHORUS_API_KEY."""
    return os.environ.get("CHORUS_API_KEY", "").partition(",")[0].strip() or None


@dataclass(frozen=True)
class OtelEnvironment:
    """What the standard variables of OpenTelemetry say; its SDK reads the rest of them itself."""

    has_endpoint: bool
    protocol: str
    disabled: bool

    @classmethod
    def read(cls) -> Self:
        get, otlp = os.environ.get, "OTEL_EXPORTER_OTLP"
        return cls(
            has_endpoint=bool(get(f"{otlp}_TRACES_ENDPOINT") or get(f"{otlp}_ENDPOINT")),
            protocol=get(f"{otlp}_TRACES_PROTOCOL") or get(f"{otlp}_PROTOCOL", ""),
            disabled=get("OTEL_SDK_DISABLED", "").lower() == "true" or get("OTEL_TRACES_EXPORTER") == "none",
        )


def _file(settings_cls: type[BaseSettings], path: Path) -> TomlConfigSettingsSource:
    if not path.is_file():
        raise SettingsError(f"--config {path}: there is no such file")
    try:
        return TomlConfigSettingsSource(settings_cls, toml_file=path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--config {path}: {error}") from error


def user_data_dir() -> Path:
    """The user's data folder by the XDG convention: $XDG_DATA_HOME, or ~/.local/share."""
    configured = os.environ.get("XDG_DATA_HOME", "")
    return Path(configured) if Path(configured).is_absolute() else Path.home() / ".local" / "share"

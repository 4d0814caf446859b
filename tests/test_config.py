"""The options of the server. A new one is a decision: add it here."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest
from pydantic_settings import SettingsError

from server.config import RELOADABLE, Settings, parse_bytes, user_data_dir

OPTIONS = [
    "config",
    "model", "revision", "served_model_name", "tokenizer", "load_format", "dtype", "device", "threads",
    "seed",
    "adapters", "data_dir", "allowed_lora_roots", "max_upload_bytes", "upload_timeout_s",
    "max_unpacked_bytes", "max_header_bytes", "max_adapter_tensors", "max_lora_rank",
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "kv_cache_bytes", "arena_bytes",
    "host_cache_bytes", "attention", "enforce_eager", "cuda_levers", "prefix_caching", "scheduling_policy",
    "max_pinned_share", "spare_engine", "tool_parser", "reasoning_parser",
    "host", "port", "api_key", "auth", "unknown_fields", "trust_request_chat_template", "max_request_bytes",
    "allowed_hosts", "cors_origins",
    "ssl_certfile", "ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs",
    "max_connections", "max_request_head_bytes", "max_request_headers", "max_pipelined_requests",
    "read_timeout_s", "min_rate_bytes", "keep_alive_s", "unread_timeout_s", "max_unread_bytes",
    "max_waiting_requests", "request_timeout_s", "shutdown_grace_s", "watchdog_s",
    "log_level", "log_format", "audit_log", "usage_retention_days", "otlp_endpoint",
]  # fmt: skip


def test_the_list_of_options() -> None:
    assert list(Settings.model_fields) == OPTIONS


def test_each_option_says_what_it_is() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        unit = {"bytes": "bytes", "s": "seconds"}.get(name.rsplit("_", 1)[-1])
        assert unit is None or unit in field.description, name


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 * 2**20), ("2GB", 2 * 10**9), ("1.5g", 1_500_000_000), (" 7 ", 7), (7, 7)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "5i", "-1", "1e3", "5 mb x"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


def test_environment_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_KV_CACHE_BYTES", "1GiB")
    monkeypatch.setenv("CHORUS_PORT", "1234")
    settings = Settings(model="m", port=99)
    assert (settings.kv_cache_bytes, settings.port) == (2**30, 99)
    with pytest.raises(pydantic.ValidationError):
        Settings(model="m", no_such_option=1)  # type: ignore[call-arg]  # the point of the test


def test_empty_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """`CHORUS_ADAPTERS=` of a compose file, `--adapters "$UNSET"`: never the working directory."""
    plain = Settings(model="m")
    for name in set(OPTIONS) - {"model"}:
        monkeypatch.setenv(f"CHORUS_{name.upper()}", "")
    assert Settings(model="m") == plain
    given = dict.fromkeys(set(OPTIONS) - {"model", "allowed_lora_roots"}, "")
    assert Settings(model="m", **given) == plain  # type: ignore[arg-type]  # text, as flags are


def test_an_empty_flag_undoes_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_ADAPTERS", "/adapters")
    assert Settings(model="m", adapters="").adapters is None


@pytest.mark.parametrize("fields", [{"model": ""}, {"model": "m", "allowed_lora_roots": ["/a", ""]}])
def test_what_must_not_be_empty(fields: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError, match="must not be empty"):
        Settings(**fields)  # type: ignore[arg-type]  # the point of the test


def test_user_data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert user_data_dir() == tmp_path
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_data_dir() == tmp_path / ".local" / "share"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_behind_arguments_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "chorus.toml", 'model = "m"\nport = 1\nseed = 2\nkv_cache_bytes = "1GiB"\n')
    monkeypatch.setenv("CHORUS_SEED", "3")
    settings = Settings(config=file, port=4)  # type: ignore[call-arg]  # the file has the model
    assert (settings.model, settings.port, settings.seed, settings.kv_cache_bytes) == ("m", 4, 3, 2**30)
    monkeypatch.setenv("CHORUS_CONFIG", str(file))
    assert Settings().model == "m"  # type: ignore[call-arg]
    assert Settings(model="other", config=None).seed == 3
    assert Settings(model="other", config=None).kv_cache_bytes is None


@pytest.mark.parametrize(
    ("text", "reason"), [(None, "no such file"), ("port = ", "Invalid value"), ("no_such = 1", "no_such")]
)
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str | None, reason: str) -> None:
    file = tmp_path / "chorus.toml"
    if text is not None:
        write(file, text)
    with pytest.raises((SettingsError, pydantic.ValidationError), match=reason):
        Settings(model="m", config=file)


def test_reading_again_takes_what_a_running_server_can(tmp_path: Path) -> None:
    file = write(tmp_path / "chorus.toml", 'watchdog_s = 5\nlog_level = "info"\nseed = 1\n')
    settings = Settings(model="m", config=file, shutdown_grace_s=7)
    settings = settings.model_copy(update={"model": "/found/m"})  # as at start
    write(file, "watchdog_s = 6\nseed = 2\nshutdown_grace_s = 8\n")
    for changed in ({"watchdog_s": 6.0}, {}):  # again: what waits for a restart is told again
        settings, took, others = settings.taking(settings.reread())
        assert (took, others) == (changed, ["seed"])  # an argument wins as it did
    assert (settings.model, settings.watchdog_s, settings.seed) == ("/found/m", 6, 1)
    assert settings.shutdown_grace_s == 7


def test_what_can_be_reloaded_is_a_setting() -> None:
    assert Settings.model_fields.keys() >= RELOADABLE

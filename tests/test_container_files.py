"""The container files and the operations guide, against the code that they speak of."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from load_tests.fake_engine import empty_stats
from server.config import Settings
from server.messages import EngineInfo, EngineStats
from server.telemetry.adapter_metrics import Served
from server.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PROMETHEUS = ROOT / "deploy" / "prometheus"
GUIDE = (ROOT / "docs" / "operations.md").read_text()
SERVERS = ("chorus", "chorus-gpu")


def _instructions(name: str) -> list[str]:
    """Arguments of every `name` instruction, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M))
    return re.findall(rf"^{name} +(.*)$", joined, flags=re.M)


def _image_environment() -> dict[str, str]:
    """What the runtime stage sets (its ENV is the last one)."""
    return dict(re.findall(r"(\w+)=(\S+)", _instructions("ENV")[-1]))


def _stats() -> EngineStats:
    return msgspec.structs.replace(empty_stats(), resident=("a",), step_tokens=(0,) * 7)


def _metric_names() -> set[str]:
    """Every name that `/metrics` and `/metrics/adapters` show, as Prometheus stores it."""
    info = EngineInfo(
        pid=1, model_type="llama", device="cpu", dtype="float32", vocab_size=8, max_model_len=8,
        parameters=1, weights_bytes=1, block_size=16, kv_blocks=1,
        kv_bytes=1, arena_bytes=1, lora_targets=[], load_seconds=0.0,
    )  # fmt: skip
    engine: Any = SimpleNamespace(state="ready", restarts=0, info=info, stats=_stats())
    metrics = Metrics(engine, lambda digest: digest)
    metrics.watch_queue(lambda: 0, lambda: 1)
    metrics.adapters.count(Served("a", "a", "completed", 1, 1, 0.1))
    text = (metrics.render() + metrics.render_adapters()).decode()
    samples = {s.name for family in text_string_to_metric_families(text) for s in family.samples}
    return {name for name in samples if not name.endswith("_created")}


@pytest.mark.parametrize("file", ["Dockerfile", "docker-compose.yml", "docs/operations.md"])
def test_variables_are_settings(file: str) -> None:
    named = set(re.findall(r"\bCHORUS_([A-Z_]*[A-Z])\b", (ROOT / file).read_text()))
    assert named
    assert {name.lower() for name in named} <= set(Settings.model_fields)


def test_flags_of_the_guide_are_settings() -> None:
    guide, _, _ = GUIDE.partition("## How the image was built")  # with the flags of other programs
    commands = re.findall(r"chorus serve (.*)", guide.replace("\\\n", " "))
    flags = {flag for command in commands for flag in re.findall(r"--(?:no-)?([a-z][a-z-]+)", command)}
    flags |= set(re.findall(r"`--(?:no-)?([a-z][a-z-]+)[` ]", guide))
    flags -= {"help", "extra-index-url"}  # typer's and pip's
    assert flags
    assert {flag.replace("-", "_") for flag in flags} <= set(Settings.model_fields)


def test_default_command_makes_a_valid_configuration() -> None:
    assert _instructions("ENTRYPOINT") == ['["chorus"]']
    assert _instructions("CMD") == ['["serve"]']
    given = {
        name.removeprefix("CHORUS_").lower(): value
        for name, value in _image_environment().items()
        if name.startswith("CHORUS_")
    }
    settings = Settings(**given)
    assert settings.host == "0.0.0.0"
    assert f"EXPOSE {settings.port}\n" in DOCKERFILE


def test_image_runs_without_root_rights_and_is_watched() -> None:
    assert _instructions("USER") == ["10001:10001"]
    assert _instructions("STOPSIGNAL") == ["SIGTERM"]
    assert "/health/ready" in _instructions("HEALTHCHECK")[0]
    (volume,) = _instructions("VOLUME")
    environment = _image_environment()
    assert environment["XDG_DATA_HOME"] == environment["HOME"] == volume


def test_image_version_is_the_package_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"VERSION={project['version']}" in _instructions("ARG")


def test_copied_files_pass_the_dockerignore() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    admitted = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copies = [copy.split() for copy in _instructions("COPY") if "--from" not in copy]
    sources = {source for *sources, _ in copies for source in sources}
    assert "*" in lines
    assert sources == admitted
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_services_are_closed_by_default(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("${PUBLISH_ADDRESS:-127.0.0.1}:") for port in service["ports"])


@pytest.mark.parametrize("name", SERVERS)
def test_servers_have_time_to_drain_and_a_volume(name: str) -> None:
    service = COMPOSE["services"][name]
    grace = float(service["stop_grace_period"].removesuffix("s"))
    assert grace > Settings.model_fields["shutdown_grace_s"].default
    (volume,) = service["volumes"]
    assert volume.endswith(":/data")
    assert volume.split(":")[0] in COMPOSE["volumes"]
    assert service["ports"][0].endswith(f":{service['environment']['CHORUS_PORT']}")


def test_gpu_is_behind_its_profile() -> None:
    services = COMPOSE["services"]
    assert "profiles" not in services["chorus"]
    assert services["chorus-gpu"]["profiles"] == ["gpu"]
    assert services["chorus-gpu"]["build"]["args"]["TORCH"] == "cuda"
    (device,) = services["chorus-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"


def test_prometheus_scrapes_the_servers() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    paths = set()
    for job in config["scrape_configs"]:
        (discovery,) = job["dns_sd_configs"]
        assert discovery["names"] == list(SERVERS)
        assert str(discovery["port"]) == _image_environment()["CHORUS_PORT"]
        paths.add(job.get("metrics_path", "/metrics"))
    assert paths == {"/metrics", "/metrics/adapters"}
    assert all((PROMETHEUS / rules).is_file() for rules in config["rule_files"])


def test_prometheus_gives_the_key_that_compose_mounts() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (secret,) = COMPOSE["services"]["prometheus"]["secrets"]
    for job in config["scrape_configs"]:
        assert job["authorization"] == {"credentials_file": f"/run/secrets/{secret}"}
    variable, default = re.fullmatch(r"\$\{(\w+):-(.+)\}", COMPOSE["secrets"][secret]["file"]).groups()
    assert (ROOT / default).read_bytes() == b""  # a server without keys is given none
    assert f"{variable}=" in GUIDE


def test_services_mount_and_find_what_is_there() -> None:
    services = COMPOSE["services"]
    mounts = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    assert all((ROOT / source).is_dir() for source in mounts if source.startswith("./"))
    assert {source for source in mounts if not source.startswith("./")} == set(COMPOSE["volumes"])
    collector = yaml.safe_load((ROOT / "deploy" / "otel" / "collector.yml").read_text())
    port = collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"].rpartition(":")[2]
    for name in SERVERS:
        assert services[name]["environment"]["CHORUS_OTLP_ENDPOINT"] == f"http://otel-collector:{port}"
        assert "otel-collector" in services[name]["depends_on"]
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"].startswith("http://prometheus:")
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "chorus.yml").read_text())["providers"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


def test_alerts_use_metrics_that_exist() -> None:
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        used = set(re.findall(r"\b(?:chorus_|vllm:)\w+", rule["expr"]))
        assert used <= _metric_names(), rule["alert"]
        assert f"`{rule['alert']}`" in GUIDE


def test_guide_lists_every_metric() -> None:
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in _metric_names()}
    listed = set(re.findall(r"^\| `((?:chorus_|vllm:)\w+)", GUIDE, flags=re.M))
    assert listed == families


def test_guide_lists_settings_with_their_defaults() -> None:
    rows = re.findall(r"^\| `--([a-z-]+)` \| ([^|]*?) \|", GUIDE, flags=re.M)
    assert rows
    for flag, default in rows:
        value = Settings.model_fields[flag.replace("-", "_")].default
        if value not in (None, ()):
            assert default == str(value).removesuffix(".0"), flag

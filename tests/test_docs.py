"""What the documents name exists: commands, flags, variables, routes, metrics, files and tests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from starlette.routing import Route

from server.api.app import ROUTERS
from server.api.inference.field_lists import asks_for_nothing
from server.api.inference.schemas import (
    IGNORED_FIELDS,
    NEUTRAL_FIELDS,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from server.cli import app
from server.config import Settings
from server.errors import ChorusError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")

ROUTES = [route for router in ROUTERS for route in router.routes if isinstance(route, Route)]

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def code_of(text: str) -> str:
    """The code of a Markdown text: fenced blocks with continued lines joined, and spans, one a line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return re.sub(r"\\\n\s*", " ", "\n".join([*blocks, *spans]))


def read(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def commands(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Every command of the `chorus` script with its flags."""
    yield path, {"--help", *(flag for p in group.params for flag in (*p.opts, *p.secondary_opts))}
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


@each_document
def test_make_targets(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    assert set(re.findall(r"^\s*make ([a-z]+)", code_of(read(document)), re.M)) <= targets


@each_document
def test_commands_and_their_flags(document: Path) -> None:
    for line in re.findall(
        r"(?:^|[\s/(])chorus ((?:serve|adapters|keys|quotas|usage|--).*)", code_of(read(document))
    ):
        words = [word for word in re.split(r"\s+#\s|[|&;)]", line)[0].split() if word != "..."]
        path = tuple(words[:2]) if words[0] in ("adapters", "keys", "quotas") else (words[0],)
        path = () if words[0].startswith("--") else path
        assert path in COMMANDS, line
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= COMMANDS[path], line


@pytest.mark.parametrize("name", ["README.md", "docs/api.md", "docs/architecture.md"])
def test_flags_named_in_the_text(name: str) -> None:
    """In documents where every flag named alone is one of the server's."""
    known = set().union(*COMMANDS.values())
    named = set(re.findall(r"(?<!`)`(--[a-z-]+)`", read(ROOT / name)))
    assert named <= known


@each_document
def test_environment_variables(document: Path) -> None:
    known = {f"CHORUS_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"\bCHORUS_[A-Z][A-Z_]*[A-Z]\b", read(document))) <= known


@each_document
def test_routes_named_exist(document: Path) -> None:
    ours = {(method, route.path.replace(":path", "")) for route in ROUTES for method in route.methods or ()}
    verbs = "GET|POST|PUT|DELETE|PATCH"
    assert set(re.findall(rf"`({verbs}) (/[^\s`?]+)`", read(document))) <= ours
    for path in re.findall(r"127\.0\.0\.1:800\d(/[^\s'\"`?)]+)", read(document)):
        assert any(route.path_regex.match(path) for route in ROUTES) or path == "/v1", path


def test_every_route_is_described() -> None:
    for route in ROUTES:
        for method in (route.methods or set()) - {"HEAD"}:
            assert f"`{method} {route.path.replace(':path', '')}`" in API


def test_every_error_code_is_described() -> None:
    def kinds(kind: type[ChorusError]) -> Iterator[type[ChorusError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from kinds(child)

    for kind in kinds(ChorusError):
        if kind.__module__ == "server.errors" and kind.code is not None:
            assert f"`{kind.code}`" in API
    for path in (ROOT / "server" / "api").rglob("*.py"):
        for code in re.findall(r'\bcode="([a-z_]+)"', path.read_text("utf-8")):
            assert f"`{code}`" in API, path.name


def test_every_metric_is_described_and_no_other() -> None:
    sources = [path.read_text("utf-8") for path in (ROOT / "server" / "telemetry").glob("*.py")]
    made = set(re.findall(r'"((?:chorus_|vllm:)[a-z0-9_]+)"', "\n".join(sources)))
    made = {name.removesuffix("_total") for name in made}
    described = {name.removesuffix("_total") for name in re.findall(r"`((?:chorus_|vllm:)[a-z0-9_]+)", API)}
    assert described == made


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read(document)):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@each_document
def test_links_within_a_document(document: Path) -> None:
    titles = re.findall(r"^#+ (.*)$", read(document), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", read(document))) <= anchors


@each_document
def test_files_and_tests_named_exist(document: Path) -> None:
    roots = "server|tests|examples|load_tests|deploy|docs"
    for path, name in re.findall(rf"`((?:{roots})/[\w/.-]+?\.\w+)(?:::(\w+))?`", read(document)):
        assert (ROOT / path).is_file(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text("utf-8"), f"{path}::{name}"
    within_server = r"`((?:api|text|registry|engine|model|lora|native|telemetry)/[\w/]+\.\w+)`"
    for path in re.findall(within_server, read(document)) if document.name == "architecture.md" else ():
        assert (ROOT / "server" / path).is_file(), path


def _field_state(name: str, kind: type[GenerationRequest]) -> str:
    """What docs/api.md is to say of a field of this body."""
    if name in IGNORED_FIELDS:
        return "no effect"
    if name in kind.model_fields:
        return "works"
    if name not in NEUTRAL_FIELDS:
        return "refused"
    values = [json.dumps(value) for value in NEUTRAL_FIELDS[name] if not asks_for_nothing(value)]
    return "only " + (" or ".join(f"`{value}`" for value in dict.fromkeys(values)) or "empty")


def test_the_table_of_every_field() -> None:
    """All that OpenAI's SDK sends, and what else is known, as the server treats it; the tests are looked for
    above, with all that documents name."""
    table = API.partition("### Every field")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| \w+ \| (.+?) \| (.+?) \| `(tests/.+?::\w+)` \|$", table, re.M)
    sent = {"stream"}
    for params in (completion_params.CompletionCreateParamsBase, chat_params.CompletionCreateParamsBase):
        sent |= params.__annotations__.keys()
    known = CompletionRequest.model_fields.keys() | ChatRequest.model_fields.keys()
    assert {name for name, *_ in rows} == sent | known | NEUTRAL_FIELDS.keys() | IGNORED_FIELDS
    for name, completions, chat, _ in rows:
        assert completions == _field_state(name, CompletionRequest), name
        assert chat == _field_state(name, ChatRequest), name

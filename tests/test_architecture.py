"""The walls of docs/architecture.md: which room may import what. Imports are read, not run, lazy ones too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each room may import of `server` besides itself. A new line here is a new dependency: a decision.
MAY_IMPORT = {
    "api": {
        "base_model",
        "config",
        "errors",
        "engine.client",
        "engine.messages",
        "registry",
        "telemetry",
        "text",
    },
    "text": {"errors"},
    "registry": {"config", "errors", "engine.messages"},
    "telemetry": {"engine.client", "engine.messages"},
    "engine": {"config", "errors", "telemetry.logging"},
    "engine.engine": {"config", "engine", "lora", "model"},
    "model": {"config", "engine.messages", "engine.sequence", "engine.step_plan", "lora", "native"},
    "lora": {"engine.adapter_gate", "engine.messages", "errors", "native", "registry.peft_format"},
    "native": set(),
}
HTTP = {"fastapi", "starlette", "uvicorn"}
TENSORS = {"torch", "transformers", "triton"}
SCHEDULING = (
    "scheduler",
    "block_pool",
    "sequence",
    "step_plan",
    "policy",
    "waiting_line",
    "adapter_turns",
    "adapter_gate",
)
VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "manager", "managers", "misc"}


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything in `server`."""
    found = {}
    for path in sorted((ROOT / "server").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str) -> set[str]:
    """Every module that the source may import, at its top or inside a function. `from a import b` gives
    `a` and `a.b`, because `b` may be a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            assert node.module is not None
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@cache
def imports_of(module: str) -> frozenset[str]:
    return frozenset(imported(modules()[module].read_text(encoding="utf-8")))


def parents(module: str) -> Iterator[str]:
    """The packages around a module, which Python imports before it."""
    while "." in module:
        module = module.rpartition(".")[0]
        yield module


def reached(module: str) -> dict[str, list[str]]:
    """Everything that importing `module` may import, each with the way to it through `server`."""
    ways: dict[str, list[str]] = {}
    ahead = [(name, [name]) for name in (module, *parents(module))]
    while ahead:
        name, way = ahead.pop()
        if name in ways:
            continue
        ways[name] = way
        if name in modules():
            ahead += [(found, [*way, found]) for each in imports_of(name) for found in (each, *parents(each))]
    return ways


def room_of(module: str) -> str:
    """`server.model.attention.hf` -> `model`; the one module with rights of its own keeps its name."""
    inside = module.removeprefix("server.")
    return inside if inside in MAY_IMPORT else inside.partition(".")[0]


def in_rooms(*rooms: str) -> list[str]:
    return [module for module in modules() if module.startswith(tuple(f"server.{room}" for room in rooms))]


def assert_never_reaches(module: str, forbidden: set[str]) -> None:
    ways = reached(module)
    assert not (bad := ways.keys() & forbidden), [" -> ".join(ways[name]) for name in sorted(bad)]


def test_lazy_imports_and_submodules_are_seen() -> None:
    source = "import os.path\nfrom a import b\ndef f():\n    from c.d import e\n"
    assert imported(source) == {"os.path", "a", "a.b", "c.d", "c.d.e"}
    assert "torch" in reached("server.engine.engine")
    assert len(modules()) > 50


@pytest.mark.parametrize("module", in_rooms("api", "text", "registry", "telemetry"))
def test_the_face_reaches_no_tensor_library(module: str) -> None:
    assert_never_reaches(module, TENSORS)


@pytest.mark.parametrize("name", SCHEDULING)
def test_scheduling_reaches_no_tensor_library(name: str) -> None:
    assert_never_reaches(f"server.engine.{name}", TENSORS)


@pytest.mark.parametrize("module", in_rooms("engine", "model", "lora", "native"))
def test_the_engine_reaches_no_http_library(module: str) -> None:
    assert_never_reaches(module, HTTP)


def test_torch_is_imported_where_steps_are_run_and_nowhere_else() -> None:
    importers = {module for module in modules() if imports_of(module) & TENSORS}
    assert importers <= {*in_rooms("model", "lora", "native"), "server.engine.engine"}


def test_only_the_engine_sees_scheduler_and_runner() -> None:
    both = {"server.engine.scheduler", "server.model.runner"}
    assert [module for module in modules() if both <= {*imports_of(module), module}] == [
        "server.engine.engine"
    ]


@pytest.mark.parametrize("module", in_rooms(*MAY_IMPORT))
def test_rooms_see_only_their_neighbours(module: str) -> None:
    room = room_of(module)
    allowed = {room, *MAY_IMPORT[room]}
    for name in imports_of(module) & modules().keys() - {"server"}:
        inside = name.removeprefix("server.")
        inside_and_around = {inside, *parents(inside)}
        if any(other.startswith(f"{name}.") for other in imports_of(module) & modules().keys()):
            continue  # the package of a module that is judged by itself
        assert inside_and_around & allowed, f"{module} imports {name}"


def test_the_environment_is_read_in_one_place() -> None:
    def reads_environment(source: str) -> bool:
        names = {"environ", "environb", "getenv", "getenvb"}
        return any(
            (isinstance(node, ast.Attribute) and node.attr in names)
            or (isinstance(node, ast.ImportFrom) and any(alias.name in names for alias in node.names))
            for node in ast.walk(ast.parse(source))
        )

    readers = [name for name, path in modules().items() if reads_environment(path.read_text("utf-8"))]
    assert readers == ["server.config"]


def test_no_vague_names() -> None:
    words = {word for module in modules() for part in module.split(".") for word in part.split("_")}
    assert not words & VAGUE_NAMES


def test_the_app_loads_without_tensor_libraries() -> None:
    """As the import graph says, and for what other people's packages import as well."""
    code = "import sys, server.api.app; print(*sorted(set(sys.argv[1:]) & sys.modules.keys()))"
    command = [sys.executable, "-c", code, *sorted(TENSORS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

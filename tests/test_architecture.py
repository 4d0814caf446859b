"""The walls of docs/architecture.md: which room may import what. Imports are read, not run, lazy ones too."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

DRAWING = ROOT / "docs" / "architecture.md"
WORDS = {"messages", "errors", "config", "log", "garbage", "turns"}  # single files that cross rooms
TOPS = {
    "cli",
    "__main__",
    "adapters_cli",
    "keys_cli",
    "remote",
    "usage_cli",
    "quotas_cli",
}  # what starts the rest
HTTP = {"fastapi", "starlette", "uvicorn"}
TENSORS = {"torch", "transformers", "triton"}
SIZED = ("server", "load_tests")
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
    """`server.model.attention.hf` -> `model`."""
    return module.removeprefix("server.").partition(".")[0]


def in_rooms(*rooms: str) -> list[str]:
    return [module for module in modules() if module != "server" and room_of(module) in rooms]


@cache
def may_import() -> dict[str, set[str]]:
    """What each room may import besides itself, as docs/architecture.md draws it, lowest room first."""
    table = DRAWING.read_text(encoding="utf-8").split("## Walls and seams", 1)[1]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]*) \|$", table, re.MULTILINE)
    return {room: set(re.findall(r"`(\w+)`", allowed)) for room, allowed in rows}


def assert_never_reaches(module: str, forbidden: set[str]) -> None:
    ways = reached(module)
    assert not (bad := ways.keys() & forbidden), [" -> ".join(ways[name]) for name in sorted(bad)]


def test_lazy_imports_and_submodules_are_seen() -> None:
    source = "import os.path\nfrom a import b\ndef f():\n    from c.d import e\n"
    assert imported(source) == {"os.path", "a", "a.b", "c.d", "c.d.e"}
    assert "torch" in reached("server.engine.engine")
    assert len(modules()) > 50


@pytest.mark.parametrize(
    "module", in_rooms("api", "border", "peft", "registry", "telemetry", "text", "usage")
)
def test_the_face_reaches_no_tensor_library(module: str) -> None:
    assert_never_reaches(module, TENSORS)


@pytest.mark.parametrize("module", in_rooms("scheduling"))
def test_scheduling_reaches_no_tensor_library(module: str) -> None:
    assert_never_reaches(module, TENSORS)


@pytest.mark.parametrize("module", in_rooms("engine", "model", "lora", "devices", "scheduling"))
def test_the_engine_reaches_no_http_library(module: str) -> None:
    assert_never_reaches(module, HTTP)


def test_torch_is_imported_where_steps_are_run_and_nowhere_else() -> None:
    importers = {module for module in modules() if imports_of(module) & TENSORS}
    assert importers <= {*in_rooms("model", "lora", "devices"), "server.engine.engine"}


def test_archives_are_read_by_a_process_of_their_own() -> None:
    """That starts fast, because it imports nothing of the server's, and that nobody imports."""
    reader = "server.registry.sources.archive_reader"
    importers = {module for module in modules() if imports_of(module) & {"tarfile", "zipfile", "gzip"}}
    assert importers == {reader}
    assert not [module for module in modules() if reader in imports_of(module)]
    assert not [name for name in imports_of(reader) if name.partition(".")[0] not in sys.stdlib_module_names]


def test_only_the_engine_sees_scheduler_and_runner() -> None:
    both = {"server.scheduling.scheduler", "server.model.runner"}
    assert [module for module in modules() if both <= {*imports_of(module), module}] == [
        "server.engine.engine"
    ]


def test_the_drawing_has_every_room() -> None:
    rooms = {room_of(module) for module in modules() if module != "server"}
    assert set(may_import()) == rooms - WORDS - TOPS


@pytest.mark.parametrize("module", in_rooms(*may_import(), *WORDS))
def test_rooms_see_only_what_the_drawing_allows(module: str) -> None:
    room = room_of(module)
    allowed = {room} if room in WORDS else {room, *may_import()[room]}
    seen = {room_of(name) for name in imports_of(module) & modules().keys() - {"server"}}
    assert seen <= allowed, f"{module} imports {sorted(seen - allowed)}"


def test_the_drawing_is_what_the_code_does() -> None:
    """An arrow that nobody uses is taken out."""
    for room, allowed in may_import().items():
        used = {room_of(name) for module in in_rooms(room) for name in imports_of(module) & modules().keys()}
        assert allowed <= used, f"{room} may import {sorted(allowed - used)} and does not"


def test_no_arrow_runs_up() -> None:
    order = [*WORDS, *may_import()]
    for room, allowed in may_import().items():
        assert all(order.index(other) < order.index(room) for other in allowed), room


def test_no_module_imports_itself_through_others() -> None:
    """Imports for type checkers count too."""
    for start in modules():
        ahead, seen = list(direct(start)), set[str]()
        while ahead:
            name = ahead.pop()
            assert name != start, f"{start} imports itself through others"
            if name not in seen:
                seen.add(name)
                ahead += direct(name)


@cache
def direct(module: str) -> frozenset[str]:
    """The modules of `server` that it imports, without the packages around them."""
    names = imports_of(module) & modules().keys() - {module}
    return frozenset(name for name in names if not any(other.startswith(f"{name}.") for other in names))


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


def test_sizes() -> None:
    """Files up to 400 lines, functions up to 60, with docstrings; half of all functions up to 7."""
    sources = {path: path.read_text("utf-8") for room in SIZED for path in (ROOT / room).rglob("*.py")}
    assert not [str(path) for path, source in sources.items() if len(source.splitlines()) > 400]
    functions = [
        (node.end_lineno - node.lineno + 1, f"{path}:{node.lineno} {node.name}")
        for path, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    ]
    assert not [where for lines, where in functions if lines > 60]
    assert statistics.median(lines for lines, _ in functions) <= 7


def test_one_word_is_one_type() -> None:
    """No two modules define a public class or type of the same name; type variables aside."""
    places: dict[str, list[str]] = {}
    for module, path in modules().items():
        for node in ast.parse(path.read_text("utf-8")).body:
            if (name := type_name(node)) is not None:
                places.setdefault(name, []).append(module)
    assert not {name: each for name, each in places.items() if len(each) > 1}


def type_name(node: ast.stmt) -> str | None:
    """The name of a public class, or of a type alias."""
    if isinstance(node, ast.ClassDef):
        name = node.name
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        name = node.targets[0].id
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "TypeVar":
            return None
    else:
        return None
    return name if name[0].isupper() and name != name.upper() else None


def test_no_vague_names() -> None:
    words = {word for module in modules() for part in module.split(".") for word in part.split("_")}
    assert not words & VAGUE_NAMES


def test_the_app_loads_without_tensor_libraries() -> None:
    """As the import graph says, and for what other people's packages import as well."""
    code = "import sys, server.api.app; print(*sorted(set(sys.argv[1:]) & sys.modules.keys()))"
    command = [sys.executable, "-c", code, *sorted(TENSORS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

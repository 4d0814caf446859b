"""`chorus adapters`: see and change the adapters of a running server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from server.remote import (
    LOCAL,
    JsonOption,
    KeyOption,
    Remote,
    ServerOption,
    TenantOption,
    ago,
    fail,
    print_json,
    printable,
)

# Written out, so that the command starts without loading numpy.
_FILE_NAMES = ("adapter_config.json", "adapter_model.safetensors")

app = typer.Typer(no_args_is_help=True, help="See and change the adapters of a running server.")

NameArgument = Annotated[str, typer.Argument(help="Name of the adapter.", show_default=False)]

_out = Console()
_err = Console(stderr=True)


@app.command("list")
def list_adapters(
    server: ServerOption = LOCAL,
    api_key: KeyOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List every adapter."""
    adapters = Remote(server, api_key, tenant).listed("/v1/adapters")
    if as_json:
        print_json({"object": "list", "data": adapters})
        return
    table = Table("name", "state", "version", "rank", "size", "where", "requests", "last used")
    for adapter in printable(adapters):
        table.add_row(
            *(_text(adapter.get(key)) for key in ("name", "state", "version", "rank")),
            _size(adapter.get("bytes")),
            _text(adapter.get("residency")),
            _text(adapter.get("requests")),
            ago(adapter["last_used"]) if "last_used" in adapter else "shared",
        )
    _out.print(table)


@app.command()
def show(
    name: NameArgument,
    server: ServerOption = LOCAL,
    api_key: KeyOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one adapter and its versions."""
    adapter = Remote(server, api_key, tenant).call("GET", _path(name))
    if as_json:
        print_json(adapter)
        return
    adapter = printable(adapter)
    versions = adapter.pop("versions")
    table = Table(show_header=False, box=None)
    for key, value in adapter.items():
        if key != "object" and value not in (None, ""):
            table.add_row(key, _field(key, value))
    _out.print(table)
    if versions:
        listed = Table("version", "digest", "rank", "size", "where", "requests", "tokens", "created")
        for version in versions:
            listed.add_row(
                str(version["version"]),
                version["digest"][:10],
                str(version["rank"]),
                _size(version["bytes"]),
                *(_text(version.get(key)) for key in ("residency", "requests", "tokens")),
                ago(version["created_at"]),
            )
        _out.print(listed)


@app.command()
def upload(
    name: NameArgument,
    path: Annotated[
        Path, typer.Argument(help="Folder in PEFT layout, or a .zip, .tar or .tar.gz of one.", exists=True)
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Make it a new version if the name exists.")
    ] = False,
    server: ServerOption = LOCAL,
    api_key: KeyOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload an adapter."""
    files = [path / file for file in _FILE_NAMES] if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            fail(f"{path} holds no {file.name}")
    method, route = ("PUT", _path(name)) if replace else ("POST", "/v1/adapters")
    with _uploading(files) as parts:
        answer = Remote(server, api_key, tenant).call(method, route, data={"name": name}, files=parts)
    if as_json:
        print_json(answer)
    else:
        answer = printable(answer)
        _out.print(
            f"{answer['name']}: version {answer['version']}, rank {answer['rank']}, "
            f"{_size(answer['bytes'])}, digest {answer['digest'][:12]}",
            highlight=False,
        )


@app.command()
def delete(
    name: NameArgument,
    server: ServerOption = LOCAL,
    api_key: KeyOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete an adapter; running requests finish first."""
    answer = Remote(server, api_key, tenant).call("DELETE", _path(name))
    if as_json:
        print_json(answer)
    elif answer["state"] == "draining":
        _out.print(f"{name} takes no new requests; it goes when the running ones have finished")
    else:
        _out.print(f"{name} is deleted")


@app.command()
def share(
    name: NameArgument,
    off: Annotated[bool, typer.Option("--off", help="Let no other tenant use it any more.")] = False,
    server: ServerOption = LOCAL,
    api_key: KeyOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let every tenant use an adapter (admin keys)."""
    answer = Remote(server, api_key, tenant).call("PATCH", _path(name), json={"shared": not off})
    if as_json:
        print_json(answer)
    else:
        _out.print(f"{name} is {'not shared any more' if off else 'shared with every tenant'}")


@contextmanager
def _uploading(files: list[Path]) -> Iterator[list[tuple[str, tuple[str, IO[bytes]]]]]:
    """The parts of a multipart body, read from disk as they are sent, with a bar that shows it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    progress = Progress(*columns, console=_err, transient=True, disable=not sys.stderr.isatty())
    with progress, ExitStack() as opened:
        try:
            yield [
                ("files", (file.name, opened.enter_context(progress.open(file, "rb", description=file.name))))
                for file in files
            ]
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}")


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='/')}"


def _field(key: str, value: Any) -> str:
    formats: dict[str, Callable[[Any], str]] = {
        "bytes": _size,
        "share": lambda share: f"{share:.2%} of the base model's parameters",
        "created_at": ago,
        "last_used": ago,
        "targets": ", ".join,
        "parameters": "{:,}".format,
        "last_load_ms": "{:.3g}".format,
    }
    return formats.get(key, _text)(value)


def _text(value: object) -> str:
    return "" if value is None else escape(str(value))


def _size(size: int | None) -> str:
    if size is None:
        return ""
    amount, units = float(size), ["B", "kB", "MB", "GB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.3g} {units[0]}"

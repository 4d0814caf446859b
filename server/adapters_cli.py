"""`chorus adapters`: see and change the adapters of a running server."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn
from urllib.parse import quote

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

# Written out, so that the command starts without loading numpy.
_FILE_NAMES = ("adapter_config.json", "adapter_model.safetensors")

app = typer.Typer(no_args_is_help=True, help="See and change the adapters of a running server.")

ServerOption = Annotated[str, typer.Option("--server", help="Address of the server.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
NameArgument = Annotated[str, typer.Argument(help="Name of the adapter.", show_default=False)]

_LOCAL = "http://127.0.0.1:8000"
_TIMEOUT = httpx.Timeout(30.0, read=600.0)  # a large upload is judged before it is answered
_out = Console()
_err = Console(stderr=True)


@app.command("list")
def list_adapters(server: ServerOption = _LOCAL, as_json: JsonOption = False) -> None:
    """List every adapter."""
    answer = _call(server, "GET", "/v1/adapters")
    if as_json:
        _print_json(answer)
        return
    answer = _printable(answer)
    table = Table("name", "state", "version", "rank", "size", "where", "requests", "last used")
    for adapter in answer["data"]:
        table.add_row(
            *(_text(adapter.get(key)) for key in ("name", "state", "version", "rank")),
            _size(adapter.get("bytes")),
            _text(adapter.get("residency")),
            _text(adapter["requests"]),
            _ago(adapter["last_used"]),
        )
    _out.print(table)


@app.command()
def show(name: NameArgument, server: ServerOption = _LOCAL, as_json: JsonOption = False) -> None:
    """Show one adapter and its versions."""
    adapter = _call(server, "GET", _path(name))
    if as_json:
        _print_json(adapter)
        return
    adapter = _printable(adapter)
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
                version["residency"],
                str(version["requests"]),
                str(version["tokens"]),
                _ago(version["created_at"]),
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
    server: ServerOption = _LOCAL,
    as_json: JsonOption = False,
) -> None:
    """Upload an adapter."""
    files = [path / file for file in _FILE_NAMES] if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            _fail(f"{path} holds no {file.name}")
    method, route = ("PUT", _path(name)) if replace else ("POST", "/v1/adapters")
    with _uploading(files) as parts:
        answer = _call(server, method, route, data={"name": name}, files=parts)
    if as_json:
        _print_json(answer)
    else:
        answer = _printable(answer)
        _out.print(
            f"{answer['name']}: version {answer['version']}, rank {answer['rank']}, "
            f"{_size(answer['bytes'])}, digest {answer['digest'][:12]}",
            highlight=False,
        )


@app.command()
def delete(name: NameArgument, server: ServerOption = _LOCAL, as_json: JsonOption = False) -> None:
    """Delete an adapter; running requests finish first."""
    answer = _call(server, "DELETE", _path(name))
    if as_json:
        _print_json(answer)
    elif answer["state"] == "draining":
        _out.print(f"{name} takes no new requests; it goes when the running ones have finished")
    else:
        _out.print(f"{name} is deleted")


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
            _fail(f"{error.filename}: {error.strerror}")


def _call(server: str, method: str, path: str, **body: Any) -> dict[str, Any]:
    """The server's answer; any error ends the command with one line and code 1."""
    try:
        with httpx.Client(base_url=server, timeout=_TIMEOUT) as client:
            response = client.request(method, path, **body)
        answer: dict[str, Any] = response.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        _fail(f"no answer from {server}: {error or type(error).__name__}")
    except ValueError:
        _fail(f"{server} answered {response.status_code}, and not in JSON; is it a Chorus server?")
    if response.is_error:
        detail = answer.get("error")
        _fail(detail["message"] if isinstance(detail, dict) else f"{server} answered {response.status_code}")
    return answer


def _printable(value: Any) -> Any:
    """The same without what a terminal may take for a command, or shows in another order."""
    if isinstance(value, str):
        return "".join(character for character in value if character.isprintable())
    if isinstance(value, dict):
        return {_printable(key): _printable(each) for key, each in value.items()}
    return [_printable(each) for each in value] if isinstance(value, list) else value


def _fail(message: str) -> NoReturn:
    message = _printable(" ".join(message.splitlines()))
    _err.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='/')}"


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def _field(key: str, value: Any) -> str:
    formats: dict[str, Callable[[Any], str]] = {
        "bytes": _size,
        "share": lambda share: f"{share:.2%} of the base model's parameters",
        "created_at": _ago,
        "last_used": _ago,
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


def _ago(moment: float | None) -> str:
    if moment is None:
        return "never"
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"

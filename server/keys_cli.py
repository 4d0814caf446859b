"""`chorus keys`: API keys of a running server, or of the data folder of one that is stopped."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.errors import ChorusError
from server.remote import LOCAL, JsonOption, KeyOption, Remote, ServerOption, ago, fail, print_json, printable

if TYPE_CHECKING:
    from server.access.keyring import Keyring

app = typer.Typer(
    no_args_is_help=True,
    help="API keys: of a running server (with an admin's key), or of the data folder of one that is stopped.",
)

DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Data folder of a server that is stopped, instead of a running one."),
]

_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}

_out = Console()
_err = Console(stderr=True)


@app.command()
def create(
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="infer, upload, manage, metrics or admin; again for several."),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="What it is for.")] = "",
    tenant: Annotated[str | None, typer.Option("--tenant", help="Whose it is. Default: default.")] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", help="How long it is good for: 90d, 12h, 30min, 60s.")
    ] = None,
    data_dir: DataDirOption = None,
    server: ServerOption = LOCAL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key. It is printed once, alone on standard output; the server keeps only its hash."""
    wanted = {"name": name, "scopes": scope or ["infer"], "expires_in_s": _seconds(expires)}
    if tenant is not None:
        wanted["tenant"] = tenant
    if data_dir is None:
        made = Remote(server, api_key).call("POST", "/v1/keys", json=wanted)
    else:
        made = _create_offline(data_dir, wanted)
    if as_json:
        print_json(made)
        return
    _err.print(f"key {made['id']} of tenant {made['tenant']}: {', '.join(made['scopes'])}", highlight=False)
    typer.echo(made["key"])


@app.command("list")
def list_keys(
    data_dir: DataDirOption = None,
    server: ServerOption = LOCAL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List every key, revoked ones too; never the keys themselves."""
    if data_dir is None:
        keys = Remote(server, api_key).listed("/v1/keys")
    else:
        with _offline(data_dir, new=False) as keyring:
            keys = [_view(key) for key in keyring.known()]
    if as_json:
        print_json({"object": "list", "data": keys})
        return
    table = Table()
    table.add_column("id", no_wrap=True)  # it is there to be copied
    for title in ("name", "tenant", "scopes", "state", "created", "expires", "last used"):
        table.add_column(title)
    for key in printable(keys):
        table.add_row(
            *(escape(str(each)) for each in (key["id"], key["name"], key["tenant"])),
            " ".join(key["scopes"]),
            key["state"],
            ago(key["created_at"]),
            "never" if key["expires_at"] is None else time.strftime("%F", time.gmtime(key["expires_at"])),
            ago(key["last_used"]),
        )
    _out.print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Its id, as `list` shows it.", show_default=False)],
    data_dir: DataDirOption = None,
    server: ServerOption = LOCAL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Refuse a key from now on. Requests that run by it go on to their end."""
    if re.fullmatch(r"chorus-[0-9a-f]+-.+", key_id):
        fail("that is the key itself; give its id, the part between the first two dashes")
    if not re.fullmatch(r"[0-9a-f]{1,32}", key_id):
        fail(f"{key_id!r} is no id of a key")
    if data_dir is None:
        revoked = Remote(server, api_key).call("DELETE", f"/v1/keys/{key_id}")
    else:
        with _offline(data_dir, new=False) as keyring:
            revoked = _view(keyring.revoke(key_id))
    if as_json:
        print_json(revoked)
    else:
        _out.print(f"key {revoked['id']} is revoked", highlight=False)


def _create_offline(data_dir: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    with _offline(data_dir, new=True) as keyring:
        tenant = {"tenant": wanted["tenant"]} if "tenant" in wanted else {}
        key, text = keyring.create(
            wanted["name"], wanted["scopes"], lifetime_s=wanted["expires_in_s"], **tenant
        )
        return {**_view(key), "key": text}


@contextmanager
def _offline(data_dir: Path, *, new: bool) -> Iterator[Keyring]:
    """The keys of a data folder, which no server uses meanwhile. Whatever is wrong ends the command."""
    from server.access.keyring import Keyring  # the database: not for --help, and not for a running server
    from server.registry.data_folder import DataFolder
    from server.registry.store import DataDirInUseError, DataFolderError

    if not new and not (data_dir / "registry.db").exists():
        fail(f"{data_dir} holds no registry.db; is it a data folder?")
    try:
        with closing(DataFolder(data_dir)) as folder, closing(Keyring([], folder.keys)) as keyring:
            yield keyring
    except DataDirInUseError:
        fail(f"a server uses {data_dir}: ask it, by --server and an admin's --api-key, without --data-dir")
    except DataFolderError as error:
        fail(str(error))
    except ChorusError as error:
        fail(error.message)


def _view(key: Any) -> dict[str, Any]:
    from server.access.keys import view

    return dict(view(key, time.time()))


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9})(s|min|h|d)", text)
    if match is None or int(match[1]) == 0:
        fail(f"--expires: {text!r} is no time; write it like 90d, 12h, 30min or 60s")
    return float(match[1]) * _SECONDS[match[2]]

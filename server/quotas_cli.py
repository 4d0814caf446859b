"""`chorus quotas`: how much tenants, keys and adapters of a running server may use."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.remote import LOCAL, JsonOption, KeyOption, Remote, ServerOption, print_json, printable

app = typer.Typer(no_args_is_help=True, help="Quotas of a running server (with an admin's key).")

KindArgument = Annotated[str, typer.Argument(help="tenant, key or adapter.", show_default=False)]
SubjectArgument = Annotated[
    str, typer.Argument(help="The tenant, the key's id, or the adapter as usage has it.", show_default=False)
]
_LIMITS = (
    "requests_per_s", "tokens_per_s", "tokens_per_day", "concurrent_requests", "adapters_stored",
    "bytes_stored", "weight",
)  # fmt: skip

_out = Console()


@app.command("set")
def set_quota(
    kind: KindArgument,
    name: SubjectArgument,
    requests_per_s: Annotated[float | None, typer.Option(help="Requests a second.")] = None,
    tokens_per_s: Annotated[float | None, typer.Option(help="Tokens a second, prompts included.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(help="Tokens a day (UTC).")] = None,
    concurrent_requests: Annotated[int | None, typer.Option(help="Requests that run at once.")] = None,
    adapters_stored: Annotated[int | None, typer.Option(help="Adapters, of a tenant.")] = None,
    bytes_stored: Annotated[int | None, typer.Option(help="Bytes of weights, of a tenant.")] = None,
    weight: Annotated[float | None, typer.Option(help="Share of service, of a tenant.")] = None,
    server: ServerOption = LOCAL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set the whole quota: what is not named is not limited."""
    given = (
        requests_per_s, tokens_per_s, tokens_per_day, concurrent_requests, adapters_stored, bytes_stored,
        weight,
    )  # fmt: skip
    wanted = {limit: value for limit, value in zip(_LIMITS, given, strict=True) if value is not None}
    _show(Remote(server, api_key).call("PUT", _path(kind, name), json=wanted), as_json)


@app.command("list")
def list_quotas(server: ServerOption = LOCAL, api_key: KeyOption = None, as_json: JsonOption = False) -> None:
    """Every quota."""
    quotas = Remote(server, api_key).listed("/v1/quotas")
    if as_json:
        print_json({"object": "list", "data": quotas})
        return
    table = Table()
    for title in ("kind", "id", "limits"):
        table.add_column(title, no_wrap=title == "id")
    for quota in printable(quotas):
        table.add_row(escape(quota["kind"]), escape(quota["id"]), escape(_limits_of(quota)))
    _out.print(table)


@app.command()
def remove(
    kind: KindArgument,
    name: SubjectArgument,
    server: ServerOption = LOCAL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Limit it no more."""
    _show(Remote(server, api_key).call("DELETE", _path(kind, name)), as_json)


def _path(kind: str, name: str) -> str:
    return f"/v1/quotas/{quote(kind, safe='')}/{quote(name)}"


def _show(quota: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(quota)
        return
    shown = printable(f"{quota['kind']} {quota['id']}: {_limits_of(quota)}")
    _out.print(shown, markup=False, highlight=False)


def _limits_of(quota: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {quota[name]}" for name in _LIMITS if quota[name] is not None)

"""`chorus usage`: who has used what, as a table, JSON or CSV."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.remote import LOCAL, JsonOption, KeyOption, Remote, ServerOption, print_json, printable

_SUMS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")

_out = Console()


def usage(
    start: Annotated[
        str | None, typer.Option("--start", help="From then on: 2026-11-28, or 2026-11-28T13:00:00Z.")
    ] = None,
    end: Annotated[str | None, typer.Option("--end", help="Until then.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Of this tenant.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Of the key of this id.")] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="Of this adapter.")] = None,
    group_by: Annotated[
        str, typer.Option("--group-by", help="Some of day, hour, tenant, key, adapter, version.")
    ] = "day,tenant,adapter",
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    server: ServerOption = LOCAL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Requests and tokens of a running server, added up."""
    given = {"start": start, "end": end, "tenant": tenant, "key": key, "adapter": adapter}
    wanted = {name: value for name, value in given.items() if value is not None} | {"group_by": group_by}
    remote = Remote(server, api_key)
    if csv:
        typer.echo(remote.text("/v1/usage", wanted | {"format": "csv"}), nl=False)
        return
    lines = remote.listed("/v1/usage", wanted)
    if as_json:
        print_json({"object": "list", "data": lines})
        return
    titles = [name for name in ("day", "hour", "tenant", "key", "adapter", "version") if name in group_by]
    table = Table()
    for title in titles:
        table.add_column(title, no_wrap=True)  # they are there to be copied
    for title in _SUMS:
        table.add_column(title.replace("_", " "), justify="right")
    for line in printable(lines):
        group = [str(line[title])[: 12 if title == "version" else None] for title in titles]
        table.add_row(*map(escape, group), *(str(line[name]) for name in _SUMS))
    _out.print(table)

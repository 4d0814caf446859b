"""A running server as the commands talk to it: its address, a key for it, one call, one line on failure."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.console import Console

from server.config import client_key

ServerOption = Annotated[str, typer.Option("--server", help="Address of the server.")]
KeyOption = Annotated[
    str | None,
    typer.Option("--api-key", help="Key for it. Better in CHORUS_API_KEY: others see flags of a process."),
]
TenantOption = Annotated[str | None, typer.Option("--tenant", help="Act for this tenant (admin keys).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]

LOCAL = "http://127.0.0.1:8000"

_TIMEOUT = httpx.Timeout(30.0, read=600.0)  # a large upload is judged before it is answered
_PAGE = 1000
_err = Console(stderr=True)


class Remote:
    """One server, one key. Any error of a call ends the command with one line and code 1."""

    def __init__(self, server: str, api_key: str | None, tenant: str | None = None) -> None:
        self._server = server
        key = api_key or client_key()
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        if tenant is not None:
            self._headers["x-chorus-tenant"] = tenant

    def call(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """The server's answer."""
        response = self._request(method, path, **body)
        answer = self._json(response)
        if response.is_error:
            self._refused(response, answer)
        return answer

    def text(self, path: str, parameters: dict[str, str]) -> str:
        """An answer that is no JSON."""
        response = self._request("GET", path, params=parameters)
        if response.is_error:
            self._refused(response, self._json(response))
        return response.text

    def listed(self, path: str, parameters: dict[str, str] | None = None) -> list[dict[str, Any]]:
        """A whole list, page by page."""
        return [item for page in self._pages(path, parameters or {}) for item in page["data"]]

    def _pages(self, path: str, parameters: dict[str, str]) -> Iterator[dict[str, Any]]:
        wanted = {"limit": _PAGE, **parameters}
        page = self.call("GET", path, params=wanted)
        yield page
        while page.get("has_more"):
            page = self.call("GET", path, params=wanted | {"after": page["last_id"]})
            yield page

    def _request(self, method: str, path: str, **body: Any) -> httpx.Response:
        try:
            with httpx.Client(base_url=self._server, timeout=_TIMEOUT, headers=self._headers) as client:
                return client.request(method, path, **body)
        except UnicodeEncodeError:
            fail("a key or tenant has characters that no header can carry")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fail(f"no answer from {self._server}: {error or type(error).__name__}")

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = response.json()
        except ValueError:
            fail(f"{self._server} answered {response.status_code}, and not in JSON; is it a Chorus server?")
        return answer

    def _refused(self, response: httpx.Response, answer: dict[str, Any]) -> NoReturn:
        detail = answer.get("error")
        shown = isinstance(detail, dict) and detail.get("message")
        fail(str(shown or f"{self._server} answered {response.status_code}"))


def printable(value: Any) -> Any:
    """The same without what a terminal may take for a command, or shows in another order."""
    if isinstance(value, str):
        return "".join(character for character in value if character.isprintable())
    if isinstance(value, dict):
        return {printable(key): printable(each) for key, each in value.items()}
    return [printable(each) for each in value] if isinstance(value, list) else value


def fail(message: str) -> NoReturn:
    """One line on standard error, and exit code 1."""
    message = printable(" ".join(message.splitlines()))
    _err.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def ago(moment: float | None) -> str:
    """Seconds since 1970 -> how long ago that was."""
    if moment is None:
        return "never"
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"

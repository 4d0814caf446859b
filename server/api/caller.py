"""Who makes a request, as the door found."""

from __future__ import annotations

from starlette.requests import Request

from server.access.caller import Caller


def caller_of(request: Request) -> Caller:
    """Fails where it came by no door."""
    caller: Caller = request.state.caller
    return caller

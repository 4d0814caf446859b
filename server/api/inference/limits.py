"""Whose quotas an inference request is under, and what its answer says of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from server.api.caller import caller_of
from server.api.face import face_of
from server.api.inference.mix import LeasedMix
from server.usage.quotas import Grant, Subject


def check_limits(request: Request) -> None:
    """Before anything is read of it. Raises RateLimited."""
    quotas = face_of(request).quotas
    if quotas is not None:
        subjects = _subjects(request)
        request.state.headers = quotas.headers(subjects)
        quotas.check(subjects)


@contextmanager
def within_limits_of_requests(request: Request) -> Iterator[None]:
    """While one runs that costs no tokens of a model. Raises RateLimited."""
    check_limits(request)
    with within_limits(request, None, 0):
        yield


@contextmanager
def within_limits(request: Request, leased: LeasedMix | None, prompt_tokens: int) -> Iterator[Grant]:
    """While it runs. `leased`: None of what no model runs. Raises RateLimited."""
    quotas = face_of(request).quotas
    if quotas is None:
        yield Grant()
        return
    adapters = [Subject("adapter", version.label) for version, _ in leased.members] if leased else []
    subjects = [*_subjects(request), *adapters]
    request.state.headers = quotas.headers(subjects)
    with quotas.enter(subjects, prompt_tokens) as grant:
        request.state.headers = quotas.headers(subjects)
        yield grant


def _subjects(request: Request) -> list[Subject]:
    caller = caller_of(request)
    own = [Subject("tenant", caller.tenant)]
    return [*own, Subject("key", caller.key_id)] if caller.key_id else own

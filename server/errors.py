"""Every error a client can be shown, with its HTTP status.

Any room raises these; `api/errors.py` maps them to the OpenAI error shape once. A message names the field
or tensor at fault and never holds a file path or an address.
"""

from __future__ import annotations

from collections.abc import Sequence


class ChorusError(Exception):
    """An error with a status, shown to the client as `{"error": {message, type, param, code}}`."""

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after_s: int | None = None
    challenge: str | None = None  # of `WWW-Authenticate`

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s

    @property
    def reason(self) -> str | None:
        """Why, in one of few words, for figures."""
        return self.code


class InvalidRequest(ChorusError):
    """400: a field of the request cannot be served as asked."""

    status = 400
    type = "invalid_request_error"


class InvalidGrammar(InvalidRequest):
    """400: a grammar, schema or pattern that no output can be held to."""

    code = "invalid_grammar"


class InvalidAdapter(InvalidRequest):
    """400: the adapter's config or a tensor is wrong; `param` names the field or tensor."""

    code = "invalid_adapter"


class DamagedAdapter(ChorusError):
    """500: the stored files of an adapter are not what was stored."""

    code = "adapter_damaged"


class Forbidden(ChorusError):
    """403: outside what this server may read."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class Unauthorized(ChorusError):
    """401: no API key, or (`wrong`) none of this server's. What is wrong with it is not said."""

    status = 401
    type = "authentication_error"

    def __init__(self, message: str, *, wrong: bool) -> None:
        super().__init__(message, code="invalid_api_key" if wrong else "missing_api_key")
        self.challenge = 'Bearer realm="chorus"' + (', error="invalid_token"' if wrong else "")


class InsufficientScope(Forbidden):
    """403: the API key is right and may not do this."""

    code = "insufficient_scope"

    def __init__(self, scopes: Sequence[str]) -> None:
        super().__init__(f"This API key lacks the scope {' or '.join(scopes)}.")
        self.challenge = f'Bearer realm="chorus", error="insufficient_scope", scope="{" ".join(scopes)}"'


class NotFound(ChorusError):
    """404."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """404: `model` names neither the base model nor an adapter."""

    code = "model_not_found"

    def __init__(self, name: str, reason: str | None = None) -> None:
        why = "does not exist" if reason is None else f"cannot be served: {reason}"
        super().__init__(f"The model `{name[:200]}` {why.rstrip('.')}.", param="model")


class TooSlow(ChorusError):
    """408: the client took too long to send its request, or to read the answer."""

    status = 408
    type = "invalid_request_error"
    code = "too_slow"


class Conflict(ChorusError):
    """409: another call on this name is in progress, or the name is taken."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class PinLimit(Conflict):
    """409: pinned adapters hold their share of accelerator memory already."""

    code = "pin_limit"


class TooLarge(ChorusError):
    """413: over a size limit of this server."""

    status = 413
    type = "invalid_request_error"
    code = "too_large"


class UnsupportedMedia(ChorusError):
    """415: a file type this server never reads (pickles), or a body that is not of the route's type."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class WrongHost(ChorusError):
    """421: the request is for a host name that is not this server's."""

    status = 421
    type = "invalid_request_error"
    code = "wrong_host"


class HeadTooLarge(ChorusError):
    """431: the request's headers are too long or too many."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class Unavailable(ChorusError):
    """503: not now; the engine is starting, restarting, draining or full."""

    status = 503
    type = "server_error"
    code = "unavailable"
    retry_after_s = 1


class EngineDied(Unavailable):
    """503: the engine process ended while it held this request."""

    code = "engine_restarted"


class QueueFull(Unavailable):
    """503: too many requests wait for their first token."""

    code = "queue_full"


class QueueShareFull(ChorusError):
    """429: too many requests of one tenant wait for their first token, while others want to."""

    status = 429
    type = "rate_limit_error"
    code = "queue_share_full"


class RateLimited(ChorusError):
    """429: a quota is used up for now; `param` names which of its limits."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    @property
    def reason(self) -> str | None:
        return self.param


class StoredQuotaExceeded(Conflict):
    """409: the tenant stores as much as its quota lets it."""

    code = "quota_exceeded"


class DeadlineExceeded(ChorusError):
    """504: the request's time was over before its answer was whole."""

    status = 504
    code = "deadline_exceeded"


class OutOfMemory(Unavailable):
    """503: accelerator memory for this adapter could not be had now."""

    code = "out_of_accelerator_memory"


class InsufficientStorage(ChorusError):
    """507: the disk is full; what was there still serves."""

    status = 507
    type = "server_error"
    code = "insufficient_storage"

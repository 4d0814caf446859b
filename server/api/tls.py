"""HTTPS by the server itself: `--ssl-certfile` and what belongs to it, judged before the model is loaded."""

from __future__ import annotations

import ssl

from server.base_model import StartError
from server.config import Settings


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """None without a certificate. Raises StartError, which names the flag, for files that do not do."""
    certificate, authorities = settings.ssl_certfile, settings.ssl_ca_certs
    if certificate is None:
        if settings.ssl_keyfile or authorities:
            raise StartError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate(context, settings)
    if authorities is not None:
        _load_authorities(context, settings)
    return context


def _load_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    secret = settings.ssl_keyfile_password
    password = secret.get_secret_value() if secret else ""
    assert settings.ssl_certfile is not None
    for flag, path in (("--ssl-certfile", settings.ssl_certfile), ("--ssl-keyfile", settings.ssl_keyfile)):
        _readable(flag, path)
    try:  # a password that is asked for is given as "", or OpenSSL would wait at the terminal for one
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, lambda: password)
    except ssl.SSLError as error:
        key = settings.ssl_keyfile or settings.ssl_certfile
        raise StartError(
            f"--ssl-certfile {settings.ssl_certfile} and its key {key} do not do: {_reason(error)}"
        ) from error


def _load_authorities(context: ssl.SSLContext, settings: Settings) -> None:
    _readable("--ssl-ca-certs", settings.ssl_ca_certs)
    try:
        context.load_verify_locations(settings.ssl_ca_certs)
    except ssl.SSLError as error:
        raise StartError(f"--ssl-ca-certs {settings.ssl_ca_certs}: {_reason(error)}") from error
    context.verify_mode = ssl.CERT_REQUIRED


def _readable(flag: str, path: object) -> None:
    try:
        if path is not None:
            open(str(path), "rb").close()
    except OSError as error:
        raise StartError(f"{flag} {path}: {error.strerror}") from error


def _reason(error: ssl.SSLError) -> str:
    known = {
        "KEY_VALUES_MISMATCH": "the key is not the certificate's",
        "NO_START_LINE": "no PEM certificate or key in it",
        "NO_CERTIFICATE_OR_CRL_FOUND": "no PEM certificate in it",
    }
    if error.reason in known:
        return known[error.reason]
    if error.reason is None or "DECRYPT" in error.reason or "PASSWORD" in error.reason:
        return "the key cannot be read, perhaps for its password (--ssl-keyfile-password)"
    return error.reason.lower().replace("_", " ")

"""HTTPS by the server itself: `--ssl-certfile` and what belongs to it, judged before the model is loaded."""

from __future__ import annotations

import ssl
from pathlib import Path

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
        _load_authorities(context, authorities)
    return context


def _load_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile
    assert certificate is not None
    _expect("--ssl-certfile", certificate, "CERTIFICATE")
    _expect("--ssl-keyfile" if key else "--ssl-certfile", key or certificate, "PRIVATE KEY")
    secret = settings.ssl_keyfile_password
    password = secret.get_secret_value() if secret else ""  # or OpenSSL would wait at the terminal for one
    try:
        context.load_cert_chain(certificate, key, lambda: password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            reason = "the key is not the certificate's"
        else:
            reason = f"they cannot be read, perhaps for want of --ssl-keyfile-password ({_words(error)})"
        raise StartError(
            f"--ssl-certfile {certificate} with the key in {key or certificate}: {reason}"
        ) from error


def _load_authorities(context: ssl.SSLContext, path: Path) -> None:
    _expect("--ssl-ca-certs", path, "CERTIFICATE")
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise StartError(f"--ssl-ca-certs {path}: {_words(error)}") from error
    context.verify_mode = ssl.CERT_REQUIRED


def _expect(flag: str, path: Path, what: str) -> None:
    """Raises StartError where the file cannot be read, or has no such block in it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StartError(f"{flag} {path}: {error.strerror}") from error
    if f"{what}-----".encode() not in data:
        raise StartError(f"{flag} {path}: no PEM {what.lower()} in it")


def _words(error: ssl.SSLError) -> str:
    return (error.reason or error.args[-1]).lower().replace("_", " ")

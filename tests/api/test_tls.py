"""HTTPS by the server's own flags, with certificates made here."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from server.api.tls import tls_context
from server.base_model import StartError
from server.config import Settings
from tests.api.test_listen import process, url_of

PASSWORD = "open sesame"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of PEM files: chain, key, both, ca, locked (the key under PASSWORD), other-key, junk."""
    folder = tmp_path_factory.mktemp("tls")
    own, other = authority.issue_cert("localhost", "127.0.0.1"), authority.issue_cert("localhost")
    chain, key = own.cert_chain_pems[0].bytes(), own.private_key_pem.bytes()
    plain = serialization.load_pem_private_key(key, None)
    locked = plain.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(PASSWORD.encode()),
    )
    contents = {
        "chain": chain,
        "key": key,
        "locked": locked,
        "both": key + chain,
        "ca": authority.cert_pem.bytes(),
    }
    contents |= {"other-key": other.private_key_pem.bytes(), "junk": b"junk"}
    for name, data in contents.items():
        (folder / f"{name}.pem").write_bytes(data)
    return folder


def flags(files: Path, **names: str) -> dict[str, str]:
    return {f"ssl_{field}": str(files / f"{name}.pem") for field, name in names.items()}


@contextmanager
def served(folder: Path, settings: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with process(folder, "5", "", *(f"{name}={value}" for name, value in settings.items())) as server:
        yield server, url_of(server)


def test_https(tmp_path: Path, files: Path, authority: trustme.CA) -> None:
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with served(tmp_path, flags(files, certfile="chain", keyfile="key")) as (server, url):
        assert url.startswith("https://")
        with httpx.Client(verify=trusting, base_url=url) as client:
            assert client.get("/health/ready").status_code == 200
            body = {"model": "base", "prompt": "hello", "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health/ready")
        with pytest.raises(httpx.RemoteProtocolError):  # not encrypted: no answer, and nothing else either
            httpx.get(url.replace("https", "http") + "/health/ready")
        server.terminate()
        assert server.wait(20) == 0
        assert server.stderr is not None
        assert "Traceback" not in server.stderr.read()


def presented(url: str) -> int:
    """The serial number of the certificate that a new connection is shown."""
    host, _, port = url.removeprefix("https://").rpartition(":")
    pem = ssl.get_server_certificate((host, int(port)), timeout=20)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def test_a_renewed_certificate_is_taken_over_and_a_wrong_one_is_not(
    tmp_path: Path, files: Path, authority: trustme.CA
) -> None:
    own = tmp_path / "own.pem"
    shutil.copy(files / "both.pem", own)
    config = tmp_path / "chorus.toml"
    config.write_text("watchdog_s = 9\n")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with (
        served(tmp_path, {"ssl_certfile": str(own), "config": str(config)}) as (server, url),
        httpx.Client(verify=trusting, base_url=url) as client,
    ):
        first = presented(url)
        config.write_text("watchdog_s = 8\n")
        own.write_bytes((files / "chain.pem").read_bytes())  # the key is not there any more
        refused = client.post("/v1/admin/reload")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "ssl_certfile")
        assert str(tmp_path) not in refused.text
        assert presented(url) == first
        renewed = authority.issue_cert("localhost", "127.0.0.1")
        own.write_bytes(renewed.private_key_and_cert_chain_pem.bytes())
        taken = client.post("/v1/admin/reload")  # on the connection that the first one was for
        assert taken.json() == {"changed": {"watchdog_s": 8.0}, "needs_restart": [], "certificate": True}
        assert presented(url) not in (first, 0)
        with httpx.Client(verify=trusting, base_url=url) as another:
            assert another.get("/health/ready").status_code == 200
        server.terminate()
        assert server.wait(20) == 0


def test_a_client_that_never_agrees_on_tls_is_closed(tmp_path: Path, files: Path) -> None:
    settings = flags(files, certfile="both") | {"read_timeout_s": "0.5"}
    with served(tmp_path, settings) as (_, url):
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as silent:
            assert silent.recv(1) == b""


def test_clients_with_certificates(tmp_path: Path, files: Path, authority: trustme.CA) -> None:
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with served(tmp_path, flags(files, certfile="chain", keyfile="key", ca_certs="ca")) as (_, url):
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            httpx.get(f"{url}/health/live", verify=trusting)
        authority.issue_cert("me@example.org").configure_cert(trusting)
        assert httpx.get(f"{url}/health/live", verify=trusting).status_code == 200


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({"certfile": "nothing"}, "--ssl-certfile {}/nothing.pem: No such file or directory"),
        (
            {"certfile": "chain", "keyfile": "nothing"},
            "--ssl-keyfile {}/nothing.pem: No such file or directory",
        ),
        ({"certfile": "chain", "keyfile": "other-key"}, "the key is not the certificate's"),
        ({"certfile": "junk"}, "--ssl-certfile {}/junk.pem: no PEM certificate in it"),
        ({"certfile": "chain"}, "--ssl-certfile {}/chain.pem: no PEM private key in it"),
        ({"certfile": "chain", "keyfile": "locked"}, "--ssl-keyfile-password"),
        ({"keyfile": "key"}, "need --ssl-certfile"),
        ({"certfile": "both", "ca_certs": "junk"}, "--ssl-ca-certs {}/junk.pem: no PEM certificate in it"),
    ],
)
def test_files_that_do_not_do(files: Path, names: dict[str, str], reason: str) -> None:
    with pytest.raises(StartError) as caught:
        tls_context(Settings(model="m", **flags(files, **names)))  # type: ignore[arg-type]  # as flags
    assert reason.format(files) in caught.value.message


def test_a_key_with_a_password(files: Path) -> None:
    named = flags(files, certfile="chain", keyfile="locked")
    settings = Settings(model="m", ssl_keyfile_password=PASSWORD, **named)  # type: ignore[arg-type]  # as flags
    assert tls_context(settings) is not None
    assert PASSWORD not in repr(settings) + settings.model_dump_json()

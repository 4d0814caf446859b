"""What an upload puts into staging, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.errors import InvalidRequest, TooLarge, UnsupportedMedia
from server.registry.sources.upload import Upload
from server.registry.store import Staging
from tests.lora.adapter_folder import LIMITS
from tests.registry import adapter_files


def encoded(boundary: str) -> bytes:
    parts = [("f", (name, data)) for name, data in adapter_files.files().items()]
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    fields = {"name": "team/a", "description": "caf\u00e9"}
    return httpx.Request("POST", "http://x", data=fields, files=parts, headers=headers).read()


def received(root: Path, chunks: Iterator[bytes], boundary: str) -> tuple[dict[str, str], str]:
    fields: dict[str, str] = {}
    staging = Staging(root)
    try:
        upload = Upload(
            f"multipart/form-data; boundary={boundary}",
            staging,
            fields.__setitem__,
            LIMITS,
        )
        for chunk in chunks:
            upload.feed(chunk)
        upload.finish()
        return fields, staging.seal()
    finally:
        staging.discard()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 4000), max_size=40), boundary=st.sampled_from(["b", "--", "\u0061" * 70]))
def test_any_cut_of_the_body_means_the_same(tmp_path: Path, cuts: list[int], boundary: str) -> None:
    body = encoded(boundary)
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    chunks = (body[start:end] for start, end in itertools.pairwise(edges))
    whole = received(tmp_path, iter([body]), boundary)
    assert received(tmp_path, chunks, boundary) == whole
    assert whole[0] == {"name": "team/a", "description": "caf\u00e9"}
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2000), byte=st.integers(0, 255), end=st.integers(0, 4000))
def test_a_damaged_body_is_refused_or_read(tmp_path: Path, at: int, byte: int, end: int) -> None:
    """Whatever comes is an upload or a refusal; never another exception, and nothing stays."""
    body = bytearray(encoded("b"))
    body[min(at, len(body) - 1)] = byte
    with suppress(InvalidRequest, TooLarge, UnsupportedMedia):
        received(tmp_path, iter([bytes(body[:end]) if end < 3000 else bytes(body)]), "b")
    assert list(tmp_path.iterdir()) == []

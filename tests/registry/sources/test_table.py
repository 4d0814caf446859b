"""Which source a URI leads to."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import Limits
from server.errors import Forbidden
from server.registry.sources.table import Sources
from server.registry.store import Staging
from tests.lora.adapter_folder import LIMITS


class Recorder:
    """A source that says what it was given."""

    def fill(self, uri: str, staging: Staging, limits: Limits) -> str:
        assert limits is LIMITS
        return f"from {uri}"


def test_a_further_scheme_is_a_line_of_the_table(tmp_path: Path) -> None:
    staging = Staging(tmp_path)
    assert Sources({"hf": Recorder()}).fill("hf://org/name", staging, LIMITS) == "from hf://org/name"
    assert Sources({"https": Recorder()}).fill("https://x/y", staging, LIMITS) == "from https://x/y"
    with pytest.raises(Forbidden):
        Sources({"hf": Recorder()}).fill("https://x/y", staging, LIMITS)


@pytest.mark.parametrize("uri", ["/a/b", "hf:x", "C:x", "file:x", "file:///x", ""])
def test_what_has_no_scheme_is_a_file(tmp_path: Path, uri: str) -> None:
    """A colon alone makes no scheme: folders may have one in their names."""
    assert Sources({"file": Recorder()}).fill(uri, Staging(tmp_path), LIMITS) == f"from {uri}"

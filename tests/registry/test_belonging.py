"""A data folder and the base model that it was made for."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from server.registry.belonging import OtherBaseModelError, check_base_model
from server.registry.data_folder import DataFolder
from tests.registry import adapter_files


def test_a_folder_belongs_to_the_first_base_model_that_used_it(data_dir: Path) -> None:
    adapter_files.open_registry(data_dir).close()  # as an older server left it: it says nothing yet
    for _ in range(2):
        with closing(DataFolder(data_dir)) as folder:
            check_base_model(folder, "a" * 64)
    with closing(DataFolder(data_dir)) as folder:
        with pytest.raises(OtherBaseModelError, match=r"registry.db .*--data-dir") as caught:
            check_base_model(folder, "b" * 64)
        check_base_model(folder, "a" * 64)
    assert "\n" not in str(caught.value)

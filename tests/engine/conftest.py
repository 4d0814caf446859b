from __future__ import annotations

from pathlib import Path

import pytest

from server.devices.cpu.device import CpuDevice
from tests.model.tiny_models import build


@pytest.fixture(params=[False, True], ids=["", "beside"])
def runs_beside_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a step is launched before the one before is read."""
    monkeypatch.setattr(CpuDevice, "runs_beside_host", request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("model"))

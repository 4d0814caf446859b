"""Which levers are on, by their names."""

from __future__ import annotations

import pytest
import torch

from server.devices import open_device
from server.devices.cuda.levers import USUAL, Levers


def test_those_named_are_on_and_the_others_off() -> None:
    assert Levers.of(["dependent-launch"]) == Levers(
        rotate_write=False, shrink_beside=False, dependent_launch=True
    )
    assert Levers.of(["none"]) == Levers(False, False, False)
    assert Levers.of(["all"]) == Levers(True, True, True)


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no such lever: fast; there are all, none, rotate-write, shrink-"):
        Levers.of(["fast", "rotate-write"])


def test_a_device_has_those_that_the_settings_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert open_device("cuda")._levers == USUAL
    assert open_device("cuda", ["none"])._levers == Levers.of(["none"])
    with pytest.raises(ValueError, match="no such lever"):
        open_device("cuda", ["fast"])
    assert open_device("cpu", ["fast"]).torch_device.type == "cpu", "which has none"

"""Structs that Python fills are, field by field, those that the compiled code reads."""

from __future__ import annotations

import ctypes

import pytest

from server.devices.cpu.attention import AttentionStruct, PlanStruct
from server.devices.cpu.layers import LayerStruct, NormStruct
from server.devices.cpu.linear import LinearStruct
from server.devices.cpu.lora import SegmentsStruct
from server.devices.cpu.native import Mirror, compare, libraries, library
from server.devices.cpu.sampling import DrawsStruct

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels on this machine")


class Wider(Mirror):
    c_name = "ChorusLinear"
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_float * 4),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("module", ctypes.c_int64),
    )


class Shorter(Mirror):
    c_name = "ChorusNorm"
    _fields_ = (("weight", ctypes.c_void_p),)


class Longer(Mirror):
    c_name = "ChorusNorm"
    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_float), ("more", ctypes.c_float))


def test_every_library_has_the_structs_of_this_code() -> None:
    for lib in libraries():
        compare(lib, PlanStruct, AttentionStruct, SegmentsStruct, LinearStruct, NormStruct, LayerStruct)
        compare(lib, DrawsStruct)


def test_all_mirrors_are_compared() -> None:
    assert {mirror.c_name for mirror in Mirror.__subclasses__()} == {
        "ChorusPlan",
        "ChorusAttention",
        "ChorusSegments",
        "ChorusLinear",
        "ChorusNorm",
        "ChorusLayer",
        "ChorusDecoder",
        "ChorusDraws",
    }


@pytest.mark.parametrize("mirror", [Wider, Shorter, Longer])
def test_another_struct_is_refused(mirror: type[Mirror]) -> None:
    lib = library()
    assert lib is not None
    with pytest.raises(RuntimeError, match=f"another {mirror.c_name} than this code: run `make setup`"):
        compare(lib, mirror)

"""The header of a safetensors file: what lies where in it (https://github.com/huggingface/safetensors#format).

8 bytes of length (little-endian), JSON, then the tensors' bytes. The JSON may be a client's: it is counted
before anything is built of it, and decoded by type, so that it costs no more than its tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from server.config import Limits
from server.peft.patterns import bad

# safetensors dtype -> its name in torch, bytes, and the exponent bits that are all set in NaN and Inf
DTYPES = {
    "F32": ("float32", 4, 0x7F80_0000),
    "F16": ("float16", 2, 0x7C00),
    "BF16": ("bfloat16", 2, 0x7F80),
}

_METADATA_VALUES = 10_000  # that a header may have besides its tensors'
_MAX_DIMENSIONS = 8

_Whole = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class _Entry(msgspec.Struct, frozen=True, gc=False):
    dtype: str
    shape: Annotated[list[_Whole], msgspec.Meta(max_length=_MAX_DIMENSIONS)]
    data_offsets: tuple[_Whole, _Whole]


_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(_Entry)


@dataclass(frozen=True)
class TensorSpan:
    """Where one tensor lies in its file."""

    name: str
    dtype: str  # torch's name: float32, float16 or bfloat16
    shape: tuple[int, ...]
    offset: int  # from the start of the file, bytes
    nbytes: int


def read_header(path: Path, limits: Limits) -> dict[str, TensorSpan]:
    """The tensors of a file by name: one after the other, without holes, to its end.

    Raises InvalidAdapter that names the file, or the tensor whose entry is malformed.
    """
    if not path.is_file():
        raise bad(path.name, "is missing")
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or header_bytes > file_bytes - 8:
            raise bad(path.name, "is shorter than its header says")
        if header_bytes > limits.max_header_bytes:
            raise bad(path.name, f"has a header larger than {limits.max_header_bytes} bytes")
        raw = file.read(header_bytes)
    start = 8 + header_bytes
    tensors = {
        name: _span(name, entry, start)
        for name, entry in _members(raw, path.name, limits.max_tensors).items()
    }
    _check_order(tensors, path.name, start, file_bytes)
    return tensors


def _members(raw: bytes, file: str, most: int) -> dict[str, msgspec.Raw]:
    """The entries of tensors by name, each still as JSON."""
    if raw.count(b"{") > most + 2:
        raise bad(file, f"holds more than {most} tensors")
    # An entry has four colons, and commas between its dimensions, offsets, fields and the next.
    if raw.count(b":") > 4 * most + _METADATA_VALUES or raw.count(b",") > 12 * most + _METADATA_VALUES:
        raise bad(file, f"has a header of more values than {most} tensors have")
    try:
        members = _MEMBERS.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad(file, f"has a header that is not a JSON object: {str(error)[:200]}") from None
    except RecursionError:
        raise bad(file, "has a header that is nested too deeply") from None
    metadata = bytes(members.pop("__metadata__", b""))
    if not members:
        raise bad(file, "holds no tensors")
    if raw.count(b"\\") > metadata.count(b"\\"):
        raise bad(file, "has an escaped character in the name of a tensor")
    # The decoder keeps the last of two members of a name.
    if raw.count(b'"data_offsets"') - metadata.count(b'"data_offsets"') > len(members):
        raise bad(file, "has a header that names something twice")
    return members


def _span(name: str, raw: msgspec.Raw, start: int) -> TensorSpan:
    try:
        entry = _ENTRY.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise bad(name, "has a malformed header entry") from None
    if entry.dtype not in DTYPES:
        raise bad(name, f"has dtype {entry.dtype[:20]}, expected one of {', '.join(DTYPES)}")
    torch_name, width, _ = DTYPES[entry.dtype]
    begin, end = entry.data_offsets
    if end - begin != math.prod(entry.shape) * width:
        raise bad(name, f"has data_offsets that do not fit shape {entry.shape} of {entry.dtype}")
    return TensorSpan(name, torch_name, tuple(entry.shape), start + begin, end - begin)


def _check_order(tensors: dict[str, TensorSpan], file: str, start: int, file_bytes: int) -> None:
    end = start
    for span in sorted(tensors.values(), key=lambda span: (span.offset, span.nbytes)):
        if span.offset != end:
            raise bad(span.name, "does not begin where the tensor before it ends")
        end += span.nbytes
    if end != file_bytes:
        raise bad(file, f"has {file_bytes - start} bytes of data, its header says {end - start}")

"""What the face and a reader process say to each other: frames of msgpack, each after its length."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import Literal

import msgspec

BodyKind = Literal["completions", "chat", "tokenize", "detokenize"]
TEXT_FIELDS: dict[BodyKind, str] = {  # where the text stands
    "completions": "prompt",
    "chat": "messages",
    "tokenize": "prompt",
    "detokenize": "tokens",
}

_PART = 128 * 2**10  # bytes
HEAD = struct.Struct("<Q")  # the bytes of the frame that follows


class ReaderStart(msgspec.Struct, frozen=True):
    """The first frame: what the process reads with, and what one job may take."""

    folder: str  # of tokenizer.json and the chat template
    tool_style: str | None = None  # how the model writes calls of tools; None: it is not shown any
    job_s: float = 30.0  # of processor time, in all
    render_s: float = 2.0  # of processor time, for the chat template
    grammar_s: float = 1.5  # of processor time, to compile a grammar and take its first tokens
    memory_bytes: int = 2 * 2**30  # of address space, on top of what the process begins with


class ReadRules(msgspec.Struct, frozen=True):
    """What the server's settings say of bodies."""

    ignore_unknown: bool = False  # fields, instead of refusing them
    take_templates: bool = False  # of requests


DEFAULT_RULES = ReadRules()


class ReadJob(msgspec.Struct, frozen=True):
    """One body to be read. Between processes `body` is empty here and a frame of its own."""

    kind: BodyKind
    max_model_len: int  # tokens
    vocab_size: int
    body: bytes
    rules: ReadRules = DEFAULT_RULES
    compiles: bool = False  # whether a grammar in it may be compiled by who reads it


class ReadError(msgspec.Struct, frozen=True):
    """A refusal. `code` is None where its type's own holds."""

    message: str
    param: str | None = None
    code: str | None = None
    internal: bool = False  # the reader's own fault, told in its log


class ReadAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a body says: of an inference route the fields beside the prompt, and the prompts as token ids."""

    fields: bytes = b""  # JSON
    prompts: list[bytes] = []  # each its token ids, int32 in the machine's order
    echoes: list[str] | None = None
    grammar: str | None = None  # that the output is held to
    ignored: list[str] = []  # unknown fields
    in_thought: bool = False  # the prompt breaks off within reasoning
    answer: bytes = b""  # JSON, of a route that answers with nothing else
    error: ReadError | None = None
    resident_bytes: int = 0  # memory of the process now
    last: bool = False  # the process ends with it
    not_here: bool = False  # it has a grammar, and was to be read without


def frame(message: msgspec.Struct) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return HEAD.pack(len(payload)) + payload


def job_frames(job: ReadJob) -> Iterator[bytes]:
    """Both frames of a job, in parts that are quickly handed on."""
    yield frame(msgspec.structs.replace(job, body=b"")) + HEAD.pack(len(job.body))
    for start in range(0, len(job.body), _PART):
        yield job.body[start : start + _PART]


def ids_to_bytes(ids: list[int]) -> bytes:
    return array("i", ids).tobytes()


def ids_of_bytes(packed: bytes) -> list[int]:
    ids = array("i")
    ids.frombytes(packed)
    return ids.tolist()

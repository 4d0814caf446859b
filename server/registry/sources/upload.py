"""Adapter files that clients send: a multipart upload, pushed into staging as it comes."""

from __future__ import annotations

from collections.abc import Callable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.config import Limits
from server.errors import InvalidRequest, TooLarge
from server.peft.format import CONFIG_NAME, WEIGHTS_NAME, is_pickle, pickle_refused
from server.registry.sources.archive import ARCHIVE_SUFFIXES, unpack
from server.registry.store import FILE_NAMES, Sink, Staging, full_disk_is_refused

_MAX_FIELD_BYTES = 16 * 1024
_FIELDS = ("name", "description")


def check_size(nbytes: int, limits: Limits) -> None:
    """Of an upload, announced or received. Raises TooLarge."""
    if nbytes > limits.max_upload_bytes:
        raise TooLarge(f"The upload is larger than {limits.max_upload_bytes} bytes.")


class Upload:
    """A multipart form, parsed as it comes and written straight to disk.

    Text fields `name` and `description`; files recognised by their file name (the field's own name is
    free): the two adapter files, or one archive of them. `on_field` is told of each text field when it ends
    and may refuse it, so that a bad name is refused before the weights are sent. `feed` and `finish`
    belong in a thread: they write, hash and unpack.

    Raises InvalidRequest, TooLarge, UnsupportedMedia for pickles, InsufficientStorage, and whatever
    `on_field` raises.
    """

    def __init__(
        self,
        content_type: str,
        staging: Staging,
        on_field: Callable[[str, str], None],
        limits: Limits,
    ) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise InvalidRequest("The upload must be multipart/form-data with a boundary.")
        self._staging = staging
        self._on_field = on_field
        self._limits = limits
        self._received = 0
        self._ended = False
        self._fields: set[str] = set()
        self._files: set[str] = set()
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._field = ""
        self._text = bytearray()
        self._sink: Sink | None = None
        self._parser = self._new_parser(options[b"boundary"])

    def feed(self, data: bytes) -> None:
        """The next bytes of the body."""
        self._received += len(data)
        check_size(self._received, self._limits)
        with full_disk_is_refused():
            try:
                self._parser.write(data)
            except FormParserError as error:
                raise InvalidRequest("The body is not well-formed multipart/form-data.") from error

    def finish(self) -> str:
        """The body is complete: unpack the archive, if there is one, and see that both files are there.

        Returns the provenance, as `Source.fill` does.
        """
        if not self._ended:
            raise InvalidRequest("The body ended before its last part.")
        if "archive" in self._files:
            with full_disk_is_refused(), self._staging.scratch.open("rb") as archive:
                unpack(archive, self._staging, self._limits)
        for name in () if "archive" in self._files else FILE_NAMES:
            if name not in self._files:
                raise InvalidRequest(
                    f"The upload lacks {name}; it takes {CONFIG_NAME} and {WEIGHTS_NAME}, or one archive.",
                    param=name,
                )
        return "upload"

    def _new_parser(self, boundary: bytes) -> MultipartParser:
        def end() -> None:
            self._ended = True

        try:
            return MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._begin_content,
                    "on_part_data": self._content,
                    "on_part_end": self._end_part,
                    "on_end": end,
                },
            )
        except FormParserError as error:
            raise InvalidRequest("The multipart boundary is too long.") from error

    def _begin_part(self) -> None:
        self._disposition = b""
        self._text.clear()
        self._sink = None

    def _end_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode(errors="replace")
        if b"filename" in options:
            file_name = options[b"filename"].decode(errors="replace")
            self._sink = self._begin_file(file_name.replace("\\", "/").rpartition("/")[2])
        elif self._field not in _FIELDS:
            raise InvalidRequest(
                f"`{self._field[:100]}` is no field of an upload; it takes {', '.join(_FIELDS)} and files.",
                param=self._field[:100],
            )
        elif self._field in self._fields:
            raise InvalidRequest(f"`{self._field}` was sent twice.", param=self._field)

    def _begin_file(self, name: str) -> Sink:
        if name in FILE_NAMES:
            file, sink = name, self._staging.sink(name)
        elif name.lower().endswith(ARCHIVE_SUFFIXES):
            if "archive" in self._files:
                raise InvalidRequest("An upload takes one archive only.", param=self._field[:100])
            file, sink = "archive", self._staging.scratch_sink()
        elif is_pickle(name):
            raise pickle_refused(self._field[:100])
        else:
            raise InvalidRequest(
                f"The file `{name[:100]}` is not expected; send {CONFIG_NAME} and {WEIGHTS_NAME}, or one "
                f"archive ({', '.join(ARCHIVE_SUFFIXES)}) of them.",
                param=self._field[:100],
            )
        self._files.add(file)
        if "archive" in self._files and len(self._files) > 1:
            raise InvalidRequest("Send either the two files or one archive, not both.")
        return sink

    def _content(self, data: bytes, start: int, end: int) -> None:
        if self._sink is not None:
            self._sink.write(memoryview(data)[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > _MAX_FIELD_BYTES:
            raise InvalidRequest(f"`{self._field}` is too long.", param=self._field)

    def _end_part(self) -> None:
        if self._sink is not None:
            self._sink.close()
            return
        self._fields.add(self._field)
        try:
            text = self._text.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f"`{self._field}` is not UTF-8.", param=self._field) from None
        self._on_field(self._field, text)

"""Takes the two adapter files out of a zip or tar archive that nobody vouches for, in a bounded process.

The libraries that read archives hold the interpreter for as long as a header asks them to (128 KiB of digits
in a PAX header: 21 s) and take what memory it asks for. So the face never parses one: `archive_reader.py`
does, with limits that the system keeps.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from server.config import Limits
from server.errors import ChorusError, InsufficientStorage, InvalidRequest, TooLarge, Unavailable
from server.peft.format import CONFIG_NAME, MAX_CONFIG_BYTES, PICKLES, pickle_refused
from server.registry.store import FILE_NAMES, Staging

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")

_READER = Path(__file__).with_name("archive_reader.py")  # run, never imported
_DEADLINE_S = 60.0  # by the clock, and
_BYTES_PER_S = 10e6  # for what may come out, on top: a slow disk

_log = logging.getLogger(__name__)


def unpack(archive: BinaryIO, staging: Staging, limits: Limits) -> None:
    """Write the adapter's files of `archive` (a zip, tar or gzipped tar on disk) into `staging`.

    Raises InvalidRequest for an archive that is broken or unsafe, or that takes more time or memory to read
    than its size explains; TooLarge when more than `max_unpacked_bytes` come out of it, UnsupportedMedia when
    its weights are a pickle, InsufficientStorage, Unavailable when no process can be had. Where the archive
    itself is at fault, `param` is "file".
    """
    with ExitStack() as opened:
        targets = {name: opened.enter_context(staging.unhashed(name)).fileno() for name in FILE_NAMES}
        answer = _answer(archive, targets, limits)
    if answer:
        raise refusal(answer)


def _answer(archive: BinaryIO, targets: Mapping[str, int], limits: Limits) -> dict[str, str]:
    """What the reader says of the archive."""
    most = limits.max_unpacked_bytes
    files = {
        name: (target, MAX_CONFIG_BYTES if name == CONFIG_NAME else most) for name, target in targets.items()
    }
    order = json.dumps({"files": files, "most": most, "pickles": PICKLES})
    with _unexplained_is_refused():
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(_READER), order],
            stdin=archive,
            capture_output=True,
            pass_fds=tuple(targets.values()),
            env={},  # secrets of the server's are none of its business
            cwd="/",
            timeout=_DEADLINE_S + most / _BYTES_PER_S,
            check=True,
        )
    answer: dict[str, str] = json.loads(done.stdout)
    return answer


@contextmanager
def _unexplained_is_refused() -> Iterator[None]:
    """A reader that was ended by a limit is the archive's fault; one that broke is ours."""
    try:
        yield
    except OSError as error:
        raise Unavailable("The server can start no process to read the archive now.") from error
    except subprocess.CalledProcessError as error:
        if error.returncode > 0:
            _log.error("the reader of archives broke: %s", error.stderr.decode(errors="replace")[-2000:])
            raise ChorusError("The archive could not be read.") from error
        raise _unreasonable() from error
    except subprocess.TimeoutExpired as error:
        raise _unreasonable() from error


def _unreasonable() -> InvalidRequest:
    return InvalidRequest("The archive takes more time to read than its size explains.", param="file")


def refusal(answer: Mapping[str, str]) -> ChorusError:
    """The error that the reader's answer stands for."""
    kind, message, param = answer["kind"], answer["message"], answer["param"]
    if kind == "pickle":
        return pickle_refused(param)
    if kind == "full":
        return InsufficientStorage("The server's disk is full; nothing was stored.")
    return TooLarge(message, param=param) if kind == "too_large" else InvalidRequest(message, param=param)

"""How a process of ours is started beside the face."""

from __future__ import annotations

import sys


def program(module: str, *words: str) -> tuple[str, ...]:
    """The command that calls `main(*words)` of a module of this server.

    The process finds the same modules as this one, wherever it is started: `-P` keeps the working folder
    (which may hold some other package named `server`) out, and sys.path is handed on.
    """
    end = 1 + len(words)
    line = (
        f"import sys; words, sys.path[:] = sys.argv[1:{end}], sys.argv[{end}:]; "
        f"from {module} import main; main(*words)"
    )
    return (sys.executable, "-P", "-c", line, *words, *sys.path)

"""`python -m tests.api.serve_fake FOLDER GRACE_S [REASON [NAME=VALUE ...]]`: the real server, a fake engine.

The engine gives two tokens of each request and then waits for ever; with REASON it does not start, and with
`-` it takes for ever to. More settings come as NAME=VALUE.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from server.api.listen import bind, run
from server.api.tls import tls_context
from server.base_model import BaseModel
from server.config import Settings
from tests.api.face_site import model_folder
from tests.api.fake_engine import FakeEngine


class Loading(FakeEngine):
    async def wait_ready(self) -> None:
        print("loading", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    folder = Path(sys.argv[1])
    settings = Settings(
        model=str(model_folder(folder)),
        served_model_name="base",
        load_format="dummy",
        data_dir=folder / "data",
        port=0,
        shutdown_grace_s=float(sys.argv[2]),
        **dict(each.split("=", 1) for each in sys.argv[4:]),  # type: ignore[arg-type]  # as flags
    )
    engine = Loading() if sys.argv[3:4] == ["-"] else FakeEngine()
    engine.tokens = [7] * 50
    engine.pause_after = 2
    reason = sys.argv[3] if len(sys.argv) > 3 else ""
    engine.failure = reason or None
    sys.exit(run(settings, engine, BaseModel.resolve(settings), bind(settings), tls_context(settings)))


if __name__ == "__main__":
    main()

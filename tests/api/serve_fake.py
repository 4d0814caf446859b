"""`python -m tests.api.serve_fake FOLDER [REASON]`: the real HTTP server around a fake engine.

The engine gives two tokens of each request and then waits for ever; with REASON it does not start.
"""

from __future__ import annotations

import sys
from pathlib import Path

from server.api.listen import bind, run
from server.base_model import BaseModel
from server.config import Settings
from tests.api.face_site import model_folder
from tests.api.fake_engine import FakeEngine


def main() -> None:
    folder = Path(sys.argv[1])
    settings = Settings(
        model=str(model_folder(folder)),
        served_model_name="base",
        load_format="dummy",
        data_dir=folder / "data",
        port=0,
        shutdown_grace_s=float(sys.argv[2]),
    )
    engine = FakeEngine()
    engine.tokens = [7] * 50
    engine.pause_after = 2
    engine.failure = sys.argv[3] if len(sys.argv) > 3 else None
    sys.exit(run(settings, engine, BaseModel.resolve(settings), bind(settings)))


if __name__ == "__main__":
    main()

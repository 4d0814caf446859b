"""`python -m load_tests.face_server MODEL DATA_DIR PORT CORES`: the real HTTP face around the fake engine.

CORES, such as 1 or 0,1, are all that the face may use.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from load_tests.fake_engine import FACTORY


def main() -> None:
    model, data_dir, port, cores = sys.argv[1:]
    os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    # Only now: some libraries start threads when they are imported, and those keep the cores of that moment.
    from server.api.listen import bind, run
    from server.base_model import BaseModel
    from server.border.client import ProcessEngineClient
    from server.config import Settings

    settings = Settings(
        model=model,
        served_model_name="base",
        load_format="dummy",
        data_dir=Path(data_dir),
        port=int(port),
        log_level="warning",
    )
    engine = ProcessEngineClient(settings, factory=FACTORY)
    sys.exit(run(settings, engine, BaseModel.resolve(settings), bind(settings)))


if __name__ == "__main__":
    main()

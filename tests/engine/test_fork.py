"""The engine's program may be read before a process forks: it starts nothing that a copy must not share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODEL = Path(__file__).parents[2] / "models" / "chorus-tiny"

TRACED = """
import os, sys
import torch
asked = []
def traced(name, real):
    return lambda *args: (asked.append(name), real(*args))[1]
for name in ("is_available", "device_count", "init", "current_device"):
    setattr(torch.cuda, name, traced(name, getattr(torch.cuda, name)))
import server.engine.engine
from server.config import Settings
server.engine.engine.prepare(Settings(model=sys.argv[1]))
assert "transformers.models.llama.modeling_llama" in sys.modules
assert "server.devices.cpu.device" in sys.modules
print(sorted(set(asked)), torch.cuda.is_initialized())
threads = [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
pid = os.fork()
if pid == 0:  # numpy's BLAS ends its threads at a fork
    print(len(os.listdir("/proc/self/task")), flush=True)
    torch.set_num_threads(2)
    x = torch.ones(512, 512)
    print(float((x @ x).sum()), flush=True)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_reading_the_program_asks_no_device_and_a_copy_can_compute() -> None:
    """CUDA that was asked for anything before the fork cannot be used after it."""
    done = subprocess.run(
        [sys.executable, "-c", TRACED, str(MODEL)], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.splitlines() == ["[] False", "1", str(float(512**3))]

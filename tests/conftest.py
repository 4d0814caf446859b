"""Triton reads TRITON_INTERPRET once, when it is imported, so it is set before any test module is.

Without a GPU its interpreter runs the kernels' tests on the CPU; with one, tests/gpu runs them compiled.
"""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

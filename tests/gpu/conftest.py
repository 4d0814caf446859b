"""Everything in this folder needs a CUDA device, and is skipped where there is none.

`load_tests/gpu/run.sh` runs it in three processes, by the marks that are given here and beside the tests:
`smoke`, a case of every path, after which nothing else is worth the card's time if it fails; `alone`, what
may leave a process in a state that others cannot use; and the rest without `extra`, which says again what
another case has said.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
MARKS = {
    "smoke": "a case of every path on the card, run first",
    "alone": "may spoil its process for other tests",
    "extra": "says again what another case says; left out where the card's time is short",
}
# By file: names of tests with their parameters.
SMOKE = {
    "test_lora_kernels.py": [
        "test_llama_projections[torch.bfloat16-4096-4096-decode, 64 segments]",  # rows
        "test_llama_projections[torch.bfloat16-4096-4096-decode, shared]",  # small tiles
        "test_llama_projections[torch.bfloat16-4096-4096-prefill]",  # tiles
        "test_captured_graph_replays_other_contents[1]",
    ],
    "test_paged_attention.py": ["test_llama[torch.bfloat16-decode]", "test_llama[torch.bfloat16-mixed]"],
    "test_engine.py": ["test_mixed_batch[llama-False]"],
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            if item.name in SMOKE.get(item.path.name, ()):
                item.add_marker(pytest.mark.smoke)
            # Triton 3.9 announces a change of 3.10 at its first compilation
            item.add_marker(pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _healthy_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test leaves running ends with it, and its memory goes back.

    An illegal access spoils the device for the whole process: xdist starts another worker for the tests that
    are left when this one ends.
    """
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\n{request.node.nodeid} spoiled the device: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    gc.collect()
    torch.cuda.empty_cache()

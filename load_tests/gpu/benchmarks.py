"""The measurements, one after another in one process: imports, kernels and one engine serve them all.

    python -m load_tests.gpu.benchmarks --out FOLDER [PART ...]

Without names: the parts below in their order, and the extra ones as long as the time reaches. Each part has a
time after which it begins nothing more, and leaves `PART.json` and `PART.txt` in the folder as it goes. What
one part raises is printed, and the others go on, with a new engine.

`parts.txt` says what became of each: `begun`, then `ok`, `failed` or `died` with its process. A part that
hangs ends the process, and so does an error after which CUDA refuses everything; called again with the same
folder it goes on with the parts that were not begun. Exit status: 0 all is well; 3 all were run and some
failed; else the process died.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import os
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from load_tests.gpu.context import Context
from load_tests.gpu.figures import Deadline, Results
from load_tests.gpu.workload import WORKLOADS, Workload

if TYPE_CHECKING:
    from load_tests.gpu.subject import Subject

SOME_FAILED, DIED = 3, 70  # exit statuses
_GRACE_S = 40  # that a part may take beyond its time before it counts as hung
_LEAST_S = 10  # that must be left for a part to begin


@dataclass(frozen=True)
class Part:
    seconds: int  # begin nothing more after
    measure: str  # module in this folder, and its function
    extra: bool = False  # only where it is named or time is left
    alone: bool = False  # beside no other engine


# In the order of what they are worth. `engine` also bears the start of the shared one.
PARTS = {
    "ceilings": Part(8, "ceilings:measure"),
    "engine": Part(95, "engine:measure"),
    "mixed": Part(18, "mixed:measure"),
    "sampling": Part(15, "sampling:measure"),
    "profile": Part(15, "profiler:measure"),
    "kernels": Part(35, "kernels:measure"),
    "attention": Part(40, "attention:measure_part"),
    "swap": Part(40, "swap:measure"),
    "ranks": Part(65, "ranks:measure", extra=True, alone=True),
    "engine-small": Part(40, "engine:measure_small", extra=True, alone=True),
    "levers": Part(110, "levers:measure", extra=True, alone=True),
    "sweep": Part(50, "sweep:measure", extra=True, alone=True),
    "kernel-ranks": Part(110, "kernels:measure_ranks", extra=True),
}


class SharedEngine:
    """The engine that parts share: started when it is first asked for, and anew after `close`.

    One that cannot start is not tried again: what it raised is raised at once, since a start takes a minute.
    """

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._stack = ExitStack()
        self._subject: Subject | None = None
        self._refusal: RuntimeError | None = None

    def get(self) -> Subject:
        if self._refusal is not None:
            raise self._refusal
        if self._subject is None:
            try:
                self._subject = self._stack.enter_context(self._start())
            except Exception as refusal:
                # not itself: its traceback would hold what the start had allocated
                self._refusal = RuntimeError(f"the engine did not start: {refusal}")
                raise
        return self._subject

    def close(self) -> None:
        """Give back its memory, on the device too."""
        self._subject = None
        self._stack.close()
        gc.collect()
        torch.cuda.empty_cache()

    def _start(self) -> AbstractContextManager[Subject]:
        from load_tests.gpu import mixed, swap  # not at the top: they import transformers
        from load_tests.gpu.subject import adapter_bytes, subject

        work = self._workload
        in_arena = max(work.sequences, swap.IN_ARENA)
        return subject(
            work.shape,
            ranks=[work.rank],
            arena_ranks=work.rank * in_arena,
            max_num_seqs=work.most_sequences,
            kv_tokens=max(work.longest, work.prompt + mixed.output_tokens(), swap.longest(work.storm_steps)),
            host_bytes=adapter_bytes(work.shape, work.rank) * swap.host_images(in_arena),
        )


class Ledger:
    """What became of each part, on disk: a process that follows one that died goes on from there."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "parts.txt"

    def note(self, name: str, state: str) -> None:
        print(f"--- {name}: {state}", flush=True)
        with self._path.open("a") as file:
            file.write(f"{name} {state}\n")

    @property
    def states(self) -> dict[str, str]:
        """The last word of each part, in the order in which they began."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return dict(line.split(" ", 1) for line in lines)


def run_part(name: str, workload: Workload, folder: Path, shared: SharedEngine, seconds: float) -> bool:
    """Whether it ended well; what it raised is printed."""
    part = PARTS[name]
    if part.alone:
        shared.close()
    context = Context(workload, Results(name, folder, shape=workload.shape), Deadline(seconds), shared.get)
    faulthandler.dump_traceback_later(part.seconds + _GRACE_S, exit=True, file=sys.__stderr__)
    try:
        measure: Callable[[Context], None] = pkgutil.resolve_name(f"load_tests.gpu.{part.measure}")
        measure(context)
    except Exception:
        traceback.print_exc()
        context.results.say(traceback.format_exc(limit=-2).strip())
    else:
        return True
    finally:
        faulthandler.cancel_dump_traceback_later()
    return False


def leave_if_cuda_is_lost() -> None:
    """After some errors every later call of this process fails as well: another one must go on."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"this process is of no more use: {error}", flush=True)
        os._exit(DIED)


def run(names: Sequence[str], workload: Workload, folder: Path, deadline: Deadline) -> int:
    """The parts that were not begun before; returns the exit status."""
    ledger, shared = Ledger(folder), SharedEngine(workload)
    for name, state in ledger.states.items():
        if state == "begun":
            ledger.note(name, "died")
    for name in names or PARTS:
        part = PARTS[name]
        least = part.seconds if part.extra and not names else _LEAST_S
        if name in ledger.states or deadline.left < least:
            continue
        ledger.note(name, "begun")
        began = time.monotonic()
        good = run_part(name, workload, folder, shared, min(part.seconds, deadline.left))
        ledger.note(name, f"{'ok' if good else 'failed'} after {time.monotonic() - began:.0f} s")
        if not good:
            leave_if_cuda_is_lost()
            shared.close()  # whose sequences and memory may be amiss
    shared.close()
    states = ledger.states
    missed = [name for name in names or PARTS if name not in states and (names or not PARTS[name].extra)]
    for name in missed:
        ledger.note(name, "not begun: no time left")
    return 0 if all(state.startswith("ok") for state in ledger.states.values()) else SOME_FAILED


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="folder for what was measured")
    parser.add_argument("--shape", choices=WORKLOADS, default="llama-3.1-8b")
    parser.add_argument("--seconds", type=float, default=480, help="of all parts: begin nothing more after")
    args = parser.parse_args()
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}")
    logging.basicConfig(level=logging.INFO)  # why a fast path is not taken
    args.out.mkdir(parents=True, exist_ok=True)
    raise SystemExit(run(args.parts, WORKLOADS[args.shape], args.out, Deadline(args.seconds)))


if __name__ == "__main__":
    main()

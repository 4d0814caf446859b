"""The steps that the device has and whose tokens are not known yet."""

from __future__ import annotations

from collections import deque

from server.scheduling.sequence import Sequence, State
from server.scheduling.step_plan import ScheduledRun, StepPlan


class Flight:
    """Oldest first. Runs of a plan made ahead, whose sequence ended or went back since, do not count."""

    def __init__(self) -> None:
        self._steps: deque[tuple[StepPlan, list[ScheduledRun]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._steps)

    def launch(self, plan: StepPlan) -> list[ScheduledRun]:
        """One more step. Returns the runs that count."""
        counted = [
            run for run in plan.runs if run.seq.state is State.RUNNING and run.seq.num_computed == run.start
        ]
        self._steps.append((plan, counted))
        return counted

    def land(self, plan: StepPlan) -> list[bool]:
        """The oldest is computed. Returns which of its runs count still. Raises ValueError for another."""
        launched, counted = self._steps.popleft()
        if launched is not plan:
            raise ValueError("steps are updated in the order in which they were launched")
        there = {id(run) for run in counted if run.seq.state is State.RUNNING}
        return [id(run) in there for run in plan.runs]

    def lose(self) -> list[Sequence]:
        """None of them is computed. Returns whose they were, each once."""
        lost = dict.fromkeys(run.seq for plan, _ in self._steps for run in plan.runs)
        self._steps.clear()
        return list(lost)

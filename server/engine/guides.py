"""Requests whose grammars are being compiled, which takes up to seconds: a thread does it, no step waits."""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.config import Settings
from server.errors import InvalidGrammar
from server.guidance.matcher import Matcher, Vocabulary
from server.scheduling.sequence import Sequence

log = logging.getLogger(__name__)

_REMEMBERED = 32  # grammars; of a schema that many requests bring, all but the first are copies


@dataclass
class _Job:
    grammar: str
    sequences: list[Sequence]
    outcome: Matcher | str = ""  # a matcher, or why there is none


class Guides:
    """Gives sequences their matchers (`Sequence.guide`). One thread calls it.

    `open_vocabulary` is called once, in the thread, when the first grammar comes; `wake` when there is
    something for `poll`.
    """

    def __init__(self, open_vocabulary: Callable[[], Vocabulary], wake: Callable[[], None]) -> None:
        self._open_vocabulary = open_vocabulary
        self._vocabulary: Vocabulary | None = None
        self._wake = wake
        self._known: OrderedDict[str, Matcher] = OrderedDict()
        self._waiting: dict[str, _Job] = {}  # by the id of each sequence
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        """Sequences that wait."""
        return len(self._waiting)

    def guide(self, grammar: str, sequences: list[Sequence]) -> bool:
        """Give these their matcher. False where it is not known yet: `poll` has them later."""
        matcher = self._known.get(grammar)
        if matcher is not None:
            self._known.move_to_end(grammar)
            _give(matcher, sequences)
            return True
        job = _Job(grammar, sequences)
        self._waiting.update((seq.request_id, job) for seq in sequences)
        self._jobs.put(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="grammars", daemon=True)
            self._thread.start()
        return False

    def cancel(self, request_id: str) -> None:
        """If it waits here, it is not wanted any more."""
        job = self._waiting.pop(request_id, None)
        if job is None:
            return
        for seq in [seq for seq in job.sequences if seq.request_id == request_id]:
            job.sequences.remove(seq)
            if seq.group is not None:
                seq.group.waiting.discard(seq)

    def poll(self) -> list[tuple[Sequence, str | None]]:
        """Sequences that waited, each with its matcher, or with the reason why it can have none."""
        ready: list[tuple[Sequence, str | None]] = []
        while not self._done.empty():
            job = self._done.get()
            for seq in job.sequences:
                del self._waiting[seq.request_id]
            if isinstance(job.outcome, str):
                ready += [(seq, job.outcome) for seq in job.sequences]
                continue
            self._remember(job.grammar, job.outcome)
            _give(job.outcome, job.sequences)
            ready += [(seq, None) for seq in job.sequences]
        return ready

    def close(self) -> None:
        """End the thread, when what it is at is done."""
        self._jobs.put(None)

    def _remember(self, grammar: str, matcher: Matcher) -> None:
        self._known[grammar] = matcher
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._vocabulary is None:
                    self._vocabulary = self._open_vocabulary()
                job.outcome = self._vocabulary.compile(job.grammar)
            except InvalidGrammar as error:
                job.outcome = error.message
            except Exception:  # whatever it is, those who wait must hear of it
                log.exception("a grammar could not be compiled")
                job.outcome = "it could not be compiled"
            self._done.put(job)
            self._wake()


def _give(matcher: Matcher, sequences: list[Sequence]) -> None:
    for seq in sequences:
        seq.guide = matcher


class GuidedModel(Protocol):
    """What must be known of a loaded model."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


def open_vocabulary(settings: Settings, model: GuidedModel) -> Vocabulary:
    """Of the tokenizer in the folder that `settings` name. Raises InvalidGrammar where there is none."""
    try:
        text = Path(settings.tokenizer or settings.model, "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidGrammar("the model has no tokenizer") from error
    return Vocabulary.of(text, model.vocab_size, model.eos_token_ids)

"""The sequences that run: under which adapters, and how far each is."""

from __future__ import annotations

from collections import abc
from itertools import chain

from server.scheduling.sequence import MixKey, Sequence
from server.scheduling.step_plan import ScheduledRun

_MOST_HELD = 4  # steps in a row in which prompts wait for those that go first


class PromptRoom:
    """Tokens of a step that prompts may still take. Those of others take none from who goes first."""

    def __init__(self, tokens: int, goes_first: abc.Callable[[Sequence], bool]) -> None:
        self._all = self._first = tokens
        self._goes_first = goes_first

    @property
    def is_spent(self) -> bool:
        return self._first <= 0

    def is_for(self, seq: Sequence) -> bool:
        return (self._first if self._goes_first(seq) else self._all) > 0

    def take(self, seq: Sequence) -> None:
        tokens = seq.num_tokens - seq.num_computed
        self._all -= tokens
        self._first -= tokens * self._goes_first(seq)


class Running:
    """Keeps at hand what a plan asks for each step, so that no plan looks at every sequence twice."""

    def __init__(self, block_size: int, max_scored: int) -> None:
        self._block_size = block_size
        self._max_scored = max_scored  # prompt tokens of a step whose logits are wanted
        self._sequences: dict[Sequence, None] = {}  # in order of admission
        self._mixes: dict[MixKey, list[Sequence]] = {}  # those that use adapters
        self._base: list[Sequence] = []  # those that use none
        self._prefilling: list[Sequence] = []  # those with more than one token to compute
        self._steps_held = 0  # in a row, in which some prompts waited for others
        self._growing: list[Sequence] = []  # their next token starts a block that they do not have yet

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> abc.Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, seq: object) -> bool:
        return seq in self._sequences

    @property
    def mixes(self) -> abc.Collection[list[Sequence]]:
        """Those that use adapters, by mix."""
        return self._mixes.values()

    @property
    def digests(self) -> tuple[str, ...]:
        """The adapters in use, each once."""
        return tuple(dict.fromkeys(digest for mix in self._mixes for digest, _ in mix))

    @property
    def decoding(self) -> int:
        """How many have one token to compute."""
        return len(self._sequences) - len(self._prefilling)

    def prompt_room(self, tokens: int, goes_first: abc.Callable[[Sequence], bool]) -> PromptRoom:
        """In a step of so many tokens."""
        room = PromptRoom(tokens - self.decoding, goes_first)
        for seq in self._prefilling:
            room.take(seq)
        return room

    @property
    def growing(self) -> int:
        """How many want a block before their next step."""
        return len(self._growing)

    def add(self, seq: Sequence) -> None:
        self._sequences[seq] = None
        (self._mixes.setdefault(seq.mix_key, []) if seq.mix_key else self._base).append(seq)
        if seq.num_tokens - seq.num_computed > 1:
            self._prefilling.append(seq)

    def remove(self, seq: Sequence) -> None:
        del self._sequences[seq]
        if seq.mix_key:
            self._mixes[seq.mix_key].remove(seq)
            if not self._mixes[seq.mix_key]:
                del self._mixes[seq.mix_key]
        else:
            self._base.remove(seq)
        if seq in self._prefilling:
            self._prefilling.remove(seq)

    def take_growing(self) -> list[Sequence]:
        """Those that want a block, oldest first. The caller gives each one, or takes it out."""
        growing, self._growing = self._growing, []
        return sorted(growing, key=lambda seq: seq.order)

    def runs(
        self, tokens: int, goes_first: abc.Callable[[Sequence], bool] = lambda _: False
    ) -> list[ScheduledRun]:
        """One token of each that decodes, and what is left of the step's `tokens` shared out among the
        others, first admitted first.

        Where some of these go first, the others wait for them, for a few steps in a row at most: the step is
        as long as its tokens.

        Runs of one mix are neighbours, those of the base model come last. One whose last token is on its way
        from the device does not run.
        """
        chunks = self._chunks(self._prompts_now(goes_first), tokens - self.decoding)
        runs: list[ScheduledRun] = []
        for seq in chain(*self._mixes.values(), self._base):
            start = seq.num_computed
            known = seq.num_tokens - start
            if known == 1:
                if not seq.is_full:
                    runs.append(ScheduledRun(seq, seq.mix_key, start, 1, rows=1))
                elif seq.is_prompt_alone:
                    runs.append(ScheduledRun(seq, seq.mix_key, start, 1, rows=0))
            elif seq in chunks:
                ends = chunks[seq] == known and not seq.is_prompt_alone
                scored = _scored(seq, chunks[seq])
                runs.append(ScheduledRun(seq, seq.mix_key, start, chunks[seq], int(ends), scored))
        return runs

    def _prompts_now(self, goes_first: abc.Callable[[Sequence], bool]) -> list[Sequence]:
        """Those of the prompts that may be in this step."""
        first = [seq for seq in self._prefilling if goes_first(seq)] if len(self._prefilling) > 1 else []
        if not first or len(first) == len(self._prefilling) or self._steps_held == _MOST_HELD:
            self._steps_held = 0
            return self._prefilling
        self._steps_held += 1
        return first

    def _chunks(self, prompts: abc.Iterable[Sequence], tokens: int) -> dict[Sequence, int]:
        chunks, scored = {}, self._max_scored
        for seq in prompts:
            size = min(seq.num_tokens - seq.num_computed, tokens)
            if seq.num_unscored > scored:  # so that no step has the logits of a long prompt at once
                size = min(size, max(seq.num_scored - seq.num_computed, 0) + scored)
            if not size:
                continue
            chunks[seq] = size
            tokens -= size
            scored -= len(_scored(seq, size))
            if not tokens:
                break
        return chunks

    def advance(self, run: ScheduledRun) -> None:
        """Its tokens are computed, or will be before anything that is given to the device from now on."""
        seq = run.seq
        was_prefilling = seq.num_tokens - seq.num_computed > 1
        seq.num_computed += run.num_tokens
        if was_prefilling and seq.num_tokens - seq.num_computed <= 1:
            self._prefilling.remove(seq)
        if run.rows == 1:
            seq.expect()
            self.moved_on(seq)

    def moved_on(self, seq: Sequence) -> None:
        """It has a further token to compute: see whether that needs a block."""
        if not seq.is_full and seq.num_computed == len(seq.block_ids) * self._block_size:
            self._growing.append(seq)


def _scored(seq: Sequence, size: int) -> range:
    """The positions among its next `size` tokens whose logits give a log-probability to be told."""
    start, end = seq.num_computed, seq.num_computed + size
    if not seq.num_unscored:
        return range(0)
    return range(max(start, seq.num_scored), max(min(end, seq.num_prompt_tokens - 1), start, seq.num_scored))

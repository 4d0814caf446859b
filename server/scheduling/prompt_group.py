"""Choices of one request: one of them computes the prompt, the others begin with its blocks."""

from __future__ import annotations

from server.messages import Request
from server.scheduling.block_pool import BlockPool
from server.scheduling.sequence import PromptGroup, Sequence, State


def sequences_of(request: Request, arrival: float, order: int) -> list[Sequence]:
    """Of all choices of a request; `order` is that of the first, the others follow it."""
    first = Sequence(request, arrival, order)
    sequences = [first, *(first.fork(choice, order + 1 + k) for k, choice in enumerate(request.forks))]
    if request.forks:
        PromptGroup(sequences)
    return sequences


class SharedPrompts:
    """Keeps the prompts' blocks of a pool for choices that are yet to start.

    The block that a choice's first output token goes into is not shared: it is copied into one of the
    choice's own before its first step. `copies` are those still to be made; until then the block that is
    copied from is held.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._kept: dict[PromptGroup, None] = {}  # with blocks, the longest kept first
        self._copies: dict[Sequence, tuple[int, int]] = {}

    @property
    def copies(self) -> list[tuple[int, int]]:
        """(from, to), to be made before the next step."""
        return list(self._copies.values())

    def must_wait(self, seq: Sequence) -> bool:
        """Whether another computes its prompt for it."""
        group = seq.group
        if group is None or seq not in group.waiting:
            return False
        first = group.first
        scores = first is not seq and first.num_unscored > 0 and first.state is not State.FINISHED
        return scores or group.leader is not None

    def prompt_of(self, seq: Sequence) -> list[int]:
        """The kept blocks of its prompt, where it is yet to start and has no use for logits; else none."""
        group = seq.group
        return [] if group is None or seq not in group.waiting or seq.num_unscored else group.block_ids

    def copy(self, seq: Sequence, source: int, target: int) -> None:
        """Before the next step, `source` into `target`, which is the sequence's own."""
        self._pool.share([source])
        self._copies[seq] = source, target

    def copied(self, seq: Sequence) -> None:
        """The copy for it was made, or nobody needs it any more."""
        if pair := self._copies.pop(seq, None):
            self._pool.release(pair[:1])

    def started(self, seq: Sequence) -> None:
        """It runs: as the leader where others wait for the prompt and nobody has computed it."""
        if seq.group is not None:
            self._left(seq, seq.group)
            if seq.group.waiting and not seq.group.block_ids:
                seq.group.leader = seq

    def stopped(self, seq: Sequence) -> None:
        """It runs no more, or never will."""
        self.copied(seq)
        if seq.group is not None:
            self._left(seq, seq.group)
            if seq.group.leader is seq:
                seq.group.leader = None

    def computed(self, seq: Sequence) -> None:
        """Its prompt is in the cache: where it leads, the blocks stay for those who wait."""
        group = seq.group
        if group is None or group.leader is not seq:
            return
        group.leader = None
        if group.waiting:
            group.block_ids = seq.block_ids[: self._pool.blocks_for(seq.num_prompt_tokens)]
            self._pool.share(group.block_ids)
            self._kept[group] = None

    def make_room(self, but_for: Sequence | None = None) -> bool:
        """Give up the prompt kept last, but not that of `but_for`; False when there is none."""
        spared = but_for.group if but_for is not None else None
        group = next((group for group in reversed(self._kept) if group is not spared), None)
        if group is not None:
            self._release(group)
        return group is not None

    def _left(self, seq: Sequence, group: PromptGroup) -> None:
        group.waiting.discard(seq)
        if not group.waiting:
            self._release(group)

    def _release(self, group: PromptGroup) -> None:
        self._pool.release(group.block_ids)
        group.block_ids = []
        self._kept.pop(group, None)

"""The blocks of sequences: taken when they start, with what the prefix cache has, and offered when full."""

from __future__ import annotations

from server.scheduling.block_pool import BlockPool, extend_hashes, root_hash
from server.scheduling.prompt_group import SharedPrompts
from server.scheduling.sequence import Sequence
from server.scheduling.step_plan import ScheduledRun


class SequenceBlocks:
    """Takes and offers a pool's blocks.

    `looked_up_tokens`: prompt tokens looked up in the prefix cache so far. `cached_tokens`: taken from it.
    """

    def __init__(self, pool: BlockPool, prompts: SharedPrompts) -> None:
        self.looked_up_tokens = 0
        self.cached_tokens = 0
        self._pool = pool
        self._prompts = prompts

    def take(self, seq: Sequence, running: int) -> bool:
        """Cached blocks of its prefix and new ones for all other known tokens; all or nothing.

        Room for the whole prompt and not for its next chunk alone, so that two long prompts never preempt
        one another half-way; and one block more for each of those `running`, which will soon want it.
        """
        while not self._try(seq, running):
            # Kept prompts make way; the one that it would share only where nobody runs who would make room.
            if not self._prompts.make_room(but_for=seq if running else None):
                return False
        return True

    def _try(self, seq: Sequence, running: int) -> bool:
        pool = self._pool
        # The last token is always computed: its logits give the next one. So are those that the prompt's
        # log-probabilities are still to come from.
        known = seq.num_scored if seq.num_unscored else seq.num_tokens - 1
        most = known // pool.block_size
        prompt = self._prompts.prompt_of(seq)
        if prompt:
            hits = prompt[:most]
            pool.share(hits)
        else:
            hits = self._cached(seq, most)
        wanted = pool.blocks_for(seq.num_tokens) - len(hits)
        if wanted + running > pool.available:
            pool.release(hits)
            return False
        seq.block_ids = hits + pool.allocate(wanted)
        seq.num_computed = len(hits) * pool.block_size
        if prompt:
            self._prompts.copy(seq, prompt[most], seq.block_ids[most])
            seq.num_computed = seq.num_tokens - 1
        elif not seq.num_preemptions:
            looked_up = pool.prefix_caching and not seq.num_unscored
            self.looked_up_tokens += seq.num_prompt_tokens if looked_up else 0
            seq.cached_tokens = seq.num_computed
            self.cached_tokens += seq.num_computed
        return True

    def _cached(self, seq: Sequence, most: int) -> list[int]:
        """Blocks of its prefix that the cache knows, with a reference to each."""
        if not self._pool.prefix_caching:
            return []
        self._hash(seq, seq.num_tokens)
        return self._pool.match_prefix(seq.block_hashes[:most])

    def offer(self, run: ScheduledRun) -> None:
        """Those that the run filled, for reuse: their tokens are known now."""
        seq, block_size, end = run.seq, self._pool.block_size, run.start + run.num_tokens
        if self._pool.prefix_caching and end // block_size > run.start // block_size:
            self._hash(seq, end)
            for i in range(run.start // block_size, end // block_size):
                self._pool.register(seq.block_ids[i], seq.block_hashes[i])

    def _hash(self, seq: Sequence, tokens: int) -> None:
        root = root_hash(seq.mix_key, seq.tenant, seq.cache_salt)
        extend_hashes(seq.block_hashes, seq.tokens[:tokens], root, self._pool.block_size)

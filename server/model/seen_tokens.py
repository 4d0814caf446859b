"""The tokens of penalised sequences, kept on the device: no step waits for the host to read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from server.model.sampling import SampleRow

_STATE = "seen_tokens"


class _Slot:
    """A sequence's place. It is free again when nobody holds this any more: the sequence has ended."""

    def __init__(self, index: int, free: list[int]) -> None:
        self.index = index
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.index)


class SeenTokens:
    """For each penalised sequence, in a slot of its own, its tokens and how often its output has each."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        # [slots, L] of prompt and output; a sequence's places beyond its end hold its first token again
        self._ids = torch.zeros(0, 0, dtype=torch.int64, device=device)
        # [slots, V], of the output
        self._counts = torch.zeros(0, vocabulary, dtype=torch.int32, device=device)
        self._free: list[int] = []

    def of(self, rows: Sequence[SampleRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's tokens, some more than once, and how often its output has each: both [R, L].

        L is the longest row's length before the token that is to be drawn.
        """
        slots_R1 = self._slots(rows)[:, None]
        ids_RL = self._ids[:, : max(row.position for row in rows)][slots_R1[:, 0]]
        return ids_RL, self._counts[slots_R1, ids_RL]

    def add(self, token_ids_R: torch.Tensor, rows: Sequence[SampleRow]) -> None:
        """The token that was drawn for each row."""
        slots_R = self._slots(rows)
        self._widen(max(row.position for row in rows) + 1)
        at_R = self._to_device(np.array([row.position for row in rows]))
        self._ids.index_put_((slots_R, at_R), token_ids_R)
        self._count(slots_R, token_ids_R)

    def _count(self, slots_R: torch.Tensor, token_ids_R: torch.Tensor) -> None:
        one = torch.ones_like(token_ids_R, dtype=torch.int32)
        self._counts.index_put_((slots_R, token_ids_R), one, accumulate=True)

    def _slots(self, rows: Sequence[SampleRow]) -> torch.Tensor:
        for row in rows:
            if _STATE not in row.state:
                row.state[_STATE] = self._new(row)
        return self._to_device(np.array([row.state[_STATE].index for row in rows]))

    def _new(self, row: SampleRow) -> _Slot:
        self._widen(len(row.tokens))
        if not self._free:
            slots = len(self._counts)
            self._ids, self._counts = (
                torch.cat([table, table.new_zeros(max(4, slots), table.shape[1])])
                for table in (self._ids, self._counts)
            )
            self._free.extend(range(len(self._counts) - 1, slots - 1, -1))
        slot = _Slot(self._free.pop(), self._free)
        tokens = self._to_device(row.tokens)
        self._ids[slot.index] = tokens[0]
        self._ids[slot.index, : len(tokens)] = tokens
        self._counts[slot.index].zero_()
        output = tokens[row.num_prompt_tokens :]
        self._count(torch.full_like(output, slot.index), output)
        return slot

    def _widen(self, length: int) -> None:
        wide = self._ids.shape[1]
        if length > wide:
            more = max(length, 2 * wide) - wide
            first = self._ids[:, :1] if wide else self._ids.new_zeros(len(self._ids), 1)
            self._ids = torch.cat([self._ids, first.expand(-1, more)], dim=1)

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._ids.device, non_blocking=True)

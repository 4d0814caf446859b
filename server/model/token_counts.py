"""Which tokens a sequence holds, and how often its output has each: kept on the device for penalties."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.model.sampling import SampleRow

_STATE = "token_counts"


class _Slot:
    """A sequence's place. It is free again when nobody holds this any more: the sequence has ended."""

    def __init__(self, index: int, free: list[int]) -> None:
        self.index = index
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.index)


class TokenCounts:
    """A row of the vocabulary for each penalised sequence, made when it is first asked for.

    Later tokens are added where they are sampled, so that no step waits for the host to read them.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        # [slots, V]: how often in the output, whether at all in the prompt
        self.output = torch.zeros(0, vocabulary, dtype=torch.int32, device=device)
        self.prompt = torch.zeros(0, vocabulary, dtype=torch.bool, device=device)
        self._free: list[int] = []

    def slots(self, rows: Sequence[SampleRow]) -> torch.Tensor:
        """[R]: the rows of `output` and `prompt` that are theirs."""
        for row in rows:
            if _STATE not in row.state:
                row.state[_STATE] = self._new(row)
        indices = torch.tensor([row.state[_STATE].index for row in rows])
        return indices.to(self.output.device, non_blocking=True)

    def add(self, slots_R: torch.Tensor, token_ids_R: torch.Tensor) -> None:
        """One more token of each."""
        one = torch.ones_like(token_ids_R, dtype=torch.int32)
        self.output.index_put_((slots_R, token_ids_R), one, accumulate=True)

    def _new(self, row: SampleRow) -> _Slot:
        if not self._free:
            self._grow()
        slot = _Slot(self._free.pop(), self._free)
        device = self.output.device
        prompt, output = (
            torch.as_tensor(tokens).to(device, non_blocking=True)
            for tokens in (row.tokens[: row.num_prompt_tokens], row.output)
        )
        self.prompt[slot.index].zero_()
        self.prompt[slot.index].index_fill_(0, prompt, value=True)
        self.output[slot.index].zero_()
        self.add(torch.full_like(output, slot.index), output)
        return slot

    def _grow(self) -> None:
        slots = len(self.output)
        more = max(4, slots)
        self.output = torch.cat([self.output, self.output.new_zeros(more, self.output.shape[1])])
        self.prompt = torch.cat([self.prompt, self.prompt.new_zeros(more, self.prompt.shape[1])])
        self._free.extend(range(slots + more - 1, slots - 1, -1))

"""Which tokens of a step's batch use which resident adapters.

The batch orders its tokens so that sequences with the same adapter mix are neighbours: each run of such
tokens is one segment. Segments come first, tokens of the base model last, so LoRA kernels work on the
first `num_tokens` rows only and a base-only step has no segments at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class SegmentWork:
    """What the programs of a step's LoRA kernels do, in all modules; `LoraKernels.prepare` makes it.

    An item is up to `longest` tokens of one segment.
    """

    # [1 + I, 8] int32, of each item after the first row: first token, tokens, the slot and (its bits) the
    # weight of its first entry, and which entries are its own, [begin, end); two are left over. The first row
    # begins with how many items there are: in a captured step fewer than there is room for.
    items: torch.Tensor
    longest: int

    @property
    def room(self) -> int:
        return len(self.items) - 1

    def to(self, device: torch.device | str) -> SegmentWork:
        return replace(self, items=self.items.to(device, non_blocking=True))


@dataclass(frozen=True)
class Segments:
    """The adapter mixes of one step, built once on the host for all modules.

    Segment g covers the tokens [token_starts[g], token_starts[g + 1]) and adds the entries
    [entry_starts[g], entry_starts[g + 1]): pairs of an arena slot and a weight. A plain request has one
    entry of weight 1; a composition has several. Index tensors lie on the device of the arena.
    """

    token_starts: torch.Tensor  # [G + 1] int32
    entry_starts: torch.Tensor  # [G + 1] int32
    slots: torch.Tensor  # [E] int32
    weights: torch.Tensor  # [E] float32
    num_tokens: int  # tokens covered by segments = token_starts[G]
    max_tokens: int  # longest segment
    work: SegmentWork | None = None  # for kernels that want one, see `LoraKernels.prepare`

    @property
    def num_segments(self) -> int:
        return self.token_starts.numel() - 1

    @property
    def num_entries(self) -> int:
        return self.slots.numel()

    def to(self, device: torch.device | str) -> Segments:
        return replace(
            self,
            token_starts=self.token_starts.to(device, non_blocking=True),
            entry_starts=self.entry_starts.to(device, non_blocking=True),
            slots=self.slots.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
            work=None if self.work is None else self.work.to(device),
        )

    @classmethod
    def build(
        cls, mixes: Sequence[tuple[Sequence[tuple[int, float]], int]], device: torch.device | str = "cpu"
    ) -> Segments | None:
        """`mixes`: for each segment in batch order, ((slot, weight), ...) and its number of tokens.

        Returns None when there is no segment: a base-only step runs no LoRA kernel.
        """
        if not mixes:
            return None
        token_starts, entry_starts = [0], [0]
        slots: list[int] = []
        weights: list[float] = []
        for entries, tokens in mixes:
            for slot, weight in entries:
                slots.append(slot)
                weights.append(weight)
            token_starts.append(token_starts[-1] + tokens)
            entry_starts.append(len(slots))

        segments = cls(
            token_starts=torch.tensor(token_starts, dtype=torch.int32),
            entry_starts=torch.tensor(entry_starts, dtype=torch.int32),
            slots=torch.tensor(slots, dtype=torch.int32),
            weights=torch.tensor(weights, dtype=torch.float32),
            num_tokens=token_starts[-1],
            max_tokens=max(tokens for _, tokens in mixes),
        )
        return segments.to(device)

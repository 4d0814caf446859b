"""The proof that a fast path computes what the model's own modules compute.

Fused layers, a forward of our own or a captured graph round in other places than transformers' modules do,
and a deep model amplifies what rounding leaves. So no fixed distance between the two tells a right fast path
from a wrong one. What tells them apart is the model in float32: a right fast path is about as far from it as
the modules are themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from server.model.attention.interface import AttentionPlan
from server.model.batch import Batch
from server.model.sampling import Sampling

# The prompts of the probe, in tokens: short ones before a longer one, and one of a single token.
LENGTHS = (3, 1, 13)
_TIMES_THE_MODULES = 1.5  # how far off a fast path may be, in what the modules are off
_ALWAYS_ALLOWED = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_NEVER_ALLOWED = 0.3  # what is this far off proves nothing
_HALVES = (torch.bfloat16, torch.float16)


def relative_error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """||logits - reference|| / ||reference||, over all elements."""
    return float((logits.float() - reference.float()).norm() / reference.float().norm())


@dataclass(frozen=True)
class Proof:
    """The probe's T tokens, and their logits in float32 and as the model's modules compute them."""

    token_ids: torch.Tensor  # [T] int64; T = sum(LENGTHS), prompt after prompt
    exact: torch.Tensor  # [T, vocabulary] float32
    usual: torch.Tensor  # [T, vocabulary], in the model's type

    def limit(self, rows_N: torch.Tensor | slice = slice(None)) -> float:
        """The error up to which logits of these rows are right."""
        noise = relative_error(self.usual[rows_N], self.exact[rows_N])
        return min(_NEVER_ALLOWED, max(_ALWAYS_ALLOWED[self.usual.dtype], _TIMES_THE_MODULES * noise))

    def objection(self, logits_NV: torch.Tensor, rows_N: torch.Tensor) -> str | None:
        """Why logits of the rows `rows_N` [N] are not the model's; None where they are."""
        error, limit = relative_error(logits_NV, self.exact[rows_N]), self.limit(rows_N)
        return None if error < limit else f"off by {error:.2g}, where {limit:.2g} is rounding"


class PagedProbe:
    """The probe's prompts as batches over the first blocks of a paged cache.

    The first `sequences` of them, and of those the tokens that the cache has room for: a prompt's beginning
    has the logits that it has in the whole. Base model only, on the host.
    """

    def __init__(self, proof: Proof, num_blocks: int, block_size: int, sequences: int = len(LENGTHS)) -> None:
        self._ids = proof.token_ids.cpu()
        self._block_size = block_size
        self._begins, self._lengths, self._tables = [], [], []
        begin, first_block = 0, 0
        for length in LENGTHS[:sequences]:
            held = min(length, (num_blocks - first_block) * block_size)
            if held > 0:
                blocks = -(-held // block_size)
                self._begins.append(begin)
                self._lengths.append(held)
                self._tables.append(torch.arange(first_block, first_block + blocks, dtype=torch.int32))
                first_block += blocks
            begin += length

    def prompts(self) -> tuple[Batch, torch.Tensor]:
        """All tokens in one step, and which rows of the proof its logits are: [N], every second token."""
        return self._batch([(0, length) for length in self._lengths], every=2)

    def prompts_then_tokens(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Two steps, and their rows of the proof [N]: all tokens but each prompt's last, if any; those."""
        before = [(0, length - 1) for length in self._lengths]
        if any(last for _, last in before):
            yield self._batch(before)
        yield self._batch([(length - 1, length) for length in self._lengths])

    def _batch(
        self, spans: Sequence[tuple[int, int]], every: int | None = None
    ) -> tuple[Batch, torch.Tensor]:
        """Tokens [first, last) of each prompt; logits of the last of each, or of every so-many-th token."""
        live = [s for s, (first, last) in enumerate(spans) if first < last]
        positions = [torch.arange(*spans[s]) for s in live]
        lengths = torch.tensor([len(of_one) for of_one in positions])
        at_T = torch.cat([self._begins[s] + of_one for s, of_one in zip(live, positions, strict=True)])
        slots_T = torch.cat(
            [self._tables[s][of_one // self._block_size].long() * self._block_size + of_one % self._block_size
             for s, of_one in zip(live, positions, strict=True)]
        )  # fmt: skip
        ends = lengths.cumsum(0)
        rows_N = torch.arange(0, len(at_T), every) if every else ends - 1
        contexts = torch.tensor([spans[s][1] for s in live], dtype=torch.int32)
        batch = Batch(
            token_ids=self._ids[at_T],
            positions=torch.cat(positions),
            sample_rows=rows_N,
            attention=AttentionPlan(
                query_starts=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int(),
                context_lens=contexts,
                block_tables=nn.utils.rnn.pad_sequence([self._tables[s] for s in live], batch_first=True),
                slot_mapping=slots_T,
                num_seqs=len(live),
                max_query_len=int(lengths.max()),
                max_context_len=int(contexts.max()),
            ),
            segments=None,
            sample_segments=None,
            sampling=Sampling([]),
            rows=[],
        )
        return batch, at_T[rows_N]


def probe_ids(vocab_size: int, device: torch.device) -> torch.Tensor:
    """[T] tokens for prompts of LENGTHS."""
    return (torch.arange(sum(LENGTHS), device=device) * 7919 + 11) % vocab_size


def probe_positions(device: torch.device) -> torch.Tensor:
    """[T]: where each token of `probe_ids` stands in its prompt."""
    return torch.cat([torch.arange(n, device=device) for n in LENGTHS])


class InFloat32(TorchFunctionMode):
    """Every operation inside computes in float32, whatever the types of its tensors.

    Weights are widened one at a time, as they are used, so a model needs no second copy of itself.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # an attribute, read of a tensor
            value = func(*args, **kwargs)
            return torch.float32 if isinstance(value, torch.dtype) and value in _HALVES else value
        if func is functional.embedding:  # rows of a table: the table stays as it is
            return _widened(func(*args, **kwargs))
        kept = args[:1] if _writes(func) else ()
        wide = tree_map(_widened, tuple(args[len(kept) :]))
        return func(*kept, *wide, **tree_map(_widened, dict(kwargs)))


def _writes(func: Callable[..., Any]) -> bool:
    """Whether its first argument is written to, so that what goes into a widened copy would be lost."""
    name = getattr(func, "__name__", "")
    return name.startswith(("__set", "__i")) or (name.endswith("_") and not name.endswith("__"))


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALVES else value

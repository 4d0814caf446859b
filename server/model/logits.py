"""What changes a row's logits before a token is taken from it: penalties, bias, a minimum length, tokens and
words that may not come, a grammar.

A sampling option that acts on logits is one `LogitsProcessor`: which rows want it and what it then does stand
side by side, and the sampler asks no other question.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from server.guidance.matcher import Masks, Matcher
from server.model.sampling import Draws, SampleRow, Sampling
from server.model.seen_tokens import SeenTokens


class LogitsProcessor(ABC):
    """One option's effect on logits."""

    reads_output: ClassVar[bool]  # whether the host must know every token before the one to be drawn

    @staticmethod
    @abstractmethod
    def wants(row: SampleRow) -> bool:
        """Whether the row's logits may change by it. If not, then at no later token either."""

    def begin(self, rows: Sequence[SampleRow], vocabulary: int) -> None:  # noqa: B027  # most do nothing
        """Before the logits are computed: what can be done beside that for the rows that want it."""

    @abstractmethod
    def apply(self, scores_NV: torch.Tensor, at_R: torch.Tensor, rows: Sequence[SampleRow]) -> None:
        """Change the scores of the R rows that want it, which stand at `at_R`, in place, on their device.

        scores_NV: [N, vocabulary] float32; some may be -inf already, by a processor before. Does not wait for
        the device.
        """

    def taken(self, token_ids_R: torch.Tensor, rows: Sequence[SampleRow]) -> None:  # noqa: B027  # as above
        """The tokens that were then taken from those rows, on the device."""


class Penalties(LogitsProcessor):
    """Repetition penalty over prompt and output (Keskar et al. 2019); presence and frequency penalties over
    the output, as OpenAI's."""

    reads_output: ClassVar[bool] = False

    def __init__(self) -> None:
        self._seen: SeenTokens | None = None

    @staticmethod
    def wants(row: SampleRow) -> bool:
        params = row.params
        return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)

    def apply(self, scores_NV: torch.Tensor, at_R: torch.Tensor, rows: Sequence[SampleRow]) -> None:
        if self._seen is None:
            self._seen = SeenTokens(scores_NV.shape[1], scores_NV.device)
        ids_RL, counts_RL = self._seen.of(rows)
        penalties = [
            (row.params.repetition_penalty, row.params.presence_penalty, row.params.frequency_penalty)
            for row in rows
        ]
        of_rows = torch.tensor(penalties, dtype=torch.float32).to(scores_NV.device, non_blocking=True)
        repetition_R1, presence_R1, frequency_R1 = of_rows[:, :, None].unbind(1)
        at_R1 = at_R[:, None]
        scores_RL = scores_NV[at_R1, ids_RL]
        scores_RL = torch.where(scores_RL > 0, scores_RL / repetition_R1, scores_RL * repetition_R1)
        scores_RL -= frequency_R1 * counts_RL + presence_R1 * (counts_RL > 0)
        scores_NV.index_put_((at_R1, ids_RL), scores_RL)  # where a token stands twice, the same twice

    def taken(self, token_ids_R: torch.Tensor, rows: Sequence[SampleRow]) -> None:
        assert self._seen is not None
        self._seen.add(token_ids_R, rows)


class LogitBias(LogitsProcessor):
    """A number added to the logit of each token that the request names."""

    reads_output: ClassVar[bool] = False

    @staticmethod
    def wants(row: SampleRow) -> bool:
        return bool(row.params.logit_bias)

    def apply(self, scores_NV: torch.Tensor, at_R: torch.Tensor, rows: Sequence[SampleRow]) -> None:
        for row in rows:
            if "logit_bias" not in row.state:
                bias = row.params.logit_bias or {}
                row.state["logit_bias"] = tuple(
                    torch.tensor(list(half)).to(scores_NV.device, non_blocking=True)
                    for half in (bias.keys(), bias.values())
                )
        ids, values = zip(*(row.state["logit_bias"] for row in rows), strict=True)
        at_E = _repeated(at_R, ids)
        scores_NV.index_put_((at_E, torch.cat(ids)), torch.cat(values), accumulate=True)


class MinimumLength(LogitsProcessor):
    """No token that would end the sequence before `min_tokens`."""

    reads_output: ClassVar[bool] = False

    @staticmethod
    def wants(row: SampleRow) -> bool:
        return row.position - row.num_prompt_tokens < row.params.min_tokens

    def apply(self, scores_NV: torch.Tensor, at_R: torch.Tensor, rows: Sequence[SampleRow]) -> None:
        for row in rows:
            if "ending" not in row.state:
                ending = [*row.params.stop_token_ids, *(() if row.params.ignore_eos else row.eos_token_ids)]
                row.state["ending"] = torch.tensor(ending, dtype=torch.long).to(
                    scores_NV.device, non_blocking=True
                )
        ids = [row.state["ending"] for row in rows]
        never = scores_NV.new_full((), float("-inf"))
        scores_NV.index_put_((_repeated(at_R, ids), torch.cat(ids)), never)


class AllowedTokens(LogitsProcessor):
    """No token but those that the request names."""

    reads_output: ClassVar[bool] = False

    @staticmethod
    def wants(row: SampleRow) -> bool:
        return row.params.allowed_token_ids is not None

    def apply(self, scores_NV: torch.Tensor, at_R: torch.Tensor, rows: Sequence[SampleRow]) -> None:
        for row in rows:
            if "allowed" not in row.state:
                row.state["allowed"] = torch.tensor(row.params.allowed_token_ids).to(
                    scores_NV.device, non_blocking=True
                )
        ids = [row.state["allowed"] for row in rows]
        at_E, ids_E = _repeated(at_R, ids), torch.cat(ids)
        kept_E = scores_NV[at_E, ids_E]
        scores_NV.index_fill_(0, at_R, float("-inf"))
        scores_NV.index_put_((at_E, ids_E), kept_E)


class BadWords(LogitsProcessor):
    """No token that would end one of the request's bad words in the output."""

    reads_output: ClassVar[bool] = True

    @staticmethod
    def wants(row: SampleRow) -> bool:
        return bool(row.params.bad_words)

    def apply(self, scores_NV: torch.Tensor, at_R: torch.Tensor, rows: Sequence[SampleRow]) -> None:
        ids = [torch.tensor(_ending(row), dtype=torch.long).to(scores_NV.device) for row in rows]
        never = scores_NV.new_full((), float("-inf"))
        scores_NV.index_put_((_repeated(at_R, ids), torch.cat(ids)), never)


def _ending(row: SampleRow) -> list[int]:
    """The last tokens of those bad words of which the output ends with all others."""
    longest = max(map(len, row.params.bad_words)) - 1
    said = tuple(row.output[-longest:].tolist()) if longest else ()
    return [word[-1] for word in row.params.bad_words if said[len(said) - len(word) + 1 :] == word[:-1]]


class Grammar(LogitsProcessor):
    """Tokens that the output's grammar allows, and no others. The last processor: where nothing but the end
    can come, or by what else the request says nothing but the end is left, that is allowed whatever was said
    before."""

    reads_output: ClassVar[bool] = True

    def __init__(self) -> None:
        self._masks: Masks | None = None  # has a thread
        self._begun: _Begun | None = None

    @staticmethod
    def wants(row: SampleRow) -> bool:
        return row.guide is not None

    def begin(self, rows: Sequence[SampleRow], vocabulary: int) -> None:
        self._begun = self._begin(rows, vocabulary)

    def _begin(self, rows: Sequence[SampleRow], vocabulary: int) -> _Begun:
        if self._masks is None:
            self._masks = Masks()
        matchers = [_matcher(row) for row in rows]
        tokens = [row.output[m.followed :].tolist() for row, m in zip(rows, matchers, strict=True)]
        bits = self._masks.begin(matchers, tokens, -(-vocabulary // 32))
        return _Begun(list(rows), [row.position for row in rows], matchers, bits)

    def apply(self, scores_NV: torch.Tensor, at_R: torch.Tensor, rows: Sequence[SampleRow]) -> None:
        begun = self._begun
        if begun is None or not begun.is_of(rows):
            begun = self._begin(rows, scores_NV.shape[1])
        self._begun = None
        bits_RB = begun.bits.result()
        banned_RV = _unpacked(~bits_RB.view(np.uint8), scores_NV)
        if len(rows) < len(scores_NV):
            banned_NV = torch.zeros_like(scores_NV, dtype=torch.bool)
            banned_NV[at_R] = banned_RV
        else:
            banned_NV = banned_RV
        scores_NV.masked_fill_(banned_NV, float("-inf"))
        for at, banned_V, matcher, row in zip(at_R, banned_RV, begun.matchers, rows, strict=True):
            if matcher.error:
                scores_NV[at] = float("nan")  # no token: see `grammar_error`
            elif matcher.complete:
                scores_NV[at] = scores_NV[at].masked_fill(~banned_V, 0.0)
            elif row.params.bad_words or row.params.allowed_token_ids is not None:
                scores_NV[at] = _or_the_end(scores_NV[at], banned_V, row)


@dataclass(frozen=True)
class _Begun:
    """Masks that are made: of these rows, for the tokens at these positions."""

    rows: list[SampleRow]
    positions: list[int]
    matchers: list[Matcher]
    bits: Future[npt.NDArray[np.int32]]

    def is_of(self, rows: Sequence[SampleRow]) -> bool:
        return len(rows) == len(self.rows) and all(
            row is known and row.position == position
            for row, known, position in zip(rows, self.rows, self.positions, strict=True)
        )


def _or_the_end(scores_V: torch.Tensor, banned_V: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """The scores, or where they leave nothing the end of the text, if the grammar allows that now."""
    ending_E = torch.tensor(row.eos_token_ids, dtype=torch.long).to(scores_V.device, non_blocking=True)
    ended_V = torch.full_like(scores_V, float("-inf")).index_fill_(0, ending_E, 0.0)
    ended_V.masked_fill_(banned_V, float("-inf"))
    return torch.where(scores_V.amax() == float("-inf"), ended_V, scores_V)


def _unpacked(bits_RB: npt.NDArray[np.uint8], scores_NV: torch.Tensor) -> torch.Tensor:
    """Bits, the lowest first, as one bool for each token of the vocabulary: [R, V], where the scores are."""
    vocabulary, device = scores_NV.shape[1], scores_NV.device
    if device.type == "cpu":
        of_tokens = np.unpackbits(bits_RB, axis=1, count=vocabulary, bitorder="little")
        return torch.from_numpy(of_tokens.view(np.bool_))
    bits = torch.from_numpy(bits_RB).to(device, non_blocking=True)[:, :, None]
    places = torch.arange(8, dtype=torch.uint8, device=device)
    return ((bits >> places) & 1).flatten(1)[:, :vocabulary].bool()


_MATCHER = "matcher"


def _matcher(row: SampleRow) -> Matcher:
    """The row's own, which may not know all of the output yet. Made anew where its state was dropped."""
    assert row.guide is not None
    matcher: Matcher | None = row.state.get(_MATCHER)
    if matcher is None:
        matcher = row.state[_MATCHER] = row.guide.copy()
    return matcher


def grammar_error(state: Mapping[str, Any]) -> str | None:
    """Why a sequence's output can go no further by its grammar; None where it can. `state`: its own, which
    processors keep things in."""
    matcher: Matcher | None = state.get(_MATCHER)
    return None if matcher is None else matcher.error


def _repeated(at_R: torch.Tensor, of_rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Each row's place as often as it has entries: [E]."""
    lengths = [len(entries) for entries in of_rows]
    return torch.cat([at.expand(length) for at, length in zip(at_R, lengths, strict=True)])


# In the order in which they act. Each sampler has its own of each, since some keep things on its device.
PROCESSORS: tuple[type[LogitsProcessor], ...] = (
    Penalties,
    LogitBias,
    MinimumLength,
    AllowedTokens,
    BadWords,
    Grammar,
)


# What may leave no token, in the words of a request.
_NARROWING: Mapping[type[LogitsProcessor], str] = {
    AllowedTokens: "allowed_token_ids",
    BadWords: "bad_words",
    MinimumLength: "min_tokens",
    Grammar: "the grammar",
}


def nothing_left(row: SampleRow, vocabulary: int) -> str | None:
    """What bans all tokens of the vocabulary in a row that gave none; None where it gave none for another
    reason. It is found anew, since a device says no more than that there is none."""
    here = replace(row, state={name: value for name, value in row.state.items() if name == _MATCHER})
    scores_1V, first = torch.zeros(1, vocabulary), torch.zeros(1, dtype=torch.long)
    kinds = [kind for kind in _NARROWING if kind.wants(row)]
    for kind in kinds:
        kind().apply(scores_1V, first, [here])
    if bool((scores_1V > float("-inf")).any()):
        return None
    return ", ".join(_NARROWING[kind] for kind in kinds)


def wanted(row: SampleRow) -> list[type[LogitsProcessor]]:
    """Those that may change the row's logits, in order; none for most rows."""
    return [kind for kind in PROCESSORS if kind.wants(row)]


def sampling_of(rows: list[SampleRow]) -> Sampling:
    """How tokens are taken from these rows."""
    kinds = [wanted(row) for row in rows]
    return Sampling(
        rows,
        Draws.of(rows),
        changed=[n for n, of_row in enumerate(kinds) if of_row],
        with_logprobs=[n for n, row in enumerate(rows) if row.params.logprobs is not None],
        must_be_read=any(kind.reads_output for of_row in kinds for kind in of_row),
    )

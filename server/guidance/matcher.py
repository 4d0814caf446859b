"""Which tokens may come next, by a grammar: llguidance, with bounds on what one grammar may take."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par

from server.errors import InvalidGrammar

_MOST_REASON = 300  # characters
_JUDGED_TOKENS = 4

# A grammar is written by a client. With llguidance's own limits one pattern of 20 characters takes five
# seconds for its first token; with these 0.3 s, and a schema of 200 properties is still far from any of them.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000,
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_lexer_states=10_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class Matcher:
    """Where one text stands in its grammar. What it may be continued by changes with each token."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.followed = 0  # tokens so far

    def copy(self) -> Matcher:
        """One of its own life, at the same place."""
        other = Matcher(self._matcher.deep_copy())
        other.followed = self.followed
        return other

    def follow(self, token_ids: Sequence[int]) -> None:
        """Take tokens in. One that the grammar does not allow leaves it in error."""
        self._matcher.consume_tokens(list(token_ids))
        self.followed += len(token_ids)

    @property
    def library(self) -> LLMatcher:
        """For `Masks`."""
        return self._matcher

    def allowed(self) -> bytes:
        """The tokens that may come next, a bit each from the lowest on, 4 * ceil(vocabulary / 32) bytes.

        Where the text may end, an end-of-sequence token is one of them. Means nothing in error.
        """
        return self._matcher.compute_bitmask()

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can come."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why it can go no further: a limit was met, or a token was wrong. None: it can."""
        return _reason(self._matcher.get_error()) if self._matcher.is_error() else None


class Masks:
    """The next tokens of many matchers at once, in a thread: the caller may do other things meanwhile."""

    def __init__(self) -> None:
        self._executor = LLExecutor(num_threads=1)
        self._thread = ThreadPoolExecutor(1, "masks")

    def begin(
        self, matchers: Sequence[Matcher], tokens: Sequence[Sequence[int]], width: int
    ) -> Future[npt.NDArray[np.int32]]:
        """Each matcher takes its tokens in; then as `Matcher.allowed`, a row for each: [R, width]."""
        bits_RB = np.empty((len(matchers), width), np.int32)
        return self._thread.submit(self._fill, matchers, tokens, bits_RB)

    def _fill(
        self, matchers: Sequence[Matcher], tokens: Sequence[Sequence[int]], bits_RB: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int32]:
        if all(len(of_one) == 1 for of_one in tokens):  # nearly always, and then no interpreter is held
            pairs = [(m.library, of_one[0]) for m, of_one in zip(matchers, tokens, strict=True)]
            self._executor.consume_token_par(pairs)
            for matcher in matchers:
                matcher.followed += 1
        else:
            for matcher, of_one in zip(matchers, tokens, strict=True):
                matcher.follow(of_one)
        places = [(matcher.library, at) for at, matcher in enumerate(matchers)]
        fill_next_token_bitmask_par(self._executor, places, bits_RB)
        return bits_RB


class Vocabulary:
    """The tokens of one tokenizer, as grammars are matched against."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> Self:
        """`vocab_size`: of the model, which may be more than the tokenizer has. Takes a second for 128,000
        tokens. Raises InvalidGrammar where no text can be guided: a kind of tokenizer that llguidance does
        not read, or no token that ends a text.
        """
        if not eos_token_ids:
            raise InvalidGrammar("the model has no end-of-sequence token")
        try:
            return cls(LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids)))
        except Exception as error:  # the library raises whatever it met
            raise InvalidGrammar(f"the model's tokenizer cannot be guided: {_reason(str(error))}") from error

    def compile(self, grammar: str) -> Matcher:
        """A matcher at the beginning. Raises InvalidGrammar. Lets other threads run."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise InvalidGrammar(_reason(matcher.get_error()))
        return Matcher(matcher)

    def judge(self, grammar: str) -> None:
        """Raises InvalidGrammar for what cannot be compiled, that no text matches, or that fails within the
        first tokens of a text: what takes too long mostly does."""
        matcher = self.compile(grammar)
        for _ in range(_JUDGED_TOKENS):
            bits = np.frombuffer(matcher.allowed(), np.uint8)
            if matcher.error:
                raise InvalidGrammar(matcher.error)
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            if matcher.complete:
                return
            matcher.follow([int(allowed[len(allowed) // 2])])


def _reason(text: str) -> str:
    """A library's message in one line."""
    if text.startswith("NoExtension"):
        return "no text matches it"
    return " ".join(text.replace("<non-verbose/>", "").split())[:_MOST_REASON]

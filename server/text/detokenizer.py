"""Token ids to text, one token at a time."""

from __future__ import annotations

from server.text.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
_LONGEST_WINDOW = 16  # tokens; a character takes at most 4


class Detokenizer:
    """Text of a growing sequence. Never gives half a character, and costs the same for each token.

    Decodes a short window: the tokens since the last place where the text was whole, after a few tokens of
    context where the decoder needs them (it may write a space before any token but the first). For a
    byte-level tokenizer the pieces joined are exactly the decoding of all tokens at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._context = 0  # tokens at the window's start that are context only
        self._done = 0  # characters of the window's text that were given already

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often a word piece, sometimes empty."""
        if self._skip and token_id in self._tokenizer.special_ids:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = len(text.rstrip(_UNFINISHED))
        if certain == len(text) > self._done:
            piece = text[self._done :]
            self._restart()
            return piece
        if len(self._window) - self._context > _LONGEST_WINDOW:
            return self._shorten(text)
        piece = text[self._done : certain]
        self._done = max(self._done, certain)
        return piece

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        piece = self._decode(self._window)[self._done :]
        self._window, self._context, self._done = [], 0, 0
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)

    def _restart(self) -> None:
        """All of the window's text is given: keep only the newest tokens, as context."""
        if self._tokenizer.context_free:
            self._window, self._context, self._done = [], 0, 0
            return
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._done = len(self._decode(self._window))

    def _shorten(self, text: str) -> str:
        """Many tokens and still no whole character (noise, or tokens without text): give up the oldest.

        A cut inside an unfinished character makes two marks of what is one, so where both sides together are
        as long as the whole, the cut is clean. One of three neighbouring places always is.
        """
        for cut in range(len(self._window) - 1, max(len(self._window) - 5, 0), -1):
            left, right = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            if len(left) + len(right) == len(text):
                break
        piece = left[self._done :]
        given_of_right = max(self._done - len(left), 0)
        self._window, self._context, self._done = self._window[cut:], 0, given_of_right
        return piece

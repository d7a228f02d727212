"""A text that grows by tokens, up to an end-of-text token or a stop string.

Its characters are given out as soon as no later token can change them: a token may hold a part of a
character, and a part of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsmoe_jax.config.checks import require
from dsmoe_jax.data.tokenizer import Tokenizer

END_OF_TEXT = "end_of_text"
STOP_STRING = "stop_string"
MAX_NEW_TOKENS = "max_new_tokens"

# What bytes that are no character, or not yet one, become.
_BROKEN = "\ufffd"


class GrowingText:
    """A text that grows by tokens.

    Args:
      tokenizer: of the tokens.
      stop_strings: the text ends before the first one that is complete, also one that begins in one
        token and ends in another.

    Attributes:
      tokens: number of tokens that were taken, end-of-text not counted.
      stop_reason: why the text has ended; None: it has not.

    Raises:
      ValueError: for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        for string in stop_strings:
            require(bool(string), "stop", string, "must not be empty")
        self.tokens = 0
        self.stop_reason: str | None = None
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._text = ""
        # Decoders may join tokens, so new tokens are decoded together with those just before them.
        self._before: list[int] = []
        self._new: list[int] = []

    @property
    def text(self) -> str:
        """The characters that stay, whatever comes: the whole text once it has ended."""
        if self.stop_reason is not None:
            return self._text
        return self._text[: len(self._text) - self._may_be_stop()]

    def add(self, tokens: Sequence[int]) -> None:
        """Takes tokens; those behind the end are left."""
        for token in tokens:
            if self.stop_reason is not None:
                return
            if token == self._tokenizer.eos_id:
                self._end(END_OF_TEXT)
            else:
                self.tokens += 1
                self._new.append(token)
                self._settle(last=False)

    def close(self) -> None:
        """Says that no token comes any more."""
        if self.stop_reason is None:
            self._end(MAX_NEW_TOKENS)

    def _end(self, reason: str) -> None:
        self._settle(last=True)
        if self.stop_reason is None:  # else the last characters complete a stop string
            self.stop_reason = reason

    def _settle(self, *, last: bool) -> None:
        """Decodes the new tokens, unless their last character may not be whole yet."""
        decoded = self._tokenizer.decode([*self._before, *self._new])
        if decoded.endswith(_BROKEN) and not last:
            return
        known = len(self._tokenizer.decode(self._before))
        self._before, self._new = self._new, []
        self._append(decoded[known:])

    def _append(self, characters: str) -> None:
        """Takes characters, and ends the text before the first stop string that is complete."""
        n = len(self._text)
        self._text += characters
        found = []
        for string in self._stop_strings:
            # It was not complete before, so its last character is a new one.
            start = self._text.find(string, max(0, n - len(string) + 1))
            if start >= 0:
                found.append((start + len(string), start))
        if found:
            _, start = min(found)
            self._text = self._text[:start]
            self.stop_reason = STOP_STRING

    def _may_be_stop(self) -> int:
        """Characters at the end that a stop string may begin with."""
        lengths = (
            n
            for string in self._stop_strings
            for n in range(1, len(string))
            if self._text.endswith(string[:n])
        )
        return max(lengths, default=0)

"""Writes growing texts, one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from dsmoe_jax.data.growing_text import GrowingText


class TextPrinter:
    """Writes prompts with their continuations, as far as they have grown; several are numbered.

    A text begins when the one before has ended, so they come out the same however often `show` is
    called.

    Args:
      stream: to write to.
      prompts: what each text continues.
      texts: growing.
    """

    def __init__(self, stream: TextIO, prompts: Sequence[str], texts: Sequence[GrowingText]):
        self._stream = stream
        self._prompts = prompts
        self._texts = texts
        self._at = 0  # the text that is being written
        self._written: int | None = None  # its characters; None: not even the prompt

    def show(self) -> None:
        """Writes what is new."""
        while self._at < len(self._texts):
            text = self._texts[self._at]
            if self._written is None:
                self._stream.write(self._heading() + self._prompts[self._at])
                self._written = 0
            characters = text.text
            self._stream.write(characters[self._written :])
            self._written = len(characters)
            if text.stop_reason is None:
                break
            self._stream.write("\n")
            self._at += 1
            self._written = None
        self._stream.flush()

    def _heading(self) -> str:
        n = len(self._texts)
        return "" if n == 1 else f"[{self._at + 1}/{n}]\n"

"""Byte-level BPE: any Unicode text becomes ids and comes back unchanged.

Shapes: V vocabulary.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


class Tokenizer:
    """A trained byte-level BPE with two special tokens.

    `eos_id` ends a document and, as an input, begins the next one; `pad_id` fills a sequence.
    Text never encodes to a special token, not even text that spells its name: in a packed
    stream `eos_id` always means a document boundary.
    """

    def __init__(self, bpe: _Tokenizer):
        bpe.encode_special_tokens = True
        self._bpe = bpe
        self.vocab_size: int = bpe.get_vocab_size()
        self.eos_id, self.pad_id = (self._special_id(token) for token in SPECIAL_TOKENS)

    def _special_id(self, token: str) -> int:
        token_id = self._bpe.token_to_id(token)
        if token_id is None:
            raise ValueError(f"tokenizer: lacks the special token {token}")
        return token_id

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads a `tokenizer.json`.

        Raises:
          ValueError: if it is missing, or not a tokenizer of this kind.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"tokenizer {path}: no such file")
        try:
            bpe = _Tokenizer.from_str(path.read_text("utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"tokenizer {path}: not a tokenizers file ({error})") from error
        return cls(bpe)

    def to_json(self) -> str:
        """The content of `tokenizer.json`; the same training text gives the same string."""
        return self._bpe.to_str(pretty=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end-of-text token."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        return [e.ids for e in self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return self._bpe.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        """Text of one id, for tables; the name of a special token."""
        return self.decode([token_id], skip_special_tokens=False)

    @property
    def bytes_per_token_V(self) -> np.ndarray:
        """Number of UTF-8 bytes that each token stands for, int32 [V]; 0 if special.

        Summed over `encode(text)` it is the number of UTF-8 bytes of `text`, so
        bits per byte = nats summed / ln 2 / bytes summed over the targets.
        """
        bytes_V = np.zeros(self.vocab_size, np.int32)
        for token, token_id in self._bpe.get_vocab().items():
            if token not in SPECIAL_TOKENS:
                bytes_V[token_id] = len(token)  # byte-level: one character stands for one byte
        return bytes_V


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns byte-level BPE merges from `texts` until there are `vocab_size` tokens.

    Deterministic: the same texts in the same order give the same tokenizer.

    Raises:
      ValueError: if `vocab_size` is less than the 256 bytes and the special tokens, or more than
        the texts can fill.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens need at least {MIN_VOCAB_SIZE}"
        )
    bpe = _Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is too large for this corpus: its text gives only "
            f"{bpe.get_vocab_size()} tokens"
        )
    return Tokenizer(bpe)

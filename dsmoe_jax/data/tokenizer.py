"""Byte-level BPE: any Unicode text becomes ids and comes back unchanged.

Shapes: V vocabulary.
"""

import codecs
import functools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD)
UNFINISHED = "▯"  # a token that ends within a character
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a token stands for (GPT-2): its own, if it can be printed.

    The others are, in their order, the characters from 256 on.
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    found = {chr(byte): byte for byte in printed}
    return found | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _bytes_of_characters()


class Tokenizer:
    """A trained byte-level BPE with two special tokens.

    `eos_id` ends a document and, as an input, begins the next one; `pad_id` fills a sequence.
    Text never encodes to a special token, not even text that spells its name: in a packed
    stream `eos_id` always means a document boundary.
    """

    def __init__(self, bpe: _Tokenizer):
        bpe.encode_special_tokens = True
        self._bpe = bpe
        # Ids may have holes, in a tokenizer that others made.
        self.vocab_size: int = max(bpe.get_vocab().values(), default=-1) + 1
        self.eos_id, self.pad_id = (self._special_id(token) for token in SPECIAL_TOKENS)

    def _special_id(self, token: str) -> int:
        token_id = self._bpe.token_to_id(token)
        if token_id is None:
            raise ValueError(f"tokenizer: lacks the special token {token}")
        return token_id

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads the `tokenizer.json` of a corpus.

        Raises:
          ValueError: if it is missing, or not a tokenizer of this kind.
        """
        # `Path` would make another place of one in a bucket, which is no `Path`.
        return cls(_read(cast(Path, path) if isinstance(path, PurePath) else Path(path)))

    @classmethod
    def adopt(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads a byte-level tokenizer that others made; the special tokens it lacks are added.

        Args:
          path: of a JSON file of the `tokenizers` library, or of a folder with a `tokenizer.json`:
            a prepared corpus, a model of Hugging Face.

        Raises:
          ValueError: if there is none, or its tokens do not stand for bytes.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        return cls._adopted(_read(path), path)

    @classmethod
    def adopt_json(cls, content: str, path: Path) -> "Tokenizer":
        """Like `adopt`, from the content of the file.

        Args:
          content: JSON of the `tokenizers` library.
          path: where it is from, for errors.

        Raises:
          ValueError: as `adopt` does.
        """
        return cls._adopted(_parse(content, path), path)

    @classmethod
    def _adopted(cls, bpe: _Tokenizer, path: Path) -> "Tokenizer":
        if not _is_byte_level(json.loads(bpe.to_str())["decoder"]):
            raise ValueError(
                f"tokenizer {path}: must be byte-level (with the decoder ByteLevel), so that any"
                " text comes back and loss can be measured in bits per byte"
            )
        # Many files say that a text is to be cut at the model's length.
        bpe.no_truncation()
        bpe.no_padding()
        bpe.add_special_tokens(list(SPECIAL_TOKENS))
        ids = list(bpe.get_vocab().values())
        if len(set(ids)) < len(ids):  # the library numbers what it adds by the number of tokens
            raise ValueError(f"tokenizer {path}: its ids have holes; must be numbered from 0 on")
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

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of many texts at once, on all cores; special tokens are shown by name."""
        return self._bpe.decode_batch([list(i) for i in ids], skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """Text of one id, for tables; the name of a special token.

        One that is a part of a character is its bytes: `<e4 bd>`.
        """
        content = self._bytes(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return f"<{content.hex(' ')}>"

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Text of each of successive ids, for reading: a character stands where it is complete.

        An id that ends within a character and completes none is `UNFINISHED`; so is one that goes
        on with a character of which the beginning is missing.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        return [decoder.decode(self._bytes(int(i))) or UNFINISHED for i in ids]

    def _bytes(self, token_id: int) -> bytes:
        """UTF-8 of a token, of a special one its name; nothing of an id without a token."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._bpe.id_to_token(token_id) or ""
        return bytes(_BYTES[character] for character in token)

    @functools.cached_property
    def _added(self) -> dict[int, str]:
        """Names of the tokens that are not made of bytes."""
        return {i: token.content for i, token in self._bpe.get_added_tokens_decoder().items()}

    def may_be_written(self, n_rows: int) -> np.ndarray:
        """Mask of the ids that a model may write: all tokens, end-of-text included, but padding.

        Args:
          n_rows: V, the ids that the model has; those past the last token are no text.

        Returns:
          bool (V,).
        """
        mask_V = np.isin(np.arange(n_rows), list(self._bpe.get_vocab().values()))
        mask_V[self.pad_id] = False
        return mask_V

    @functools.cached_property
    def bytes_per_token_V(self) -> np.ndarray:
        """Number of UTF-8 bytes that each token stands for, int32 [V]; 0 if special.

        Summed over `encode(text)` it is the number of UTF-8 bytes of `text`, so
        bits per byte = nats summed / ln 2 / bytes summed over the targets.
        """
        bytes_V = np.zeros(self.vocab_size, np.int32)
        for token, token_id in self._bpe.get_vocab().items():
            bytes_V[token_id] = len(token)  # byte-level: one character stands for one byte
        for token_id, token in self._bpe.get_added_tokens_decoder().items():
            bytes_V[token_id] = 0 if token.special else len(token.content.encode("utf-8"))
        return bytes_V


def _read(path: Path) -> _Tokenizer:
    if not path.is_file():
        raise ValueError(f"tokenizer {path}: no such file")
    try:
        content = path.read_text("utf-8")
    except ValueError as error:
        raise ValueError(f"tokenizer {path}: not a tokenizers file ({error})") from error
    return _parse(content, path)


def _parse(content: str, path: Path) -> _Tokenizer:
    try:
        return _Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"tokenizer {path}: not a tokenizers file ({error})") from error


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    """Whether a decoder, as JSON, makes bytes of the characters of tokens."""
    steps = (decoder or {}).get("decoders", [decoder or {}])
    return any(step.get("type") == "ByteLevel" for step in steps)


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

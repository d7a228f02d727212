"""The section `data` of a config."""

from __future__ import annotations

import dataclasses

from dsmoe_jax.config.checks import positive


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    corpus: str = "demo"  # "demo", "stdlib", a file or directory of text, or a prepared corpus
    sequence_length: int = 2048
    tokenizer_vocab_size: int = 8192  # of the byte-level BPE trained on the corpus
    domains: tuple[str, ...] = ()  # () is all of the corpus

    def __post_init__(self) -> None:
        positive(self, "data.", "sequence_length", "tokenizer_vocab_size")

"""The section `data` of a config."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsmoe_jax.config import mixture
from dsmoe_jax.config.checks import positive
from dsmoe_jax.config.frozen import FrozenDict


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The corpus, its tokenizer and the length of its sequences."""

    # "demo", "gpu", "stdlib", "tasks", a file or directory of text, or a prepared corpus, packed or
    # not.  None must be replaced: no corpus that comes with the project is large enough for the
    # paper's scale.
    corpus: str | None = "demo"
    sequence_length: int = 2048
    tokenizer_vocab_size: int = 8192  # of the byte-level BPE trained on the corpus
    domains: tuple[str, ...] | None = None  # None is all of the corpus
    # The next six are for text that is not prepared yet; docs/data.md explains them.
    # Text to hold out, a path; None is the part of the corpus whose name says so (validation), or
    # else 5 % of every domain.
    validation: str | None = None
    tokenizer: str | None = None  # tokenizer.json, or a folder with one; None trains one
    text_column: str = "text"  # the field of .jsonl and .parquet rows
    keep_repeats: bool = False  # exact copies of a document weight it; False reads it once
    dedup_across_domains: bool = False  # leave out copies of documents of other domains, too
    rows: str = "text"  # what a row is, a name in dsmoe_jax/data/row_kinds.py: "text" or "chat"
    # How much of each domain is trained on: a weight, or pairs (share of the steps, weight) joined
    # by straight lines.  None: all sequences once an epoch.  See docs/data.md.
    mixture: FrozenDict[str, Any] | None = None

    def __post_init__(self) -> None:
        positive(self, "data.", "sequence_length", "tokenizer_vocab_size")
        if self.mixture is not None:
            mixture.check(self.mixture)

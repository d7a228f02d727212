"""A prepared corpus on disk: the files of its directory, writing and loading them.

    manifest.json                           what the corpus is, by domain and split
    tokenizer.json                          byte-level BPE, trained on the train split
    train-00000-of-0000N.array_record       packed records, see packing.py
    validation-00000-of-0000N.array_record  one domain a record, every held-out token once

A corpus that was prepared in parts (in_parts.py) says of each file in its manifest how many records
of each domain it has, `records_by_domain`, and how long it is, `file_bytes`.

Shapes: V vocabulary.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.data import packing
from dsmoe_jax.data.packing import count_records, decode_record, ids_of, read_records
from dsmoe_jax.data.tokenizer import Tokenizer

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = 1
SPLITS = ("train", "validation")
_KEYS = {"fingerprint", "vocab_size", "sequence_length", "request", "splits", "domains"}


@dataclass(frozen=True)
class Corpus:
    """A loaded corpus.

    `fingerprint` is a sha256 over tokenizer and records: two runs with the same fingerprint,
    seed and batch size see the same data. `domains` is what `domain_BS` indexes.
    """

    directory: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the special ones included."""
        return self.manifest["vocab_size"]

    @property
    def sequence_length(self) -> int:
        """Inputs per record: the S that the corpus was packed for."""
        return self.manifest["sequence_length"]

    @property
    def domains(self) -> list[str]:
        """Names of the domains, in the order of their indices."""
        return [domain["name"] for domain in self.manifest["domains"]]

    @property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of the content."""
        return self.manifest["fingerprint"]

    @functools.cached_property
    def bytes_per_token_V(self) -> np.ndarray:
        """UTF-8 bytes of each token, int32 [V], see `Tokenizer.bytes_per_token_V`."""
        return self.tokenizer.bytes_per_token_V

    @functools.cached_property
    def token_counts_V(self) -> np.ndarray:
        """Occurrences of each token as an input of the train split, int64 [V]; reads the split."""
        counts_V = np.zeros(self.vocab_size, np.int64)
        for record in read_records(self.shards("train")):
            _, tokens = decode_record(record)
            counts_V += np.bincount(ids_of(tokens[:-1]), minlength=self.vocab_size)
        return counts_V

    @property
    def answers_only(self) -> bool:
        """Whether only answers count as targets, because it is of conversations."""
        return self.manifest.get("answers_only", False)

    def num_records(self, split: str) -> int:
        """Number of sequences in 'train' or 'validation'."""
        return self.manifest["splits"][split]["records"]

    def records_by_shard(self, split: str) -> list[int] | None:
        """Number of records of each file of a corpus that was prepared in parts; else None."""
        by_domain = self.manifest["splits"][split].get("records_by_domain")
        return None if by_domain is None else [sum(counts) for counts in by_domain]

    def shards(self, split: str) -> list[Path]:
        """Paths of the ArrayRecord files of a split, in order."""
        return [self.directory / name for name in self.manifest["splits"][split]["shards"]]


def write_corpus(
    directory: Path,
    tokenizer_json: str,
    records: Mapping[str, list[list[bytes]]],
    about: Mapping[str, Any],
) -> str:
    """Writes all files of a corpus into `directory`, the manifest last.

    Args:
      directory: exists and is empty.
      tokenizer_json: content of `tokenizer.json`.
      records: of each split, by domain.
      about: the other keys of the manifest.

    Returns:
      The fingerprint.
    """
    (directory / TOKENIZER).write_text(tokenizer_json, "utf-8")
    fingerprint = hashlib.sha256(tokenizer_json.encode("utf-8"))
    fingerprint.update(str(about["sequence_length"]).encode())
    files: dict[str, Any] = {}
    for split in SPLITS:
        in_order = packing.interleave(records[split])
        for record in in_order:
            fingerprint.update(record)
        files[split] = {
            "records": len(in_order),
            "shards": packing.write_shards(directory, split, in_order),
        }
    manifest = {"format": FORMAT, "fingerprint": fingerprint.hexdigest(), **about, "splits": files}
    content = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (directory / MANIFEST).write_text(content, "utf-8")
    return fingerprint.hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads `manifest.json` of a corpus directory.

    Raises:
      ValueError: if it is not a manifest of this format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        reason = "no such directory" if not directory.is_dir() else f"has no {MANIFEST}"
        raise ValueError(
            f"corpus directory {directory}: {reason}; "
            "python -m dsmoe_jax prepare_data --out makes one"
        )
    return parse_manifest(path.read_bytes(), path)


def parse_manifest(content: bytes, path: Path) -> dict[str, Any]:
    """The manifest with this content.

    Args:
      content: of the file.
      path: of it, for errors.

    Raises:
      ValueError: if it is not a manifest of this format.
    """
    try:
        manifest = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also not UTF-8, also nested too deep
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: not a dsmoe_jax corpus of format {FORMAT}; prepare it again")
    if missing := _KEYS - manifest.keys():
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}; prepare it again")
    return manifest


def load_corpus(directory: str | Path) -> Corpus:
    """Opens a prepared corpus and checks that it is whole.

    Raises:
      ValueError: if a file is missing, cut, or has other contents than the manifest says.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    corpus = Corpus(directory, manifest, Tokenizer.load(directory / TOKENIZER))
    if corpus.tokenizer.vocab_size != corpus.vocab_size:
        raise ValueError(
            f"{directory / TOKENIZER}: has {corpus.tokenizer.vocab_size} tokens, "
            f"the manifest says {corpus.vocab_size}"
        )
    for split in SPLITS:
        missing = [path for path in corpus.shards(split) if not path.is_file()]
        if missing:
            raise ValueError(f"shard {missing[0]}: missing; prepare the corpus again")
        if corpus.records_by_shard(split) is not None:
            _check_sizes(corpus, split)
            continue
        found = sum(map(count_records, corpus.shards(split)))
        if found != corpus.num_records(split):
            raise ValueError(
                f"corpus {directory}: {split} has {found} records, "
                f"the manifest says {corpus.num_records(split)}; prepare it again"
            )
    return corpus


def _check_sizes(corpus: Corpus, split: str) -> None:
    """Refuses files of a corpus in parts that are cut; none is opened, since they may be many."""
    sizes = corpus.manifest["splits"][split]["file_bytes"]
    for path, size in zip(corpus.shards(split), sizes, strict=True):
        if (found := path.stat().st_size) != size:
            raise ValueError(
                f"shard {path}: has {found} bytes, the manifest says {size}; prepare it again"
            )

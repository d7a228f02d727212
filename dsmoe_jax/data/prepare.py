"""Builds a corpus directory: read -> choose -> train the tokenizer -> pack -> write.

The text is held in memory while it is prepared: right for corpora up to a few GB.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.data import corpus as corpus_format
from dsmoe_jax.data import packing
from dsmoe_jax.data.corpus import Corpus, load_corpus, read_manifest, write_corpus
from dsmoe_jax.data.directories import make_whole
from dsmoe_jax.data.documents import Split, num_bytes
from dsmoe_jax.data.request import Request, absolute, make_request
from dsmoe_jax.data.selection import read_text, say
from dsmoe_jax.data.tokenizer import Tokenizer, train_tokenizer
from dsmoe_jax.progress import ProgressLine

_ENCODE_BATCH = 256


def prepare(
    corpus: str,
    out: str | Path,
    vocab_size: int | None,
    sequence_length: int,
    domains: Sequence[str] | None = None,
    max_bytes_per_domain: int | None = None,
    **options: Any,
) -> Corpus:
    """Prepares `corpus` in the directory `out`, which appears only when it is whole.

    The same request again does nothing.

    Args:
      out: a directory; one that holds something else is never written over.
      corpus, vocab_size, sequence_length, domains, max_bytes_per_domain: see `make_request`.
      **options: further keywords of `make_request`.

    Raises:
      ValueError: for any bad input, in one line: what is wrong and what would be right.
    """
    request = make_request(
        corpus, vocab_size, sequence_length, domains, max_bytes_per_domain, **options
    )
    return fulfil(request, absolute(out, "out"))


def fulfil(request: Request, out: Path) -> Corpus:
    """Prepares what is requested in the directory `out`; see `prepare`."""
    make_whole(
        out,
        lambda: _already_prepared(out, request),
        lambda directory: _build(request, directory),
    )
    return load_corpus(out)


def _already_prepared(out: Path, request: Request) -> bool:
    """Whether `out` holds this request; refuses a directory that holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / corpus_format.MANIFEST).is_file():
        raise ValueError(f"out={out}: exists and is not a corpus; choose another directory")
    have = read_manifest(out)["request"]
    different = [key for key in {**have, **request} if have.get(key) != request.get(key)]
    if different:
        changes = ", ".join(
            f"{key} {have.get(key)!r} (asked: {request.get(key)!r})" for key in different
        )
        raise ValueError(f"out={out}: holds another corpus: {changes}; choose another directory")
    return True


def _build(request: Request, directory: Path) -> None:
    """Writes all files of the corpus into `directory`, the manifest last."""
    text = read_text(request)
    splits = text.splits
    tokenizer = _tokenizer(request, [text for split in splits.values() for text in split.train])
    statistics = {name: _domain_entry(name, splits[name], text.origins[name]) for name in splits}
    total = sum(sum(entry["bytes"].values()) for entry in statistics.values()) / 1e6
    with contextlib.closing(ProgressLine("encoding, MB", round(total))) as line:
        records = {
            part: [
                _encode(getattr(split, part), i, tokenizer, request, statistics[name], part, line)
                for i, (name, split) in enumerate(splits.items())
            ]
            for part in corpus_format.SPLITS
        }
    about = {
        "vocab_size": tokenizer.vocab_size,
        "sequence_length": request["sequence_length"],
        "request": request,
        "notes": text.notes,
        "domains": list(statistics.values()),
    }
    write_corpus(directory, tokenizer.to_json(), records, about)


def _tokenizer(request: Request, texts: list[str]) -> Tokenizer:
    """The tokenizer that was given, or one trained on the texts."""
    if "tokenizer" in request:
        return Tokenizer.adopt(request["tokenizer"])
    say(f"training a tokenizer of {request['vocab_size']} tokens")
    return train_tokenizer(texts, request["vocab_size"])


def _domain_entry(name: str, split: Split, origin: list[dict[str, str]]) -> dict[str, Any]:
    """Entry of one domain in the manifest; `_encode` adds tokens and records."""
    texts = {"train": split.train, "validation": split.validation}
    digest = hashlib.sha256()
    for text in [*split.train, *split.validation]:
        digest.update(text.encode("utf-8") + b"\0")
    return {
        "name": name,
        "origin": origin,
        "sha256": digest.hexdigest(),
        "documents": {part: len(texts[part]) for part in texts},
        "bytes": {part: sum(map(num_bytes, texts[part])) for part in texts},
        "repeats": split.repeats,
        "tokens": {},
        "records": {},
    }


def _encode(
    texts: list[str],
    domain: int,
    tokenizer: Tokenizer,
    request: Request,
    entry: dict[str, Any],
    part: str,
    line: ProgressLine,
) -> list[bytes]:
    """Records of one domain and split; counts go into `entry`.

    `tokens` counts targets: the tokens of every document and the end-of-text after it.
    """
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), _ENCODE_BATCH):
        batch = texts[start : start + _ENCODE_BATCH]
        encoded = tokenizer.encode_batch(batch)
        if "tokenizer" in request:
            _check_round_trip(tokenizer, batch, encoded, request["tokenizer"])
        ids += [np.array(document, np.int32) for document in encoded]
        line.add(sum(map(num_bytes, batch)) / 1e6)
    packed = packing.pack(ids, request["sequence_length"], tokenizer.eos_id)
    entry["tokens"][part] = sum(map(len, ids)) + len(ids)
    entry["records"][part] = len(packed)
    return [packing.encode_record(domain, tokens) for tokens in packed]


def _check_round_trip(
    tokenizer: Tokenizer, texts: list[str], ids: list[list[int]], path: str
) -> None:
    """Refuses a tokenizer that does not give the text back: its bits per byte would be wrong."""
    bytes_V = tokenizer.bytes_per_token_V
    for text, back, document in zip(texts, tokenizer.decode_batch(ids), ids, strict=True):
        if back != text or bytes_V[document].sum() != num_bytes(text):
            pairs = itertools.zip_longest(text, back)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), 0)
            raise ValueError(
                f"tokenizer={path}: changes the text, {text[at : at + 20]!r} comes back as"
                f" {back[at : at + 20]!r}; must be a tokenizer that leaves it as it is, without a"
                " normalizer or a prefix space"
            )

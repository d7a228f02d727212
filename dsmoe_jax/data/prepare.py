"""Builds a corpus directory: read -> choose -> train the tokenizer -> pack -> write.

The text is held in memory while it is prepared: right for corpora up to a few GB.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.data import corpus as corpus_format
from dsmoe_jax.data import packing, sources, user_files
from dsmoe_jax.data.corpus import Corpus, load_corpus, read_manifest
from dsmoe_jax.data.documents import Document, Split, choose, num_bytes
from dsmoe_jax.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer, train_tokenizer
from dsmoe_jax.progress import ProgressLine

# Raised whenever the same request would give other records: a reader, the split, the packing.
RECIPE = 1
DEFAULT_MAX_BYTES = {"demo": 2_000_000, "stdlib": 1_000_000}
"""Bytes of text kept per domain of a built-in corpus; the user's own text has no cap."""

_ENCODE_BATCH = 256


def prepare(
    corpus: str,
    out: str | Path,
    vocab_size: int,
    sequence_length: int,
    domains: Sequence[str] | None = None,
    max_bytes_per_domain: int | None = None,
) -> Corpus:
    """Prepares `corpus` in the directory `out`, which appears only when it is whole.

    The same request again does nothing.

    Args:
      corpus: 'demo', 'stdlib' or a path to text.
      out: a directory; one that holds something else is never written over.
      vocab_size: tokens of the tokenizer.
      sequence_length: inputs per record.
      domains: those to take; None takes all (of 'demo': all but the large extra archives).
      max_bytes_per_domain: cap in UTF-8 bytes; None takes DEFAULT_MAX_BYTES.

    Raises:
      ValueError: for any bad input, in one line: what is wrong and what would be right.
    """
    out = Path(os.path.abspath(out))
    request = _request(corpus, vocab_size, sequence_length, domains, max_bytes_per_domain)
    if _already_prepared(out, request):
        return load_corpus(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out.parent):
        # Another process may have prepared it while this one waited for the lock.
        if not _already_prepared(out, request):
            building = out.with_name(f".{out.name}.building")
            shutil.rmtree(building, ignore_errors=True)  # left by a build that was killed
            building.mkdir()
            try:
                _build(request, building)
                building.replace(out)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return load_corpus(out)


def _request(
    corpus: str,
    vocab_size: int,
    sequence_length: int,
    domains: Sequence[str] | None,
    max_bytes: int | None,
) -> dict[str, Any]:
    """Everything that decides the content, checked; kept in the manifest."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size}: byte-level BPE needs >= {MIN_VOCAB_SIZE}")
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length}: must be at least 1")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes_per_domain={max_bytes}: must be at least 1")
    request: dict[str, Any] = {
        "recipe": RECIPE,
        "corpus": corpus,
        "vocab_size": vocab_size,
        "sequence_length": sequence_length,
        "max_bytes_per_domain": max_bytes or DEFAULT_MAX_BYTES.get(corpus),
    }
    if corpus == "demo":
        known = {**sources.DEMO, **sources.EXTRA}
        request["domains"] = _check_domains(domains, known) or list(sources.DEMO)
        parts = [part for name in request["domains"] for part in known[name]]
        request["packages"] = sorted({sources.PACKAGES[part.package].pin for part in parts})
    elif corpus == "stdlib":
        request["domains"] = _check_domains(domains, sources.STDLIB) or list(sources.STDLIB)
        request["python"] = platform.python_version()
    else:
        path = Path(os.path.abspath(corpus))
        request["corpus"] = str(path)
        request["domains"] = list(domains) if domains else None
        request["sha256"] = user_files.fingerprint(path)
    return request


def _check_domains(domains: Sequence[str] | None, known: Mapping[str, object]) -> list[str]:
    """`domains` as a list without repeats; refuses unknown ones."""
    for domain in domains or ():
        if domain not in known:
            raise ValueError(f"unknown domain {domain!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(domains or ()))


def _already_prepared(out: Path, request: dict[str, Any]) -> bool:
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


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lets one process at a time prepare a corpus in `directory`; the lock dies with it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _build(request: dict[str, Any], directory: Path) -> None:
    """Writes all files of the corpus into `directory`, the manifest last."""
    splits, origins = _read(request)
    train_texts = [text for split in splits.values() for text in split.train]
    _say(f"training a tokenizer of {request['vocab_size']} tokens")
    tokenizer = train_tokenizer(train_texts, request["vocab_size"])
    (directory / corpus_format.TOKENIZER).write_text(tokenizer.to_json(), "utf-8")

    fingerprint = hashlib.sha256(tokenizer.to_json().encode("utf-8"))
    fingerprint.update(str(request["sequence_length"]).encode())
    statistics = {name: _domain_entry(name, splits[name], origins[name]) for name in splits}
    total = sum(sum(entry["bytes"].values()) for entry in statistics.values()) / 1e6
    files: dict[str, Any] = {}
    with contextlib.closing(ProgressLine("encoding, MB", round(total))) as line:
        for part in corpus_format.SPLITS:
            by_domain = [
                _encode(getattr(split, part), i, tokenizer, request, statistics[name], part, line)
                for i, (name, split) in enumerate(splits.items())
            ]
            records = packing.interleave(by_domain)
            for record in records:
                fingerprint.update(record)
            shards = packing.write_shards(directory, part, records)
            files[part] = {"records": len(records), "shards": shards}
    manifest = {
        "format": corpus_format.FORMAT,
        "fingerprint": fingerprint.hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "sequence_length": request["sequence_length"],
        "request": request,
        "splits": files,
        "domains": list(statistics.values()),
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (directory / corpus_format.MANIFEST).write_text(text, "utf-8")


def _read(request: dict[str, Any]) -> tuple[dict[str, Split], dict[str, list[dict[str, str]]]]:
    """The chosen texts and their origins, by domain."""
    splits: dict[str, Split] = {}
    origins: dict[str, list[dict[str, str]]] = {}
    max_bytes = request["max_bytes_per_domain"]
    if request["corpus"] in DEFAULT_MAX_BYTES:
        demo = {**sources.DEMO, **sources.EXTRA}
        table = demo if request["corpus"] == "demo" else sources.STDLIB
        for name in request["domains"]:
            _say(f"reading {name}")
            documents = (d for part in table[name] for d in part.documents())
            splits[name] = choose(documents, name, max_bytes)
            origins[name] = [part.describe() for part in table[name]]
        return splits, origins
    path = Path(request["corpus"])
    _say(f"reading {path}")
    found = user_files.read_user_corpus(path)
    if not any(document.text.strip() for documents in found.values() for document in documents):
        raise ValueError(f"corpus {path}: empty, its files hold no text")
    for name in _check_domains(request["domains"], found) or sorted(found):
        splits[name] = choose(found[name], name, max_bytes)
        origins[name] = [{"source": str(path), "sha256": request["sha256"], "licence": "yours"}]
    return splits, origins


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
        "tokens": {},
        "records": {},
    }


def _encode(
    texts: list[str],
    domain: int,
    tokenizer: Tokenizer,
    request: dict[str, Any],
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
        ids += [np.array(document, np.int32) for document in tokenizer.encode_batch(batch)]
        line.add(sum(map(num_bytes, batch)) / 1e6)
    packed = packing.pack(ids, request["sequence_length"], tokenizer.eos_id)
    entry["tokens"][part] = sum(map(len, ids)) + len(ids)
    entry["records"][part] = len(packed)
    return [packing.encode_record(domain, tokens) for tokens in packed]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


__all__ = ["DEFAULT_MAX_BYTES", "Document", "prepare"]

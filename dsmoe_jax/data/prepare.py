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

from dsmoe_jax.data import chat, packing
from dsmoe_jax.data import corpus as corpus_format
from dsmoe_jax.data.corpus import Corpus, load_corpus, read_manifest, write_corpus
from dsmoe_jax.data.directories import make_whole
from dsmoe_jax.data.documents import Split, num_bytes
from dsmoe_jax.data.own_text import absolute
from dsmoe_jax.data.request import Request, kind_of, make_request
from dsmoe_jax.data.row_kinds import RowKind
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
    refuse_other_request(out, read_manifest(out)["request"], request)
    return True


def refuse_other_request(out: Path, have: Request, request: Request) -> None:
    """Refuses a directory that was made for another request.

    Raises:
      ValueError: naming what differs.
    """
    different = [key for key in {**have, **request} if have.get(key) != request.get(key)]
    if different:
        changes = ", ".join(
            f"{key} {have.get(key)!r} (asked: {request.get(key)!r})" for key in different
        )
        raise ValueError(f"out={out}: holds another corpus: {changes}; choose another directory")


def _build(request: Request, directory: Path) -> None:
    """Writes all files of the corpus into `directory`, the manifest last."""
    text = read_text(request)
    splits = text.splits
    kind = kind_of(request)
    tokenizer = tokenizer_of(request, [text for split in splits.values() for text in split.train])
    statistics = {
        name: domain_entry(name, splits[name], text.origins[name], kind) for name in splits
    }
    total = sum(sum(entry["bytes"].values()) for entry in statistics.values()) / 1e6
    with contextlib.closing(ProgressLine("encoding, MB", round(total))) as line:
        records = {
            part: [
                encode(getattr(split, part), i, tokenizer, request, statistics[name], part, line)
                for i, (name, split) in enumerate(splits.items())
            ]
            for part in corpus_format.SPLITS
        }
    notes = _too_long(statistics, records, request)
    about = {
        "vocab_size": tokenizer.vocab_size,
        "sequence_length": request["sequence_length"],
        "request": request,
        "notes": text.notes + notes,
        **({"answers_only": True} if kind.answers_only else {}),
        "domains": list(statistics.values()),
    }
    write_corpus(directory, tokenizer.to_json(), records, about)


def tokenizer_of(request: Request, texts: list[str]) -> Tokenizer:
    """The tokenizer that was given, or one trained on the texts."""
    if "tokenizer" in request:
        return Tokenizer.adopt(request["tokenizer"])
    say(f"training a tokenizer of {request['vocab_size']} tokens")
    pieces = kind_of(request).pieces
    written = ("".join(piece.text for piece in pieces(text)) for text in texts)
    return train_tokenizer(written, request["vocab_size"])


def domain_entry(
    name: str, split: Split, origin: list[dict[str, str]], kind: RowKind
) -> dict[str, Any]:
    """Entry of one domain in the manifest; `encode` adds tokens and records."""
    texts = {"train": split.train, "validation": split.validation}
    digest = hashlib.sha256()
    for text in [*split.train, *split.validation]:
        digest.update(text.encode("utf-8") + b"\0")
    return {
        "name": name,
        "origin": origin,
        "sha256": digest.hexdigest(),
        "documents": {part: len(texts[part]) for part in texts},
        "bytes": {part: sum(_num_bytes(text, kind) for text in texts[part]) for part in texts},
        "repeats": split.repeats,
        **({"in_other_domains": split.in_other_domains} if split.in_other_domains else {}),
        "tokens": {},
        "records": {},
    }


def encode(
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
    kind = kind_of(request)
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), _ENCODE_BATCH):
        batch = [kind.pieces(text) for text in texts[start : start + _ENCODE_BATCH]]
        flat = [piece.text for pieces in batch for piece in pieces]
        encoded = tokenizer.encode_batch(flat)
        if "tokenizer" in request:
            _check_round_trip(tokenizer, flat, encoded, request["tokenizer"])
        of_pieces = iter(encoded)
        for pieces in batch:
            own = list(itertools.islice(of_pieces, len(pieces)))
            ids.append(chat.join(own, pieces, tokenizer.eos_id))
        line.add(sum(map(num_bytes, flat)) / 1e6)
    packed = kind.pack(ids, request["sequence_length"], tokenizer.eos_id)
    entry["tokens"][part] = sum(len(tokens) - 1 for tokens in packed.records)
    entry["records"][part] = len(packed.records)
    if kind.answers_only:
        counted = (packing.counted(tokens).sum() for tokens in packed.records)
        entry.setdefault("answer_tokens", {})[part] = int(sum(counted))
        entry.setdefault("cut", {})[part] = packed.cut
        entry.setdefault("left_out", {})[part] = packed.left_out
    return [packing.encode_record(domain, tokens) for tokens in packed.records]


def _num_bytes(text: str, kind: RowKind) -> int:
    """UTF-8 bytes of a document as it is tokenised."""
    return sum(num_bytes(piece.text) for piece in kind.pieces(text))


def _too_long(
    statistics: dict[str, dict[str, Any]], records: dict[str, list[list[bytes]]], request: Request
) -> list[str]:
    """A line on conversations that are longer than a sequence, if there are any; also on stderr.

    Raises:
      ValueError: if none is left of a split.
    """
    length = request["sequence_length"]
    entries = statistics.values()
    for part in corpus_format.SPLITS:
        left_out = sum(entry.get("left_out", {}).get(part, 0) for entry in entries)
        if left_out and not any(records[part]):
            raise ValueError(
                f"sequence_length={length}: no conversation of {part} has an answer within so many"
                " tokens; must be more"
            )
    notes = too_long_note(list(entries), request)
    for note in notes:
        say(note)
    return notes


def too_long_note(entries: Sequence[dict[str, Any]], request: Request) -> list[str]:
    """A line on conversations that are longer than a sequence, if there are any.

    Args:
      entries: of all domains in the manifest.
      request: for the corpus.
    """
    length = request["sequence_length"]
    numbers = {
        what: sum(sum(entry.get(what, {}).values()) for entry in entries)
        for what in ("cut", "left_out")
    }
    if not any(numbers.values()):
        return []
    return [
        f"conversations longer than {length} tokens: {numbers['cut']} cut there,"
        f" {numbers['left_out']} left out, since no answer begins before"
    ]


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

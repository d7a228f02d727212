"""Packing: documents -> one stream of tokens -> records of S + 1 tokens -> ArrayRecord shards.

Shapes: S sequence.

The stream of a domain is `eos d1 eos d2 eos ...`. Each `eos` is the target that ends a document
and, as an input, the first token of the next one, so that every token of every document
(its first one and its end too) is predicted exactly once, and only from its own document.
Record i holds the tokens i*S .. i*S + S of the stream: S inputs and, one step on, S targets.
Neighbours share one token, which is a target in the first and an input in the second.

Conversations (chat.py) are never cut up to fill a record: `pack_whole` puts as many whole ones into
each as fit.  Their tokens carry marks, bits above those of any id; a text has none:

    CONTEXT    as a target the token does not count: only answers are learned
    WITHIN     an end-of-text token that ends an answer, not the document
"""

import bisect
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

SHARD_BYTES = 64 * 2**20
# group_size 1: each record can be read alone, as a shuffled order needs.
WRITER_OPTIONS = "group_size:1"
CONTEXT = 1 << 30
WITHIN = 1 << 29
_ID = WITHIN - 1


class Packed(NamedTuple):
    """Records of S + 1 tokens or fewer, and what became of documents that are longer.

    `cut` lost their end; of `left_out` no target that counts would have been left.
    """

    records: list[np.ndarray]
    cut: int = 0
    left_out: int = 0


def ids_of(tokens: np.ndarray) -> np.ndarray:
    """The ids of tokens, without their marks."""
    return tokens & _ID


def counted(tokens: np.ndarray) -> np.ndarray:
    """Whether each token of a record but the first, as a target, counts: bool (S,) or shorter."""
    return tokens[1:] & CONTEXT == 0


def pack(documents: Iterable[np.ndarray], sequence_length: int, eos_id: int) -> Packed:
    """Cuts the stream of `documents` (arrays of token ids) into int32 arrays of up to S + 1 tokens.

    Only the last one may be shorter; it has at least one input and one target.
    """
    parts = [np.array([eos_id], np.int32)]
    for document in documents:
        parts += [document.astype(np.int32), parts[0]]
    stream = np.concatenate(parts)
    starts = range(0, len(stream) - 1, sequence_length)
    return Packed([stream[start : start + sequence_length + 1] for start in starts])


def pack_whole(documents: Iterable[np.ndarray], sequence_length: int, eos_id: int) -> Packed:
    """Packs whole documents into records of up to S + 1 tokens, as densely as best fit does.

    A record is `eos d1 eos d2 eos`.  Each document, the longest first, goes where it leaves the
    least room.  One that fits into no record is cut after S targets, and left out if none of them
    counts.  Records, and the documents in them, are in the order of the documents.
    """
    kept: list[np.ndarray] = []
    cut = 0
    left_out = 0
    for document in documents:
        if len(document) < sequence_length:
            kept.append(np.append(document, eos_id).astype(np.int32))
        elif (document[:sequence_length] & CONTEXT).all():
            left_out += 1
        else:
            kept.append(document[:sequence_length].astype(np.int32))
            cut += 1
    bins = _best_fit([len(document) for document in kept], sequence_length)
    begin = np.array([eos_id], np.int32)
    records = [np.concatenate([begin, *(kept[i] for i in inside)]) for inside in bins]
    return Packed(records, cut, left_out)


def _best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The indices of the lengths by bin, each bin of sum `room` at most (best fit, decreasing)."""
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # by the room that they have left
    rooms: list[int] = []  # the keys of it, in order
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, lengths[i])
        if at == len(rooms):
            chosen = len(bins)
            bins.append([])
            left = room
        else:
            left = rooms[at]
            chosen = open_bins[left].pop()
            if not open_bins[left]:
                del rooms[at], open_bins[left]
        bins[chosen].append(i)
        left -= lengths[i]
        if left not in open_bins:
            open_bins[left] = []
            bisect.insort(rooms, left)
        open_bins[left].append(chosen)
    return sorted(sorted(inside) for inside in bins)


def encode_record(domain: int, tokens: np.ndarray) -> bytes:
    """A record, in little-endian int32: the index of its domain, then its tokens with marks."""
    return np.concatenate([[domain], tokens]).astype("<i4").tobytes()


def decode_record(record: bytes) -> tuple[int, np.ndarray]:
    """Domain and tokens, with their marks, of a record made by `encode_record`."""
    array = np.frombuffer(record, "<i4").astype(np.int32)
    return int(array[0]), array[1:]


def interleave(records_by_domain: Sequence[list[bytes]]) -> list[bytes]:
    """Spreads each domain evenly over the whole, so that any prefix has every domain's share."""
    keyed = [
        ((i + 0.5) / len(records), domain, record)
        for domain, records in enumerate(records_by_domain)
        for i, record in enumerate(records)
    ]
    keyed.sort(key=lambda entry: entry[:2])
    return [record for _, _, record in keyed]


def write_shards(
    directory: Path, split: str, records: Sequence[bytes], shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Writes `SPLIT-0000i-of-0000N.array_record` files of about `shard_bytes`.

    Returns:
      The names of the files.

    Raises:
      OSError: if they cannot be written.
    """
    shards = max(1, math.ceil(sum(map(len, records)) / shard_bytes))
    names = []
    for shard in range(shards):
        name = f"{split}-{shard:05d}-of-{shards:05d}.array_record"
        first, last = (len(records) * i // shards for i in (shard, shard + 1))
        write_shard(directory / name, records[first:last])
        names.append(name)
    return names


def write_shard(path: Path, records: Sequence[bytes]) -> None:
    """Writes one ArrayRecord file.

    Raises:
      OSError: if it cannot be written.
    """
    try:
        writer = ArrayRecordWriter(os.fspath(path), WRITER_OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
    except RuntimeError as error:  # the library reports errors of the system so
        raise OSError(f"cannot write {path}: {error}") from error


def count_records(path: Path) -> int:
    """Number of records of one shard.

    Raises:
      ValueError: if it is not a whole ArrayRecord file.
    """
    try:
        reader = ArrayRecordReader(os.fspath(path))
        count = reader.num_records()
        reader.close()
    except Exception as error:  # the library raises many types
        raise ValueError(f"shard {path}: not a whole ArrayRecord file") from error
    return count


def read_records(paths: Iterable[Path]) -> Iterator[bytes]:
    """All records of the shards, in order.

    Raises:
      ValueError: naming the shard, if one is damaged.
    """
    for path in paths:
        try:
            reader = ArrayRecordReader(os.fspath(path))
            records = reader.read_all()
            reader.close()
        except RuntimeError as error:
            raise damaged(path, error) from error
        yield from records


def damaged(path: Path, error: RuntimeError) -> ValueError:
    """For what the library raises if bytes are not those that were written: it keeps hashes."""
    return ValueError(f"{path}: damaged ({error}); prepare the corpus again")

"""Packing: documents -> one stream of tokens -> records of S + 1 tokens -> ArrayRecord shards.

Shapes: S sequence.

The stream of a domain is `eos d1 eos d2 eos ...`. Each `eos` is the target that ends a document
and, as an input, the first token of the next one, so that every token of every document
(its first one and its end too) is predicted exactly once, and only from its own document.
Record i holds the tokens i*S .. i*S + S of the stream: S inputs and, one step on, S targets.
Neighbours share one token, which is a target in the first and an input in the second.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

SHARD_BYTES = 64 * 2**20
# group_size 1: each record can be read alone, as a shuffled order needs.
WRITER_OPTIONS = "group_size:1"


def pack(documents: Iterable[np.ndarray], sequence_length: int, eos_id: int) -> list[np.ndarray]:
    """Cuts the stream of `documents` (arrays of token ids) into int32 arrays of up to S + 1 tokens.

    Only the last one may be shorter; it has at least one input and one target.
    """
    parts = [np.array([eos_id], np.int32)]
    for document in documents:
        parts += [document.astype(np.int32), parts[0]]
    stream = np.concatenate(parts)
    starts = range(0, len(stream) - 1, sequence_length)
    return [stream[start : start + sequence_length + 1] for start in starts]


def encode_record(domain: int, tokens: np.ndarray) -> bytes:
    """A record, in little-endian int32: the index of its domain, then its tokens."""
    return np.concatenate([[domain], tokens]).astype("<i4").tobytes()


def decode_record(record: bytes) -> tuple[int, np.ndarray]:
    """Domain and tokens of a record made by `encode_record`."""
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
        try:
            writer = ArrayRecordWriter(os.fspath(directory / name), WRITER_OPTIONS)
            for record in records[first:last]:
                writer.write(record)
            writer.close()
        except RuntimeError as error:  # the library reports errors of the system so
            raise OSError(f"cannot write {directory / name}: {error}") from error
        names.append(name)
    return names


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

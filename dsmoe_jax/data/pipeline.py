"""Batches: from the shards of a corpus to arrays for the training step, with Grain.

Shapes: B sequences of the global batch (or of this host's part of it), S sequence.

Row r of step t is record t*B + r of one endless stream: all records in a random order, then all
of them in another order, and so on; or with a mixture the stream of mixture.py. The stream depends
on the seed and the config alone; a host reads only those rows of each batch that its devices need.
Hence any number of hosts, on any mesh, sees the same global batches, and the position is a single
number, the step.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import grain
import numpy as np

from dsmoe_jax.config.tasks import numbers_of
from dsmoe_jax.data.corpus import Corpus, load_corpus
from dsmoe_jax.data.mixture import MixedOrder, Mixture
from dsmoe_jax.data.packing import CONTEXT, decode_record, encode_record, ids_of
from dsmoe_jax.data.records import Records, records_in_order
from dsmoe_jax.data.reshuffling import shuffled

PREFETCH_BATCHES = 8
READ_THREADS = 2


class Batch(TypedDict):
    """One batch of packed sequences.

    Every token of every document, its end-of-text included, is a target once: an end-of-text
    token is the last target of its document and the first input of the next one.  Of conversations
    only the tokens of answers count as targets.
    """

    tokens_BS: np.ndarray
    """int32 inputs."""
    targets_BS: np.ndarray
    """int32, the token that follows each input."""
    segment_ids_BS: np.ndarray
    """int32, 1, 2, ... per document within the sequence; 0 is padding. Attend only within one."""
    positions_BS: np.ndarray
    """int32, 0, 1, ... restarting with each document (and at the start of the sequence)."""
    loss_mask_BS: np.ndarray
    """float32, 1 where the target counts; 0 on padding, and where no answer is predicted."""
    domain_BS: NotRequired[np.ndarray]
    """int32 index into `Corpus.domains`; validation only, meaningless where loss_mask is 0."""
    task_ids_BS: NotRequired[np.ndarray]
    """int32, the task of each token's document, if a router chooses by it."""
    replayed_ids_BLSK: NotRequired[np.ndarray]
    """int32, recorded experts of every layer, if they are to be replayed."""
    replayed_gates_BLSK: NotRequired[np.ndarray]
    """float32, their gates."""
    replayed_sent_BLSK: NotRequired[np.ndarray]
    """int32, the experts before dropping."""
    replayed_chosen_BLSK: NotRequired[np.ndarray]
    """int32, those and the ones that the router itself left out."""


def make_batch(records: Sequence[bytes], sequence_length: int, eos_id: int, pad_id: int) -> Batch:
    """Decodes records of up to S + 1 tokens into a batch, `domain_BS` included."""
    decoded = [decode_record(record) for record in records]
    rows = len(decoded)
    columns = sequence_length
    stream_BS1 = np.full((rows, columns + 1), pad_id, np.int32)
    lengths_B1 = np.zeros((rows, 1), np.int32)
    for row, (_, tokens) in enumerate(decoded):
        stream_BS1[row, : len(tokens)] = tokens
        lengths_B1[row] = len(tokens) - 1
    place_S = np.arange(columns, dtype=np.int32)
    real_BS = place_S < lengths_B1
    # Text never encodes to eos, so an eos among the inputs begins a document: but for one that is
    # marked as the end of an answer within a conversation.
    begins_BS = (stream_BS1[:, :-1] == eos_id) | (place_S == 0)
    counts_BS = real_BS & (stream_BS1[:, 1:] & CONTEXT == 0)
    tokens_BS1 = ids_of(stream_BS1)
    start_BS = np.maximum.accumulate(np.where(begins_BS, place_S, 0), axis=1)
    return Batch(
        tokens_BS=np.where(real_BS, tokens_BS1[:, :-1], pad_id),
        targets_BS=np.where(real_BS, tokens_BS1[:, 1:], pad_id),
        segment_ids_BS=np.cumsum(begins_BS, axis=1, dtype=np.int32) * real_BS,
        positions_BS=(place_S - start_BS) * real_BS,
        loss_mask_BS=counts_BS.astype(np.float32),
        domain_BS=np.repeat(np.array([[d] for d, _ in decoded], np.int32), columns, axis=1),
    )


def train_batches(
    corpus_dir: str | Path,
    sequence_length: int,
    global_batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    start: tuple[int, int] = (0, 0),
    skips: Sequence[tuple[int, int]] = (),
    tasks: Sequence[str] = (),
    mixture: Mixture | None = None,
) -> "grain.DatasetIterator[Batch]":
    """Endless shuffled batches, of which this host gets the given rows (None: all).

    `start` is a step and the number of records that the steps before it took, since their batches
    may have had other sizes: no record is left out or read twice.  But `skips`, pairs of a step and
    a number of records, leave out those records before that step.  With names of `tasks` batches
    have `task_ids_BS`, see config/tasks.py.  A `mixture` says which domain each row is of.
    `get_state()` gives a small JSON-able dict; `set_state()` continues from it bit for bit, also
    with other rows. Threads read ahead.

    Raises:
      ValueError: if the sizes do not fit the corpus, or a domain is of no task.
    """
    corpus = load_corpus(corpus_dir)
    label = _labels(corpus, tasks)
    rows = _checked_rows(global_batch_size, rows)
    if sequence_length != corpus.sequence_length:
        raise ValueError(
            f"sequence_length={sequence_length}: corpus {corpus.directory} is packed for "
            f"{corpus.sequence_length}; prepare one for {sequence_length}"
        )
    if corpus.num_records("train") < global_batch_size:
        raise ValueError(
            f"global_batch_size={global_batch_size}: corpus {corpus.directory} has only "
            f"{corpus.num_records('train')} training sequences"
        )
    source = Records(corpus, "train")
    order = shuffled(len(source), seed)
    mixed_order = None if mixture is None else MixedOrder(mixture, corpus, seed, global_batch_size)
    eos_id, pad_id = corpus.tokenizer.eos_id, corpus.tokenizer.pad_id

    def batch_of_step(step: int) -> Batch:
        first = start[1] + (step - start[0]) * global_batch_size
        first += sum(records for at, records in skips if at <= step)
        if mixed_order is None:
            places = [order[first + row] for row in rows]
            domains = None
        else:
            places, domains = mixed_order.batch(step, first, rows)
        batch = make_batch(source.read(places), sequence_length, eos_id, pad_id)
        domain_BS = batch["domain_BS"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        if domains is not None and domain_BS[:, 0].tolist() != domains:
            raise ValueError(
                f"corpus {corpus.directory}: its records are of other domains than its manifest"
                " says; prepare it again"
            )
        batch = label(batch)
        del batch["domain_BS"]  # the training step has no use for it
        return batch

    steps = grain.MapDataset.range(2**40).map(batch_of_step)
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
    return iter(steps.to_iter_dataset(options))


def validation_batches(
    corpus_dir: str | Path,
    batch_size: int,
    max_batches: int | None = None,
    rows: Sequence[int] | None = None,
    tasks: Sequence[str] = (),
    all_of: int | None = None,
) -> Iterator[Batch]:
    """The held-out sequences in a fixed order, each once; with `domain_BS`.

    The last batch is filled up with rows of padding (loss_mask 0). Domains are interleaved:
    the first `max_batches` batches hold every domain in about its share. This host gets the
    given rows of every batch (None: all), as in `train_batches`. With names of `tasks` the batches
    have `task_ids_BS`; with the number `all_of` one, all text is of that task, whatever its domain.
    """
    corpus = load_corpus(corpus_dir)
    rows = _checked_rows(batch_size, rows)
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches={max_batches}: must be at least 1, or None for all")
    label = _labels(corpus, tasks, all_of)
    return map(label, _validation_batches(corpus, batch_size, max_batches, rows))


def _labels(
    corpus: Corpus, tasks: Sequence[str], all_of: int | None = None
) -> Callable[[Batch], Batch]:
    """Adds `task_ids_BS` to a batch with `domain_BS`, if there are tasks.

    Raises:
      ValueError: for a domain that is of no task.
    """
    if not tasks:
        return lambda batch: batch
    numbers = [all_of] * len(corpus.domains)
    if all_of is None:
        numbers = numbers_of(corpus.domains, tasks)
    numbers_G = np.array(numbers, np.int32)

    def labelled(batch: Batch) -> Batch:
        assert "domain_BS" in batch, "every batch has it at first"
        batch["task_ids_BS"] = numbers_G[batch["domain_BS"]]
        return batch

    return labelled


def _validation_batches(
    corpus: Corpus, batch_size: int, max_batches: int | None, rows: Sequence[int]
) -> Iterator[Batch]:
    records = records_in_order(corpus, "validation")
    eos_id, pad_id = corpus.tokenizer.eos_id, corpus.tokenizer.pad_id
    no_targets = encode_record(0, np.array([pad_id], np.int32))
    for _ in range(max_batches or sys.maxsize):
        batch = list(itertools.islice(records, batch_size))
        if not batch:
            return
        batch += [no_targets] * (batch_size - len(batch))
        yield make_batch([batch[row] for row in rows], corpus.sequence_length, eos_id, pad_id)


def _checked_rows(batch_size: int, rows: Sequence[int] | None) -> Sequence[int]:
    """The rows to read; refuses a batch without rows."""
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: must be > 0")
    rows = range(batch_size) if rows is None else rows
    assert all(0 <= row < batch_size for row in rows)
    return rows

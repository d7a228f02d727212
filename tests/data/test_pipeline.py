"""Pipeline: what a batch says, the same order on any number of hosts, exact resume."""

import itertools
import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest

from dsmoe_jax.data.corpus import Corpus, load_corpus
from dsmoe_jax.data.packing import encode_record, read_records
from dsmoe_jax.data.pipeline import Batch, make_batch, train_batches, validation_batches

S = 64


def _train(corpus: Path, size: int = 8, rows: list[int] | None = None, seed: int = 3):
    return train_batches(corpus, S, size, seed, rows)


def _take(batches, n: int) -> list[Batch]:
    return list(itertools.islice(batches, n))


def _assert_equal(left: list[Batch], right: list[Batch]):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_a_batch_by_hand():
    eos, pad = 0, 1
    records = [encode_record(4, np.array([7, 0, 5, 6, 0, 9])), encode_record(2, np.array([0, 8]))]
    batch = make_batch(records, 5, eos, pad)
    expected = {
        "tokens_BS": [[7, 0, 5, 6, 0], [0, 1, 1, 1, 1]],
        "targets_BS": [[0, 5, 6, 0, 9], [8, 1, 1, 1, 1]],
        "segment_ids_BS": [[1, 2, 2, 2, 3], [1, 0, 0, 0, 0]],
        "positions_BS": [[0, 0, 1, 2, 0], [0, 0, 0, 0, 0]],
        "loss_mask_BS": [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
        "domain_BS": [[4] * 5, [2] * 5],
    }
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(batch[key], value)
        assert batch[key].dtype == (np.float32 if key == "loss_mask_BS" else np.int32)


def _documents_of(batches: list[Batch], eos: int) -> list[list[int]]:
    """The documents that the targets of consecutive sequences spell, ends included."""
    documents, current = [], []
    for batch in batches:
        for target, mask in zip(batch["targets_BS"].flat, batch["loss_mask_BS"].flat, strict=True):
            if mask:
                current.append(int(target))
                if target == eos:
                    documents.append(current)
                    current = []
    assert not current
    return documents


def test_validation_gives_every_held_out_token_once_by_domain(tiny_corpus: Path):
    corpus = load_corpus(tiny_corpus)
    eos = corpus.tokenizer.eos_id
    batches = list(validation_batches(tiny_corpus, 8))
    assert {batch["tokens_BS"].shape for batch in batches} == {(8, S)}
    for index, domain in enumerate(corpus.manifest["domains"]):
        mine = []
        for batch in batches:
            mask = batch["loss_mask_BS"] * (batch["domain_BS"] == index)
            mine.append({**batch, "loss_mask_BS": mask})
        documents = _documents_of(mine, eos)
        assert len(documents) == domain["documents"]["validation"]
        assert sum(map(len, documents)) == domain["tokens"]["validation"]
        n_bytes = sum(len(corpus.tokenizer.decode(d[:-1]).encode()) for d in documents)
        assert n_bytes == domain["bytes"]["validation"]
        in_table = sum(corpus.bytes_per_token_V[d].sum() for d in documents)
        assert in_table == n_bytes


def test_validation_repeats_and_a_few_batches_hold_every_domain(tiny_corpus: Path):
    batches = list(validation_batches(tiny_corpus, 8))
    _assert_equal(batches, list(validation_batches(tiny_corpus, 8)))
    few = list(validation_batches(tiny_corpus, 8, max_batches=2))
    _assert_equal(batches[:2], few)
    domains = np.concatenate([batch["domain_BS"].ravel() for batch in few])
    assert set(domains) == set(range(len(load_corpus(tiny_corpus).domains)))


def test_validation_by_host_is_the_whole(tiny_corpus: Path):
    whole = list(validation_batches(tiny_corpus, 8))
    for rows in ([0, 1, 2, 3], [1, 6]):
        _assert_equal(_rows(whole, rows), list(validation_batches(tiny_corpus, 8, None, rows)))


def _rows(batches: list[Batch], rows: list[int]) -> list[Batch]:
    return [{key: x[rows] for key, x in batch.items()} for batch in batches]


def test_the_global_batch_does_not_depend_on_the_number_of_hosts(tiny_corpus: Path):
    steps = load_corpus(tiny_corpus).num_records("train") // 8 + 3  # into the second epoch
    whole = _take(_train(tiny_corpus), steps)
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [0, 5]):
        _assert_equal(_rows(whole, rows), _take(_train(tiny_corpus, rows=rows), steps))


def test_restoring_continues_bit_for_bit(tiny_corpus: Path):
    batches = _train(tiny_corpus)
    expected = _take(batches, 40)
    for position in (0, 1, 17):
        first = _train(tiny_corpus)
        _take(first, position)
        state = json.loads(json.dumps(first.get_state()))
        second = _train(tiny_corpus)
        _take(second, 5)  # wherever it was before
        second.set_state(state)
        _assert_equal(_take(second, 40 - position), expected[position:])


def test_an_epoch_is_every_record_once_and_the_next_has_another_order(tiny_corpus: Path):
    corpus = load_corpus(tiny_corpus)
    n = corpus.num_records("train")
    rows = []
    for batch in _take(_train(tiny_corpus, size=1), 2 * n):
        rows.append(batch["targets_BS"][batch["loss_mask_BS"] > 0].tobytes())
    stored = [
        np.frombuffer(r, np.int32)[2:].tobytes() for r in read_records(corpus.shards("train"))
    ]
    assert sorted(rows[:n]) == sorted(rows[n:]) == sorted(stored)
    assert rows[:n] != rows[n:]
    assert rows[:n] != stored


def test_seeds_differ_and_repeat(tiny_corpus: Path):
    one, again, other = (_take(_train(tiny_corpus, seed=s), 3) for s in (1, 1, 2))
    _assert_equal(one, again)
    assert any((a["tokens_BS"] != b["tokens_BS"]).any() for a, b in zip(one, other, strict=True))


def test_no_processes_are_started(tiny_corpus: Path):
    next(_train(tiny_corpus))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((S, 0, 0), "batch size 0: must be > 0"),
        ((32, 4, 0), "sequence_length=32: .* is packed for 64"),
        ((S, 10**6, 0), r"global_batch_size=1000000: .* has only \d+ training sequences"),
    ],
)
def test_sizes_that_do_not_fit(tiny_corpus: Path, arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        train_batches(tiny_corpus, *arguments)


def test_validation_arguments(tiny_corpus: Path):
    with pytest.raises(ValueError, match="max_batches=0"):
        validation_batches(tiny_corpus, 8, max_batches=0)


def _copy(tiny_corpus: Path, tmp_path: Path) -> tuple[Path, Corpus]:
    shutil.copytree(tiny_corpus, tmp_path / "copy")
    return tmp_path / "copy", load_corpus(tmp_path / "copy")


def test_a_damaged_corpus_is_refused(tiny_corpus: Path, tmp_path: Path):
    directory, corpus = _copy(tiny_corpus, tmp_path)
    manifest = directory / "manifest.json"
    text = manifest.read_text("utf-8")
    wrong = json.loads(text)
    wrong["splits"]["train"]["records"] += 1
    manifest.write_text(json.dumps(wrong), "utf-8")
    with pytest.raises(ValueError, match=r"train has \d+ records, the manifest says \d+"):
        load_corpus(directory)
    manifest.write_text(text[:100], "utf-8")
    with pytest.raises(ValueError, match="not JSON"):
        load_corpus(directory)
    manifest.write_text(text, "utf-8")
    corpus.shards("validation")[0].unlink()
    with pytest.raises(ValueError, match=r"shard .*validation.* missing"):
        load_corpus(directory)
    with pytest.raises(ValueError, match="no such directory"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        load_corpus(tmp_path)


def test_damaged_records_are_named(tiny_corpus: Path, tmp_path: Path):
    shutil.copytree(tiny_corpus, tmp_path / "corpus")
    (path,) = load_corpus(tmp_path / "corpus").shards("train")
    content = bytearray(path.read_bytes())
    content[len(content) // 5] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.array_record: damaged \("):
        list(read_records([path]))
    steps = load_corpus(tmp_path / "corpus").num_records("train") // 8 + 1
    with pytest.raises(ValueError, match=r"corpus: damaged \(.*; prepare the corpus again"):
        _take(_train(tmp_path / "corpus"), steps)

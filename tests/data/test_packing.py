"""Packing: each token is a target once, records and shards come back as they were written."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_jax.data import packing

EOS = 0
_DOCUMENTS = st.lists(st.lists(st.integers(2, 9), max_size=12), min_size=1, max_size=8)


def _pack(documents: list[list[int]], sequence_length: int) -> list[np.ndarray]:
    return packing.pack([np.array(d, np.int32) for d in documents], sequence_length, EOS).records


@given(_DOCUMENTS, st.integers(1, 9))
def test_every_token_is_a_target_once(documents: list[list[int]], length: int):
    records = _pack(documents, length)
    targets = np.concatenate([record[1:] for record in records])
    assert targets.tolist() == [token for d in documents for token in [*d, EOS]]
    assert all(len(record) == length + 1 for record in records[:-1])
    assert 2 <= len(records[-1]) <= length + 1
    for left, right in itertools.pairwise(records):
        assert left[-1] == right[0]


@given(st.integers(0, 99), st.lists(st.integers(0, 2**31 - 1), min_size=1))
def test_record_round_trip(domain: int, tokens: list[int]):
    decoded = packing.decode_record(packing.encode_record(domain, np.array(tokens)))
    assert decoded[0] == domain
    assert decoded[1].tolist() == tokens
    assert decoded[1].dtype == np.int32


def test_interleave_gives_every_prefix_its_share():
    domains = [[b"a"] * 80, [b"b"] * 16, [b"c"] * 4]
    mixed = packing.interleave(domains)
    assert sorted(mixed) == sorted(itertools.chain(*domains))
    quarter = mixed[:25]
    assert [quarter.count(x) for x in (b"a", b"b", b"c")] == [20, 4, 1]


def test_shards_keep_all_records_in_order(tmp_path: Path):
    records = [bytes([i]) * 100 for i in range(50)]
    names = packing.write_shards(tmp_path, "train", records, shard_bytes=1500)
    assert names[0] == "train-00000-of-00004.array_record"
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    paths = [tmp_path / name for name in names]
    assert list(packing.read_records(paths)) == records
    assert sum(map(packing.count_records, paths)) == 50


def test_a_cut_shard_is_refused(tmp_path: Path):
    (name,) = packing.write_shards(tmp_path, "train", [b"x" * 1000] * 100)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a whole ArrayRecord file"):
        packing.count_records(tmp_path / name)


def test_a_full_disk_is_an_os_error(tmp_path: Path):
    script = (
        "import os, resource, sys, pathlib\n"
        "from dsmoe_jax.data.packing import write_shards\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write_shards(pathlib.Path(sys.argv[1]), 'train', [os.urandom(1000)] * 500)\n"
        "except OSError as error: print('refused:', error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.startswith(f"refused: cannot write {tmp_path}/train-"), result

"""Splits by name: those of well-known datasets, and names that only sound like one."""

import pytest

from dsmoe_jax.data.split_names import splits_by_name


@pytest.mark.parametrize(
    "splits",
    [
        {"train.txt": "train", "valid.txt": "validation", "test.txt": "test"},
        {"train": "train", "dev": "validation", "test": "test", "README.md": None},
        {"Train.JSONL.gz": "train", "VAL.jsonl": "validation"},
        {"ptb.train.txt": None, "ptb.valid.txt": "validation", "ptb.test.txt": "test"},
        {"train-00000-of-00005.parquet": "train", "test-00000-of-00001.parquet": "test"},
        {
            "c4-train.00000-of-01024.jsonl.gz": None,
            "c4-train.00001-of-01024.jsonl.gz": None,
            "c4-validation.00000-of-00008.jsonl.gz": "validation",
        },
        {"train.jsonl": "train", "dev_matched.jsonl": "validation", "test_matched.jsonl": "test"},
        {"corpus.txt": None, "validation.txt": "validation", "eval_2.txt": "test"},
        {"how-to-test.txt": None, "web-dev.txt": None, "train-journey.txt": None},
        {"testament.txt": None, "devices.txt": None, "value.txt": None, "trains.txt": None},
        {"latest.train.txt": None, "latest.test.txt": "test"},
        {"attest.txt": None, "42.txt": None, "of.txt": None, "": None},
    ],
)
def test_names_in_one_folder(splits: dict[str, str | None]):
    found = splits_by_name(list(splits))
    assert found == {name: split for name, split in splits.items() if split}


def test_every_name_in_a_dataset_is_that_of_a_split():
    names = ["train", "validation_matched", "test_mismatched", "unsupervised"]
    splits = ["train", "validation", "test", "train"]
    assert splits_by_name(names, are_splits=True) == dict(zip(names, splits, strict=True))

"""The split of a file or folder by its name: what to train on, what to hold out, what to leave."""

import re

from dsmoe_jax.data.text_formats import split_name

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_SPLIT_WORDS = {
    "train": TRAIN, "training": TRAIN,
    "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION,
    "test": TEST, "testing": TEST, "eval": TEST, "evaluation": TEST,
}  # fmt: skip
"""The words by which Hugging Face's `datasets` knows the split of a file."""


def splits_by_name(names: list[str], are_splits: bool = False) -> dict[str, str]:
    """The splits of those of the files and folders in one folder whose names say one.

    A name does so with one of the words train, validation (valid, val, dev) or test (eval) alone,
    numbers aside (`test`, `val_2.txt`, `train-00000-of-00005.parquet`); or as part of it, if there
    is a name with train in its place (`ptb.valid.txt` beside `ptb.train.txt`) or with train alone.

    Args:
      names: all names in the folder.
      are_splits: whether every name is that of a split.
    """
    stems = {name: re.sub(r"\d+", "0", split_name(name)[0].lower()) for name in names}
    words = {name: re.findall("[a-z]+", stem) for name, stem in stems.items()}
    alone = {name for name, said in words.items() if _says_split_alone(said)}
    any_train = are_splits or any(_SPLIT_WORDS[words[name][0]] == TRAIN for name in alone)
    splits = dict.fromkeys(names, TRAIN) if are_splits else {}
    for name, stem in stems.items():
        for word in filter(_SPLIT_WORDS.get, words[name]):
            other = re.sub(f"(?<![a-z]){word}(?![a-z])", "train", stem)
            if name in alone or any_train or (other != stem and other in stems.values()):
                splits[name] = _SPLIT_WORDS[word]
    return splits


def _says_split_alone(words: list[str]) -> bool:
    return bool(words) and words[0] in _SPLIT_WORDS and all(word == "of" for word in words[1:])

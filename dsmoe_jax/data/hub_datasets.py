"""Datasets that Hugging Face's `datasets` reads: `hf:NAME_OR_PATH[@CONFIG][:SPLIT]`.

NAME is that of a dataset on the hub, PATH a folder of files that `load_dataset` takes, or that
`save_to_disk` wrote.  Rows are streamed: nothing is copied into a cache.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PREFIX = "hf:"
_EXTRA = "needs Hugging Face's datasets: pip install 'dsmoe_jax[datasets]'"
_SPLIT = re.compile(r"[\w.-]+")


@dataclasses.dataclass(frozen=True)
class HubDataset:
    """A dataset, or one split of it.

    Attributes:
      name: on the hub, or an absolute path.
      config: the subset, if it has several.
      split: None is all of them.
    """

    name: str
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        config = "" if self.config is None else f"@{self.config}"
        split = "" if self.split is None else f":{self.split}"
        return f"{PREFIX}{self.name}{config}{split}"

    @property
    def stem(self) -> str:
        """The last part of its name: the domain of its rows, if they name none."""
        return Path(self.name).name

    def parts(self) -> list[HubPart]:
        """Its splits; the one split, if it names one.

        Raises:
          ValueError: naming it, if it cannot be opened or has no such split.
        """
        names = _split_names(self)
        if self.split is not None and self.split not in names:
            raise ValueError(f"{self}: has no such split; must be one of {', '.join(names)}")
        chosen = names if self.split is None else [self.split]
        return [HubPart(dataclasses.replace(self, split=name)) for name in chosen]


@dataclasses.dataclass(frozen=True)
class HubPart:
    """A split of a dataset, or one of several parts of it; its rows are `rows()`."""

    dataset: HubDataset
    index: int = 0
    of: int = 1

    def __str__(self) -> str:
        return str(self.dataset) + (f" part {self.index} of {self.of}" if self.of > 1 else "")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows, streamed."""
        stream = _stream(self.dataset)
        yield from stream.shard(self.of, self.index) if self.of > 1 else stream

    def divided(self) -> list[HubPart]:
        """Its parts, one for each file that holds some of it."""
        number = max(1, _stream(self.dataset).num_shards)
        return [HubPart(self.dataset, index, number) for index in range(number)]


def is_hub_dataset(corpus: str) -> bool:
    """Whether the name of a corpus is that of a dataset."""
    return corpus.startswith(PREFIX)


def parse(corpus: str, key: str = "corpus") -> HubDataset:
    """The dataset that `hf:...` names, a path made absolute.

    Args:
      corpus: its name.
      key: what the user calls it, for errors.

    Raises:
      ValueError: if there is no name.
    """
    name = corpus.removeprefix(PREFIX)
    split = config = None
    if not _is_path(name) and ":" in name:
        name, _, split = name.rpartition(":")
        if not _SPLIT.fullmatch(split):
            raise ValueError(f"{key}={corpus}: must be {PREFIX}NAME_OR_PATH[@CONFIG][:SPLIT]")
    if not _is_path(name) and "@" in name:
        name, _, config = name.rpartition("@")
    if not name or config == "":
        raise ValueError(f"{key}={corpus}: must be {PREFIX}NAME_OR_PATH[@CONFIG][:SPLIT]")
    if _is_path(name):
        name = os.path.abspath(os.path.expanduser(name))
    elif name.startswith(("/", ".", "~")):
        raise ValueError(f"{key}={corpus}: no such file or directory")
    return HubDataset(name, config, split)


def _is_path(name: str) -> bool:
    return bool(name) and os.path.exists(os.path.expanduser(name))


def _library(dataset: HubDataset) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"{dataset}: {_EXTRA}") from None
    return datasets


def _split_names(dataset: HubDataset) -> list[str]:
    library = _library(dataset)
    try:
        if (saved := _saved(dataset)) is None:
            return list(library.get_dataset_split_names(dataset.name, dataset.config))
        return list(saved) if isinstance(saved, dict) else ["train"]
    except Exception as error:  # of many types: of the hub, of files, of formats
        raise _unreadable(dataset, error) from error


def _stream(dataset: HubDataset) -> Any:
    """The rows of a split, an `IterableDataset`."""
    library = _library(dataset)
    try:
        if (saved := _saved(dataset)) is None:
            return library.load_dataset(
                dataset.name, dataset.config, split=dataset.split, streaming=True
            )
        split = saved[dataset.split] if isinstance(saved, dict) else saved
        return split.to_iterable_dataset(num_shards=max(1, len(split.cache_files)))
    except Exception as error:
        raise _unreadable(dataset, error) from error


def _saved(dataset: HubDataset) -> Any:
    """A `Dataset` that `save_to_disk` wrote, or a `DatasetDict` of them; None if it is neither."""
    markers = ("state.json", "dataset_dict.json")
    if not any(os.path.isfile(os.path.join(dataset.name, name)) for name in markers):
        return None
    return _library(dataset).load_from_disk(dataset.name)


def _unreadable(dataset: HubDataset, error: Exception) -> ValueError:
    message = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{dataset}: cannot be read: {message}")

"""`hf:` corpora: datasets on disk that Hugging Face's `datasets` reads, with the real library."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmoe_jax.config import DataConfig
from dsmoe_jax.data import own_text
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.hub_datasets import HubDataset, parse
from dsmoe_jax.data.opening import locate, open_corpus
from dsmoe_jax.data.packing import decode_record, read_records
from dsmoe_jax.data.prepare import prepare

SIZES = {"vocab_size": 265, "sequence_length": 32}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, and no cache but one of the test's own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))


def _write(folder: Path, splits: dict[str, int]) -> Path:
    """A dataset of two files a split; every other row names its domain."""
    folder.mkdir(parents=True)
    for split, n in splits.items():
        for k in range(2):
            rows = [
                {"text": f"{split} {k} {i} " * 20, "domain": "odd" if i % 2 else None}
                for i in range(n)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}-{k}.jsonl").write_text(text, "utf-8")
    return folder


def _texts(corpus: Corpus, split: str) -> set[str]:
    """The documents of a split."""
    streams: dict[int, list[int]] = {}
    for record in read_records(corpus.shards(split)):
        domain, tokens = decode_record(record)
        streams.setdefault(domain, []).extend(tokens[1:].tolist())
    decode = corpus.tokenizer.decode
    joined = "".join(decode(s, skip_special_tokens=False) for s in streams.values())
    return set(joined.split("<|endoftext|>")) - {""}


def test_the_splits_of_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = _write(tmp_path / "stories", {"train": 8, "validation": 3, "test": 2})
    corpus = prepare(f"hf:{folder}", tmp_path / "out", **SIZES)
    assert corpus.domains == ["odd", "stories"]
    expected = {f"train {k} {i} " * 20 for k in range(2) for i in range(8)}
    assert _texts(corpus, "train") == expected
    assert len(_texts(corpus, "validation")) == 6
    noted = capsys.readouterr().err
    assert f"trained on: 1 (hf:{folder}:train); held out: 1 (hf:{folder}:validation)" in noted
    assert f"left out: test text by name 1 (hf:{folder}:test)" in noted
    same = prepare(str(folder), tmp_path / "files", **SIZES)  # read by ourselves
    assert same.fingerprint == corpus.fingerprint


def test_one_split(tmp_path: Path):
    folder = _write(tmp_path / "stories", {"train": 30, "validation": 30})
    corpus = prepare(f"hf:{folder}:validation", tmp_path / "out", **SIZES)
    texts = _texts(corpus, "train") | _texts(corpus, "validation")
    assert texts == {f"validation {k} {i} " * 20 for k in range(2) for i in range(30)}
    assert _texts(corpus, "validation")  # a part of it is held out
    with pytest.raises(
        ValueError, match=r"stories:dev: has no such split; must be one of train, v"
    ):
        prepare(f"hf:{folder}:dev", tmp_path / "other", **SIZES)
    held_out = prepare(
        f"hf:{folder}:train", tmp_path / "held", validation=f"hf:{folder}:validation", **SIZES
    )
    assert _texts(held_out, "validation") == texts


def test_one_that_was_saved(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"row {i} " * 20} for i in range(40)]
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=3)
    corpus = prepare(f"hf:{tmp_path / 'saved'}", tmp_path / "out", **SIZES)
    assert corpus.domains == ["saved"]
    assert len(_texts(corpus, "train") | _texts(corpus, "validation")) == 40
    (part,) = parse(f"hf:{tmp_path / 'saved'}").parts()
    divided = part.divided()
    assert len(divided) == 3
    assert [row["text"] for one in divided for row in one.rows()] == [row["text"] for row in rows]


def test_training_prepares_it_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _write(tmp_path / "stories", {"train": 30})
    monkeypatch.chdir(tmp_path)
    config = DataConfig("hf:stories:train", sequence_length=32, tokenizer_vocab_size=265)
    corpus = open_corpus(config)
    assert corpus.directory.parent == tmp_path / "cache" / "corpora"
    assert corpus.manifest["request"]["corpus"] == f"hf:{tmp_path / 'stories'}:train"
    assert locate("hf:stories:train") == f"hf:{tmp_path / 'stories'}:train"
    file = tmp_path / "stories" / "train-0.jsonl"
    file.write_text(file.read_text("utf-8").replace("train 0 3", "train 0 x"), "utf-8")
    assert open_corpus(config).directory != corpus.directory  # other text


def test_conversations(tmp_path: Path):
    folder = tmp_path / "talk"
    folder.mkdir()
    for i in range(2):
        turns = [("user", f"what is {i}?"), ("assistant", f"it is {i}")]
        rows = [
            {"messages": [{"role": role, "content": f"{text} {j}"} for role, text in turns]}
            for j in range(20)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"train-{i}.jsonl").write_text(text, "utf-8")
    corpus = prepare(f"hf:{folder}", tmp_path / "out", rows="chat", **SIZES)
    assert corpus.answers_only
    documents = corpus.manifest["domains"][0]["documents"]
    assert documents["train"] + documents["validation"] == 40


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:org/name", HubDataset("org/name")),
        ("hf:org/name:train", HubDataset("org/name", None, "train")),
        ("hf:org/name@en:train", HubDataset("org/name", "en", "train")),
    ],
)
def test_names(name: str, expected: HubDataset):
    assert parse(name) == expected
    assert str(expected) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:", r"corpus=hf:: must be hf:NAME_OR_PATH\[@CONFIG\]\[:SPLIT\]"),
        ("hf:org/name:", "must be hf:NAME"),
        ("hf:/no/such/folder", "corpus=hf:/no/such/folder: no such file or directory"),
        ("hf:nobody/nothing", r"hf:nobody/nothing: cannot be read: "),
    ],
)
def test_names_that_are_none(name: str, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message) as raised:
        prepare(name, tmp_path / "out", **SIZES)
    assert "\n" not in str(raised.value)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _write(tmp_path / "stories", {"train": 3})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"needs Hugging Face's datasets: pip install 'dsmoe_jax\["
    ):
        prepare(f"hf:{tmp_path / 'stories'}", tmp_path / "out", **SIZES)


def test_text_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = _write(tmp_path / "stories", {"train": 8})
    fingerprint: Callable[..., str] = own_text.fingerprint

    def then_change(*args: object) -> str:
        found = fingerprint(*args)
        (folder / "train-1.jsonl").write_text('{"text": "new", "domain": null}\n', "utf-8")
        return found

    monkeypatch.setattr(own_text, "fingerprint", then_change)
    with pytest.raises(ValueError, match="has changed while it was read"):
        prepare(f"hf:{folder}", tmp_path / "out", **SIZES)

"""The corpus of a config: the keys of the section `data`, and where what they ask for is kept."""

import hashlib
import json
from pathlib import Path

import pytest

from dsmoe_jax.config import DataConfig
from dsmoe_jax.data.opening import open_corpus
from dsmoe_jax.data.prepare import prepare


def _data(**changes: object) -> DataConfig:
    return DataConfig(**{"sequence_length": 32, "tokenizer_vocab_size": 270, **changes})  # pyright: ignore


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of corpora that are prepared when they are opened."""
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "corpora"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 30 documents."""
    path = tmp_path / "text.jsonl"
    rows = ({"text": f"Text number {i} of thirty. " * 3} for i in range(30))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_what_is_prepared_in_the_cache_stays_valid(text: Path, cache: Path):
    """Its directory is named by what decides the content, as it always was."""
    corpus = open_corpus(_data(corpus=str(text)))
    content = hashlib.sha256(text.read_bytes()).hexdigest()
    content = hashlib.sha256(f"text.jsonl\0{content}\n".encode()).hexdigest()
    key = json.dumps([1, str(text), content, 270, 32, []])
    assert corpus.directory == cache / f"text-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    request = corpus.manifest["request"]
    assert request == {
        "recipe": 1,
        "corpus": str(text),
        "vocab_size": 270,
        "sequence_length": 32,
        "max_bytes_per_domain": None,
        "domains": None,
        "sha256": content,
    }


def test_the_options_of_text_that_is_not_prepared_yet(text: Path, tmp_path: Path):
    """Each is a corpus of its own, the one that `prepare` makes of it."""
    held = tmp_path / "held.txt"
    held.write_text("Text that is held out.\n", "utf-8")
    first = open_corpus(_data(corpus=str(text)))
    rows = text.read_text("utf-8")
    text.write_text(rows + rows.replace('"text"', '"text": "none", "body"'), "utf-8")
    directories = {first.directory}
    for number, (key, value) in enumerate(
        {
            "validation": str(held),
            "tokenizer": str(first.directory),
            "text_column": "text",
            "keep_repeats": True,
        }.items()
    ):
        ours = open_corpus(_data(corpus=str(text), **{key: value}))
        asked = prepare(str(text), tmp_path / f"asked{number}", 270, 32, **{key: value})
        assert ours.fingerprint == asked.fingerprint
        directories.add(ours.directory)
    assert len(directories) == 5
    with pytest.raises(ValueError, match=r"text\.jsonl:1: needs a field 'body'"):
        open_corpus(_data(corpus=str(text), text_column="body"))


def test_a_changed_tokenizer_is_another_corpus(text: Path, tmp_path: Path):
    tokenizer = tmp_path / "tokenizer.json"
    seen = set()
    for size in (270, 269):
        made = prepare(str(text), tmp_path / str(size), size, 32)
        tokenizer.write_text(made.tokenizer.to_json(), "utf-8")
        seen.add(open_corpus(_data(corpus=str(text), tokenizer=str(tokenizer))).directory)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("validation", "x"), ("tokenizer", "x"), ("text_column", "x"), ("keep_repeats", True)],
)
def test_a_prepared_corpus_has_its_options(text: Path, tmp_path: Path, key: str, value: object):
    corpus = prepare(str(text), tmp_path / "out", 270, 32)
    message = rf"data\.{key}={value!r}: the corpus .*out is prepared already; give --{key} to"
    with pytest.raises(ValueError, match=message):
        open_corpus(_data(corpus=str(corpus.directory), **{key: value}))


def test_a_tilde_is_the_home_directory(text: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(text.parent))
    expected = open_corpus(_data(corpus=str(text)))
    assert open_corpus(_data(corpus="~/text.jsonl")).directory == expected.directory
    with pytest.raises(ValueError, match=r"data\.corpus=~nobody-of-this-name/x: there is no such"):
        open_corpus(_data(corpus="~nobody-of-this-name/x"))


def test_an_empty_path_is_not_the_working_directory():
    with pytest.raises(ValueError, match=r"data\.corpus='': must be a path"):
        open_corpus(_data(corpus=""))

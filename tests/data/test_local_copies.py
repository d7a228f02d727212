"""Corpora in a bucket: fetched once, checked, and read as those of a file system."""

import dataclasses

import pytest
from google.cloud.storage import Blob

from dsmoe_jax.config import DataConfig
from dsmoe_jax.data import packed
from dsmoe_jax.data.corpus import load_corpus
from dsmoe_jax.data.local_copies import local_copy
from dsmoe_jax.data.opening import is_there, locate, open_corpus
from dsmoe_jax.storage import files
from dsmoe_jax.storage.places import bucket_and_name, place_of
from tests.tools.buckets import emulator


@pytest.fixture(scope="module")
def bucket():
    with emulator() as running:
        yield running


@pytest.fixture
def folder(bucket, request, tmp_path, monkeypatch):
    """An address that no other test uses, and an empty cache."""
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
    return f"{bucket.address}/{request.node.name}"


def upload(address, content):
    files.upload(place_of("x", address), content)


def fetched(tmp_path):
    return sorted(p for p in (tmp_path / "cache/fetched").rglob("*") if p.is_file())


def test_a_prepared_corpus(folder, tiny_corpus, tmp_path, capsys):
    for path in tiny_corpus.iterdir():
        upload(f"{folder}/tiny/{path.name}", path.read_bytes())
    config = DataConfig(f"{folder}/tiny", sequence_length=64, tokenizer_vocab_size=512)
    corpus = open_corpus(config)
    assert corpus.fingerprint == load_corpus(tiny_corpus).fingerprint
    assert f"fetching {folder}/tiny" in capsys.readouterr().err
    before = [path.stat().st_mtime_ns for path in fetched(tmp_path)]
    assert open_corpus(config).directory == corpus.directory
    assert [path.stat().st_mtime_ns for path in fetched(tmp_path)] == before, "fetched once"
    assert capsys.readouterr().err == ""
    assert locate(config.corpus) == config.corpus, "config.json keeps the address"
    assert is_there(config.corpus)
    assert not is_there(f"{folder}/none")


def test_a_packed_corpus_and_a_text(folder, tiny_corpus, tmp_path):
    packed.pack(load_corpus(tiny_corpus), tmp_path / "tiny.tar.xz")
    upload(f"{folder}/tiny.tar.xz", (tmp_path / "tiny.tar.xz").read_bytes())
    config = DataConfig(f"{folder}/tiny.tar.xz", sequence_length=64, tokenizer_vocab_size=512)
    assert open_corpus(config).fingerprint == load_corpus(tiny_corpus).fingerprint
    text = "".join(f"line {i * i * 31 % 997} of a text\n" for i in range(3000))
    (tmp_path / "mine.txt").write_text(text)
    upload(f"{folder}/mine.txt", text.encode())
    config = dataclasses.replace(config, corpus=f"{folder}/mine.txt", tokenizer_vocab_size=300)
    there = open_corpus(config)
    here = open_corpus(dataclasses.replace(config, corpus=str(tmp_path / "mine.txt")))
    assert there.fingerprint == here.fingerprint


def test_what_has_changed_is_fetched_anew(folder):
    upload(f"{folder}/a.txt", b"old")
    assert local_copy("data.corpus", f"{folder}/a.txt").read_bytes() == b"old"
    upload(f"{folder}/a.txt", b"new")
    assert local_copy("data.corpus", f"{folder}/a.txt").read_bytes() == b"new"


def test_damage_on_the_way(folder, tmp_path, monkeypatch):
    upload(f"{folder}/a/b.txt", b"text")
    original = Blob.download_to_filename

    def damaged(self, filename, **options):
        original(self, filename, **options)
        with open(filename, "r+b") as file:
            file.write(b"T")

    monkeypatch.setattr(Blob, "download_to_filename", damaged)
    with pytest.raises(ValueError, match=r"^data\.corpus=gs:.*a/b\.txt is damaged on its way"):
        local_copy("data.corpus", f"{folder}/a")
    assert fetched(tmp_path) == []
    monkeypatch.undo()
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
    assert (local_copy("data.corpus", f"{folder}/a") / "b.txt").read_bytes() == b"text"


def test_bad_names(folder, tmp_path):
    with pytest.raises(ValueError, match=r"^data\.corpus=.*none: there is no such file or folder"):
        local_copy("data.corpus", f"{folder}/none")
    bucket, name = bucket_and_name(place_of("x", folder))
    bucket.blob(f"{name}/../../escaped").upload_from_string(b"x")
    with pytest.raises(ValueError, match="no name of a file"):
        local_copy("data.corpus", folder)
    assert not list(tmp_path.rglob("escaped"))

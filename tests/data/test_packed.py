"""A corpus in one file: it comes back as it was, and what is damaged or hostile is refused."""

import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsmoe_jax.config import DataConfig
from dsmoe_jax.data import corpus as corpus_format
from dsmoe_jax.data import packed
from dsmoe_jax.data.corpus import Corpus, load_corpus
from dsmoe_jax.data.opening import open_corpus
from dsmoe_jax.data.packing import decode_record, read_records

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def corpus(tiny_corpus: Path) -> Corpus:
    """A corpus of four domains, 512 tokens and sequences of 64."""
    return load_corpus(tiny_corpus)


@pytest.fixture
def file(corpus: Corpus, tmp_path: Path) -> Path:
    """It, packed."""
    packed.pack(corpus, tmp_path / "tiny.tar.xz")
    return tmp_path / "tiny.tar.xz"


def test_it_comes_back_as_it_was(corpus: Corpus, file: Path, tmp_path: Path):
    back = packed.unpack(file, tmp_path / "back")
    assert back.fingerprint == corpus.fingerprint
    assert back.manifest == corpus.manifest
    for split in corpus_format.SPLITS:
        found = list(read_records(back.shards(split)))
        assert found == list(read_records(corpus.shards(split)))
    assert back.tokenizer.to_json() == corpus.tokenizer.to_json()


def test_the_same_corpus_gives_the_same_file(corpus: Corpus, file: Path, tmp_path: Path):
    assert packed.pack(corpus, tmp_path / "again.tar.xz") == file.stat().st_size
    assert (tmp_path / "again.tar.xz").read_bytes() == file.read_bytes()
    assert packed.packed_bytes(corpus) == file.stat().st_size


def test_others_can_read_it(corpus: Corpus, file: Path):
    """tarfile and numpy alone find every token of the held-out text."""
    with tarfile.open(file, "r:xz") as archive:
        assert archive.getnames() == [
            "manifest.json", "tokenizer.json", "train.tokens", "validation.tokens",
        ]  # fmt: skip
        content = archive.extractfile("validation.tokens")
        assert content is not None
        numbers = np.frombuffer(content.read(), "<u2").astype(int)
    records = [decode_record(record) for record in read_records(corpus.shards("validation"))]
    assert len(numbers) == sum(2 + len(tokens) for _, tokens in records)
    assert sum(numbers) == sum(len(t) + domain + t.sum() for domain, t in records)
    assert numbers[1] == 0
    assert numbers[2 : 2 + numbers[0]].tolist() in [t.tolist() for d, t in records if d == 0]


def test_ids_of_more_than_16_bits(corpus: Corpus):
    wide = packed._dtype({**corpus.manifest, "vocab_size": 2**16})
    record = next(read_records(corpus.shards("train")))
    assert wide == np.dtype("<u4")
    manifest = {**corpus.manifest, "vocab_size": 2**16}
    encoded = packed._encode(record, wide)
    assert list(packed._decode(encoded, manifest, Path("file"))) == [record]


def test_a_config_names_the_file(
    corpus: Corpus, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
    data = DataConfig(str(file), sequence_length=64, tokenizer_vocab_size=512)
    opened = open_corpus(data)
    assert opened.fingerprint == corpus.fingerprint
    assert opened.directory.parent == tmp_path / "cache" / "corpora"
    before = (opened.directory / "manifest.json").stat().st_mtime_ns
    assert open_corpus(data).directory == opened.directory
    assert (opened.directory / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"data.sequence_length=32: the corpus .* packed for 64"):
        open_corpus(DataConfig(str(file), sequence_length=32, tokenizer_vocab_size=512))


def test_nothing_is_overwritten(corpus: Corpus, file: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"tiny\.tar\.xz: exists already"):
        packed.pack(corpus, file)
    with pytest.raises(ValueError, match=r"tiny\.zip: .* must end in \.tar\.xz"):
        packed.pack(corpus, tmp_path / "tiny.zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.tar.xz"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-40],
        lambda content: content[:1000] + bytes([content[1000] ^ 1]) + content[1001:],
        lambda content: content[:-9000] + bytes([content[-9000] ^ 1]) + content[-8999:],
        lambda content: b"",
        lambda content: b"text\n",
    ],
    ids=["half", "no index", "a bit at the start", "a bit at the end", "empty", "text"],
)
def test_a_damaged_file_is_named(file: Path, tmp_path: Path, damage: Callable):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"tiny\.tar\.xz: (damaged|no packed corpus)"):
        packed.unpack(file, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.tar.xz"]


def _members(file: Path) -> Members:
    with tarfile.open(file, "r:xz") as archive:
        return [(m, archive.extractfile(m).read()) for m in archive.getmembers()]  # pyright: ignore


def _write(file: Path, members: Members) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for member, data in members:
            member.size = len(data) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(data))
    file.write_bytes(lzma.compress(content.getvalue()))


def _renamed(name: str) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        members[2][0].name = name
        return members

    return change


def _link(members: Members) -> Members:
    member = tarfile.TarInfo("train.tokens")
    member.type = tarfile.SYMTYPE
    member.linkname = "/etc/passwd"
    return [*members[:2], (member, b""), *members[3:]]


def _one_more(members: Members) -> Members:
    return [*members, (tarfile.TarInfo("../more"), b"text")]


def _manifest(**changes: object) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        manifest = json.loads(members[0][1]) | changes
        return [(members[0][0], json.dumps(manifest).encode()), *members[1:]]

    return change


def _other_tokens(members: Members) -> Members:
    member, data = members[2]
    numbers = np.frombuffer(data, "<u2").copy()
    numbers[2] += 1
    return [*members[:2], (member, numbers.tobytes()), members[3]]


def _long_record(members: Members) -> Members:
    member, data = members[3]
    numbers = np.frombuffer(data, "<u2").copy()
    numbers[0] = 60_000
    return [*members[:3], (member, numbers.tobytes())]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed("../../escaped"), r"no packed corpus, has the member '\.\./\.\./escaped'"),
        (_renamed("/tmp/escaped"), r"has the member '/?tmp/escaped' in place of"),
        (_link, r"has the member 'train\.tokens' in place of the file"),
        (_one_more, r"has a member '\.\./more' that no packed corpus has"),
        (lambda members: members[:3], r"has nothing in place of the file 'validation\.tokens'"),
        (_manifest(splits={"train": {"records": 1}}), r"its manifest is none of a packed corpus"),
        (_manifest(domains=5), r"its manifest is none of a packed corpus"),
        (_manifest(vocab_size="many"), r"its manifest is none of a packed corpus"),
        (_manifest(format=99), r"not a dsmoe_jax corpus of format 1"),
        (
            _manifest(splits={s: {"records": 1} for s in corpus_format.SPLITS}),
            r"train\.tokens has \d+ bytes, more than it can have",
        ),
        (_manifest(domains=[{"name": "one"}]), r"holds records that do not fit its manifest"),
        (_long_record, r"holds records that do not fit its manifest"),
        (_other_tokens, r"its records have the fingerprint [0-9a-f]{12}, its manifest says"),
        (_manifest(fingerprint=None), r"its manifest says None; pack the corpus again"),
    ],
)
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    file: Path, tmp_path: Path, change: Callable[[Members], Members], message: str
):
    _write(file, change(_members(file)))
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        packed.unpack(file, tmp_path / "deep" / "deeper" / "back")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        "deep", "deep/deeper", "tiny.tar.xz",
    ]  # fmt: skip


def test_the_archive_as_it_was_is_taken(file: Path, corpus: Corpus, tmp_path: Path):
    """The control of the test above: writing it anew is not what is refused."""
    _write(file, _members(file))
    assert packed.unpack(file, tmp_path / "back").fingerprint == corpus.fingerprint

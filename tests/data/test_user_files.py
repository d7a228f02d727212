"""The user's own text: every kind of file, and every way in which it can be wrong."""

import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest

from dsmoe_jax.data import user_files
from dsmoe_jax.data.user_files import UserText, find_text, read_documents


def _texts(path: Path) -> dict[str, list[str]]:
    found = read_documents(find_text(path).files)
    return {name: [d.text for d in documents] for name, documents in found.items()}


def _fingerprint(path: Path) -> str:
    return user_files.fingerprint(find_text(path))


def test_text_files_and_their_domains(tmp_path: Path):
    root = tmp_path / "mine"
    (root / "law" / "deep").mkdir(parents=True)
    (root / "a.txt").write_text("alpha\n", "utf-8")
    (root / "law" / "deep" / "b.txt").write_text("中文\n", "utf-8")
    assert _texts(root) == {"mine": ["alpha\n"], "law": ["中文\n"]}
    assert _texts(root / "a.txt") == {"a": ["alpha\n"]}


def test_a_long_text_becomes_several_documents(tmp_path: Path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(10_000)), "utf-8")
    (texts,) = _texts(path).values()
    assert len(texts) > 3
    assert "".join(texts) == path.read_text("utf-8")


def test_jsonl_with_and_without_domain(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "one"}, {"text": "two", "domain": "news"}]
    path.write_text("\n\n".join(map(json.dumps, rows)), "utf-8")
    assert _texts(path) == {"rows": ["one"], "news": ["two"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\xff\xfe", r"a\.txt:2: not UTF-8 at byte 5 \(0xff\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe4"}\n', r"a\.jsonl:2: not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"txt": "x"}\n', r"a\.jsonl:1: needs a field 'text'"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1: needs a field 'text'"),
        ("a.jsonl", b'{"text": "x", "domain": 3}\n', r"a\.jsonl:1: 'domain' must be a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: 'text' has a lone surrogate"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 200_000, r"a\.jsonl:2: not JSON .*nested too deep"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"1" * 6000 + b"}", r"a\.jsonl:1: not JSON .*digits"),
        ("a.jsonl", b'{"text": "x", "domain": "\\udfff"}', r"a\.jsonl:1: 'domain' has a lone"),
        ("a.csv", b"x", r"a\.csv: must be a folder or a \.txt, "),
    ],
)
def test_bad_content_names_its_place(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _texts(tmp_path / name)


def test_nothing_there(tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere: no such file"):
        _texts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no \.txt"):
        _texts(tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        _texts(tmp_path)


def test_parquet(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow", reason="an optional package")
    parquet = pytest.importorskip("pyarrow.parquet", reason="an optional package")
    rows = {"text": ["one", "two"], "domain": ["x", None], "other": [1, 2]}
    table = pyarrow.table(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    assert _texts(tmp_path / "a.parquet") == {"x": ["one"], "a": ["two"]}
    with pytest.raises(ValueError, match=r"needs a field 'body' .* \(it has text, domain, other\)"):
        read_documents(find_text(tmp_path / "a.parquet").files, "body")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match=r"b\.parquet row 1: cannot be read"):
        _texts(tmp_path / "b.parquet")


def test_damaged_parquet_names_the_row(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow", reason="an optional package")
    parquet = pytest.importorskip("pyarrow.parquet", reason="an optional package")
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"text number {i} of many" for i in range(3000)]})
    options = {"compression": "none", "use_dictionary": False, "row_group_size": 1024}
    parquet.write_table(table, path, write_page_checksum=True, **options)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"text number 1500 of", b"text number 9999 of"))
    with pytest.raises(ValueError, match=r"a\.parquet row 1025: cannot be read: .*CRC"):
        _texts(path)
    buffers = pyarrow.array([b"fine", b"\xff"]).buffers()
    not_utf8 = pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)
    parquet.write_table(pyarrow.table({"text": not_utf8}), path)
    with pytest.raises(ValueError, match=r"a\.parquet row 2: cannot be read: 'utf-8' codec"):
        _texts(path)


def _write_saved_dataset(path: Path, rows: list[dict[str, str]]) -> None:
    """Files with the library's names, for the fake one of `datasets_installed`."""
    path.mkdir(parents=True)
    for name in ("state.json", "dataset_info.json"):
        (path / name).write_text("{}", "utf-8")
    (path / "data-00000-of-00001.arrow").write_text(json.dumps(rows), "utf-8")


@pytest.fixture
def datasets_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_from_disk(path: str) -> list[dict[str, str]]:
        return json.loads((Path(path) / "data-00000-of-00001.arrow").read_text("utf-8"))

    fake = types.SimpleNamespace(load_from_disk=load_from_disk)
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_a_saved_dataset(tmp_path: Path, datasets_installed: None, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "v1.0"
    _write_saved_dataset(root, [{"text": "one", "domain": "x"}, {"text": "two"}])
    assert _texts(root) == {"x": ["one"], "v1.0": ["two"]}
    (root / "data-00000-of-00001.arrow").write_text('[{"text": "one"}, {"txt": "two"}]', "utf-8")
    with pytest.raises(ValueError, match=r"v1\.0 row 2: needs a field 'text' .* \(it has txt\)"):
        _texts(root)
    (root / "data-00000-of-00001.arrow").write_text('[{"text"', "utf-8")
    with pytest.raises(ValueError, match=r"v1\.0 row 1: cannot be read"):
        _texts(root)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        _texts(root)


@pytest.mark.parametrize("below", ["", "wiki"])
def test_the_splits_of_a_saved_dataset(tmp_path: Path, datasets_installed: None, below: str):
    for split in ("train_sft", "train_more", "validation", "test_sft"):
        _write_saved_dataset(tmp_path / "root" / below / split, [{"text": split}])
    (tmp_path / "root" / below / "dataset_dict.json").write_text("{}", "utf-8")
    found = find_text(tmp_path / "root")
    domain = below or "root"
    assert read_documents(found.of("train")).keys() == {domain}
    assert _by_split(found) == {"train": ["train_more", "train_sft"], "validation": ["validation"]}
    assert "left out: test text by name 1 (" in found.notes()[1]


def _by_split(found: UserText) -> dict[str, list[str]]:
    """Texts of each split, in alphabetical order."""
    return {
        split: sorted(d.text for texts in read_documents(found.of(split)).values() for d in texts)
        for split in ("train", "validation")
    }


def _write(path: Path, text: str | bytes = "text of its own") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


class TestSplits:
    def test_files(self, tmp_path: Path):
        for split in ("train", "val", "test"):
            _write(tmp_path / f"{split}.txt", split)
        found = find_text(tmp_path)
        assert _by_split(found) == {"train": ["train"], "validation": ["val"]}
        assert found.notes() == [
            "trained on: 1 (train.txt); held out: 1 (val.txt)",
            "left out: test text by name 1 (test.txt)",
        ]
        assert {file.domain for file in found.files} == {tmp_path.name}

    def test_folders_do_not_name_domains(self, tmp_path: Path):
        for split in ("train", "dev", "test"):
            _write(tmp_path / split / "law" / "test of it.txt", split)
        found = find_text(tmp_path)
        assert _by_split(found) == {"train": ["train"], "validation": ["dev"]}
        assert {file.domain for file in found.files} == {"law"}

    def test_only_text_for_testing(self, tmp_path: Path):
        _write(tmp_path / "test.txt")
        with pytest.raises(ValueError, match=r"holds no \.txt.* to train on; left out: test text"):
            find_text(tmp_path)

    def test_text_that_is_given(self, tmp_path: Path):
        root = tmp_path / "root"
        for name in ("train.txt", "more.txt", "validation.txt", "test.txt"):
            _write(root / name, name)
        inside = find_text(root, root / "more.txt")
        assert _by_split(inside) == {"train": ["train.txt"], "validation": ["more.txt"]}
        assert inside.notes()[1] == (
            "left out: validation text that the one given replaces 1 (validation.txt),"
            " test text by name 1 (test.txt)"
        )
        outside = find_text(root, _write(tmp_path / "test" / "test.txt", "held").parent)
        assert _by_split(outside)["validation"] == ["held"]
        assert outside.of("validation")[0].domain == "root"
        assert user_files.fingerprint(inside) != user_files.fingerprint(outside)

    def test_one_file_and_another(self, tmp_path: Path):
        found = find_text(_write(tmp_path / "a.txt"), _write(tmp_path / "b.txt"))
        assert found.notes() == ["trained on: 1 (a.txt); held out: 1 (b.txt)"]

    def test_all_of_the_text_is_given(self, tmp_path: Path):
        _write(tmp_path / "a.txt")
        with pytest.raises(ValueError, match=r"to train on; .* held out: 1 \(a\.txt\)"):
            find_text(tmp_path, tmp_path)


class TestLinks:
    def test_each_real_file_once(self, tmp_path: Path):
        root = tmp_path / "root"
        _write(root / "law" / "a.txt", "a")
        _write(tmp_path / "else" / "deep" / "b.txt", "b")
        _write(tmp_path / "blobs" / "123", "c")
        (root / "alias").symlink_to(root / "law")  # sorts before it, but is not its name
        (root / "cycle").symlink_to(root)
        (root / "law" / "up").symlink_to("..")
        (root / "other").symlink_to(tmp_path / "else")
        (root / "again").symlink_to(tmp_path / "else")
        (root / "c.txt").symlink_to(tmp_path / "blobs" / "123")
        (root / "d.txt").symlink_to(root / "law" / "a.txt")
        assert _texts(root) == {"root": ["c"], "law": ["a"], "again": ["b"]}
        (note,) = find_text(root).notes()
        assert note.startswith("left out: linked a second time 5 (")

    @pytest.mark.parametrize("target", ["nowhere", "a.txt"])
    def test_that_lead_nowhere(self, tmp_path: Path, target: str):
        (tmp_path / "a.txt").symlink_to(target)
        with pytest.raises(ValueError, match=rf"a\.txt, a link to {target}: cannot be read"):
            find_text(tmp_path)


class TestLeftOut:
    def test_is_counted_and_named(self, tmp_path: Path):
        for name in ("a.txt", "1.png", "2.md", "3", "4.csv", ".hidden.txt", ".git/config.txt"):
            _write(tmp_path / name)
        found = find_text(tmp_path)
        assert [file.path.name for file in found.files] == ["a.txt"]
        assert found.notes() == [
            "left out: not text 4 (1.png, 2.md, 3, ...), hidden 2 (.git, .hidden.txt)"
        ]

    def test_a_pipe_is_not_text(self, tmp_path: Path):
        _write(tmp_path / "a.txt")
        os.mkfifo(tmp_path / "b.txt")  # reading it would wait forever
        assert find_text(tmp_path).notes() == ["left out: not text 1 (b.txt)"]

    @pytest.mark.parametrize(
        "names",
        [("config.json", "metrics.jsonl"), ("manifest.json", "tokenizer.json", "readme.txt")],
    )
    def test_what_the_commands_write(self, tmp_path: Path, names: tuple[str, ...]):
        _write(tmp_path / "a.txt")
        before = _fingerprint(tmp_path)
        for name in names:
            _write(tmp_path / "runs" / "first" / name, "{}")
        assert find_text(tmp_path).notes() == ["left out: runs and prepared corpora 1 (runs/first)"]
        assert _fingerprint(tmp_path) == before


def test_a_finished_run_in_the_folder_changes_nothing(tmp_path: Path, finished_run: tuple):
    _write(tmp_path / "a.txt")
    before = _fingerprint(tmp_path)
    workdir, _ = finished_run
    shutil.copytree(workdir, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    assert _fingerprint(tmp_path) == before


def test_a_name_with_a_line_break_stays_on_one_line(tmp_path: Path):
    _write(tmp_path / "a.txt")
    _write(tmp_path / "b\n.png")
    assert find_text(tmp_path).notes() == [r"left out: not text 1 (b\n.png)"]


def test_a_name_that_is_not_utf8(tmp_path: Path):
    _write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")))
    with pytest.raises(ValueError, match=r"caf\\udce9\.txt: its name is not UTF-8"):
        find_text(tmp_path)
    _write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")))
    os.rename(os.fsencode(tmp_path) + b"/caf\xe9.txt", tmp_path / "a.txt")
    assert find_text(tmp_path).notes() == [r"left out: not text 1 (caf\udce9.png)"]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    """By a stand-in for the system, since the super-user may read everything."""
    secret = _write(tmp_path / "secret" / "b.txt")
    shut = secret.parent if what == "folder" else secret

    def refuse(function):
        def guarded(path, *args, **kwargs):
            if os.fspath(path) == os.fspath(shut):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return function(path, *args, **kwargs)

        return guarded

    monkeypatch.setattr(os, "listdir", refuse(os.listdir))
    monkeypatch.setattr(Path, "open", refuse(Path.open))
    with pytest.raises(ValueError, match=rf"{shut.name}: cannot be read: Permission denied"):
        _fingerprint(tmp_path)


class TestMarks:
    """Byte-order marks, which some editors write."""

    def test_are_no_text(self, tmp_path: Path):
        mark = b"\xef\xbb\xbf"
        _write(tmp_path / "a.txt", mark + b"one\n")
        _write(tmp_path / "b.jsonl", mark + b'{"text": "two"}\n')
        assert _texts(tmp_path) == {tmp_path.name: ["one\n", "two"]}
        before = _fingerprint(tmp_path)
        _write(tmp_path / "a.txt", b"one\n")
        assert _fingerprint(tmp_path) == before

    @pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
    def test_of_utf16(self, tmp_path: Path, encoding: str):
        _write(tmp_path / "a.txt", "\ufeffone\n".encode(encoding))
        with pytest.raises(ValueError, match=r"a\.txt:1: UTF-16, .* iconv -f UTF-16 -t UTF-8"):
            _texts(tmp_path)


class TestCompressed:
    ROWS = "".join(f'{{"text": "row {i}, {i * i % 997}"}}\n' for i in range(2000)).encode()

    def test_files_are_read(self, tmp_path: Path):
        _write(tmp_path / "a.JSONL.gz", gzip.compress(self.ROWS) + gzip.compress(b'{"text": "z"}'))
        _write(tmp_path / "b.Txt.GZ", gzip.compress(b"b\n"))
        _write(tmp_path / "C.TXT", "c\n")
        (texts,) = _texts(tmp_path).values()
        assert texts[0] == "c\n"
        assert texts[1] == "row 0, 0"
        assert texts[-2:] == ["z", "b\n"]
        assert len(texts) == 2003
        assert _texts(tmp_path / "a.JSONL.gz").keys() == {"a"}

    def test_parquet(self, tmp_path: Path):
        pyarrow = pytest.importorskip("pyarrow", reason="an optional package")
        parquet = pytest.importorskip("pyarrow.parquet", reason="an optional package")
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": ["one"]}), buffer)
        _write(tmp_path / "a.parquet.gz", gzip.compress(buffer.getvalue()))
        assert _texts(tmp_path / "a.parquet.gz") == {"a": ["one"]}

    def test_cut_gzip(self, tmp_path: Path):
        _write(tmp_path / "a.jsonl.gz", gzip.compress(self.ROWS)[:-100])
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz:1\d\d\d: cannot be read: .*ended"):
            _texts(tmp_path)

    def test_zstandard(self, tmp_path: Path):
        zstandard = pytest.importorskip("zstandard", reason="an optional package")
        frames = [zstandard.compress(self.ROWS), zstandard.compress(b'{"text": "z"}\n')]
        path = _write(tmp_path / "a.jsonl.zst", b"".join(frames))
        (texts,) = _texts(path).values()
        assert texts[-2:] == ["row 1999, 25", "z"]
        _write(path, b"".join(frames)[:-5])
        with pytest.raises(ValueError, match=r"a\.jsonl\.zst:1: cannot be read: .* ends within"):
            _texts(path)

    def test_zstandard_is_not_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "zstandard", None)
        _write(tmp_path / "a.txt.zst", b"anything")
        with pytest.raises(ValueError, match=r"a\.txt\.zst.*: pip install zstandard"):
            _texts(tmp_path)


class TestFingerprint:
    def test_of_plain_files_is_over_names_and_contents(self, tmp_path: Path):
        """As it always was: what is prepared stays valid."""
        root = tmp_path / "root"
        for name in ("z.txt", "law/deep/train.txt", "news.jsonl"):
            _write(root / name, '{"text": "x"}')
        content = hashlib.sha256(b'{"text": "x"}').hexdigest()
        lines = [f"root/{n}\0{content}\n" for n in ("law/deep/train.txt", "news.jsonl", "z.txt")]
        assert _fingerprint(root) == hashlib.sha256("".join(lines).encode()).hexdigest()

    def test_of_a_saved_dataset_is_over_all_its_files(self, tmp_path: Path):
        """Too: as it always was."""
        root = tmp_path / "root"
        _write_saved_dataset(root / "train", [{"text": "x"}])
        _write(root / "dataset_dict.json", "{}")
        files = sorted(path for path in root.rglob("*") if path.is_file())
        assert len(files) == 4
        lines = [
            f"{file.relative_to(tmp_path)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n"
            for file in files
        ]
        assert _fingerprint(root) == hashlib.sha256("".join(lines).encode()).hexdigest()

    def test_follows_what_is_held_out(self, tmp_path: Path):
        for name in ("a.txt", "b.txt"):
            _write(tmp_path / name, name)
        asked = [None, tmp_path / "a.txt", tmp_path / "b.txt"]
        assert len({user_files.fingerprint(find_text(tmp_path, path)) for path in asked}) == 3

    def test_follows_what_is_read(self, tmp_path: Path):
        path = _write(tmp_path / "a.txt", "one")
        seen = [_fingerprint(tmp_path)]
        _write(path, "two")
        seen.append(_fingerprint(tmp_path))
        path = path.rename(tmp_path / "b.txt")
        seen.append(_fingerprint(tmp_path))
        _write(tmp_path / "x" / "train.txt", "one")
        seen.append(_fingerprint(tmp_path))
        (tmp_path / "x").rename(tmp_path / "train")  # another domain
        seen.append(_fingerprint(tmp_path))
        path.rename(tmp_path / "val.txt")  # another split
        seen.append(_fingerprint(tmp_path))
        assert len(set(seen)) == len(seen)
        _write(tmp_path / "test.txt", "left out")
        assert _fingerprint(tmp_path) == seen[-1]

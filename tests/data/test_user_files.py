"""The user's own text: every kind of file, and every way in which it can be wrong."""

import json
import sys
import types
from pathlib import Path

import pytest

from dsmoe_jax.data.user_files import fingerprint, read_user_corpus


def _texts(path: Path) -> dict[str, list[str]]:
    return {name: [d.text for d in found] for name, found in read_user_corpus(path).items()}


def test_text_files_and_their_domains(tmp_path: Path):
    root = tmp_path / "mine"
    (root / "law" / "deep").mkdir(parents=True)
    (root / "a.txt").write_text("alpha\n", "utf-8")
    (root / "law" / "deep" / "b.txt").write_text("中文\n", "utf-8")
    (root / "notes.md").write_text("not text", "utf-8")
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
        ("a.txt", b"fine\n\xff\xfe", r"a\.txt: not UTF-8 at byte 5 \(0xff\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe4"}\n', r"a\.jsonl: not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"txt": "x"}\n', r"a\.jsonl:1: needs a field 'text'"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1: needs a field 'text'"),
        ("a.jsonl", b'{"text": "x", "domain": 3}\n', r"a\.jsonl:1: 'domain' must be a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: 'text' has a lone surrogate"),
        ("a.csv", b"x", r"a\.csv: suffix must be one of \.txt"),
    ],
)
def test_bad_content_names_its_place(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_user_corpus(tmp_path / name)


def test_nothing_there(tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere: no such file"):
        read_user_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no \.txt"):
        read_user_corpus(tmp_path)


def test_the_fingerprint_follows_content(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("one", "utf-8")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    path.write_text("two", "utf-8")
    assert fingerprint(tmp_path) != before


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        read_user_corpus(tmp_path)


def test_parquet(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow", reason="an optional package")
    parquet = pytest.importorskip("pyarrow.parquet", reason="an optional package")
    rows = {"text": ["one", "two"], "domain": ["x", None], "other": [1, 2]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    assert _texts(tmp_path / "a.parquet") == {"x": ["one"], "a": ["two"]}
    (tmp_path / "b.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match=r"b\.parquet: not a Parquet file"):
        _texts(tmp_path / "b.parquet")


def test_a_saved_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "state.json").write_text("{}", "utf-8")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_user_corpus(tmp_path)
    rows = [{"text": "one", "domain": "x"}, {"text": "two"}]
    fake = types.SimpleNamespace(load_from_disk=lambda path: {"train": rows})
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert _texts(tmp_path) == {"x": ["one"], tmp_path.name: ["two"]}

"""Preparing: what ends up in the manifest, repeats, interruptions, refusals, the command."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmoe_jax.data import packing, readers, sources
from dsmoe_jax.data import prepare as prepare_module
from dsmoe_jax.data.corpus import load_corpus
from dsmoe_jax.data.fetch import Package
from dsmoe_jax.data.prepare import prepare

SIZES = {"vocab_size": 300, "sequence_length": 32}


def _write_corpus(directory: Path) -> Path:
    directory.mkdir()
    for domain in ("prose", "code"):
        rows = [{"text": f"{domain} {i} " * 30, "domain": domain} for i in range(60)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{domain}.jsonl").write_text(text, "utf-8")
    return directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A user corpus with the domains 'code' and 'prose'."""
    return _write_corpus(tmp_path / "text")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every corpus that is built."""
    seen: list[str] = []
    build = prepare_module._build
    monkeypatch.setattr(
        prepare_module, "_build", lambda request, out: (seen.append(str(out)), build(request, out))
    )
    return seen


def test_manifest_of_the_tiny_corpus(tiny_corpus: Path):
    corpus = load_corpus(tiny_corpus)
    assert corpus.domains == ["code_python", "en_reference", "en_docstrings", "unicode_names"]
    assert (corpus.vocab_size, corpus.sequence_length) == (512, 64)
    assert len(corpus.fingerprint) == 64
    for domain in corpus.manifest["domains"]:
        assert {"source", "licence"} <= domain["origin"][0].keys()
        assert len(domain["sha256"]) == 64
        for part in ("train", "validation"):
            tokens = domain["tokens"][part]
            assert domain["documents"][part] < tokens < domain["bytes"][part]
            assert domain["records"][part] == -(-tokens // 64)
    for part in ("train", "validation"):
        total = sum(domain["records"][part] for domain in corpus.manifest["domains"])
        assert corpus.num_records(part) == total == sum(1 for _ in _records(corpus, part))


def _records(corpus, part: str):
    return packing.read_records(corpus.shards(part))


def test_no_text_is_in_both_splits(text: Path, tmp_path: Path):
    corpus = prepare(str(text), tmp_path / "out", **SIZES)
    sides = []
    for part in ("train", "validation"):
        streams: dict[int, list[int]] = {}
        for record in _records(corpus, part):
            domain, tokens = packing.decode_record(record)
            streams.setdefault(domain, []).extend(tokens[1:].tolist())
        joined = "".join(
            corpus.tokenizer.decode(stream, skip_special_tokens=False)
            for stream in streams.values()
        )
        sides.append({document.strip() for document in joined.split("<|endoftext|>")} - {""})
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0] | sides[1]) == 120
    assert len(sides[1]) == sum(d["documents"]["validation"] for d in corpus.manifest["domains"])


def test_the_same_request_again_does_nothing(text: Path, tmp_path: Path, builds: list[str]):
    first = prepare(str(text), tmp_path / "out", **SIZES)
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    again = prepare(str(text), tmp_path / "out", **SIZES)
    assert again.fingerprint == first.fingerprint
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    assert len(builds) == 1
    elsewhere = prepare(str(text), tmp_path / "elsewhere", **SIZES)
    assert elsewhere.fingerprint == first.fingerprint


def test_fingerprint_follows_what_is_asked(text: Path, tmp_path: Path):
    one = prepare(str(text), tmp_path / "one", **SIZES)
    for name, change in {
        "vocab": {"vocab_size": 301},
        "length": {"sequence_length": 33},
        "domains": {"domains": ["code"]},
        "cap": {"max_bytes_per_domain": 9000},
    }.items():
        other = prepare(str(text), tmp_path / name, **{**SIZES, **change})
        assert other.fingerprint != one.fingerprint, name
    assert load_corpus(tmp_path / "domains").domains == ["code"]


def test_fingerprint_follows_the_records_too(text: Path, tmp_path: Path):
    one = prepare(str(text), tmp_path / "one", **SIZES)
    for file in text.iterdir():
        labels = {"prose": "code", "code": "prose"}
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        swapped = [{**row, "domain": labels[row["domain"]]} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in swapped), "utf-8")
    other = prepare(str(text), tmp_path / "other", **SIZES)
    assert other.tokenizer.to_json() == one.tokenizer.to_json()
    assert other.fingerprint != one.fingerprint


def test_two_at_once_build_once(text: Path, tmp_path: Path, builds: list[str]):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(prepare(str(text), tmp_path / "out", **SIZES)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({corpus.fingerprint for corpus in found}) == 1
    assert (len(found), len(builds)) == (3, 1)


def test_a_killed_build_leaves_nothing_and_is_made_again(tmp_path: Path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dsmoe_jax", "prepare_data", "--corpus=stdlib", f"--out={out}"]
    command += ["--vocab_size=300", "--sequence_length=32", "--max_bytes_per_domain=60000"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / ".out.building").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not out.exists()
    assert (tmp_path / ".out.building").exists()  # seen in the middle
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "training and" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_build_leaves_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "write_shards", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(str(text), tmp_path / "out", **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_nothing_is_overwritten(text: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work", "utf-8")
    with pytest.raises(ValueError, match="exists and is not a corpus"):
        prepare(str(text), out, **SIZES)
    assert (out / "thesis.tex").read_text("utf-8") == "years of work"
    with pytest.raises(ValueError, match="exists and is not a corpus"):
        prepare(str(text), text / "code.jsonl", **SIZES)
    (out / "thesis.tex").unlink()
    prepare(str(text), out, **SIZES)  # an empty directory is fine
    with pytest.raises(ValueError, match=r"holds another corpus: vocab_size 300 \(asked: 400\)"):
        prepare(str(text), out, vocab_size=400, sequence_length=32)
    with (text / "code.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match="holds another corpus: sha256"):
        prepare(str(text), out, **SIZES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": "no/such"}, "no/such: no such file or directory"),
        ({"vocab_size": 257}, "vocab_size=257: byte-level BPE needs >= 258"),
        ({"vocab_size": 9999}, "vocab_size=9999 is too large for this corpus"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"max_bytes_per_domain": 0}, "max_bytes_per_domain=0"),
        ({"domains": ["prosa"]}, "unknown domain 'prosa'; there are code, prose"),
        ({"corpus": "stdlib", "domains": ["x"]}, "unknown domain 'x'; there are code_python, en_r"),
        (
            {"corpus": "demo", "domains": ["zh"]},
            "unknown domain 'zh'; there are en_drama.*en_books",
        ),
    ],
)
def test_bad_requests(text: Path, tmp_path: Path, change: dict, message: str):
    request = {"corpus": str(text), "out": tmp_path / "out", **SIZES, **change}
    with pytest.raises(ValueError, match=message):
        prepare(**request)
    assert not (tmp_path / "out").exists()


def test_an_empty_corpus(tmp_path: Path):
    (tmp_path / "empty.txt").write_text(" \n\n", "utf-8")
    with pytest.raises(ValueError, match=r"empty\.txt: empty, its files hold no text"):
        prepare(str(tmp_path / "empty.txt"), tmp_path / "out", **SIZES)


def test_demo_domains_come_from_archives(
    index: Path, make_wheel: Callable[..., Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    members = {f"verse/{i}.md": f"verse number {i}, " * 40 for i in range(50)}
    package = make_wheel(index, members)
    source = sources.Source("verse", "verse/*.md", readers.whole_files, "mine")
    monkeypatch.setitem(sources.PACKAGES, "verse", package)
    monkeypatch.setattr(sources, "DEMO", {"verse": (source,)})
    corpus = prepare("demo", tmp_path / "out", **SIZES)
    (domain,) = corpus.manifest["domains"]
    assert sum(domain["documents"].values()) == 50
    assert domain["origin"] == [
        {"source": "verse==1.0 verse/*.md", "sha256": package.sha256, "licence": "mine"}
    ]
    make_wheel(index, {"verse/0.md": "another text"})
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"source verse==1\.0: sha256"):
        prepare("demo", tmp_path / "other", **SIZES)
    assert not (tmp_path / "other").exists()


def test_sources_are_complete():
    for table in (sources.DEMO, sources.EXTRA):
        for parts in table.values():
            assert all(part.package in sources.PACKAGES and part.licence for part in parts)
    assert len(sources.DEMO) >= 8
    assert {"zh_news", "zh_reviews", "code_python"} <= sources.DEMO.keys()
    for package in sources.PACKAGES.values():
        assert len(bytes.fromhex(package.sha256)) == 32


def test_the_command_says_what_is_wrong_in_one_line(text: Path, tmp_path: Path):
    (text / "latin.txt").write_bytes("Größe".encode("latin-1"))
    command = [sys.executable, "-m", "dsmoe_jax", "prepare_data", f"--out={tmp_path / 'out'}"]
    command += [f"--corpus={text}", "--vocab_size=300", "--sequence_length=32"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {text / 'latin.txt'}: not UTF-8 at byte 2 (0xf6)")
    assert "Traceback" not in result.stderr
    result = subprocess.run(command[:-1], capture_output=True, text=True, check=False)
    message = "error: --sequence_length: missing; for example --sequence_length=256\n"
    assert (result.returncode, result.stderr) == (2, message)
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--max_bytes_per_domain" in shown.stdout

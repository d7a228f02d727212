"""Preparing: what ends up in the manifest, repeats, interruptions, refusals, the command."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.implementations import ByteLevelBPETokenizer

from dsmoe_jax.data import packing, readers, sources, user_files
from dsmoe_jax.data import prepare as prepare_module
from dsmoe_jax.data.corpus import Corpus, load_corpus
from dsmoe_jax.data.fetch import Package
from dsmoe_jax.data.pipeline import validation_batches
from dsmoe_jax.data.prepare import prepare

SIZES = {"vocab_size": 300, "sequence_length": 32}
SMALL = {**SIZES, "vocab_size": 270}


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
        ({"corpus": "stdlib", "text_column": "x"}, "text_column=x: is for text of one's own, not"),
        ({"corpus": "demo", "validation": "x"}, "validation=x: is for text of one's own, not"),
        ({"validation": "no/such"}, "no/such: no such file or directory"),
        ({"tokenizer": "no/such"}, "no/such: no such file"),
        ({"vocab_size": None}, "vocab_size=None: byte-level BPE needs >= 258"),
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
    verse = sources.BuiltIn({"verse": (source,)}, 2_000_000, "no download")
    monkeypatch.setitem(sources.CORPORA, "demo", verse)
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


def _write(path: Path, name: str, count: int) -> None:
    """Rows `NAME 0`, `NAME 1`, ... in a .jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (f"{name} {i} of this text. " * 4 for i in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


def _documents(corpus: Corpus, part: str) -> list[str]:
    """The documents of a split, in order of their records."""
    streams: dict[int, list[int]] = {}
    for record in _records(corpus, part):
        domain, tokens = packing.decode_record(record)
        streams.setdefault(domain, []).extend(tokens[1:].tolist())
    decoded = (corpus.tokenizer.decode(s, skip_special_tokens=False) for s in streams.values())
    return [text for stream in decoded for text in stream.split("<|endoftext|>")[:-1]]


def _names(corpus: Corpus, part: str) -> Counter[str]:
    """Documents of a split, counted by the names given to `_write`."""
    return Counter(text.split()[0] for text in _documents(corpus, part))


class TestSplitOfOnesOwn:
    def test_by_name(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
        """Test text is not trained on, validation text is held out, and both are said."""
        for name, count in (("train", 200), ("validation", 40), ("test", 40)):
            _write(tmp_path / "text" / f"{name}.jsonl", name, count)
        corpus = prepare(str(tmp_path / "text"), tmp_path / "out", **SIZES)
        assert _names(corpus, "train") == {"train": 200}
        assert _names(corpus, "validation") == {"validation": 40}
        notes = [
            "trained on: 1 (train.jsonl); held out: 1 (validation.jsonl)",
            "left out: test text by name 1 (test.jsonl)",
        ]
        assert corpus.manifest["notes"] == notes
        assert all(note in capfd.readouterr().err.splitlines() for note in [notes[0]])

    def test_given(self, tmp_path: Path):
        """Nothing else is held out, and what is held out is not trained on, in any domain."""
        _write(tmp_path / "text" / "a" / "a.jsonl", "a", 20)
        _write(tmp_path / "text" / "b" / "b.jsonl", "b", 1)
        _write(tmp_path / "held" / "c" / "c.jsonl", "c", 9)
        _write(tmp_path / "held" / "a.jsonl", "a", 5)
        held = tmp_path / "held"
        corpus = prepare(str(tmp_path / "text"), tmp_path / "out", validation=held, **SMALL)
        assert _names(corpus, "train") == {"a": 15, "b": 1}
        assert _names(corpus, "validation") == {"a": 5, "c": 9}
        assert corpus.domains == ["a", "b", "c", "text"]
        assert "left out of 35 documents: 5 held out too" in corpus.manifest["notes"][-1]
        batches = list(validation_batches(corpus.directory, 4))
        tokens = sum(domain["tokens"]["validation"] for domain in corpus.manifest["domains"])
        assert sum(batch["loss_mask_BS"].sum() for batch in batches) == tokens

    def test_without_text(self, tmp_path: Path):
        _write(tmp_path / "text.jsonl", "a", 3)
        (tmp_path / "held.txt").write_text("\n", "utf-8")
        request = {"corpus": str(tmp_path / "text.jsonl"), "out": tmp_path / "out", **SIZES}
        with pytest.raises(ValueError, match=r"text\.jsonl: holds no text to hold out"):
            prepare(**request, validation=tmp_path / "held.txt")
        _write(tmp_path / "held.jsonl", "a", 3)
        with pytest.raises(ValueError, match=r"holds no text to train on that is not held out"):
            prepare(**request, validation=tmp_path / "held.jsonl")


def test_repeats_are_counted_and_can_be_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = tmp_path / "text.jsonl"
    _write(path, "a", 40)
    path.write_text(path.read_text("utf-8") * 2, "utf-8")
    once = prepare(str(path), tmp_path / "once", **SIZES)
    note = "left out of 80 documents: 40 exact copies of others (keep_repeats keeps them)"
    assert once.manifest["notes"] == [note]
    assert note in capfd.readouterr().err.splitlines()
    twice = prepare(str(path), tmp_path / "twice", keep_repeats=True, **SIZES)
    assert twice.manifest["notes"] == []
    for part in ("train", "validation"):
        counts = Counter(_documents(twice, part))
        assert counts == {text: 2 for text in _documents(once, part)}


def test_another_text_column(tmp_path: Path):
    path = tmp_path / "text.jsonl"
    _write(path, "a", 40)
    usual = prepare(str(path), tmp_path / "usual", **SIZES)
    path.write_text(path.read_text("utf-8").replace('"text"', '"body"'), "utf-8")
    with pytest.raises(ValueError, match=r"text\.jsonl:1: needs a field 'text' .* \(it has body\)"):
        prepare(str(path), tmp_path / "none", **SIZES)
    other = prepare(str(path), tmp_path / "other", text_column="body", **SIZES)
    assert other.fingerprint == usual.fingerprint


class TestTokenizerOfOthers:
    def test_is_used(self, text: Path, tmp_path: Path):
        """The tokenizer of another corpus: the ids are those that Hugging Face's library gives."""
        first = prepare(str(text), tmp_path / "first", **SIZES)
        _write(tmp_path / "more.jsonl", "more", 30)
        second = prepare(
            str(tmp_path / "more.jsonl"), tmp_path / "second", None, 32, tokenizer=first.directory
        )
        assert second.vocab_size == 300
        assert second.tokenizer.to_json() == first.tokenizer.to_json()
        theirs = HuggingFaceTokenizer.from_file(str(first.directory / "tokenizer.json"))
        ids = theirs.encode("more 3 of this text. " * 4, add_special_tokens=False).ids
        streams = [packing.decode_record(r)[1].tolist() for r in _records(second, "train")]
        stream = [token for tokens in streams for token in tokens[1:]]
        assert any(stream[i : i + len(ids)] == ids for i in range(len(stream)))

    def test_larger_than_asked(self, text: Path, tmp_path: Path):
        first = prepare(str(text), tmp_path / "first", **SIZES)
        with pytest.raises(
            ValueError, match=r"vocab_size=299: must be at least 300, the tokens of"
        ):
            prepare(str(text), tmp_path / "second", 299, 32, tokenizer=first.directory)

    @pytest.mark.parametrize("options", [{"lowercase": True}, {"add_prefix_space": True}])
    def test_that_changes_the_text(self, text: Path, tmp_path: Path, options: dict):
        theirs = ByteLevelBPETokenizer(**options)
        theirs.train_from_iterator(["some text"], 300, show_progress=False)
        theirs.save(str(tmp_path / "theirs.json"))
        (text / "a.jsonl").write_text('{"text": "Größe 7"}\n{"text": "Weg"}\n', "utf-8")
        with pytest.raises(ValueError, match=r"theirs\.json: changes the text, '.+' comes back as"):
            prepare(str(text), tmp_path / "out", None, 32, tokenizer=tmp_path / "theirs.json")
        assert not (tmp_path / "out").exists()


def test_text_that_changes_meanwhile(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = user_files.read_documents

    def slowly(*args):
        found = read(*args)
        (text / "code.jsonl").write_text('{"text": "new"}\n', "utf-8")
        return found

    monkeypatch.setattr(user_files, "read_documents", slowly)
    with pytest.raises(ValueError, match="has changed while it was read"):
        prepare(str(text), tmp_path / "out", **SIZES)


def test_a_tilde_is_the_home_directory(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(text)
    corpus = prepare("~/text", "~/out", **SIZES)
    assert corpus.directory == tmp_path / "out"
    assert sorted(path.name for path in text.iterdir()) == ["code.jsonl", "prose.jsonl"]
    with pytest.raises(ValueError, match=r"out=~nobody-of-this-name/out: there is no such home"):
        prepare("~/text", "~nobody-of-this-name/out", **SIZES)
    for corpus, out in (("", "out"), ("~/text", ""), ("~/text", "a\0b")):
        with pytest.raises(ValueError, match=r"(corpus|out)='.*': must be a path"):
            prepare(corpus, out, **SIZES)


def test_a_directory_that_cannot_be_made(text: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"code\.jsonl: cannot be made: "):
        prepare(str(text), text / "code.jsonl" / "out", **SIZES)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"\xff" + content,
        lambda content: content[:100],
        lambda content: b"[" * 200_000,
        lambda content: b'{"format": 1}',
        lambda content: b'{"format": 99}',
    ],
)
def test_a_damaged_manifest_is_named(tiny_corpus: Path, tmp_path: Path, damage: Callable):
    shutil.copytree(tiny_corpus, tmp_path / "corpus")
    path = tmp_path / "corpus" / "manifest.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"manifest\.json: (not|lacks) "):
        load_corpus(tmp_path / "corpus")


def test_sources_are_complete():
    for table in (sources.DEMO, sources.EXTRA, sources.GPU):
        for parts in table.values():
            assert all(part.package in sources.PACKAGES and part.licence for part in parts)
    assert sources.GPU.keys() == sources.DEMO.keys() | sources.EXTRA.keys()
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
    assert last.startswith(f"error: {text / 'latin.txt'}:1: not UTF-8 at byte 2 (0xf6)")
    assert "Traceback" not in result.stderr
    result = subprocess.run(command[:-1], capture_output=True, text=True, check=False)
    message = "error: --sequence_length: missing; for example --sequence_length=256\n"
    assert (result.returncode, result.stderr) == (2, message)
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--max_bytes_per_domain" in shown.stdout


def test_the_command_hands_on_its_flags(text: Path, tmp_path: Path):
    first = prepare(str(text), tmp_path / "first", **SIZES)
    rows = [json.dumps({"body": f"row {i // 2}"}) for i in range(60)]
    (tmp_path / "own.jsonl").write_text("\n".join(rows), "utf-8")
    (tmp_path / "held.txt").write_text("held out\n", "utf-8")
    command = [sys.executable, "-m", "dsmoe_jax", "prepare_data", "--sequence_length=32"]
    command += [f"--corpus={tmp_path / 'own.jsonl'}", f"--out={tmp_path / 'out'}", "--keep_repeats"]
    command += [f"--tokenizer={first.directory}", "--text_column=body"]
    command += [f"--validation={tmp_path / 'held.txt'}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "trained on: 1 (own.jsonl); held out: 1 (held.txt)" in result.stderr.splitlines()
    corpus = load_corpus(tmp_path / "out")
    (domain,) = corpus.manifest["domains"]
    assert domain["documents"] == {"train": 60, "validation": 1}
    assert corpus.tokenizer.to_json() == first.tokenizer.to_json()

"""Corpora in parts: the same whoever prepares them, killed or not; copies; what training reads."""

import json
import os
import resource
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dsmoe_jax.data import in_parts, survey
from dsmoe_jax.data.corpus import Corpus, load_corpus
from dsmoe_jax.data.documents import digest
from dsmoe_jax.data.packed import pack
from dsmoe_jax.data.packing import decode_record
from dsmoe_jax.data.pipeline import train_batches, validation_batches
from dsmoe_jax.data.places import places_by_domain
from dsmoe_jax.data.prepare import prepare
from dsmoe_jax.data.records import Records
from dsmoe_jax.data.survey import HELD_OUT_TOO, IN_OTHER_DOMAIN, REPEAT, Survey
from tests.tools.forked import Process, assert_refused, run_all

SIZES = {"vocab_size": 265, "sequence_length": 32}
FLAGS = ["--vocab_size=265", "--sequence_length=32"]
N_FILES = 5


def _row(domain: str, i: int) -> dict[str, str]:
    return {"text": f"{domain} {i} of this text " * 4, "domain": domain}


def _write(folder: Path, copies: bool = True) -> Path:
    """Files of two domains; the last one has copies of the first and an empty row."""
    folder.mkdir()
    for k in range(N_FILES):
        rows = [_row(domain, 40 * k + i) for i in range(40) for domain in ("prose", "code")]
        if copies and k == N_FILES - 1:
            again = [_row("prose", i) for i in range(7)]
            elsewhere = [{**_row("code", i), "domain": "prose"} for i in range(3)]
            rows += [*again, *elsewhere, {"text": " ", "domain": "code"}]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{k}.jsonl").write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("in_parts") / "text")


@pytest.fixture(scope="module")
def alone(text: Path) -> Corpus:
    """The corpus as one process prepares it."""
    corpus = in_parts.prepare(str(text), text.parent / "alone", **SIZES)
    assert corpus is not None
    return corpus


def _files(corpus: Corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.directory.iterdir()}


def _documents(corpus: Corpus, split: str) -> Counter[tuple[str, str]]:
    """(domain, text) of every document of a split, read by domain."""
    records = Records(corpus, split)
    found: Counter[tuple[str, str]] = Counter()
    for name, places in zip(corpus.domains, places_by_domain(corpus, split), strict=True):
        decoded = [decode_record(r) for r in records.read([places[i] for i in range(len(places))])]
        assert {corpus.domains[domain] for domain, _ in decoded} <= {name}
        stream = [token for _, tokens in decoded for token in tokens[1:].tolist()]
        joined = corpus.tokenizer.decode(stream, skip_special_tokens=False)
        found.update((name, one) for one in joined.split("<|endoftext|>") if one)
    return found


def test_every_document_is_there_once(alone: Corpus):
    train, held_out = (_documents(alone, split) for split in ("train", "validation"))
    texts = [(d, _row(d, i)["text"]) for d in ("code", "prose") for i in range(40 * N_FILES)]
    elsewhere = [("prose", _row("code", i)["text"]) for i in range(3)]
    assert train + held_out == Counter(texts + elsewhere)
    assert {text for _, text in train}.isdisjoint(text for _, text in held_out)
    assert 0.01 < held_out.total() / (train + held_out).total() < 0.15
    code, prose = alone.manifest["domains"]
    assert (prose["repeats"], code["repeats"], prose["in_other_domains"]) == (7, 0, 0)
    n = 2 * 40 * N_FILES + 11
    note = f"left out of {n} documents: 7 exact copies of others (keep_repeats keeps them), 1 with"
    assert any(line.startswith(note) for line in alone.manifest["notes"])
    for split in ("train", "validation"):
        total = sum(domain["records"][split] for domain in (code, prose))
        assert alone.num_records(split) == len(Records(alone, split)) == total


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_it_does_not_depend_on_the_number_of_processes(
    text: Path, alone: Corpus, tmp_path: Path, shards: int, capsys: pytest.CaptureFixture[str]
):
    order = [*range(1, shards), 0]  # whichever is last merges
    for shard in order:
        corpus = in_parts.prepare(str(text), tmp_path / "out", shards=shards, shard=shard, **SIZES)
        if shard == 1:
            says = capsys.readouterr().err
            assert "5 parts are done; the shards 0" in says
            with pytest.raises(
                ValueError, match=r"parts are not done; of --shards=\d start --shard=0"
            ):
                in_parts.merge(tmp_path / "out", shards)
    assert corpus is not None
    assert _files(corpus) == _files(alone)
    assert in_parts.merge(tmp_path / "out").fingerprint == alone.fingerprint
    again = in_parts.prepare(str(text), tmp_path / "out", **SIZES)
    assert again is not None
    assert again.fingerprint == alone.fingerprint
    assert not (tmp_path / "out" / "parts").exists()


def test_killed_at_any_moment_it_goes_on(text: Path, alone: Corpus, tmp_path: Path):
    """Each process is killed as soon as it has made a few more files."""
    out = tmp_path / "out"
    case = ["prepare_data", f"--corpus={text}", f"--out={out}", "--shards=1", *FLAGS]
    kills = 0
    made: dict[str, int] = {}
    while not (out / "manifest.json").exists():
        before = _made(out)
        process = Process(case)
        while process.result(wait=False) is None and len(_made(out)) <= len(before) + 3:
            time.sleep(0.001)
        if process.result(wait=False) is None:
            os.kill(process.pid, signal.SIGKILL)
        result = process.result()
        assert result is not None
        assert result.code in (0, -signal.SIGKILL), result.err
        kills += result.code != 0
        for name, time_of in made.items():  # what was whole is not made again
            path = out / name
            if path.exists():
                assert path.stat().st_mtime_ns == time_of
        last = ("parts/survey-", "parts/copies-", "parts/part-")  # written last of each kind
        whole = [name for name in _made(out) if name.startswith(last)]
        made |= {name: (out / name).stat().st_mtime_ns for name in whole}
        assert kills < 20
    assert kills >= 2
    corpus = in_parts.prepare(str(text), out, **SIZES)
    assert corpus is not None
    files = {name: content for name, content in _files(corpus).items() if name[0] != "."}
    assert files == _files(alone)


def _made(out: Path) -> set[str]:
    found = [os.path.join(folder, name) for folder, _, names in os.walk(out) for name in names]
    return {os.path.relpath(p, out) for p in found if not os.path.basename(p).startswith(".")}


def test_training_reads_it(alone: Corpus):
    size, n = 8, alone.num_records("train")
    batches = train_batches(alone.directory, 32, 1, 3)
    read = [next(batches)["targets_BS"].tobytes() for _ in range(n)]
    assert len(set(read)) > 0.9 * n  # two records may be alike
    records = Records(alone, "train").read(range(n))
    assert sorted(r[8:136] for r in records if len(r) == 136) == sorted(
        t for t in read if t in {r[8:136] for r in records}
    )
    held_out = list(validation_batches(alone.directory, size))
    counts = np.zeros(2)
    for batch in held_out[: len(held_out) // 2]:
        counts += np.bincount(batch["domain_BS"][:, 0], minlength=2)
    whole = [d["records"]["validation"] for d in alone.manifest["domains"]]
    np.testing.assert_allclose(counts / counts.sum(), np.array(whole) / sum(whole), atol=0.1)


def test_files_are_opened_when_they_are_read(alone: Corpus):
    records = Records(alone, "train")
    opened = lambda: sum(r is not None for r in records._source._readers)  # noqa: E731
    assert opened() == 0
    records.read([0, 1])
    assert opened() == 1


def test_more_files_than_a_process_may_open(alone: Corpus, monkeypatch: pytest.MonkeyPatch):
    limits = [600, 4000]
    infinity = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), new))
    monkeypatch.setattr(Corpus, "shards", lambda *_: [Path("x")] * 1000)
    monkeypatch.setattr(Corpus, "records_by_shard", lambda *_: [1] * 1000)
    Records(alone, "train")
    assert limits == [1512, 4000]
    limits[:] = [600, 1200]
    with pytest.raises(
        ValueError, match=r"has 1000 files, and this process may open 1200; must be"
    ):
        Records(alone, "train")
    for allowed in ([600, infinity], [infinity, infinity]):
        limits[:] = allowed
        Records(alone, "train")


def test_copies_across_domains(text: Path, alone: Corpus, tmp_path: Path):
    options = {"dedup_across_domains": True, **SIZES}
    for make in (in_parts.prepare, prepare):
        corpus = make(str(text), tmp_path / make.__module__, **options)
        assert corpus is not None
        texts = [text for split in ("train", "validation") for _, text in _documents(corpus, split)]
        assert len(texts) == len(set(texts)) == 2 * 40 * N_FILES
        prose = corpus.manifest["domains"][1]
        assert (prose["repeats"], prose["in_other_domains"]) == (7, 3)
        assert any(
            "3 exact copies of others in other domains" in n for n in corpus.manifest["notes"]
        )
    kept = in_parts.prepare(str(text), tmp_path / "kept", keep_repeats=True, **SIZES)
    assert kept is not None
    documents = [d["documents"] for d in kept.manifest["domains"]]
    assert sum(d["train"] + d["validation"] for d in documents) == 2 * 40 * N_FILES + 10
    with pytest.raises(ValueError, match="keep_repeats=True: cannot be together with dedup_across"):
        prepare(str(text), tmp_path / "no", keep_repeats=True, **options)


def test_text_that_the_user_holds_out(tmp_path: Path):
    folder = _write(tmp_path / "text", copies=False)
    rows = [_row("prose", i) for i in range(0, 400, 40)] + [_row("prose", 1000)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    corpus = in_parts.prepare(
        str(folder), tmp_path / "out", validation=tmp_path / "held.jsonl", shards=2, **SIZES
    )
    assert corpus is not None
    assert _documents(corpus, "validation") == Counter(("prose", row["text"]) for row in rows)
    assert corpus.manifest["domains"][1]["held_out_too"] == N_FILES
    n = _documents(corpus, "train").total()
    assert n == 2 * 40 * N_FILES - N_FILES


def test_a_given_tokenizer_and_some_domains(text: Path, alone: Corpus, tmp_path: Path):
    corpus = in_parts.prepare(
        str(text), tmp_path / "out", None, 32, ["prose"], tokenizer=alone.directory, shards=2
    )
    assert corpus is not None
    assert corpus.domains == ["prose"]
    assert corpus.tokenizer.to_json() == alone.tokenizer.to_json()
    with pytest.raises(ValueError, match="unknown domain 'verse'; there are prose, code"):
        in_parts.prepare(str(text), tmp_path / "other", domains=["verse"], **SIZES)


def test_a_dataset_of_many_files(text: Path, alone: Corpus, tmp_path: Path):
    pytest.importorskip("datasets")
    corpora = [in_parts.prepare(f"hf:{text}", tmp_path / f"{n}", shards=n, **SIZES) for n in (1, 3)]
    assert [len(corpus.shards("train")) for corpus in corpora if corpus is not None] == [5, 5]
    for corpus in corpora:
        assert corpus is not None
        assert corpus.fingerprint == alone.fingerprint


class TestRefused:
    def test_another_request(self, text: Path, alone: Corpus, tmp_path: Path):
        with pytest.raises(
            ValueError, match=r"holds another corpus: sequence_length 32 \(asked: 16"
        ):
            in_parts.prepare(str(text), alone.directory, 265, 16)
        in_parts.prepare(str(text), tmp_path / "out", shards=2, shard=0, **SIZES)
        with pytest.raises(
            ValueError, match=r"holds another corpus: sequence_length 32 \(asked: 16"
        ):
            in_parts.prepare(str(text), tmp_path / "out", 265, 16, shards=2, shard=1)

    def test_files_that_change(self, tmp_path: Path):
        folder = _write(tmp_path / "text")
        out = tmp_path / "out"
        in_parts.prepare(str(folder), out, shards=2, shard=0, **SIZES)
        file = folder / "1.jsonl"
        content = file.read_text("utf-8")
        file.write_text(content.replace("code 41", "code 4x"), "utf-8")  # of the same size
        with pytest.raises(
            ValueError, match=r"1\.jsonl: has changed while the corpus was prepared"
        ):
            in_parts.prepare(str(folder), out, shards=2, shard=1, **SIZES)
        file.write_text(content + "\n", "utf-8")
        with pytest.raises(ValueError, match=r"holds another corpus: files"):
            in_parts.prepare(str(folder), out, shards=2, shard=1, **SIZES)
        with pytest.raises(ValueError, match=r"other files than when it was begun"):
            in_parts.merge(out)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shards": 0}, "shards=0: must be at least 1"),
            ({"shards": 2, "shard": 2}, "shard=2: must be from 0 to shards - 1 = 1"),
        ],
    )
    def test_shards(self, text: Path, tmp_path: Path, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            in_parts.prepare(str(text), tmp_path / "out", **options, **SIZES)

    def test_a_foreign_directory(self, text: Path, tmp_path: Path):
        with pytest.raises(ValueError, match="exists and is not a corpus"):
            in_parts.prepare(str(text), text, **SIZES)
        with pytest.raises(ValueError, match="holds no parts; prepare_data --shards=N makes them"):
            in_parts.merge(text)

    def test_nothing_to_hold_out(self, tmp_path: Path):
        (tmp_path / "a.jsonl").write_text(json.dumps(_row("prose", 0)), "utf-8")
        with pytest.raises(ValueError, match=r"a\.jsonl: holds no text to hold out; 5 % of"):
            in_parts.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", **SIZES)

    def test_packing(self, alone: Corpus, tmp_path: Path):
        with pytest.raises(
            ValueError, match="was prepared in parts; must be prepared without --sh"
        ):
            pack(alone, tmp_path / "a.tar.xz")

    def test_a_file_that_is_cut(self, text: Path, alone: Corpus, tmp_path: Path):
        shutil.copytree(alone.directory, tmp_path / "copy")
        path = load_corpus(tmp_path / "copy").shards("train")[2]
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(
            ValueError, match=r"train-00002.*: has \d+ bytes, the manifest says \d+"
        ):
            load_corpus(tmp_path / "copy")


def test_the_command(text: Path, alone: Corpus, tmp_path: Path):
    out = tmp_path / "out"
    to_out = ["prepare_data", f"--out={out}"]
    case = [*to_out, f"--corpus={text}", *FLAGS, "--shards=2"]
    merge = [*to_out, "--merge", "--shards=2"]
    first, early, second, last, *refused = run_all(
        [
            [*case, "--shard=1"],
            merge,
            [*case, "--shard=0"],
            merge,
            [*case[:-1], "--shard=1"],
            [*case, "--pack=x.tar.xz"],
            [*to_out, "--corpus=demo", *FLAGS, "--shards=2"],
        ]
    )
    assert (first.code, first.out) == (0, "")
    assert first.err.splitlines()[-1] == "2 of 5 parts are done; the shards 0 are not"
    assert_refused(early, "3 of 5 parts are not done; of --shards=2 start --shard=0")
    assert second.code == last.code == 0
    assert second.out == last.out
    n = alone.num_records("train")
    assert last.out.splitlines()[-1].startswith(f"{n} training and ")
    assert load_corpus(out).fingerprint == alone.fingerprint
    says = ("--shard=1: needs --shards", "--pack=x.tar.xz: cannot be", "--shards: is for text of")
    for result, message in zip(refused, says, strict=True):
        assert_refused(result, message)


documents = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 6)), max_size=8)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.lists(st.tuples(st.booleans(), documents), min_size=1, max_size=4),
    st.sampled_from(["keep", "domain", "corpus"]),
    st.integers(1, 5),
)
def test_which_copy_stays(
    parts: list[tuple[bool, list[tuple[str, int]]]], scope: str, n_buckets: int
):
    """Against a dictionary that sees all documents one after the other."""
    surveys = []
    for _, rows in parts:
        names = list(dict.fromkeys(name for name, _ in rows))
        hashes = b"".join(digest(str(text))[:16] for _, text in rows)
        domain_N = np.array([names.index(name) for name, _ in rows], np.int32)
        hash_N2 = np.frombuffer(hashes, ">u8").astype(np.uint64).reshape(-1, 2)
        surveys.append(Survey(names, domain_N, hash_N2))
    flags = [held_out for held_out, _ in parts]
    found = {}
    for bucket in range(n_buckets):
        options = {"keep_repeats": scope == "keep", "across_domains": scope == "corpus"}
        (copies,) = survey.find_copies(
            surveys, flags, ["a", "b"], [bucket], n_buckets, **options
        ).values()
        for part in range(len(parts)):
            found |= {(part, row): why for row, why in copies.of_part(part).items()}

    held_out_texts = {text for held_out, rows in parts for _, text in rows if held_out}
    everything = [
        (domain, part, row, text, held_out)
        for part, (held_out, rows) in enumerate(parts)
        for row, (domain, text) in enumerate(rows)
    ]
    expected = {}
    first: dict[tuple, str] = {}
    for domain, part, row, text, held_out in sorted(everything):
        if not held_out and text in held_out_texts:
            expected[part, row] = HELD_OUT_TOO
        elif scope != "keep":
            key = (text, held_out, "" if scope == "corpus" else domain)
            if key in first:
                expected[part, row] = REPEAT if first[key] == domain else IN_OTHER_DOMAIN
            first.setdefault(key, domain)
    assert found == expected

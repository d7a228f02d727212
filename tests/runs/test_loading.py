"""A run is opened without its corpus, with a corpus that has moved, and never with another one."""

import json
import shutil

import numpy as np
import pytest

from dsmoe_jax.data.corpus import load_corpus
from dsmoe_jax.runs.loading import load_run, load_writer
from dsmoe_jax.runs.workdir import changes, claim, read_config, with_absolute_paths
from dsmoe_jax.training.loop import train


def set_corpus(workdir, corpus):
    path = workdir / "config.json"
    tree = json.loads(path.read_text())
    tree["data"]["corpus"] = str(corpus)
    path.write_text(json.dumps(tree))


@pytest.fixture
def moved(finished_run, tiny_corpus, tmp_path):
    """A copy of a finished run whose corpus is not where it was, and where that is now."""
    workdir = shutil.copytree(finished_run[0], tmp_path / "run")
    set_corpus(workdir, tmp_path / "gone")
    return workdir, shutil.copytree(tiny_corpus, tmp_path / "here")


@pytest.fixture
def another(moved, tmp_path):
    """A corpus of the same sizes and another text."""
    corpus = shutil.copytree(moved[1], tmp_path / "another")
    manifest = json.loads((corpus / "manifest.json").read_text())
    (corpus / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "0" * 64}))
    return corpus


class TestWriter:
    def test_needs_no_corpus(self, moved, finished_run):
        writer = load_writer(moved[0])
        run = load_run(finished_run[0])
        assert writer.step == run.step == 10
        assert writer.tokenizer.to_json() == run.corpus.tokenizer.to_json()
        text = "def é"
        assert writer.tokenizer.decode(writer.tokenizer.encode(text)) == text
        np.testing.assert_array_equal(writer.model.head_VD[...], run.model.head_VD[...])

    def test_of_a_run_from_before_tokenizers_were_kept(self, moved):
        workdir, corpus = moved
        (workdir / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match=r"^data\.corpus='.*gone': the text of the run is not"):
            load_writer(workdir)
        set_corpus(workdir, corpus)
        assert load_writer(workdir).tokenizer.vocab_size == 512

    @pytest.mark.parametrize("content", [b"", b"{", b"[" * 200_000, b"\xff", b"{}"])
    def test_with_a_damaged_tokenizer(self, moved, content):
        (moved[0] / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizers file") as caught:
            load_writer(moved[0])
        assert "\n" not in str(caught.value)

    def test_with_the_tokenizer_of_another_run(self, moved):
        path = moved[0] / "tokenizer.json"
        tree = json.loads(path.read_text())
        first, second, *_ = [t for t in tree["model"]["vocab"] if not t.startswith("<|")]
        ids = tree["model"]["vocab"]
        ids[first], ids[second] = ids[second], ids[first]
        path.write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=r"tokenizer\.json: is not the tokenizer that the mod"):
            load_writer(moved[0])


class TestMoved:
    def test_is_asked_for_and_taken(self, moved):
        workdir, corpus = moved
        with pytest.raises(ValueError, match=r"gone': the text of the run is not there any more"):
            load_run(workdir)
        assert load_run(workdir, corpus=str(corpus)).corpus.directory == corpus

    def test_another_text_is_refused(self, moved, another):
        with pytest.raises(
            ValueError, match=r"has changed since the checkpoint was made, or is an"
        ):
            load_run(moved[0], corpus=str(another))

    def test_a_finished_run_says_so_and_knows_the_new_place(self, moved, tiny_config):
        workdir, corpus = moved
        result = train(tiny_config(**{"data.corpus": str(corpus)}), workdir, progress=False)
        assert result.resumed_from == 10
        assert read_config(workdir).data.corpus == str(corpus)

    def test_a_run_goes_on(self, moved, tiny_config, finished_run):
        workdir, corpus = moved
        (workdir / "evaluation.json").unlink()
        result = train(tiny_config(**{"data.corpus": str(corpus)}), workdir, progress=False)
        assert result.evaluation["loss"] == finished_run[1].evaluation["loss"]
        assert read_config(workdir).data.corpus == str(corpus)

    @pytest.mark.parametrize("finished", [True, False])
    def test_no_run_goes_on_with_another_text(self, moved, another, tiny_config, finished):
        workdir, _ = moved
        if not finished:
            (workdir / "evaluation.json").unlink()
        before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
        config = tiny_config(**{"data.corpus": str(another)})
        with pytest.raises(ValueError, match=r"or is another corpus \(fingerprint 000000000000, "):
            train(config, workdir, progress=False)
        after = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
        for files in (before, after):
            del files[workdir / ".lock"]
            assert json.loads(files.pop(workdir / "config.json"))["data"]["corpus"].endswith("gone")
        assert after == before

    def test_without_a_checkpoint_nothing_says_what_the_text_was(self, tiny_config, tmp_path):
        with claim(tmp_path / "run", tiny_config()):
            (tmp_path / "run/metrics.jsonl").write_text("")
        config = tiny_config(**{"data.corpus": str(tmp_path)})
        with pytest.raises(
            ValueError, match=r"another config \(data\.corpus: '.*' there, '.*' her"
        ):
            train(config, tmp_path / "run", progress=False)


class TestRelativePaths:
    def test_are_kept_so_that_they_work_from_everywhere(self, tiny_config, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        paths = {"data.corpus": "texts", "train.start_from": "~/other"}
        with claim("run", tiny_config(**paths)) as workdir:
            kept = read_config(workdir)
        assert kept.data.corpus == str(tmp_path / "texts")
        assert kept.train.start_from == str(tmp_path / "home/other")
        assert with_absolute_paths(kept) == kept
        assert with_absolute_paths(tiny_config(**{"data.corpus": "demo"})).data.corpus == "demo"

    def test_of_an_older_run_are_those_of_the_current_directory(
        self, tiny_config, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        config = tiny_config(**{"data.corpus": "texts", "train.start_from": "other"})
        with claim("run", config) as workdir:
            set_corpus(workdir, "texts")
            assert changes(workdir, config) == {}


def test_the_tokenizer_is_that_of_the_corpus(finished_run, tiny_corpus):
    kept = (finished_run[0] / "tokenizer.json").read_text("utf-8")
    assert kept == load_corpus(tiny_corpus).tokenizer.to_json()

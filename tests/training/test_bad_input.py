"""Mistakes of users: one clear line, and nothing overwritten or lost."""

import json
import os
import re
import shutil

import pytest

from dsmoe_jax.config import differences
from dsmoe_jax.data.opening import open_corpus
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.runs.workdir import claim, read_config, read_evaluation
from dsmoe_jax.training import loop
from dsmoe_jax.training.loop import train
from tests.tools.forked import run_script


def refused(message, call, *args, **kwargs):
    """Calls, and checks that the error is one line that matches."""
    with pytest.raises((ValueError, OSError), match=message) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def snapshot(directory):
    """Content of every file."""
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def no_training(monkeypatch):
    """Getting as far as the corpus is too far."""
    monkeypatch.setattr(loop, "open_corpus", None)


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run, with its end forgotten."""
    workdir = shutil.copytree(finished_run[0], tmp_path / "run")
    (workdir / "evaluation.json").unlink()
    return workdir


class TestWorkdir:
    def test_of_another_config(self, run, tiny_config, no_training):
        before = snapshot(run)
        config = tiny_config(**{"model.moe.n_shared_experts": 2, "train.seed": 1})
        message = (
            r"--workdir=.*run: holds a run with another config"
            r" \(model.moe.n_shared_experts: 1 there, 2 here; train.seed: 0 there, 1 here\)"
        )
        refused(message, train, config, run, progress=False)
        assert snapshot(run) == before

    @pytest.mark.parametrize("left", ["checkpoints", "evaluation.json", "routing"])
    def test_of_another_config_that_has_lost_its_rows(
        self, finished_run, tmp_path, tiny_config, no_training, left
    ):
        """A folder with checkpoints, results or a recording holds a run: nothing is pruned."""
        run = shutil.copytree(finished_run[0], tmp_path / "run")
        (run / "routing/train").mkdir(parents=True)
        for name in {"checkpoints", "evaluation.json", "metrics.jsonl", "routing"} - {left}:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = snapshot(run)
        config = tiny_config(**{"train.seed": 1, "train.keep_checkpoints": 1})
        refused(r"another config \(train.seed: 0 there, 1 here\)", train, config, run)
        after = snapshot(run)
        for files in (before, after):
            del files[run / ".lock"]
        assert after == before

    def test_that_is_finished_but_has_no_rows(self, finished_run, tmp_path, tiny_config):
        run = shutil.copytree(finished_run[0], tmp_path / "run")
        (run / "metrics.jsonl").unlink()
        message = (
            r"metrics\.jsonl: has no row, though evaluation\.json says that the run is finished"
        )
        refused(message, train, tiny_config(), run, progress=False)
        (run / "evaluation.json").unlink()  # the advice
        assert train(tiny_config(), run, progress=False).resumed_from == 10

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"step": 10, "lo', r"evaluation\.json: not JSON"),
            (b"[" * 200_000, r"evaluation\.json: not JSON"),
            (b"\xff", r"evaluation\.json: not JSON"),
            (b"[]", r"evaluation\.json: not a JSON object"),
            (b'{"step": 10}', r"evaluation\.json: loss=None: must be a number"),
            (b'{"step": "10"}', r"evaluation\.json: step='10': must be a number"),
            (b'{"step": 10, "loss": 1, "bits_per_byte": 1, "domains": [1]}', r"domains: must be"),
            (b'{"step": 10, "loss": 1, "bits_per_byte": 1, "domains": {"en": {}}}',
             r"evaluation\.json: domains\.en\.bits_per_byte=None: must be a number"),
        ],
    )  # fmt: skip
    def test_with_damaged_results(self, run, tiny_config, no_training, content, message):
        (run / "evaluation.json").write_bytes(content)
        refused(message, train, tiny_config(), run, progress=False)

    @pytest.mark.parametrize(
        "content", [b"[" * 200_000, b"\xff", b'{"model": ' + b"1" * 6000 + b"}"]
    )
    def test_with_a_damaged_config(self, run, tiny_config, no_training, content):
        (run / "config.json").write_bytes(content)
        before = snapshot(run)
        refused(r"config\.json: not the config of a run of .*: not JSON", train, tiny_config(), run)
        refused(r"config\.json: not the config of a run of .*: not JSON", load_run, run)
        assert snapshot(run) == before

    def test_from_before_a_key_was_added(self, run, tiny_config, capsys):
        """It goes on with the default, which is said once; then the file is whole."""
        tree = json.loads((run / "config.json").read_text())
        del tree["model"]["moe"]["expert_groups"]
        del tree["train"]["start_from"]
        (run / "config.json").write_text(json.dumps(tree))
        load_run(run)
        assert train(tiny_config(), run, progress=False).resumed_from == 10
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(
            "config.json: lacks keys that were added later, taken as model.moe.expert_groups=1,"
            " train.start_from=None"
        )
        assert not differences(read_config(run), tiny_config())
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("address", ["hdfs://host/x", "s3://bucket/x"])
    def test_in_storage_that_is_no_file_system(self, tmp_path, tiny_config, monkeypatch, address):
        """Refused for every path, before anything is written."""
        monkeypatch.chdir(tmp_path)
        refused(
            rf"^--workdir={address}: must be a path of a mounted", train, tiny_config(), address
        )
        refused(rf"^--workdir={address}: must be a path of a mounted", load_run, address)
        replays = {"model.moe.router.name": "replay_ids"}
        for key, more in (("data.corpus", {}), ("train.start_from", {}),
                          ("train.replay_routing", replays)):  # fmt: skip
            config = tiny_config(**{key: address, **more})
            refused(rf"^{key}={address}: must be a path of", train, config, tmp_path / "run")
        assert list(tmp_path.iterdir()) == []

    def test_whose_run_never_began(self, tmp_path, tiny_config):
        """After a refusal the right call works in the same directory."""
        missing = tiny_config(**{"data.corpus": str(tmp_path / "missing")})
        refused("missing", train, missing, tmp_path / "run", progress=False)
        with claim(tmp_path / "run", tiny_config()):
            pass
        assert read_config(tmp_path / "run") == tiny_config()

    def test_what_does_not_touch_the_numbers_may_change(self, finished_run, tiny_config):
        other_hardware = {"train.accumulation_steps": 2, "model.moe.dispatch.chunks": 2}
        config = tiny_config(
            **other_hardware, **{"train.log_every": 2, "train.keep_checkpoints": 5}
        )
        assert train(config, finished_run[0], progress=False).step == 10
        train(tiny_config(), finished_run[0], progress=False)

    @pytest.mark.parametrize(
        "competing",
        [
            {"model.moe.drop.capacity_factor": 2.0},
            {"model.moe.evaluation_drop.capacity_factor": 2.0},
            {"model.moe.router.name": "sinkhorn"},
            {"model.moe.router.name": "expert_choice", "model.moe.balance.expert": None},
        ],
    )
    def test_micro_batches_stay_where_their_tokens_compete(self, tmp_path, tiny_config, competing):
        with claim(tmp_path / "run", tiny_config(**competing)):
            (tmp_path / "run" / "metrics.jsonl").write_text("")
        other = tiny_config(**competing, **{"train.accumulation_steps": 2})
        refused(r"\(train.accumulation_steps: 1 there, 2 here\)", train, other, tmp_path / "run")

    def test_columns_of_stages_may_change_as_their_keys(self, tmp_path, tiny_config):
        def staged(**columns):
            columns = {f"train.stages.{key}": column for key, column in columns.items()}
            return tiny_config(**{"train.stages.share": (0.5, 0.5), **columns})

        micro, chunks = "train.accumulation_steps", "model.moe.dispatch.chunks"
        drops = {"model.moe.drop.capacity_factor": (1.0, 2.0)}
        with claim(tmp_path / "run", staged(**{micro: (1, 1), chunks: (1, 1)})):
            (tmp_path / "run" / "metrics.jsonl").write_text("")
        with claim(tmp_path / "run", staged(**{micro: (2, 1), chunks: (1, 2)})):
            pass
        with claim(tmp_path / "dropping", staged(**drops, **{micro: (1, 1)})):
            (tmp_path / "dropping" / "metrics.jsonl").write_text("")
        other = staged(**drops, **{micro: (2, 1)})
        message = r"\(train.stages.train.accumulation_steps: \(1, 1\) there, \(2, 1\) here\)"
        refused(message, train, other, tmp_path / "dropping")

    def test_of_somebody_else(self, tmp_path, tiny_config, no_training):
        (tmp_path / "thesis.tex").write_text("all of it")
        before = snapshot(tmp_path)
        refused(r"holds 'thesis.tex' but no run", train, tiny_config(), tmp_path)
        assert snapshot(tmp_path) == before

    def test_of_another_program_with_a_config_json(self, tmp_path, tiny_config, no_training):
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        before = snapshot(tmp_path)
        refused(r"config.json: not the config of a run", train, tiny_config(), tmp_path)
        assert snapshot(tmp_path) == before

    def test_that_is_a_file(self, tmp_path, tiny_config, no_training):
        (tmp_path / "file").write_text("")
        refused(r"is a file; must be a directory", train, tiny_config(), tmp_path / "file")

    def test_that_cannot_be_written(self, tmp_path, tiny_config, no_training, monkeypatch):
        (tmp_path / "file").write_text("")
        refused("cannot be written: Not a directory", train, tiny_config(), tmp_path / "file/run")
        (tmp_path / "closed").mkdir(mode=0o555)
        if os.access(tmp_path / "closed", os.W_OK):
            pytest.skip("this user may write everywhere")
        refused("cannot be written: Permission", train, tiny_config(), tmp_path / "closed/run")

    def test_in_use(self, run, tiny_config, no_training):
        before = snapshot(run)
        with claim(run, tiny_config()):
            refused(rf"in use by process {os.getpid()};", train, tiny_config(), run)
        (run / ".lock").write_bytes(before[run / ".lock"])
        assert snapshot(run) == before

    def test_with_a_broken_config(self, run, tiny_config, no_training):
        (run / "config.json").write_text("{")
        before = snapshot(run)
        refused(r"config.json: not the config of a run", train, tiny_config(), run)
        assert snapshot(run) == before

    def test_with_a_config_of_the_old_form(self, run, tiny_config, no_training):
        """From before `model.moe` had sections."""
        tree = json.loads((run / "config.json").read_text())
        tree["model"]["moe"]["router"] = "topk"
        (run / "config.json").write_text(json.dumps(tree))
        before = snapshot(run)
        message = r"config.json: .*model\.moe\.router='topk': a config of an older form"
        refused(message, train, tiny_config(), run)
        refused(message, load_run, run)
        assert snapshot(run) == before


class TestCheckpoint:
    def largest(self, directory):
        return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)

    def test_truncated(self, run, tiny_config):
        path = self.largest(run / "checkpoints/10/model")
        path.write_bytes(path.read_bytes()[:-100])
        before = snapshot(run / "checkpoints")
        message = (
            r"checkpoints/10: the checkpoint cannot be read \(model/.* has \d+ bytes, \d+ were"
            r" written\); delete that directory to go on from step 9"
        )
        refused(message, train, tiny_config(), run, progress=False)
        refused(message, load_run, run)
        assert snapshot(run / "checkpoints") == before

    def test_a_model_is_a_third_of_it_and_loaded_alone(self, run, finished_run, tiny_config):
        sizes = {}
        for item in ("model", "training"):
            files = (run / "checkpoints/10" / item).rglob("*")
            sizes[item] = sum(p.stat().st_size for p in files if p.is_file())
        assert 1.8 < sizes["training"] / sizes["model"] < 2.2
        path = self.largest(run / "checkpoints/10/training")
        path.write_bytes(path.read_bytes()[:-100])
        assert load_run(run).step == 10
        message = r"the checkpoint cannot be read \(training/.* has \d+ bytes"
        refused(message, train, tiny_config(), run, progress=False)

    def test_with_a_flipped_bit(self, run):
        path = self.largest(run / "checkpoints/10/model")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x10
        path.write_bytes(bytes(content))
        refused(r"checkpoints/10: the checkpoint cannot be read", load_run, run)
        assert load_run(run, 9).step == 9

    def test_and_the_advice_works(self, run, finished_run, tiny_config):
        shutil.rmtree(run / "checkpoints/10")
        result = train(tiny_config(), run, progress=False)
        assert result.resumed_from == 9
        assert result.evaluation["loss"] == finished_run[1].evaluation["loss"]

    def test_missing(self, run):
        refused(r"--step=4: no such checkpoint; there are \[9, 10\]", load_run, run, 4)
        shutil.rmtree(run / "checkpoints")
        refused(r"the run has no checkpoint yet", load_run, run)
        refused(r"holds no run \(there is no config.json\)", load_run, run / "nothing")

    def test_of_another_corpus(self, run, tiny_config, monkeypatch):
        monkeypatch.setattr(loop.Corpus, "fingerprint", "0" * 64)
        refused(r"has changed since the checkpoint was made", load_run, run)
        refused(r"has changed since the checkpoint", train, tiny_config(), run, progress=False)


def test_a_disk_without_room_for_a_checkpoint(tiny_config, finished_run, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = (
        r"checkpoints/3: the checkpoint could not be written \(1 MB are needed, 0 MB are free\);"
        r" there is none before it\.  Make room, then run the same command again"
    )
    refused(message, train, tiny_config(), tmp_path / "run", progress=False)
    monkeypatch.undo()
    train(tiny_config(), tmp_path / "run", progress=False)
    assert read_evaluation(tmp_path / "run") == read_evaluation(finished_run[0])


def test_a_disk_that_fills_up(tiny_config, tmp_path):
    """No file may grow beyond 30 KB.  The libraries add lines of their own, ours is one."""
    config, script = tmp_path / "tiny.py", tmp_path / "limited.py"
    config.write_text(
        "from dsmoe_jax.config import *\n"
        f"def get_config():\n    return to_config_dict({tiny_config()!r})\n"
    )
    script.write_text(
        "import resource, runpy\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30 * 1024, 30 * 1024))\n"
        "runpy.run_module('dsmoe_jax', run_name='__main__')\n"
    )
    child = run_script(script, "train", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert child.code == 2, child.err
    # Threads of the libraries write to the same place: ours may begin within one of their lines.
    pattern = r"error: .*checkpoints/3: the checkpoint could not be written \(.*"
    ours = re.findall(pattern, child.err)
    assert len(ours) == 1, child.err
    assert "there is none before it" in ours[0]


class TestCorpus:
    def test_none(self, tiny_config):
        refused(
            r"data.corpus=None: must be", open_corpus, tiny_config(**{"data.corpus": None}).data
        )

    def test_missing(self, tiny_config):
        config = tiny_config(**{"data.corpus": "/no/such/text"})
        refused(r"data.corpus='/no/such/text': no such file", open_corpus, config.data)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"data.sequence_length": 32}, r"data.sequence_length=32: .* is packed for 64"),
            ({"data.tokenizer_vocab_size": 300}, r"data.tokenizer_vocab_size=300: .* 512 tokens"),
            ({"data.domains": ("de",)}, r"data.domains=\('de',\): .* leave data.domains empty"),
        ],
    )
    def test_prepared_for_another_config(self, tiny_config, change, message):
        refused(message, open_corpus, tiny_config(**change).data)

    def test_of_ones_own_text(self, tiny_config, tmp_path, monkeypatch):
        """Prepared once in the cache; a changed text is another corpus."""
        monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
        text = tmp_path / "text"
        text.mkdir()
        for i in range(20):
            (text / f"{i}.txt").write_text(f"Document {i}. " + "The quick brown fox. " * 20)
        data = tiny_config(**{"data.corpus": str(text), "data.tokenizer_vocab_size": 260}).data
        first, second = open_corpus(data), open_corpus(data)
        assert first.directory == second.directory
        assert first.directory.is_relative_to(tmp_path / "cache")
        (text / "0.txt").write_text("Another text. " * 30)
        assert open_corpus(data).fingerprint != first.fingerprint

    def test_of_ones_own_text_without_a_cache(self, tiny_config, tmp_path, monkeypatch):
        """One that is prepared needs none."""
        (tmp_path / "text.txt").write_text("The quick brown fox. " * 100)
        monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "text.txt/cache"))
        data = tiny_config(**{"data.corpus": str(tmp_path / "text.txt")}).data
        refused(r"^DSMOE_CACHE=.*cache: cannot be written .*; set DSMOE_CACHE", open_corpus, data)
        open_corpus(tiny_config().data)

    def test_at_home(self, tiny_config, tiny_corpus, monkeypatch):
        monkeypatch.setenv("HOME", str(tiny_corpus.parent))
        data = tiny_config(**{"data.corpus": f"~/{tiny_corpus.name}"}).data
        assert open_corpus(data).directory == tiny_corpus

"""Paths on the command line: at home, in storage that is no file system, of text that has moved."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest

from tests.tools.forked import run_all

SIZES = "--vocab_size=512 --sequence_length=64"
TRAIN = "train --config=configs/dsmoe_2b.py:smoke"
RECORD = "evaluate --max_batches=1 --batch_size=2 --workdir=RUN --moved_corpus=HERE"

# Command line -> what its one line says; None: it succeeds.
CASES = {
    f"{TRAIN} --workdir=s3://bucket/x": "--workdir=s3://bucket/x: must be a path of a mounted",
    f"{TRAIN} --workdir=~/x --config.data.corpus=s3://b/x": "data.corpus=s3://b/x: must be a path",
    f"{TRAIN} --workdir=~/x --config.train.start_from=s3://b/x": "train.start_from=s3://b/x: must",
    "train --workdir=~/x --config=gs://b/x.py:demo": "config=gs://b/x.py:demo: must be a path",
    f"prepare_data --out=gs://b/x --corpus=stdlib {SIZES}": "--out=gs://b/x: must be a path",
    f"prepare_data --out=~/x --corpus=https://x/y.txt {SIZES}": "--corpus=https://x/y.txt: must",
    "evaluate --workdir=s3://b/x": "--workdir=s3://b/x: must be a path",
    "evaluate --workdir=RUN --corpus=s3://b/x": "--corpus=s3://b/x: must be a path",
    f"{RECORD} --record_routing=gs://b/x": "--record_routing=gs://b/x: must be a path",
    f"{RECORD} --replay_routing=s3://b/x": "--replay_routing=s3://b/x: must be a path",
    "evaluate --workdir=RUN": "gone': the text of the run is not there any more; say where",
    "generate --workdir=s3://b/x --prompt=a": "--workdir=s3://b/x: must be a path",
    "plot_load --workdir=RUN --out=gs://b/x.png": "--out=gs://b/x.png: must be a path",
    "plot_load --workdir=s3://b/x --out=x.png": "--workdir=s3://b/x: must be a path",
    "plot_load --workdir=~/run --out=~/load.svg": None,
    f"{RECORD} --record_routing=~/routing --json": None,
    "generate --workdir=~/run --prompt=a --max_new_tokens=1": None,
    "count --config=~/mine.py": None,
}


@pytest.fixture(scope="module")
def home(finished_run, tiny_corpus, tmp_path_factory):
    """A home with a run whose text has moved, the text, and a config file."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(finished_run[0], home / "run")
    shutil.copytree(tiny_corpus, home / "here")
    tree = json.loads((home / "run/config.json").read_text())
    tree["data"]["corpus"] = str(home / "gone")
    (home / "run/config.json").write_text(json.dumps(tree))
    (home / "mine.py").write_text(
        "from configs import dsmoe_2b\ndef get_config():\n    return dsmoe_2b.get_config('smoke')\n"
    )
    return home


@pytest.fixture(scope="module")
def results(home):
    lines = [case.replace("RUN", str(home / "run")).replace("HERE", "~/here") for case in CASES]
    before = set(Path().iterdir())
    with mock.patch.dict(os.environ, {"HOME": str(home)}):
        found = run_all([line.split() for line in lines])
    assert set(Path().iterdir()) == before, "nothing is made here"
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_places(results, case):
    code, out, err = results[case]
    if CASES[case] is None:
        assert code == 0, err
        assert out
    else:
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert CASES[case] in err


def test_what_is_written_lies_at_home(results, home):
    made = {path.name for path in home.iterdir()}
    assert {"load.svg", "routing"} <= made
    assert not {"~", "x", "gs:", "s3:"} & made

"""Places in buckets as users write them, and what is said of those that cannot be used."""

import importlib.util
from pathlib import Path

import pytest

from dsmoe_jax.storage import places
from dsmoe_jax.storage.away import Away
from dsmoe_jax.storage.places import place_of
from tests.tools.buckets import answering, going_to
from tests.tools.forked import assert_refused, run_all


def refused(says, address, key="--workdir"):
    with pytest.raises(ValueError, match=says) as error:
        place_of(key, address)
    assert "\n" not in str(error.value)


def test_paths_of_a_bucket(bucket):
    at = f"{bucket.address}/a/run"
    assert str(place_of("--workdir", at)) == at
    assert str(place_of("--workdir", f"{at}//")) == at
    assert str(place_of("--workdir", place_of("--workdir", at) / "x")) == f"{at}/x"
    assert place_of("--workdir", Path(at)) == place_of("--workdir", at), "`Path` drops a slash"
    place = place_of("--workdir", at)
    assert not place.exists()
    (place / "b/c.txt").write_text("text")
    assert [p.name for p in place.iterdir()] == ["b"]
    assert (place.exists(), place.is_dir(), (place / "b/c.txt").is_file()) == (True, True, True)
    places.bucket("tests-bucket").blob("a/run/d.txt").upload_from_string("by another process")
    assert sorted(p.name for p in place.iterdir()) == ["b", "d.txt"], "no listing is kept"


@pytest.mark.parametrize("address", ["gs://bucket", "gs://bucket/", "gs:///run", "gs://b/../run"])
def test_without_a_folder(address):
    refused(r"^--workdir=gs:.*: must name a folder of a bucket, as in gs://bucket/run$", address)


@pytest.mark.parametrize("address", ["s3://bucket/run", "az://b/run", "file:///tmp/run"])
def test_other_schemes(address):
    refused(rf"^--workdir={address}: must be a path of a mounted file system, or gs://", address)


def test_missing_bucket(bucket, tmp_path, monkeypatch):
    """One line, and no folder is made here."""
    refused("^--workdir=gs://no-such/run: there is no bucket no-such$", "gs://no-such/run")
    monkeypatch.chdir(tmp_path)
    train = "train", f"--config={Path(__file__).parents[2]}/configs/dsmoe_2b.py:smoke"
    for result, says in zip(
        run_all(
            [
                (*train, "--workdir=gs://no-such/run"),
                (*train, "--workdir=run", "--config.data.corpus=gs://no-such/corpus"),
                ("evaluate", "--workdir=gs://no-such/run"),
                ("evaluate", f"--workdir={bucket.address}/nothing"),
            ]
        ),
        [
            "--workdir=gs://no-such/run: there is no bucket no-such",
            "data.corpus=gs://no-such/corpus: there is no bucket no-such",
            "--workdir=gs://no-such/run: there is no bucket no-such",
            "nothing: holds no run (there is no config.json)",
        ],
        strict=True,
    ):
        assert_refused(result, says)
    assert list(tmp_path.iterdir()) == []


def test_forbidden_bucket():
    with answering(403, "does not have access"):
        says = r"the bucket mine must not be read by these credentials \(403 .*does not have access"
        refused(says, "gs://mine/run")


def test_no_answer(monkeypatch):
    monkeypatch.setattr(places, "_SECONDS", 0.2)
    with going_to("http://127.0.0.1:9"):  # nothing is there
        says = r"^data.corpus=gs://mine/x: the bucket mine does not answer"
        with pytest.raises(Away, match=says) as error:
            place_of("data.corpus", "gs://mine/x")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 75


def test_no_package(monkeypatch):
    found = importlib.util.find_spec
    lacking = lambda name: None if name == "gcsfs" else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    refused(
        r"^--workdir=gs://b/run: buckets need the package gcsfs; pip install 'dsmoe_jax\[gcs\]'",
        "gs://b/run",
    )

"""Paths as users write them."""

from pathlib import Path

import pytest

from dsmoe_jax.config.paths import local_path


def test_home_and_the_current_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    assert local_path("--out", "~/x/y") == Path("/home/me/x/y")
    assert local_path("--out", "~") == Path("/home/me")
    assert local_path("--out", "x/~") == tmp_path / "x/~"
    assert local_path("--out", tmp_path / "x") == tmp_path / "x"
    assert local_path("--out", "a:b/c") == tmp_path / "a:b/c", "one letter is no scheme"


@pytest.mark.parametrize(
    "written",
    ["gs://bucket/x", "s3://bucket", "hdfs://h:9000/x", "file:///tmp/x", "https://x.org/a.txt",
     Path("gs://bucket/x"), "abfss+v2://c@a/x"],
)  # fmt: skip
def test_addresses_are_refused(written):
    with pytest.raises(ValueError, match=r"^--out=\w[\w+]*:/.*: must be a path of a mounted file"):
        local_path("--out", written)


def test_no_path_and_no_home():
    with pytest.raises(ValueError, match=r"^data\.corpus='': must be a path$"):
        local_path("data.corpus", "")
    with pytest.raises(ValueError, match=r"^--out=~no_such_user_/x: there is no such home"):
        local_path("--out", "~no_such_user_/x")

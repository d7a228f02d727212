"""Files of a workdir in a bucket: written whole, added to, copied and removed."""

import pytest
from google.api_core.exceptions import PreconditionFailed
from google.cloud.storage import Blob

from dsmoe_jax.storage import files
from dsmoe_jax.storage.places import place_of


@pytest.fixture
def place(folder):
    return place_of("--workdir", folder)


def test_replacing_shows_the_old_or_the_new(place):
    """Also when it fails on the way, as a kill does."""
    path = place / "config.json"
    with files.replacing(path) as file:
        file.write(b"old")

    def fail():
        with files.replacing(path) as file:
            file.write(b"n")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"old"
    assert [p.name for p in place.iterdir()] == ["config.json"]


def test_appending(place, monkeypatch):
    path = place / "metrics.jsonl"
    with files.replacing(path) as file:
        file.write(b"1\n")
    log = files.appending(path)
    assert log.write(memoryview(b"2\n")) == 2
    assert path.read_bytes() == b"1\n", (
        "one change of an object a second is all that a bucket takes"
    )
    log.flush()
    assert path.read_bytes() == b"1\n2\n"
    log.flush()
    monkeypatch.setattr(files, "APPEND_SECONDS", 0.0)
    log.write(b"3\n")
    assert path.read_bytes() == b"1\n2\n3\n"
    monkeypatch.undo()
    log.write(b"4\n")
    log.close()
    assert path.read_bytes() == b"1\n2\n3\n4\n"
    assert [p.name for p in place.iterdir()] == ["metrics.jsonl"], "nothing else is left"


def test_a_new_file(place):
    log = files.appending(place / "events.out.tfevents.1")
    log.write(b"a")
    log.flush()
    log.write(b"b")
    log.flush()
    alike = [p.name for p in place.iterdir() if "tfevents" in p.name]
    assert alike == ["events.out.tfevents.1"], "TensorBoard would read the piece too"
    log.close()
    assert (place / "events.out.tfevents.1").read_bytes() == b"ab"


def test_two_writers(place):
    """The second one's rows are not lost, and the first one learns of it."""
    path = place / "metrics.jsonl"
    first, second = files.appending(path), files.appending(path)
    first.write(b"first\n")
    first.flush()
    second.write(b"second\n")
    with pytest.raises(OSError, match=r"metrics\.jsonl: cannot be written: another process"):
        second.flush()
    assert path.read_bytes() == b"first\n"


def test_two_writers_of_a_file_that_is_there(place):
    """The emulator joins whatever is there; the size tells."""
    path = place / "metrics.jsonl"
    files.upload(path, b"0\n")
    first, second = files.appending(path), files.appending(path)
    first.write(b"first\n")
    first.flush()
    second.write(b"second\n")
    with pytest.raises(OSError, match=r"metrics\.jsonl: cannot be written: "):
        second.flush()
    assert path.read_bytes().startswith(b"0\nfirst\n")


def test_a_lost_answer(place, monkeypatch):
    """The request was carried out; sent again it is refused, and the rows are there once."""
    path = place / "metrics.jsonl"
    log = files.appending(path)
    log.write(b"1\n")
    log.flush()
    compose = Blob.compose

    def compose_twice(self, *args, **options):
        compose(self, *args, **options)
        raise PreconditionFailed("the generation is another")

    monkeypatch.setattr(Blob, "compose", compose_twice)
    log.write(b"2\n")
    log.flush()
    monkeypatch.undo()
    log.write(b"3\n")
    log.close()
    assert path.read_bytes() == b"1\n2\n3\n"


def test_trees(place, tmp_path):
    step = place / "checkpoints/3"
    contents = {files.COMMITTED: b"c", "model/d/1": b"12", "model/manifest": b"123"}
    assert not files.is_whole(step)
    for name, content in contents.items():
        files.upload(step / name, content)
    assert files.is_whole(step)
    assert files.sizes(step) == {name: len(content) for name, content in contents.items()}
    files.copy(step / "model/d/1", place / "history/1")
    assert (place / "history/1").read_bytes() == b"12"
    files.copy_tree(step, tmp_path / "here")
    assert files.sizes(tmp_path / "here") == files.sizes(step)
    files.remove_tree(step)
    assert files.sizes(step) == {}
    assert (place / "history/1").exists()


def test_a_removal_that_is_killed(place, monkeypatch):
    """The rest does not look like a whole checkpoint."""
    step = place / "checkpoints/3"
    for name in ("_METADATA", files.COMMITTED, "model/1"):
        files.upload(step / name, b"x")
    removed = []

    def delete_one(self, *args, **options):
        if removed:
            raise OSError("killed")
        removed.append(self.name)
        return original(self, *args, **options)

    original = Blob.delete
    monkeypatch.setattr(Blob, "delete", delete_one)
    with pytest.raises(OSError, match=r"checkpoints/3: cannot be written: killed"):
        files.remove_tree(step)
    assert len(files.sizes(step)) == 2
    assert not files.is_whole(step)


def test_local_stand_in(place):
    with files.local_stand_in(place / "tensorboard") as folder:
        (folder / "plugins/profile").mkdir(parents=True)
        (folder / "plugins/profile/host.xplane.pb").write_bytes(b"trace")
    assert files.sizes(place / "tensorboard") == {"plugins/profile/host.xplane.pb": 5}


def test_a_bucket_that_goes_away(bucket):
    path = place_of("--workdir", f"{bucket.address}/x").parent.parent / "no-such/x"
    with pytest.raises(OSError, match=r"^gs://no-such/x: cannot be written: 404"):
        files.upload(path, b"")

"""Buckets that do not answer: which errors say so; one line and exit code 75 come of it."""

import aiohttp
import pytest
import requests
from google.api_core import exceptions
from google.auth.exceptions import DefaultCredentialsError, TransportError

from dsmoe_jax.parallel import hosts
from dsmoe_jax.runs.checkpoint import Checkpoints
from dsmoe_jax.storage import files, places
from dsmoe_jax.storage.away import Away, is_away, naming
from tests.tools.buckets import answering


def http_error(code):
    from gcsfs.retry import HttpError  # after `places`, which says how gcsfs is to be

    return HttpError({"code": code, "message": "no"})


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (aiohttp.ServerDisconnectedError(), True),
        (requests.ConnectionError(), True),
        (requests.exceptions.ProxyError(), True),
        (exceptions.ServiceUnavailable("x"), True),
        (exceptions.TooManyRequests("x"), True),
        (exceptions.RetryError("x", None), True),
        (TransportError("x"), True),
        (http_error(503), True),
        (ValueError("UNAVAILABLE: Error reading gs://b/x: CURL error"), True),
        (http_error(400), False),
        (exceptions.Forbidden("x"), False),
        (exceptions.PreconditionFailed("x"), False),
        (DefaultCredentialsError("x"), False),
        (FileNotFoundError("x"), False),
        (PermissionError("x"), False),
        (ValueError("NOT_FOUND: x is UNAVAILABLE"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors(error, away):
    assert is_away(error) is away
    raised = RuntimeError("of another library")
    raised.__cause__ = error
    assert is_away(raised) is away, "what it was raised from counts"
    if isinstance(error, (OSError, exceptions.GoogleAPIError)):
        with pytest.raises(OSError) as found, naming("gs://b/x"):
            raise error
        assert isinstance(found.value, Away) is away
        assert getattr(found.value, "exit_code", 2) == (75 if away else 2)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("code", "exit_code", "says"),
    [
        (503, 75, "the bucket does not answer (no room, 503); try again later"),
        (400, 2, "cannot be read: no room, 400"),
    ],
)
def test_a_plain_read_that_fails(code, exit_code, says, monkeypatch, capsys):
    """gcsfs tries six times; its error is no OSError.  A command ends with one line of it."""
    import gcsfs.retry

    from dsmoe_jax.commands import command_line

    tries = []

    async def at_once(seconds):
        tries.append(seconds)

    monkeypatch.setattr(gcsfs.retry.asyncio, "sleep", at_once)
    with answering(code):
        place = places._in_bucket("gs://mine/run/config.json")
        with pytest.raises(SystemExit) as stopped:
            command_line.run(place.read_bytes, [])
        assert stopped.value.code == exit_code
    assert capsys.readouterr().err == f"error: gs://mine/run/config.json: {says}\n"
    assert bool(tries) == (code == 503)


def test_a_listing_that_fails(monkeypatch):
    """By google-cloud-storage."""
    with answering(403):
        place = places._in_bucket("gs://mine/run/checkpoints")
        with pytest.raises(OSError, match=r"^gs://mine/run/checkpoints: cannot be read: 403 "):
            files.sizes(place)


def test_a_checkpoint_is_not_called_damaged(folder):
    """Whoever believes that deletes it."""
    checkpoints = Checkpoints(places.place_of("--workdir", f"{folder}/checkpoints"), keep=2)
    says = r"checkpoints/3: the bucket does not answer \(UNAVAILABLE: x\); the same command goes on"
    with pytest.raises(Away, match=says), checkpoints.reading(3):
        raise ValueError("UNAVAILABLE: x")
    with pytest.raises(ValueError, match="delete that directory"), checkpoints.reading(3):
        raise ValueError("DATA_LOSS: x")
    checkpoints._saving = 3
    assert isinstance(checkpoints._not_written(ConnectionError("x")), Away)
    assert type(checkpoints._not_written(PermissionError("x"))) is OSError
    checkpoints._saving = None
    checkpoints.close()


def test_a_process_that_is_killed_while_all_read_damages_nothing(monkeypatch, tmp_path):
    """The others end with the exit code that starts all of them again."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(hosts.AnotherEnded, match="Gloo"), checkpoints.reading(3):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    checkpoints._saving = 3
    found = checkpoints._not_written(ValueError("UNKNOWN: Gloo AllGather failed: closed"))
    assert isinstance(found, hosts.OnlyHere)
    with pytest.raises(ValueError, match="delete that directory"), checkpoints.reading(3):
        raise ValueError("an array is not what was saved")


def test_all_processes_end_alike(monkeypatch):
    """A launcher starts all of them again."""
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(hosts, "gather", lambda value: [value, None])

    def fail():
        raise Away("no answer")

    with pytest.raises(hosts.FailedOnFirst, match="no answer") as error:
        hosts.on_first(fail)
    assert error.value.exit_code == 75


@pytest.mark.parametrize("text", ["UNKNOWN: Gloo AllGather failed: closed by peer", "steps=0: no"])
def test_a_collective_that_another_process_has_left(monkeypatch, text):
    """JAX raises a ValueError in places, which is no bad input."""
    monkeypatch.setattr("jax.process_count", lambda: 2)
    kind = hosts.AnotherEnded if text.startswith("UNKNOWN") else ValueError
    with pytest.raises(kind, match=text[:7]), hosts.one_line_if_another_ends():
        raise ValueError(text)

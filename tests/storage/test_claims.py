"""One trainer a workdir, in a bucket: claims that beat, die and are taken over."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dsmoe_jax.runs import claims
from dsmoe_jax.runs.claims import LOCK, InUse, held
from dsmoe_jax.storage.places import place_of
from tests.tools.patience import PATIENCE

GONE = {"process": 7, "host": "another", "machine": "another", "claim": "x"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(claims, "DEAD_SECONDS", 1.0)


@pytest.fixture
def place(folder):
    return place_of("--workdir", folder)


def test_one_at_a_time(place, capsys):
    with held(place):
        holder = json.loads((place / LOCK).read_bytes())
        assert holder["process"] == os.getpid()
        with pytest.raises(
            InUse, match=rf"^--workdir={place}: in use by process {os.getpid()} on "
        ):
            held(place).__enter__()
        assert "waiting for up to 1 seconds to see whether it lives" in capsys.readouterr().err
        assert json.loads((place / LOCK).read_bytes()) == holder
    began = time.monotonic()
    with held(place):
        pass
    assert time.monotonic() - began < 0.9, "what was left need not be waited for"


def test_a_dead_claim_expires(place, capsys):
    (place / LOCK).write_text(json.dumps(GONE))
    began = time.monotonic()
    with held(place):
        assert time.monotonic() - began >= 1.0
        assert json.loads((place / LOCK).read_bytes())["process"] == os.getpid()
    assert "held by process 7 on another" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [True, False])
def test_after_a_crash_on_this_machine(place, asked):
    """Also while its parent has not asked how it ended, which keeps its number."""
    ended = subprocess.Popen(["true"], stdout=subprocess.PIPE)
    assert ended.stdout.read() == b"", "it has ended"
    if asked:
        ended.wait()
    mine = {"process": ended.pid, "machine": claims._machine()}
    (place / LOCK).write_text(json.dumps(GONE | mine))
    began = time.monotonic()
    with held(place):
        assert time.monotonic() - began < 0.9
    ended.communicate()


def test_of_many_one_gets_a_dead_claim(place):
    (place / LOCK).write_text(json.dumps(GONE))
    got, refused, all_there = [], [], threading.Barrier(4)
    done = threading.Event()

    def one():
        all_there.wait()
        try:
            with held(place):
                count(got)
                done.wait(PATIENCE)
        except InUse:
            count(refused)

    def count(outcomes):
        outcomes.append(1)
        if len(got) + len(refused) == 4:
            done.set()

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 3)


HOLDS = """
import sys, time
from dsmoe_jax.runs import claims
from dsmoe_jax.storage.places import place_of
claims.BEAT_SECONDS, claims.DEAD_SECONDS = 0.2, 1.5
with claims.held(place_of("--workdir", sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def holder(place):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(place)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_process_ends_when_another_has_its_claim(holder, place):
    """As after a sleep of a laptop: what it would write now is another's to write."""
    (place / LOCK).write_text(json.dumps(GONE))
    _, err = holder.communicate(timeout=PATIENCE)
    assert holder.returncode == 2
    assert f"--workdir={place}: it was taken over by process 7 on another; the same" in err


def test_the_process_ends_when_the_bucket_is_away(holder, bucket):
    """Before another process may take it over."""
    bucket.process.send_signal(signal.SIGSTOP)
    try:
        _, err = holder.communicate(timeout=PATIENCE)
    finally:
        bucket.process.send_signal(signal.SIGCONT)
    assert holder.returncode == 75
    assert "the bucket does not answer" in err

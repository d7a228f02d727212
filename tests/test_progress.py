"""The progress line: where it is updated in place, in a log file, and what it says is left."""

import io
from types import SimpleNamespace

import pytest

from dsmoe_jax import progress
from dsmoe_jax.progress import ProgressLine, Silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds, to be moved by hand."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_log_file_gets_a_line_now_and_then_and_the_last(clock):
    stream = io.StringIO()
    line = ProgressLine("tiny", 100, stream)
    for done in range(1, 101):  # a second each, but for the first, which compiles
        line.update(done, loss=f"{done / 10}")
        clock.now += 1
    line.note("compiling")
    assert stream.getvalue().splitlines() == [
        "tiny 21/100  loss 2.1  ETA 1:19",
        "tiny 41/100  loss 4.1  ETA 0:59",
        "tiny 61/100  loss 6.1  ETA 0:39",
        "tiny 81/100  loss 8.1  ETA 0:19",
        "tiny 100/100  loss 10.0  ETA 0:00",
    ]


def test_a_terminal_shows_one_line_and_leaves_no_rest_of_a_longer_one(clock):
    stream = Terminal()
    line = ProgressLine("tiny", 10_000, stream)
    line.note("compiling the training step of the first stage")
    for done in (1, 2):
        line.update(done, loss="2.5")
        clock.now += 60
    line.message("saved")
    note, shown = stream.getvalue().partition("\n")[0].split("\r")[1:]
    assert note == "tiny: compiling the training step of the first stage"
    assert shown == "tiny 2/10000  loss 2.5  ETA 166:38:00".ljust(len(note))
    assert stream.getvalue().endswith("\nsaved\n")
    line.close()
    assert stream.getvalue().endswith("\nsaved\n"), "no empty line"


def test_amounts_that_round_to_the_total_end_in_one_line(clock):
    stream = io.StringIO()
    line = ProgressLine("encoding, MB", 1, stream)
    for _ in range(10):
        line.add(0.1)
    assert stream.getvalue() == "encoding, MB 1/1  ETA 0:00\n"


def test_silence(capsys):
    line = Silent()
    line.update(1)
    line.message("anything")
    line.close()
    assert capsys.readouterr() == ("", "")

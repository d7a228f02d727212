"""The log of a run: rows that survive kills, and the same numbers for TensorBoard."""

import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from dsmoe_jax.runs.metrics_log import MetricsLog, read_rows
from tests.tools.patience import PATIENCE


class TestLog:
    def write(self, workdir, *steps, start=0):
        log = MetricsLog(workdir, start)
        for step in steps:
            log.write({"step": step, "loss": 1 / step})
        log.close()

    def test_rows_past_the_checkpoint_are_cut(self, tmp_path):
        self.write(tmp_path, 1, 2, 3, 4)
        self.write(tmp_path, 3, 4, 5, start=2)
        assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4, 5]
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5

    def test_a_half_written_last_line_is_no_row(self, tmp_path):
        self.write(tmp_path, 1, 2)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 3, "lo')
        assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]
        self.write(tmp_path, 3, start=2)
        assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]

    def test_what_is_not_finite_is_null_in_the_file_and_nan_for_us(self, tmp_path):
        log = MetricsLog(tmp_path, 0)
        row = {"step": 1, "loss": math.nan, "maxvio": [math.inf, 0.5], "load": [[0, 0], [1, 3]],
               "validation_domains": {"en": {"loss": math.nan}}}  # fmt: skip
        log.write(row)
        log.close()
        line = (tmp_path / "metrics.jsonl").read_text()
        assert json.loads(line, parse_constant=None) == {
            **row, "loss": None, "maxvio": [None, 0.5], "validation_domains": {"en": {"loss": None}}
        }  # fmt: skip
        assert "NaN" not in line
        assert "Infinity" not in line
        (found,) = read_rows(tmp_path)
        assert math.isnan(found["loss"])
        assert math.isnan(found["validation_domains"]["en"]["loss"])
        np.testing.assert_array_equal(found["maxvio"], [math.nan, 0.5])

    def test_rows_of_an_earlier_version_with_nan(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1, "loss": NaN}\n')
        assert math.isnan(read_rows(tmp_path)[0]["loss"])
        self.write(tmp_path, 2, start=1)
        assert path.read_text().splitlines()[0] == '{"step": 1, "loss": null}'

    @pytest.mark.parametrize(
        "line",
        [b"[1]", b"[" * 200_000, b'{"loss": 1}', b'{"step": 1.5}', b'{"step": true}',
         b'{"step": null}', b'{"step": ' + b"1" * 6000 + b"}", b'{"step": 2, "loss": "2.5"}',
         b'{"step": 2, "load": [[1, 2], [1]]}', b'{"step": 2, "kernels": {"experts": 1}}',
         b'{"step": 2, "kernels": "native"}', b'{"step": 2, "loss": \xff}', b"\0\0", b""],
    )  # fmt: skip
    def test_damage_names_file_and_line(self, tmp_path, line):
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2}\n' + line + b"\n")
        with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is not a row of m") as caught:
            read_rows(tmp_path)
        assert "\n" not in str(caught.value)

    def test_a_broken_line_elsewhere_is_an_error(self, tmp_path):
        self.write(tmp_path, 1, 2)
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1\n' + path.read_text())
        before = path.read_text()
        with pytest.raises(ValueError, match=r"metrics.jsonl: line 1 is not a row"):
            MetricsLog(tmp_path, 2)
        assert path.read_text() == before

    def test_validation_joins_its_step(self, tmp_path):
        self.write(tmp_path, 1)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 1, "validation_loss": 3.0}) + "\n")
        assert read_rows(tmp_path) == [{"step": 1, "loss": 1.0, "validation_loss": 3.0}]


def events(directory):
    """Events that TensorBoard finds: (step, tag) -> number or histogram.

    A record is its length (8 bytes), a checksum (4), the data, a checksum (4).
    """
    (path,) = directory.glob("events.*")
    data, found = path.read_bytes(), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            histogram = value.WhichOneof("value") == "histo"
            found[event.step, value.tag] = value.histo if histogram else value.simple_value
        data = data[16 + length :]
    return found


def test_tensorboard_gets_the_numbers_of_a_row(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 3, "loss": 2.5, "maxvio": [0.5, 0.0], "load": [[1, 3], [2, 2]]})
    log.close()
    found = events(tmp_path / "tensorboard")
    histograms = [found.pop((3, f"load/layer_{i}")) for i in range(2)]
    assert found == {(3, "loss"): 2.5, (3, "maxvio/layer_0"): 0.5, (3, "maxvio/layer_1"): 0.0}
    assert [(h.min, h.max, h.num) for h in histograms] == [(0.5, 1.5, 2), (1.0, 1.0, 2)]
    assert all(sum(h.bucket) == 2 for h in histograms)


FULL = """
import resource, signal, sys
from pathlib import Path
from dsmoe_jax.runs.metrics_log import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
workdir, kind = Path(sys.argv[1]), sys.argv[2]
log = MetricsLog(workdir, 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
try:
    for step in range(1, 4):
        # Many numbers in the file; or few there, and histograms among the events.
        log.write({"step": step, "load": [[1, 2]] * (50 if kind == "metrics.jsonl" else 1)})
finally:
    log.close()
"""


@pytest.mark.parametrize("kind", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_one_error_with_the_name(tmp_path, kind):
    """No file may grow beyond 400 bytes; nothing hangs, and no thread adds a traceback."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), kind],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"OSError: {tmp_path / kind}: cannot be written: "), done.stderr
    assert "Thread" not in done.stderr

"""JSON of a run: by the standard, whole, and with the file's name in every error."""

import json
import math
import subprocess
import sys

import pytest

from dsmoe_jax.runs import json_files
from tests.tools.patience import PATIENCE


def strict(text):
    """As readers that know no NaN, such as jq."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    tree = {"a": math.nan, "b": [1.5, math.inf, (-math.inf, 2)], "c": {"d": math.nan}, "e": None}
    wanted = {"a": None, "b": [1.5, None, [None, 2]], "c": {"d": None}, "e": None}
    assert strict(json_files.dumps(tree)) == wanted
    json_files.write(tmp_path / "x.json", tree)
    assert strict((tmp_path / "x.json").read_text()) == wanted
    assert json_files.read(tmp_path / "x.json") == wanted
    found = json_files.read(tmp_path / "x.json", null_is_nan=True)
    assert math.isnan(found["a"])
    assert math.isnan(found["c"]["d"])
    assert found["b"][0] == 1.5


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 200_000, b'{"a":' + b"[" * 900 + b"null" + b"]" * 900 + b"}", b"\xff{}",
     b'{"a": ' + b"1" * 6000 + b"}", b"[1]", b"3", b"null", b"{}{}", b"\0\0"],
)  # fmt: skip
def test_damage_is_one_line_with_the_name(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json: not ") as caught:
        json_files.read(path, null_is_nan=True)
    assert "\n" not in str(caught.value)


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
from pathlib import Path
from dsmoe_jax.runs import json_files
json_files.write(Path(sys.argv[1]), {"text": "x" * 1000})
"""


def test_a_full_disk_leaves_the_old_content(tmp_path):
    """No file may grow beyond 100 bytes."""
    path = tmp_path / "x.json"
    path.write_text('{"old": 1}')
    command = [sys.executable, "-c", FULL, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stderr.splitlines()[-1].startswith(f"OSError: {path}: cannot be written: ")
    assert json_files.read(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]

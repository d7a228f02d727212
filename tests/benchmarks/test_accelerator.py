"""The prepared script at smoke scale: its order, its budget, and what it does with failures."""

import functools
import json
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator, agreement
from dsmoe_jax.moe.experts import BACKENDS, Backend
from dsmoe_jax.study import runner
from dsmoe_jax.training.interrupt import Stopped
from tests.tools.made_up_runs import FakeTrain

SHAPE = agreement.Shape(24, 8, 4, 6)


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`called(*flags)`: the rows of the log after a call with made-up training."""
    monkeypatch.setattr(accelerator, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(
        accelerator.runner,
        "run",
        functools.partial(
            runner.run, train=FakeTrain(), fingerprint=lambda data: str(data.corpus) * 12
        ),
    )
    smallest = accelerator.settings("smoke")._replace(shapes={"small": SHAPE})
    monkeypatch.setattr(accelerator, "settings", lambda scale: smallest)

    def call(*flags: str) -> list[dict]:
        where = (f"--out={tmp_path / 'out'}", f"--runs={tmp_path / 'runs'}")
        accelerator.main(["--scale=smoke", *where, *flags])
        lines = (tmp_path / "out" / "accelerator.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return call


def of(rows: list[dict], part: str) -> list[dict]:
    return [row for row in rows if row["part"] == part]


def test_all_parts_in_their_order(called, tmp_path: Path):
    rows = called("--backends=ragged_dot")
    parts = list(dict.fromkeys(row["part"] for row in rows))
    assert parts == ["device", "product", "backends", "legs", "layer", "table1"]
    assert not [row for row in rows if "error_text" in row]
    assert {(row["dtype"], row["loads"]) for row in of(rows, "backends")} == {
        (dtype, loads) for dtype in agreement.TOLERANCES for loads in agreement.loads(SHAPE)
    }
    assert all(row["right"] for row in of(rows, "backends"))
    assert {row["backend"] for row in of(rows, "layer")} == {"dense", "ragged_dot"}
    first, *arms = of(rows, "table1")
    assert first["overrides"] == {"model.moe.expert_backend": "ragged_dot"}
    assert [row["arm"] for row in arms] == [
        "DeepSeekMoE", "GShard", "Switch", "Hash Layer", "Dense",
    ]  # fmt: skip
    summary = (tmp_path / "out" / "accelerator.md").read_text()
    assert summary.count("\n## ") == 6
    assert f"| DeepSeekMoE | {arms[0]['validation_loss']:.4g} |" in summary
    assert (tmp_path / "out" / "table1" / "report.md").is_file()
    results = (tmp_path / "out" / "table1" / "results.jsonl").read_text().splitlines()
    assert len(results) == 5


def test_a_failure_is_a_row_and_the_rest_goes_on(called, monkeypatch: pytest.MonkeyPatch):
    def broken(rows_ND, group_sizes_E, weights, *activation):
        raise RuntimeError("no kernel\nfor this")

    def unfit(*arguments):
        return 1.5 * BACKENDS["ragged_dot"].run(*arguments)

    monkeypatch.setitem(BACKENDS, "broken", Backend(broken))
    monkeypatch.setitem(BACKENDS, "unfit", Backend(unfit))
    rows = called("--backends=broken,unfit,ragged_dot", "--parts=backends,layer")
    failures = [row for row in rows if "error_text" in row]
    assert [(row["part"], row["backend"], row["error_text"]) for row in failures] == [
        ("backends", "broken", "RuntimeError: no kernel for this"),
        ("backends", "broken", "RuntimeError: no kernel for this"),
        ("layer", "broken", "RuntimeError: no kernel for this"),
        ("layer", "unfit", "not timed: its results are wrong"),
    ]
    agreed = {row["backend"]: row["right"] for row in of(rows, "backends") if "right" in row}
    assert agreed == {"unfit": False, "ragged_dot": True}
    # A later call adds to the file and knows what was fast.
    assert len(called("--parts=device")) == len(rows) + 2
    first, *_ = of(called("--parts=table1"), "table1")
    assert first["overrides"] == {"model.moe.expert_backend": "ragged_dot"}


def test_nothing_starts_when_the_time_is_up(called, tmp_path: Path):
    rows = called("--minutes=0.0001", "--backends=ragged_dot")
    left_out = [row for row in rows if row.get("error_text") == "not started: the time is up"]
    assert {row["part"] for row in left_out} == {"product", "backends", "legs", "layer", "table1"}
    assert len(of(left_out, "table1")) == 5
    assert "## What failed or was left out" in (tmp_path / "out" / "accelerator.md").read_text()


def test_a_case_ends_with_its_time():
    start = time.monotonic()
    with pytest.raises(accelerator.TimeUp), accelerator.time_limit(0.05):
        time.sleep(5)
    assert time.monotonic() - start < 2
    with accelerator.time_limit(0.05):
        pass
    time.sleep(0.1)  # no signal comes afterwards
    with pytest.raises(Stopped), accelerator.stopped_after(0.05):
        time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_corpus_reaches_every_arm(called, tmp_path: Path):
    (tmp_path / "packed.tar.xz").touch()
    first, *arms = of(called("--parts=table1", f"--corpus={tmp_path / 'packed.tar.xz'}"), "table1")
    assert first["overrides"] == {"data.corpus": str(tmp_path / "packed.tar.xz")}
    assert not [row for row in arms if "error_text" in row]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--parts=devcie", "'devcie' must be one of device, backends, legs, layer, table1"),
        ("--backends=lop", "'lop' must be one of loop"),
        ("--corpus=nowhere.tar.xz", "no such file or directory"),
        ("--minutes=0", "must be a number above 0"),
    ],
)
def test_wrong_flags(called, capsys: pytest.CaptureFixture[str], flag: str, message: str):
    with pytest.raises(SystemExit):
        called(flag)
    assert message in capsys.readouterr().err


class TestAgreement:
    def test_the_error_is_that_of_numpy(self):
        """A backend that is off by a known amount in one array."""

        def off(rows_ND, sizes_E, weights):
            return BACKENDS["ragged_dot"].run(rows_ND, sizes_E, weights) * 1.25

        args = agreement._arguments(SHAPE, agreement.loads(SHAPE)["one takes all"], "float32")
        exact = agreement._value_and_gradients(*args, run=BACKENDS["ragged_dot"].run)
        other = agreement._value_and_gradients(*args, run=off)
        errors = agreement._errors(other, exact)
        for name, array in zip(agreement.ARRAYS, jax.tree.leaves(exact), strict=True):
            expected = np.abs(0.25 * np.asarray(array)).max() / np.abs(array).max()
            assert errors[name] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("where", ["padding", "gradient of an empty group"])
    def test_finds_what_kernels_got_wrong(self, monkeypatch: pytest.MonkeyPatch, where: str):
        right = BACKENDS["ragged_dot"].run

        @jax.custom_vjp
        def careless(rows_ND, sizes_E, weights):
            y_ND = right(rows_ND, sizes_E, weights)
            past_N1 = (jnp.arange(len(y_ND)) >= sizes_E.sum())[:, None]
            return jnp.where(past_N1 & (where == "padding"), 1.0, y_ND)

        def forward(rows_ND, sizes_E, weights):
            _, transpose = jax.vjp(lambda x, w: right(x, sizes_E, w), rows_ND, weights)
            return careless(rows_ND, sizes_E, weights), (transpose, sizes_E)

        def backward(saved, dy_ND):
            transpose, sizes_E = saved
            dx_ND, d = transpose(dy_ND)
            if where != "padding":  # an empty group gets its neighbour's rows
                empty_E11 = (sizes_E == 0)[:, None, None]
                d = jax.tree.map(lambda a: jnp.where(empty_E11, jnp.roll(a, 1, axis=0), a), d)
            return dx_ND, None, d

        careless.defvjp(forward, backward)
        monkeypatch.setitem(BACKENDS, "careless", Backend(careless))
        rows = {row["loads"]: row for row in agreement.check("careless", SHAPE, "float32")}
        found = rows["uneven, one empty, padding"]
        assert not found["right"]
        assert found["padding_is_zero"] == (where != "padding")
        assert found["error"] > 0.1

    def test_loads_are_what_their_names_say(self):
        shape = agreement.Shape(512, 128, 8, 64)
        uneven_E, all_E = agreement.loads(shape).values()
        assert 0 < uneven_E.sum() < 512
        assert (uneven_E == 0).sum() == 1
        assert sorted(all_E)[-2:] == [0, 512]

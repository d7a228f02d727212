"""Every benchmark runs at its smallest and has a row for each case.  Its times mean nothing."""

import json

import numpy as np
import pytest
from flax import nnx

from benchmarks import (
    analysis,
    int8_experts,
    latency,
    latency_page,
    moe_layer,
    parallel,
    router_metrics,
    routers,
    train_step,
)
from dsmoe_jax.analysis import over_training
from dsmoe_jax.moe.kernels import native


@pytest.fixture
def written(tmp_path, monkeypatch):
    """`written(benchmark, *flags)`: the report of one round, from its file."""
    # Freed memory that a process keeps would stay with all other tests.
    for benchmark in (
        analysis,
        int8_experts,
        latency,
        moe_layer,
        parallel,
        router_metrics,
        routers,
        train_step,
    ):
        monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: False)

    def run(benchmark, *flags):
        path = tmp_path / "report.json"
        benchmark.main([*flags, "--repeats=1", f"--json={path}"])
        return json.loads(path.read_text())

    return run


def test_moe_layer(written):
    backends = ["loop", "native"] if native.is_there() else ["loop"]
    flags = ("--size=demo", "--tokens=32", "--shared=1", f"--backends={','.join(backends)}")
    report = written(moe_layer, *flags)["sizes"]["demo"]
    assert (report["tokens"], report["n_shared_experts"]) == (32, 1)
    assert {(row["backend"], row["routing"], row["pass"]) for row in report["rows"]} == {
        (*case, kind)
        for case in [("dense", "-"), *((b, r) for b in backends for r in moe_layer.ROUTINGS)]
        for kind in ("forward", "forward+gradients")
    }


def test_int8_experts(written, finished_run):
    flags = ("--size=demo", "--tokens=4", f"--workdir={finished_run[0]}")
    report = written(int8_experts, *flags)
    cases = {row["case"]: row for row in report["layer"]}
    assert {"float", "int8", "int8 x int8"} <= set(cases)
    assert cases["float"]["weight_mb"] == 4 * cases["int8"]["weight_mb"]
    text = {row["case"]: row["weight_mb"] for row in report["generation"]}
    assert text["int8"] == text["int8 x int8"] < text["float"]


def test_moe_layer_beside_hugging_face():
    """Both compute the same layer: the same output, and the same gradient of the tokens."""
    size = moe_layer.Size(8, 16, 4, 2, 8)
    cases = moe_layer.build_cases(size, ["loop"], True, "float32", None)
    found = {
        case.name: case.run()
        for case in cases
        if case.routing == "balanced" and case.with_gradients
    }
    ours_TD, (ours_dx_TD, *_) = found["loop"]
    theirs_BSD, (theirs_dx_BSD, *_) = found["hf"]
    np.testing.assert_allclose(ours_TD, theirs_BSD[0], atol=1e-5)
    np.testing.assert_allclose(ours_dx_TD, theirs_dx_BSD[0], atol=1e-5)


def test_train_step(written, monkeypatch):
    monkeypatch.setattr(train_step, "STEPS", 2)
    monkeypatch.setattr(train_step, "WARM_UP", 0)
    report = written(train_step, "--scale=smoke", "--arms=Dense,DeepSeekMoE")
    dense, mixture = report["rows"]
    assert (dense["model"], dense["per FLOP / dense"]) == ("Dense", 1)
    assert mixture["model"] == "DeepSeekMoE"
    assert mixture["per FLOP / dense"] > 0
    dense, mixture = report["ms_by_part"]
    of_a_mixture = ("router", "dispatch", "experts")
    assert all(dense[part] == 0 < mixture[part] for part in of_a_mixture)
    assert all(dense[part] > 0 for part in ("attention", "shared_experts", "head", "optimizer"))
    assert dense["sum"] == pytest.approx(
        sum(v for k, v in dense.items() if k not in ("model", "sum"))
    )


def test_train_step_needs_the_dense_model(capsys):
    with pytest.raises(SystemExit):
        train_step.parse(["--arms=GShard"])
    assert "--arms: must be Dense and others of Dense, Hash Layer" in capsys.readouterr().err


@pytest.mark.eight_devices
def test_parallel(monkeypatch):
    for name, size in (("T", 64), ("D", 8), ("F", 8)):
        monkeypatch.setattr(parallel, name, size)
    rows = parallel.measure(1, "float32")
    assert {(row["dispatch"], row["routing"]) for row in rows} == {
        (case, routing)
        for case in (parallel.ONE_DEVICE, *parallel.CASES)
        for routing in ("even", "skewed", "at most 3 devices")
    }
    for row in rows:
        if row["dispatch"] == parallel.ONE_DEVICE:
            assert row["sent_mb"] is None
        else:
            assert row["least_mb"] < row["sent_mb"]


@pytest.mark.eight_devices
def test_latency(written, monkeypatch, tmp_path):
    """Every part of every path; its page has its tables."""
    monkeypatch.setattr(latency, "D", 8)
    small = {"n_routed_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    monkeypatch.setattr(latency, "LAYER", latency.LAYER | small)
    monkeypatch.setattr(latency, "LIMITS", (1,))
    monkeypatch.setattr(latency, "LIMITED", 16)
    monkeypatch.setattr(latency, "ROUNDS", {16: 1})
    (tmp_path / "page.md").write_text("a\n<!-- tables -->\nold\n<!-- end of the tables -->\nb\n")
    flags = (f"--page={tmp_path / 'page.md'}", f"--picture={tmp_path / 'picture.svg'}")
    report = written(latency, *flags)
    found = {(row["devices"], row["limit"], row["path"]): row for row in report["rows"]}
    assert set(found) == {
        *((1, None, path) for path in latency.PATHS[1]),
        *((8, limit, path) for limit in (None, 1) for path in latency.PATHS[8]),
    }
    for row in report["rows"]:
        assert all(row[f"{part}_ms"] > 0 for part in (*latency.PARTS, latency.WHOLE, latency.CALL))
    assert found[8, None, "all_gather"]["rows"] == 7
    assert found[8, 1, latency.RAGGED]["rows"] <= 1 < found[8, None, latency.RAGGED]["rows"] <= 2
    page = (tmp_path / "page.md").read_text()
    tables = f"{latency_page.START}\n\n{latency_page.tables(report)}\n\n{latency_page.END}"
    assert page == f"a\n{tables}\nb\n"
    assert (tmp_path / "picture.svg").read_text().startswith("<svg")


@pytest.mark.eight_devices
@pytest.mark.parametrize("path", latency.PATHS[8])
def test_the_parts_of_latency_are_the_layer(monkeypatch, path):
    """Put together they give what the layer gives."""
    monkeypatch.setattr(latency, "D", 8)
    with latency.on_devices(8):
        layer = latency.Layer(latency.Setting(8, 4, 16), latency.PATHS[8][path])
        calls = layer.calls((latency.EXCHANGE, latency.SHARED, latency.WHOLE))
        _, routed_TD = calls[latency.EXCHANGE]()
        together = routed_TD + calls[latency.SHARED]()
        np.testing.assert_allclose(together, calls[latency.WHOLE](), atol=1e-5)


def test_routers(written, monkeypatch):
    monkeypatch.setattr(routers, "B", 2)
    monkeypatch.setattr(routers, "S", 8)
    names = ["reinforce", "replay_ids", "hash_table=frequency, K = 1", "drop by device"]
    for settings in routers.CASES.values():
        nnx.eval_shape(lambda settings=settings: routers.make_layer(settings))  # is legal
    few = {name: routers.CASES[name] for name in (routers.BASE, *names)}
    monkeypatch.setattr(routers, "CASES", few)
    rows = written(routers)["rows"]
    assert [row["case"] for row in rows] == [routers.WHOLE, routers.BASE, *names]


def test_router_metrics(written):
    report = written(router_metrics, "--scale=smoke", "--layers=1", "--sequences=1")
    assert [row["program"] for row in report["rows"]] == [
        f"{program}, {metrics_are}"
        for program in ("step", "layers")
        for metrics_are in ("with", "without", "control")
    ]


def test_analysis(written, monkeypatch):
    monkeypatch.setattr(analysis, "STEPS", 1)
    monkeypatch.setattr(over_training, "TOKENS", 200)
    report = written(analysis, "--scale=smoke", "--arm=gshard_2b")
    assert report["tokens"] == 200
    share = report["in_steps"] / report["two_percent_every"]
    assert 0 < share <= analysis.SHARE

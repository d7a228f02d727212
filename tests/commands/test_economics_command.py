"""`python -m dsmoe_jax economics`: several configs, loads, and refusals in one line."""

import json

import pytest

from tests.tools.forked import run_all

PAIR = ["economics", "--config=configs/dsmoe_2b.py:smoke", "--config=configs/dense_2b.py:smoke"]
REFUSED = {
    (): "--config: missing; for example --config=configs/dsmoe_2b.py:demo",
    (PAIR[1], "--mfu=0"): "--mfu=0.0: must be above 0",
    (PAIR[1], "--batch=0"): "batch",
    (PAIR[1], "--chip=abacus"): "should be one of",
    (PAIR[1], "--prices=no.toml"): "--prices=no.toml: no such file",
    (PAIR[1], "--loads=LOADS"): "must be of this model",
    (PAIR[1], "--config.model.hidden_size=-3"): "--config.model.hidden_size=-3",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The refusals, then two calls that work."""
    loads = tmp_path_factory.mktemp("loads") / "evaluation.json"
    loads.write_text('{"load": [[1, 2]]}')
    cases = [
        [word.replace("LOADS", str(loads)) for word in ("economics", *case)] for case in REFUSED
    ]
    even = tmp_path_factory.mktemp("loads") / "evaluation.json"
    even.write_text(json.dumps({"load": [[1] * 7 + [0] * 56] * 2}))
    works = [
        [*PAIR, "--json", f"--loads={even}", "--config.data.sequence_length=32"],
        [*PAIR, "--batch=2", "--context=64"],
    ]
    return run_all([*cases, *works])


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=map(" ".join, REFUSED))
def test_refusals(results, number):
    code, out, err = results[number]
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert [*REFUSED.values()][number] in line


def test_json(results):
    """Seven experts take all tokens: seven of 63 are touched by any batch."""
    assert results[-2].code == 0, results[-2].err
    found = json.loads(results[-2].out)
    sparse, dense = found["models"]
    assert found["context"] == 32
    assert sparse["name"] == "dsmoe_2b:smoke"
    assert [row["batch"] for row in sparse["decoding"]] == [1, 8, 64, 512]
    assert all(row["touched"] == pytest.approx(7 / 63) for row in sparse["decoding"])
    assert dense["decoding"][0]["touched"] is None
    assert dense["training"]["money"] is None
    (beside,) = found["beside"]
    assert beside["names"] == ["dsmoe_2b:smoke", "dense_2b:smoke"]


def test_tables(results):
    assert results[-1].code == 0, results[-1].err
    assert "| 2 | 21 % | 1 |" in results[-1].out
    assert "FLOPs of a token in decoding, context 64" in results[-1].out

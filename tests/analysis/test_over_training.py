"""Tables made during training: their numbers, a run that goes on, stages, and bad input."""

import json
import shutil

import numpy as np
import pytest

from dsmoe_jax.analysis import over_training, tables
from dsmoe_jax.analysis.over_training import OverTraining
from dsmoe_jax.analysis.routed_text import route_text
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.training.loop import train

CONFIG = {
    "train.steps": 4,
    "train.analyse_every": 2,
    "train.checkpoint_every": 2,
    "train.eval_every": None,
    "train.stages.share": (0.5, 0.5),
    "train.stages.model.moe.num_experts_per_tok": (2, 1),
}
TOKENS = 3000


@pytest.fixture(scope="module", autouse=True)
def few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(over_training, "TOKENS", TOKENS)
        yield


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config(**CONFIG)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run of two stages that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("analysed") / "run"
    train(config, workdir, progress=False)
    return workdir


def files(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "analysis").iterdir()}


def test_tables_are_those_of_the_checkpoint(run):
    assert files(run).keys() == {
        f"0000000{step}.{end}" for step in (2, 4) for end in ("json", "npz")
    }
    rows = {row["step"]: row for row in read_rows(run)}
    assert all(("inside_committee" in row) == (step in (2, 4)) for step, row in rows.items())
    ids = {}
    for step, columns in ((2, 2), (4, 1)):
        loaded = load_run(run, step)
        text = route_text(loaded.model, loaded.corpus, max_tokens=TOKENS, batch_size=8)
        ids[step] = text.ids_LTK
        assert text.ids_LTK.shape == (2, TOKENS, columns)
        kept = OverTraining(run / "analysis").ids(step)
        np.testing.assert_array_equal(kept, text.ids_LTK)
        others = {"step 2": ids[2]} if step == 4 else {}
        wanted = tables.compute(tables.Subject(text, others=others), only_cheap=True)
        found = json.loads((run / "analysis" / f"{step:08}.json").read_text())
        assert found["domains"] == json.loads(json.dumps(wanted["domains"]))
        assert found["saturation"] == wanted["saturation"]
        assert rows[step]["inside_committee"] == tables.by_layer(wanted)["committee"]
    assert "inside_router_saturation" not in rows[2]
    same_LT = (ids[2] == ids[4]).any(axis=2)
    assert rows[4]["inside_router_saturation"] == pytest.approx(same_LT.mean(axis=1))
    assert {"coactivation", "similarity"}.isdisjoint(found)


def test_a_run_that_goes_on_has_the_same_tables(run, config, tiny_config, tmp_path):
    """Killed before a checkpoint was whole, it goes on without tables; then they are wanted again.

    Of step 4 there is something that must not stay.
    """
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    (workdir / "evaluation.json").unlink()
    (workdir / "analysis" / "00000004.json").write_text("{}")
    train(tiny_config(**{**CONFIG, "train.analyse_every": None}), workdir, progress=False)
    assert files(workdir).keys() == {"00000002.json", "00000002.npz"}
    last = read_rows(run)[-1]
    without = {key: value for key, value in last.items() if not key.startswith("inside")}
    assert read_rows(workdir)[-1]["loss"] == last["loss"]
    assert read_rows(workdir)[-1].keys() == without.keys()
    (workdir / "evaluation.json").unlink()
    train(config, workdir, progress=False)
    assert files(workdir) == files(run)
    found = read_rows(workdir)[-1]
    assert all(found[key] == last[key] for key in last.keys() - without.keys())


def test_a_damaged_routing_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "analysis" / "00000002.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"00000002\.npz: cannot be read; remove it"):
        OverTraining(path.parent).ids(2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train.analyse_every": 0}, r"train\.analyse_every=0: must be > 0"),
        (
            {
                "model.moe.n_routed_experts": 0,
                "model.moe.num_experts_per_tok": 0,
                "model.moe.n_shared_experts": 1,
                "model.moe.balance.expert": None,
                "model.moe.balance.router_z": None,
            },
            "n_routed_experts=0: a dense model routes nothing",
        ),
    ],
)
def test_bad_input(tiny_config, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        train(tiny_config(**{"train.analyse_every": 2, **changes}), tmp_path / "new")
    assert not (tmp_path / "new").exists()

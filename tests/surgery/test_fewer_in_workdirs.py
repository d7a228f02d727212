"""A workdir with fewer experts: all that loads a checkpoint can load it, moments included."""

import jax
import numpy as np
import pytest

from dsmoe_jax.hf.workdirs import to_hf
from dsmoe_jax.runs.loading import load_run, load_writer, saved_checkpoints
from dsmoe_jax.runs.workdir import read_config
from dsmoe_jax.surgery import OPERATIONS, workdirs
from dsmoe_jax.training.start import MODEL, TRAINING, abstract_state, to_items
from tests.tools.trees import by_path


def options(operation, **changed):
    own = {name: option.default for name, option in OPERATIONS[operation].options.items()}
    return own | changed


def restored(workdir):
    """All that a training goes on with, in the shapes of the workdir's config."""
    with saved_checkpoints(workdir) as checkpoints:
        return checkpoints.restore(9, to_items(abstract_state(read_config(workdir))))


@pytest.fixture(scope="module")
def pruned(finished_run, tmp_path_factory):
    """By outputs on the held-out text of the run."""
    run = finished_run[0]
    to = tmp_path_factory.mktemp("pruned") / "run"
    made = workdirs.operate(
        "prune", str(run), str(to), options("prune", by="outputs", keep=3), step=9
    )
    return run, to, made.outcome


def test_moments_went_along(pruned):
    run, to, outcome = pruned
    assert read_config(to).model.moe.n_routed_experts == 3
    before, after = (by_path(restored(place).items[TRAINING]["opt_state"]) for place in (run, to))
    ids_LN = np.array(outcome.report["experts"])
    for path, x in before.items():
        cut = any(name in path for name in ("router_ED", "gate_EFD", "up_EFD", "down_EDF"))
        wanted = np.asarray(x)[np.arange(2)[:, None], ids_LN] if cut else x
        np.testing.assert_array_equal(after[path], wanted, err_msg=path)
    loads = [np.array(restored(place).extra["running_load"]) for place in (run, to)]
    np.testing.assert_array_equal(loads[1], np.take_along_axis(loads[0], ids_LN, axis=1))


def test_every_command_can_load_it(pruned, tmp_path):
    _, to, outcome = pruned
    assert load_run(to, 9).step == load_writer(to, 9).step == 9
    assert to_hf(str(to), str(tmp_path / "hf"), 9, "float32", 10**9).step == 9
    (entry,) = workdirs.history(to)
    assert entry["report"]["experts"] == outcome.report["experts"]


def test_merging_has_fresh_moments_or_none(pruned, tmp_path):
    """And an operation follows another one."""
    _, to, _ = pruned
    given = options("merge", by="aligned", keep=2)
    with pytest.raises(ValueError, match=r"no meaning for the new model; must be fresh or none$"):
        workdirs.operate("merge", str(to), str(tmp_path / "x"), given, step=9)
    assert [*tmp_path.iterdir()] == []
    workdirs.operate("merge", str(to), str(tmp_path / "x"), given, step=9, moments="fresh")
    state = restored(tmp_path / "x").items
    assert state[MODEL].params["layers"]["moe"]["router_ED"].shape == (2, 2, 32)
    moments = [x for x in jax.tree.leaves(state[TRAINING]["opt_state"]) if x.ndim]
    assert all((np.asarray(x) == 0).all() for x in moments)
    assert [entry["operation"] for entry in workdirs.history(tmp_path / "x")] == ["prune", "merge"]

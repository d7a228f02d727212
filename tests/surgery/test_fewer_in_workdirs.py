"""A workdir with fewer experts: all that loads a checkpoint can load it, moments included."""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from dsmoe_jax.evaluation.held_out import evaluate
from dsmoe_jax.hf.workdirs import to_hf
from dsmoe_jax.runs.checkpoint import Checkpoints
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


def test_by_loss_the_one_goes_that_is_missed_least(finished_run, tmp_path):
    """An expert without weights is not missed at all: leaving it out only frees its place."""
    run = str(finished_run[0])
    given = options("prune", by="loss", keep=3)
    made = workdirs.operate("prune", run, str(tmp_path / "x"), given, step=9)
    rises_LE = np.array(made.outcome.report["rises"])
    assert rises_LE.shape == (2, 4)
    assert 0 < np.abs(rises_LE).max() < 1
    gone = [({*range(4)} - {*ids}).pop() for ids in made.outcome.report["experts"]]
    assert gone == rises_LE.argmin(axis=1).tolist()
    assert "without one expert, nats per token, by layer: " in made.outcome.text
    before, after = (load_run(place, 9) for place in (run, tmp_path / "x"))
    losses = [evaluate(loaded.model, loaded.corpus)["loss"] for loaded in (before, after)]
    assert losses[1] - losses[0] < 0.1


WAYS_OUT = {
    ("loss", "keep", None): r"^--keep: missing; --by=loss ranks experts, and has no threshold$",
    ("loss", "threshold", 0.5): r"^--threshold=0\.5: has no meaning for --by=loss$",
    ("loss", "loads", "x.json"): r"^--loads=x\.json: has no meaning for --by=loss$",
}


@pytest.mark.parametrize(("by", "name", "value"), WAYS_OUT)
def test_what_a_way_does_not_take_is_refused(finished_run, tmp_path, by, name, value):
    given = options("prune", **{"by": by, "keep": 3, name: value})
    with pytest.raises(ValueError, match=WAYS_OUT[by, name, value]):
        workdirs.operate("prune", str(finished_run[0]), str(tmp_path / "x"), given, step=9)
    assert [*tmp_path.iterdir()] == []


def test_an_interrupted_operation_leaves_nothing(finished_run, tmp_path, monkeypatch):
    """Ctrl-C when all but the last bytes are written; afterwards the same command succeeds."""
    save = Checkpoints.save

    def interrupted(self, *arguments):
        save(self, *arguments)
        assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
        raise KeyboardInterrupt

    arguments = ("prune", str(finished_run[0]), str(tmp_path / "x"), options("prune", keep=3))
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            workdirs.operate(*arguments, step=9)
    assert [*tmp_path.iterdir()] == []
    assert workdirs.operate(*arguments, step=9).step == 9


KILLED = """
import os, signal, sys
from dsmoe_jax.runs.checkpoint import Checkpoints
from dsmoe_jax.surgery import OPERATIONS, workdirs
save = Checkpoints.save
def killed(self, *arguments):
    save(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = killed
own = {name: option.default for name, option in OPERATIONS["prune"].options.items()}
workdirs.operate("prune", sys.argv[1], sys.argv[2], own | {"keep": 3}, step=9)
"""


def test_a_killed_operation_leaves_no_workdir(finished_run, tmp_path):
    """kill -9 at that moment: what is there has a hidden name, and is in nobody's way."""
    run, to = str(finished_run[0]), tmp_path / "x"
    killed = subprocess.run([sys.executable, "-c", KILLED, run, str(to)], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name.startswith(".x.") for path in tmp_path.iterdir()] == [True]
    assert workdirs.operate("prune", run, str(to), options("prune", keep=3), step=9).step == 9

"""A workdir from another one: what it holds, that it trains on, and that a mesh takes its order."""

import json

import jax
import numpy as np
import pytest

from dsmoe_jax.config import MeshConfig
from dsmoe_jax.hf.workdirs import to_hf
from dsmoe_jax.model.build import model_shapes
from dsmoe_jax.parallel import sharding
from dsmoe_jax.parallel.mesh import make_mesh
from dsmoe_jax.runs import json_files
from dsmoe_jax.runs.loading import load_model_state, load_run, load_writer, saved_checkpoints
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.workdir import read_config
from dsmoe_jax.surgery import OPERATIONS, Subject, placement, workdirs
from dsmoe_jax.training.loop import train
from dsmoe_jax.training.start import TRAINING, abstract_state, to_items
from tests.tools.tiny import FOR_EIGHT_DEVICES
from tests.tools.trees import by_path


def options(run, **changed):
    own = {name: option.default for name, option in OPERATIONS["place"].options.items()}
    return own | {"loads": str(run / "metrics.jsonl"), "devices": 2} | changed


@pytest.fixture(scope="module")
def placed(finished_run, tmp_path_factory):
    run = finished_run[0]
    to = tmp_path_factory.mktemp("placed") / "run"
    made = workdirs.operate("place", str(run), str(to), options(run), step=9)
    return run, to, made.outcome


def model_of(workdir, step=9):
    return load_model_state(workdir, model_shapes(read_config(workdir).model), step).state


def test_the_experts_moved(placed):
    run, to, outcome = placed
    orders = np.array(outcome.report["orders"])
    assert (orders != np.arange(4)).any()
    before, after = by_path(model_of(run)), by_path(model_of(to))
    for path, x in before.items():
        moved = any(name in path for name in ("router_ED", "gate_EFD", "up_EFD", "down_EDF"))
        wanted = np.take_along_axis(
            np.asarray(x), orders.reshape(2, 4, *[1] * (x.ndim - 2)), axis=1
        ) if moved else x  # fmt: skip
        np.testing.assert_array_equal(after[path], wanted, err_msg=path)


def test_its_history(placed):
    run, to, outcome = placed
    (entry,) = workdirs.history(to)
    assert (entry["operation"], entry["step"], entry["from"]) == ("place", 9, str(run))
    assert entry["report"] == json.loads(json_files.dumps(outcome.report))
    assert entry["options"]["devices"] == 2
    assert workdirs.history(run) == []


def test_training_goes_on_as_it_would_have(placed):
    """Moments and running load moved along: the next step is the same, by rounding."""
    run, to, outcome = placed
    result = train(read_config(run), to, progress=False)
    assert (result.resumed_from, result.step) == (9, 10)
    (there,) = [row for row in read_rows(run) if row["step"] == 10]
    here = read_rows(to)[-1]
    for key in ("loss", "grad_norm", "validation_loss", "maxvio_running"):
        np.testing.assert_allclose(here[key], there[key], rtol=1e-5, err_msg=key)
    orders = np.array(outcome.report["orders"])
    assert here["load"] == np.take_along_axis(np.array(there["load"]), orders, axis=1).tolist()
    moved = by_path(model_of(to, 10))[".params['layers']['moe']['router_ED'].value"]
    wanted = by_path(model_of(run, 10))[".params['layers']['moe']['router_ED'].value"]
    wanted = np.take_along_axis(np.asarray(wanted), orders[:, :, None], axis=1)
    np.testing.assert_allclose(moved, wanted, rtol=1e-3, atol=1e-6)


def test_every_command_can_load_it(placed, tmp_path):
    _, to, _ = placed
    assert load_run(to, 9).step == load_writer(to, 9).step == 9
    assert to_hf(str(to), str(tmp_path / "hf"), 9, "float32", 10**9).step == 9


def test_a_second_operation_adds_to_the_history(placed, tmp_path):
    """And the model alone can be had, without an optimizer's state."""
    run, to, _ = placed
    workdirs.operate(
        "place", str(to), str(tmp_path / "new"), options(run, devices=4), step=9, moments="none"
    )
    assert [entry["options"]["devices"] for entry in workdirs.history(tmp_path / "new")] == [2, 4]
    assert not (tmp_path / "new/checkpoints/9" / TRAINING).exists()
    message = r"^--moments: --from=.*new has no optimizer's state, only a model; must be none$"
    with pytest.raises(ValueError, match=message):
        workdirs.operate("place", str(tmp_path / "new"), str(tmp_path / "x"), options(run))
    assert not (tmp_path / "x").exists()


def test_fresh_moments(placed, tmp_path):
    """They are 0, and the rate's schedule goes on."""
    run, _, _ = placed
    workdirs.operate(
        "place", str(run), str(tmp_path / "new"), options(run), step=9, moments="fresh"
    )
    found = {}
    for place in (run, tmp_path / "new"):
        with saved_checkpoints(place) as checkpoints:
            restored = checkpoints.restore(9, to_items(abstract_state(read_config(place))))
        found[place] = by_path(restored.items[TRAINING]["opt_state"])
    counts = {path: int(x) for path, x in found[tmp_path / "new"].items() if x.ndim == 0}
    before = {path: int(x) for path, x in found[run].items() if x.ndim == 0}
    assert set(before.values()) == {9}
    assert sorted(counts.values()) == [0, 9]
    assert all((np.asarray(x) == 0).all() for x in found[tmp_path / "new"].values() if x.ndim)


@pytest.mark.eight_devices
def test_training_goes_on_on_a_mesh(tiny_config, tmp_path):
    """And the devices of the experts get the load that the order promises."""
    steps = {"train.steps": 4, "train.eval_every": 4, "mesh.expert": 4, "mesh.fsdp": 2}
    config = tiny_config(**FOR_EIGHT_DEVICES, **steps)
    run, to = tmp_path / "run", tmp_path / "placed"
    train(config, run, progress=False)
    with jax.set_mesh(make_mesh(config.mesh)):
        given = options(run, devices=4)
        outcome = workdirs.operate("place", str(run), str(to), given, step=3).outcome
    assert train(config, to, progress=False).resumed_from == 3
    there, here = (read_rows(place)[-1] for place in (run, to))
    for key in ("loss", "grad_norm", "validation_loss"):
        np.testing.assert_allclose(here[key], there[key], rtol=1e-4, err_msg=key)
    orders = np.array(outcome.report["orders"])
    loads_LE = np.take_along_axis(np.array(there["load"]), orders, axis=1), np.array(here["load"])
    promised_LP, found_LP = (x.reshape(2, 4, -1).sum(axis=2) for x in loads_LE)
    np.testing.assert_allclose(found_LP, promised_LP, rtol=0.01)
    assert (np.array(there["load"]).reshape(2, 4, -1).sum(axis=2) != found_LP).any()


@pytest.mark.eight_devices
def test_a_mesh_gives_devices_the_parts_of_the_order(tiny_config, tmp_path):
    """Device p has the p-th part: what the plan says, and the exchange of rows follows."""
    config = tiny_config(**{"model.moe.n_routed_experts": 8})
    shapes = model_shapes(config.model)
    load = {"load": [[80, 70, 5, 5, 60, 50, 5, 5]] * 2}
    json_files.write(tmp_path / "evaluation.json", load)
    rng = np.random.default_rng(0)
    with jax.set_mesh(make_mesh(MeshConfig(expert=4, fsdp=2))):
        values = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
        state = jax.device_put(values, sharding.shardings(shapes))
        own = {name: option.default for name, option in OPERATIONS["place"].options.items()}
        own |= {"loads": str(tmp_path / "evaluation.json"), "devices": 4}
        outcome = placement.place(Subject(config, state), own)
        weights = outcome.model.params["layers"]["moe"]["gate_EFD"][...]
        order = outcome.report["orders"][0]
        shards = [(shard.index, np.asarray(shard.data)) for shard in weights.addressable_shards]
    assert outcome.report["after"]["devices"]["decide"][0] < 0.25
    assert {index[1].start for index, _ in shards} == {0, 2, 4, 6}
    given = np.asarray(values.params["layers"]["moe"]["gate_EFD"][...])
    for index, held in shards:
        np.testing.assert_array_equal(held, given[:, order][index])

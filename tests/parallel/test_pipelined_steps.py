"""Training in a pipeline on eight virtual devices is training without; so are its evaluations."""

import functools

import numpy as np
import pytest

from dsmoe_jax.model import pipelined, scanned
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.workdir import read_evaluation
from dsmoe_jax.training.loop import train
from tests.parallel.on_mesh import OnMesh
from tests.tools.tiny import FOR_EIGHT_DEVICES, tiny
from tests.tools.trees import REORDERED, assert_all_below, by_path, relative_errors

# Four MoE layers behind a dense one, terms of every scope, a bias that moves with the load; the
# batch has packed documents and padding; tokens compete for places in their micro-batch, and noise
# is drawn for each of them.
CONFIG = {
    **FOR_EIGHT_DEVICES,
    "model.attention.num_key_value_heads": 2,
    "model.num_hidden_layers": 5,
    "model.first_k_dense_replace": 1,
    "model.intermediate_size": 32,
    "model.initializer_range": 0.1,
    "model.remat": "full",
    "model.moe.router.bias_update_speed": 0.001,
    "model.moe.router.jitter": 0.1,
    "model.moe.balance.expert.factor": 0.1,
    "model.moe.balance.expert.scope": "global_batch",
    "model.moe.balance.switch.factor": 0.1,
    "model.moe.balance.switch.scope": "sequence",
    "model.moe.balance.sequence.factor": 0.1,
    "model.moe.balance.sequence.scope": "document",
    "model.moe.balance.router_z.factor": 0.01,
    "model.moe.drop.policy": "device",
    "model.moe.drop.capacity_factor": 0.7,
    "model.moe.drop.protected_share": 0.25,
    "model.moe.expert_groups": 4,
    "data.sequence_length": 16,
    "train.global_batch_size": 16,
    "train.accumulation_steps": 4,
    "train.record_routing": True,
    "optimizer.peak_learning_rate": 3e-4,
    "optimizer.warmup_steps": 0,
    "optimizer.clip_norm": 1e9,  # so that a gradient of a wrong scale shows
}
# Adam's first update is the sign of the gradient, which rounding turns where it is almost 0.
ONE_UPDATE = 1e-4

MESHES: dict[str, dict[str, object]] = {
    "4 stages": {"mesh.stage": 4, "mesh.expert": 2},
    "2 stages, 2 repeats, 2 rounds": {
        **{"mesh.stage": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
        **{"train.pipeline_repeats": 2, "train.pipeline_micro_batches": 2},
    },
}


@pytest.fixture(autouse=True)
def scanned_layers(monkeypatch):
    """Layers without stages are a loop too, as in stages: half as much to compile."""
    monkeypatch.setattr(scanned, "UNROLLED_LAYERS", 0)


def first_step(values: dict[str, object], devices: int) -> dict[str, np.ndarray]:
    """Arrays of the state and of the metrics after a step on a mesh."""
    run = OnMesh(tiny(**{**CONFIG, "mesh.data": 1, **values}), devices)
    metrics = run.take_step()
    found = by_path({"state": run.state, "metrics": metrics})
    # But for what is meant to depend on the mesh: rows between devices.
    return {p: np.asarray(x) for p, x in found.items() if "exchanged_rows" not in p}


@functools.cache
def on_one_device() -> dict[str, np.ndarray]:
    """The oracle of all meshes."""
    return first_step({}, 1)


@pytest.mark.eight_devices
@pytest.mark.parametrize("name", MESHES)
def test_a_step_is_that_of_one_device(name):
    """The first moments are the gradients (clipping is off), so their scale is seen too."""
    errors = relative_errors(first_step(MESHES[name], 8), on_one_device())
    assert sum("mu" in path for path in errors) > 15
    for of in ("load_E", "dropped_E", "computed_E", "bias_E", "terms", "recorded"):
        assert any(of in path for path in errors), of
    assert on_one_device()["['metrics'].router.ledger.dropped_E"].sum() > 0
    updated = {path: errors.pop(path) for path in [*errors] if ".params" in path}
    assert_all_below(errors, REORDERED)
    assert_all_below(updated, ONE_UPDATE)


@pytest.mark.eight_devices
def test_a_run_is_that_without_stages_and_goes_on_with_others(tiny_config, tmp_path):
    """`train` with evaluation: two steps in two stages, then two in four, beside no stages."""
    changes = {
        **FOR_EIGHT_DEVICES,
        **{"model.num_hidden_layers": 4, "model.remat": "full"},
        # Held-out tokens compete, so that batches of another size would drop others.
        "model.moe.evaluation_drop.capacity_factor": 0.8,
        **{"train.schedule_steps": 4, "train.eval_every": 2, "train.eval_batches": 1},
        **{"train.checkpoint_every": 2, "optimizer.peak_learning_rate": 3e-3},
        **{"train.global_batch_size": 16, "train.accumulation_steps": 4},
    }

    def run(name: str, steps: int, **mesh: int) -> dict[int, dict]:
        sizes = {f"mesh.{axis}": size for axis, size in mesh.items()}
        config = tiny_config(**{**changes, **sizes, "train.steps": steps})
        train(config, tmp_path / name, progress=False, self_check=False)
        return {row["step"]: row for row in read_rows(tmp_path / name)}

    wanted = run("plain", 4, data=4, tensor=2)
    run("stages", 2, stage=2, data=4)
    found = run("stages", 4, stage=4, data=2)
    keys = ("loss", "total_loss", "grad_norm", "expert_balance", "load", "dropped")
    for step in range(1, 5):
        for key in keys:
            np.testing.assert_allclose(found[step][key], wanted[step][key], rtol=1e-4, err_msg=key)
    losses = [wanted[step]["validation_loss"] for step in (2, 4)]
    assert losses[0] - losses[1] > 0.01, "it learns, so a stale evaluation would show"
    np.testing.assert_allclose([found[step]["validation_loss"] for step in (2, 4)], losses, 1e-5)
    a, b = (read_evaluation(tmp_path / name) for name in ("plain", "stages"))
    assert a is not None
    assert b is not None
    assert a["load_by_domain"] == b["load_by_domain"]
    np.testing.assert_allclose(a["gate_mass"], b["gate_mass"], 1e-4)


REFUSED = [
    (
        {"mesh.stage": 3},
        r"mesh.stage=3: times train.pipeline_repeats=1 .* the 4 MoE layers: .*1, 2, 4",
    ),
    (
        {"mesh.stage": 2, "train.pipeline_repeats": 3},
        r"mesh.stage=2: times train.pipeline_repeats=3 must divide the 4 MoE layers",
    ),
    (
        {"mesh.stage": 4, "train.accumulation_steps": 2},
        r"train.accumulation_steps=2: .*must be a multiple of mesh.stage=4",
    ),
    (
        {"mesh.stage": 2, "train.accumulation_steps": 4, "train.pipeline_micro_batches": 3},
        r"train.pipeline_micro_batches=3: must be a multiple of mesh.stage=2 that divides .*=4",
    ),
    ({"train.pipeline_repeats": 2}, r"train.pipeline_repeats=2: needs mesh.stage > 1;.* 1$"),
    ({"train.pipeline_micro_batches": 2}, r"train.pipeline_micro_batches=2: needs mesh.stage > 1"),
    (
        {"mesh.stage": 2, "train.accumulation_steps": 2, "model.remat": "none"},
        r"model.remat='none': .*must be 'dots', 'named' or 'full'",
    ),
    (
        {"mesh.stage": 2, "train.accumulation_steps": 2, "model.mtp.num_nextn_predict_layers": 1},
        r"mesh.stage=2: the modules of model.mtp .*must be 1",
    ),
    (
        {"mesh.stage": 2, "train.accumulation_steps": 2, "model.mlp_only_layers": (2,)},
        r"mesh.stage=2: .*must all be alike \(model.mlp_only_layers=\(2,\)\); must be 1",
    ),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_be_a_pipeline(values, message):
    config = tiny(**{**CONFIG, "train.accumulation_steps": 1, **values})
    with pytest.raises(ValueError, match=message) as caught:
        pipelined.check(config, config.mesh.stage)
    assert "\n" not in str(caught.value)

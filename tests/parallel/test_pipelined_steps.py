"""Training in a pipeline on eight virtual devices is training on one device; so is resuming."""

import functools

import numpy as np
import pytest

from dsmoe_jax.model import pipelined
from tests.parallel.on_mesh import OnMesh
from tests.tools.tiny import FOR_EIGHT_DEVICES, tiny
from tests.tools.trees import REORDERED, assert_all_below, by_path, relative_errors

# Four MoE layers behind a dense one, terms of every scope, a bias that moves with the load; the
# batch has packed documents and padding.
CONFIG = {
    **FOR_EIGHT_DEVICES,
    "model.attention.num_key_value_heads": 2,
    "model.num_hidden_layers": 5,
    "model.first_k_dense_replace": 1,
    "model.intermediate_size": 32,
    "model.initializer_range": 0.1,
    "model.remat": "full",
    "model.moe.router.bias_update_speed": 0.001,
    "model.moe.balance.expert.factor": 0.1,
    "model.moe.balance.expert.scope": "global_batch",
    "model.moe.balance.switch.factor": 0.1,
    "model.moe.balance.switch.scope": "sequence",
    "model.moe.balance.sequence.factor": 0.1,
    "model.moe.balance.sequence.scope": "document",
    "model.moe.balance.router_z.factor": 0.01,
    "data.sequence_length": 16,
    "train.global_batch_size": 16,
    "optimizer.peak_learning_rate": 3e-4,
    "optimizer.warmup_steps": 0,
    "optimizer.clip_norm": 1e9,  # so that a gradient of a wrong scale shows
}
# Adam's first update is the sign of the gradient, which rounding turns where it is almost 0.
ONE_UPDATE = 1e-4
# What a micro-batch's tokens compete for, and what is drawn at random.
COMPETING = {
    "model.moe.drop.policy": "device",
    "model.moe.drop.capacity_factor": 0.7,
    "model.moe.drop.protected_share": 0.25,
    "model.moe.expert_groups": 4,
    "model.moe.router.jitter": 0.1,
    "train.record_routing": True,
}


class Run(OnMesh):
    """A run on a mesh; without stages, on one device."""

    def __init__(self, values: dict[str, object]):
        config = tiny(**{**CONFIG, "mesh.data": 1, **values})
        super().__init__(config, 8 if "mesh.stage" in values else 1)

    def train(self) -> dict[str, np.ndarray]:
        """Takes a step; arrays of the state and of the metrics."""
        metrics = self.take_step()
        found = by_path({"state": self.state, "metrics": metrics})
        # But for what is meant to depend on the mesh: rows between devices.
        return {p: np.asarray(x) for p, x in found.items() if "exchanged_rows" not in p}


RUNS: dict[str, dict[str, object]] = {
    "one device": {},
    "one device, competing": {**COMPETING, "train.accumulation_steps": 4},
    "4 stages": {"mesh.stage": 4, "mesh.expert": 2, "train.accumulation_steps": 8},
    "2 stages, 2 repeats": {
        **{"mesh.stage": 2, "mesh.data": 2, "mesh.expert": 2},
        **{"train.accumulation_steps": 4, "train.pipeline_repeats": 2},
    },
    "2 stages, 2 rounds": {
        **{"mesh.stage": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
        **{"train.accumulation_steps": 4, "train.pipeline_micro_batches": 2},
    },
    "2 stages, competing": {
        **{"mesh.stage": 2, "mesh.data": 2, "mesh.expert": 2},
        **COMPETING,
        "train.accumulation_steps": 4,
    },
}


@functools.cache
def first_step(name: str) -> tuple[Run, dict[str, np.ndarray]]:
    """A run, which other tests may load into, and what its first step gave."""
    run = Run(RUNS[name])
    return run, run.train()


@pytest.mark.eight_devices
@pytest.mark.parametrize("name", [name for name in RUNS if "stages" in name])
def test_a_step_is_that_of_one_device(name):
    """The first moments are the gradients (clipping is off), so their scale is seen too."""
    wanted = first_step("one device, competing" if "competing" in name else "one device")[1]
    errors = relative_errors(first_step(name)[1], wanted)
    assert sum("mu" in path for path in errors) > 15
    for of in ("load_E", "dropped_E", "computed_E", "bias_E", "terms"):
        assert any(of in path for path in errors), of
    updated = {path: errors.pop(path) for path in [*errors] if ".params" in path}
    assert_all_below(errors, REORDERED)
    assert_all_below(updated, ONE_UPDATE)


@pytest.mark.eight_devices
def test_a_run_goes_on_with_other_stages(tmp_path):
    """Saved in two stages of two groups of layers; the next step is that of one device."""
    saved, four, one = (first_step(n)[0] for n in ("2 stages, 2 repeats", "4 stages", "one device"))
    saved.save(tmp_path / "run")
    for run in (four, one):
        run.load(tmp_path / "run")
    found, wanted = four.train(), one.train()
    metrics = [path for path in found if "metrics" in path]
    errors = relative_errors({p: found[p] for p in metrics}, {p: wanted[p] for p in metrics})
    assert len(errors) > 20
    assert_all_below(errors, REORDERED)


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
    config = tiny(**{**CONFIG, **values})
    with pytest.raises(ValueError, match=message) as caught:
        pipelined.check(config, config.mesh.stage)
    assert "\n" not in str(caught.value)

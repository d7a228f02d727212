"""Plans of experiments: FLOPs against the paper's, and commands that train the same runs."""

import dataclasses
import math
import shlex

import pytest

from dsmoe_jax.config import Config, files, from_config_dict, overrides, replace
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.model import size
from dsmoe_jax.planning import papers, planner
from dsmoe_jax.study.cells import Options, make_cells
from dsmoe_jax.study.plans import Hardware, plan_arms
from experiments.balancing import balance
from experiments.recipe import batches, rates
from experiments.v1 import fig5, table1


def described(command: str) -> Config:
    """The config that the flags of a `train` command describe."""
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "dsmoe_jax", "train"]
    given = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
    (file,) = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return replace(from_config_dict(files.load(file)), **dict(map(overrides.parse, given)))


def test_table_1_at_the_papers_scale():
    hardware = Hardware("v5p", 64, utilisation=0.5)
    planned = plan_arms(table1.EXPERIMENT, Options("paper"), hardware)
    assert [arm.label for arm in planned] == [arm.label for arm in table1.EXPERIMENT.arms]
    for arm in planned:
        assert arm.tokens == 25_000 * 2048 * 2048
        assert arm.flops == size.train_flops_per_token(arm.config) * arm.tokens
        printed = papers.V1[arm.config.name].flops_per_sequence
        assert printed is not None
        # The paper's digits are worth 2 %; it counts no router.
        assert arm.flops == pytest.approx(papers.value(printed) * 25_000 * 2048, rel=0.03)
        assert arm.chips == math.prod(arm.plan.sizes.values()) == 64
        assert arm.chip_hours == pytest.approx(arm.flops / 459e12 / 0.5 / 3600)
        assert f"--config.mesh.fsdp={arm.plan.sizes['fsdp']}" in arm.command
        assert "--config.data.corpus=CORPUS" in arm.command


def test_the_command_trains_the_run_of_the_experiment():
    """With overrides that are None, numbers and tuples, and in the workdir that is looked into."""
    options = Options("smoke", results="here/runs", overrides={"train.steps": 9})
    planned = plan_arms(balance.EXPERIMENT, options, Hardware("h100", 2))
    for arm, written in zip(planned, balance.EXPERIMENT.arms, strict=True):
        assert arm.config.train.steps == 9
        mesh = dataclasses.replace(arm.config.mesh, **arm.plan.sizes)
        train = dataclasses.replace(
            arm.config.train, accumulation_steps=arm.plan.accumulation_steps
        )
        assert described(arm.command) == dataclasses.replace(arm.config, mesh=mesh, train=train)
        (cell,) = make_cells(balance.EXPERIMENT, dataclasses.replace(options, arms=(written.slug,)))
        assert f"--workdir=here/runs/models-smoke/{cell.workdir.parent.name}/seed0" in arm.command


def test_probes_are_planned_as_the_models_that_they_measure():
    planned = plan_arms(fig5.EXPERIMENT, Options("smoke"), Hardware("h100"))
    assert [arm.label for arm in planned] == ["GShard", "DeepSeekMoE"]
    assert "/models-smoke/dsmoe_2b/seed0" in planned[1].command


def test_the_fewest_chips_are_enough_and_half_of_them_are_not():
    config = table1.EXPERIMENT.arm("GShard").run_config("paper", 0)
    plan = planner.propose_fewest(config, "v5e")
    chips = math.prod(plan.sizes.values())
    assert plan == planner.propose(config, "v5e", chips)[0]
    assert plan.used <= planner.USABLE * CHIPS["v5e"].hbm_gb
    assert chips > 1
    with pytest.raises(ValueError, match="does not fit"):
        planner.propose(config, "v5e", chips // 2)


def test_a_mesh_of_ones_own_is_examined_and_needs_the_number_of_chips():
    own = {"mesh.fsdp": 4, "mesh.expert": 16, "train.accumulation_steps": 4}
    options = Options("paper", arms=("gshard",), overrides=own)
    (arm,) = plan_arms(table1.EXPERIMENT, options, Hardware("v5p", 64))
    assert arm.plan.sizes == {"stage": 1, "data": 1, "fsdp": 4, "expert": 16, "tensor": 1}
    with pytest.raises(ValueError, match="--chips: missing"):
        plan_arms(table1.EXPERIMENT, options, Hardware("v5p"))


def test_as_many_seeds_as_an_experiment_can_have():
    two = plan_arms(table1.EXPERIMENT, Options("smoke", seeds=2), Hardware("h100"))
    assert len(two) == 5  # the costs are those of one seed
    with pytest.raises(ValueError, match="--seeds=0: must be at least 1"):
        plan_arms(table1.EXPERIMENT, Options("smoke", seeds=0), Hardware("h100"))


def test_impossible_hardware_is_refused():
    with pytest.raises(ValueError, match="--chip=v9: must be one of v4"):
        Hardware("v9")
    for share in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"--utilisation=.*: must be a share above 0"):
            Hardware("v5p", utilisation=share)


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -1e-3, 0.1, (), (1,), ((0.0, 0.0), (0.5, 1.0)), "demo", "true", "2026", "a'b"],
)
def test_an_override_that_is_written_is_read_back(value):
    key, read = overrides.parse(overrides.write("a.b", value))
    assert (key, read) == ("a.b", value)
    assert type(read) is type(value)


def test_a_multiple_of_a_setting_is_written_out_in_the_command():
    """Half the batch, twice the steps; the learning rate has two digits."""
    planned = plan_arms(batches.EXPERIMENT, Options("demo"), Hardware("h100"))
    half = next(arm for arm in planned if arm.label == "DeepSeekMoE, ×0.5")
    assert (half.config.train.global_batch_size, half.config.train.steps) == (8, 960)
    assert half.config.optimizer.warmup_steps == 96
    written = described(half.command)
    assert written.train.steps == 960
    assert written.optimizer.warmup_steps == 96
    assert {arm.tokens for arm in planned} == {480 * 16 * 128}
    faster = next(arm for arm in rates.EXPERIMENT.arms if arm.x == 1.414)
    now, then = (
        arm.run_config("demo", 0).optimizer.peak_learning_rate
        for arm in (faster, table1.EXPERIMENT.arms[0])
    )
    assert now == float(f"{1.414 * then:.2g}")

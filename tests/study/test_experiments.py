"""Every experiment can be made and is fair before anything is trained."""

import importlib
import pathlib

import pytest

import experiments
from configs import base
from dsmoe_jax.study import fairness
from dsmoe_jax.study.cells import Options, make_cells
from dsmoe_jax.study.experiment import Experiment
from dsmoe_jax.study.measures import MEASURES
from experiments.recipe import lengths

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"
MODULES = sorted(
    f"experiments.{path.parent.name}.{path.stem}"
    for path in FOLDER.glob("*/*.py")
    if not path.stem.startswith("_")
)

FOLDERS = {"balancing", "inside", "laws", "recipe", "surgery", "v1", "v2", "v3"}


def load(module: str) -> Experiment:
    return importlib.import_module(module).EXPERIMENT


def test_there_are_experiments_of_every_paper():
    assert {module.split(".")[1] for module in MODULES} == FOLDERS
    assert "experiments.v1.table1" in MODULES


def test_the_list_of_experiments_is_whole():
    assert experiments.__doc__ is not None
    listed = [line.split()[0] for line in experiments.__doc__.splitlines() if line[:4] == "    "]
    assert sorted(listed) == sorted(module.rpartition(".")[2] for module in MODULES)


def test_results_of_two_experiments_do_not_share_a_directory():
    names = [load(module).name for module in MODULES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("module", MODULES)
def test_an_experiment_says_what_it_is(module):
    experiment = load(module)
    assert experiment.module == module
    assert all((experiment.title, experiment.source, experiment.summary))
    labels = {arm.label for arm in experiment.arms}
    for claim in experiment.all_claims():
        assert len(claim.weights) >= 1
        assert set(claim.weights) <= labels
        assert claim.measure in MEASURES


# Of the five scales the two ends differ most; the others are built by the same arithmetic.
EVERY_DAY = ("paper", "demo")
SCALES = [
    pytest.param(scale, marks=() if scale in EVERY_DAY else pytest.mark.full)
    for scale in base.SCALES
]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("module", MODULES)
def test_all_arms_can_be_made_and_are_fair(module, scale):
    experiment = load(module)
    cells = make_cells(experiment, Options(scale, seeds=1))
    assert [cell.arm for cell in cells] == list(experiment.arms)
    fairness.check_configs(experiment, cells)


def test_who_gains_more_from_tokens():
    """GShard from 6 to 4, Hash layers from 5 to 4: the claim of GShard holds."""
    losses = {
        "GShard, ×0.5": 6.0,
        "GShard, ×4": 4.0,
        "Hash Layer, ×0.5": 5.0,
        "Hash Layer, ×4": 4.0,
    }
    (claim,) = (c for c in lengths.EXPERIMENT.claims if "GShard gains more" in c.text)
    assert claim.weights.keys() == losses.keys()
    assert sum(weight * losses[label] for label, weight in claim.weights.items()) == 1.0

"""The probe of redundancy on a tiny trained run: what it finds, and what it refuses."""

import numpy as np
import pytest

from dsmoe_jax.config import replace
from dsmoe_jax.moe.interventions import NONE, Intervention
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.study import redundancy
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.readings import Outcome
from experiments.inside.redundancy import EXPERIMENT

E, L = 4, 2


@pytest.fixture(scope="module")
def run(finished_run):
    return load_run(finished_run[0])


def test_all_numbers_are_there_and_are_read_by_measures(run):
    found = redundancy.redundancy(run, NONE)
    inside = found["inside"]
    assert np.shape(inside["sixteenth_rises"]) == (L, E)
    assert inside["single_rises"] == inside["sixteenth_rises"]
    assert len(inside["random_rises"]) == redundancy.DRAWS
    rises = [inside["masked_rise"], inside["least_rise"], *inside["random_rises"]]
    assert 0 < np.abs(rises).max() < 1
    assert len(inside["outputs_cka"]) == len(inside["outputs_cka_before"]) == L
    outcome = Outcome(run.config, run.config, evaluation=found)
    read = {name: MEASURES[name].read(outcome) for name in EXPERIMENT.measures}
    assert None not in read.values()
    assert read["random_rise"] == pytest.approx(np.mean(inside["random_rises"]))
    now, before = (np.mean(inside[name]) for name in ("outputs_cka", "outputs_cka_before"))
    assert read["outputs_cka"] == pytest.approx(now - before)


def test_an_intervention_and_a_single_batch_are_refused(run):
    with pytest.raises(ValueError, match="the redundancy is of the model as it was trained"):
        redundancy.redundancy(run, Intervention(mask_best=1))
    short = run._replace(config=replace(run.config, **{"train.eval_batches": 1}))
    with pytest.raises(ValueError, match=r"train\.eval_batches=1: experts are chosen on one part"):
        redundancy.redundancy(short, NONE)

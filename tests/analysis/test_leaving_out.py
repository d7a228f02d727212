"""Experts left out of a trained model: sets of experts with known answers, and the loss without.

Shapes: as in dsmoe_jax/analysis/leaving_out.py.
"""

import itertools

import numpy as np
import pytest

from dsmoe_jax.analysis import leaving_out
from dsmoe_jax.analysis.leaving_out import LossWithout
from dsmoe_jax.data.pipeline import validation_batches
from dsmoe_jax.evaluation.held_out import evaluate
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.runs.loading import load_run

LOAD_LE = np.array([[5, 1, 4, 2, 3], [1, 2, 3, 4, 5]])


def ids(sets):
    return [[members.tolist() for members in of_layer] for of_layer in sets]


def test_parts_are_even_and_begin_with_the_least_loaded():
    assert ids(leaving_out.parts(LOAD_LE, 3)) == [[[1, 3], [4, 2], [0]], [[0, 1], [2, 3], [4]]]


def test_a_sample_goes_from_the_least_loaded_to_the_most():
    assert ids(leaving_out.sample(LOAD_LE, 3)) == [[[1], [4], [0]], [[0], [2], [4]]]
    assert ids(leaving_out.sample(LOAD_LE, 9))[1] == [[0], [1], [2], [3], [4]]


def test_a_rise_is_that_of_one_set_of_one_layer():
    """A made-up loss to which each expert that is left out adds a number of its own."""
    worth_LE = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])

    class MadeUp:
        shape = worth_LE.shape

        def __call__(self, batches, left_out_LE=None):
            return 100.0 if left_out_LE is None else 100.0 + worth_LE[left_out_LE].sum()

    sets = [[np.array([0, 2]), np.array([1])], [np.array([0, 1]), np.array([2])]]
    assert leaving_out.rises(MadeUp(), [], sets).tolist() == [[5, 2], [24, 32]]
    mask_LE = leaving_out.mask([sets[0][0], sets[1][1]], 3)
    assert mask_LE.tolist() == [[True, False, True], [False, False, True]]


def test_the_loss_of_a_trained_model(finished_run):
    """With nothing left out it is that of the evaluation; every expert makes a difference."""
    run = load_run(finished_run[0])
    batches = list(validation_batches(run.corpus.directory, 4, 2))
    loss = LossWithout(run.model)
    whole = evaluate(run.model, run.corpus, batch_size=4, max_batches=2)
    assert loss(batches) == pytest.approx(whole["loss"], rel=1e-5)
    n_layers, n_experts = loss.shape
    losses = []
    for expert in range(n_experts):
        losses.append(loss(batches, np.tile(np.arange(n_experts) == expert, (n_layers, 1))))
        assert losses[-1] != loss(batches)
    assert all(a != b for a, b in itertools.pairwise(losses))
    with pytest.raises(
        ValueError, match=r"left_out of MoE layer 0=\[0, 1, 2\]: a token may be left"
    ):
        loss(batches, np.tile(np.arange(n_experts) < 3, (n_layers, 1)))
    masked = LossWithout(run.model, Intervention(mask_best=1))
    with pytest.raises(ValueError, match=r"1 masked and 2 activated"):
        masked(batches, np.tile(np.arange(n_experts) < 2, (n_layers, 1)))

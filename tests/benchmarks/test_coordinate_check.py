"""The coordinate check: with muP no activation changes by more in a wide model.

A model eight times as wide as the base, in the first steps at the base's rate; with one multiplier
wrong the check must say so.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import coordinate_check
from benchmarks.coordinate_check import PARTS, activations, made_up_batch, sizes, slope
from dsmoe_jax.config import replace
from dsmoe_jax.model import mup
from dsmoe_jax.model.build import build_model
from dsmoe_jax.model.types import ModelInputs
from tests.tools.tiny import tiny

RATIO = 8
STEPS = 3
# Slopes: 0 in the limit of width, 1 for a matrix whose rate is not scaled.
FLAT, STEEP = 0.25, 0.6


def config(ratio, base=32):
    """The tiny config, `ratio` times as wide; without muP with a deviation of width^-1/2."""
    return tiny(
        **{
            "model.hidden_size": 32 * ratio,
            "model.attention.num_attention_heads": 2 * ratio,
            "model.attention.num_key_value_heads": 2 * ratio,
            "model.moe.moe_intermediate_size": 16 * ratio,
            "model.initializer_range": 0.05 if base else 0.05 * ratio**-0.5,
            "model.mup_base_width": base,
        }
    )


@pytest.fixture(scope="module")
def narrow():
    return sizes(config(1), STEPS)


def slopes(narrow, wide):
    """Powers of the width by which the changes after the last step grow."""
    changes = [(narrow[part]["change"][-1], wide[part]["change"][-1]) for part in PARTS]
    return {p: slope((1, RATIO), pair) for p, pair in zip(PARTS, changes, strict=True)}


def test_with_mup_changes_do_not_grow_with_the_width(narrow):
    found = slopes(narrow, sizes(config(RATIO), STEPS))
    assert max(found.values()) < FLAT, found
    # Nor does anything stop learning.
    assert min(found.values()) > -FLAT, found


def test_without_mup_they_grow(narrow):
    found = slopes(narrow, sizes(config(RATIO, base=None), STEPS))
    assert found["logits"] > STEEP, found
    assert found["router"] > STEEP, found


@pytest.mark.parametrize(("name", "part"), [("head_VD", "logits"), ("router_ED", "router")])
def test_a_wrong_multiplier_is_seen(narrow, monkeypatch, name, part):
    monkeypatch.setitem(mup.KINDS, name, mup.OUTPUT._replace(rate=0))
    found = slopes(narrow, sizes(config(RATIO), STEPS))
    assert found[part] > STEEP, found


def test_activations_are_those_of_the_model():
    """The logits at the end of its own walk through the layers, and what the router is given."""
    small = replace(config(1), **{"model.num_hidden_layers": 1}).model
    tokens_BS = jnp.asarray(made_up_batch(config(1))["tokens_BS"])

    @jax.jit
    def both(key):
        model = build_model(small, key)
        return activations(model, tokens_BS), model.forward(ModelInputs(tokens_BS))

    found, output = both(jax.random.key(0))
    assert set(found) == set(PARTS)
    np.testing.assert_allclose(found["logits"], output.logits_BSV, rtol=1e-5, atol=1e-6)
    assert found["router"].shape == (1, *tokens_BS.shape, 4)
    best_LBS = found["router"].argmax(-1)
    np.testing.assert_array_equal(best_LBS, output.report.recorded.chosen[..., 0])


def test_the_slope_is_the_power():
    widths = (48, 96, 192)
    assert math.isclose(slope(widths, [3 * d**0.7 for d in widths]), 0.7, rel_tol=1e-9)


def test_rows_and_pictures_of_made_up_sizes():
    """A change that grows as the width, one that stays; a line a step and one more of sizes."""

    def made_up(d, power):
        change = [0.0] + [step * d**power for step in range(1, coordinate_check.STEPS + 1)]
        return {part: {"size": [1.0] * len(change), "change": change} for part in PARTS}

    found = {
        "standard": {d: made_up(d, 1.0) for d in (8, 16)},
        "muP": {d: made_up(d, 0.0) for d in (8, 16)},
    }
    for row in coordinate_check.rows(found):
        assert row["standard: change after 5 steps"] == "+1.00"
        assert row["muP: change after 5 steps"] == "+0.00"
    for what, lines in (("size", 6), ("change", 5)):
        axes = coordinate_check.draw(found, what).axes
        assert len(axes) == 2 * len(PARTS)
        assert all(len(ax.lines) == lines for ax in axes)

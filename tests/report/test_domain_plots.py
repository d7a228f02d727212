"""The picture of the load by domain: what is drawn is what was measured."""

import numpy as np

from dsmoe_jax.report import plots
from dsmoe_jax.report.domain_plots import in_order
from dsmoe_jax.study.histories import DomainLoads, domain_loads_of


def test_experts_stand_by_the_domain_that_uses_them_most():
    load_GE = np.array([[1.0, 0.2, 2.0, 0.5, 0.0], [0.5, 1.5, 0.1, 2.0, 0.0]])
    loads = DomainLoads(("a", "b"), load_GE[:, None], np.zeros(1))
    np.testing.assert_array_equal(in_order(loads, 0), load_GE[:, [2, 0, 4, 3, 1]])


def test_a_domain_that_is_too_small_is_left_out():
    row = {"tokens": 500}
    evaluation = {
        "domains": {"large": row, "small": {"tokens": 499}, "other": row},
        "load_by_domain": {"large": [[1, 3]], "small": [[5, 5]], "other": [[6, 2]]},
        "domain_specialisation": [0.2],
    }
    found = domain_loads_of(evaluation)
    assert found.names == ("large", "other")
    np.testing.assert_allclose(found.load_GLE, [[[0.5, 1.5]], [[1.5, 0.5]]])
    del evaluation["domain_specialisation"]
    assert domain_loads_of(evaluation) is None


def test_the_picture_shows_the_most_specialised_layer_of_every_arm(fake_run):
    comparison = fake_run(arms=("dense", "gshard", "deepseekmoe"))
    panels = plots.draw(comparison)["domain_load"].axes[:-1]
    for ax, label in zip(panels, ("GShard", "DeepSeekMoE"), strict=True):
        loads = comparison.histories[label, 0].domain_loads
        layer = loads.specialisation_L.argmax()
        (mesh,) = ax.collections
        want = in_order(loads, layer)
        np.testing.assert_allclose(mesh.get_array().reshape(want.shape), want)
        number = f"{loads.specialisation_L[layer]:.3f}"
        assert ax.get_title(loc="left") == f"{label}, layer {layer + 1}: {number}"
        assert [text.get_text() for text in ax.get_yticklabels()] == list(loads.names)

"""The legs of a grouped product: each is what its name says, and the groups are uneven."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import legs, moe_layer
from dsmoe_jax.moe.experts import BACKENDS

SHAPE = legs.Shape(96, 6, 32, 24)


def test_groups_have_all_rows_and_the_skew_of_real_text():
    sizes_E = legs.uneven_sizes(legs.SIZES["2b"])
    assert sizes_E.sum() == legs.SIZES["2b"].rows
    assert sizes_E.max() / sizes_E.mean() == pytest.approx(moe_layer.REAL_SKEW, rel=0.01)
    assert (sizes_E > 0).all()


def test_each_leg_is_what_its_name_says():
    given = {}

    def product(x_NI, w_EOI, sizes_E):
        given.update(x=x_NI.shape, w=w_EOI.shape)
        return BACKENDS["ragged_dot"].product(x_NI, w_EOI, sizes_E)

    found = {n: run() for n, run in legs._legs(product, SHAPE, 32, 24, jnp.float32).items()}
    assert given == {"x": (96, 32), "w": (6, 24, 32)}
    rng = np.random.default_rng(0)
    x, dy, w = (rng.standard_normal(s, np.float32) for s in ((96, 32), (96, 24), (6, 24, 32)))
    of_row = np.repeat(np.arange(6), legs.uneven_sizes(SHAPE))
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(found["dense"], x @ w[0].T, **close)
    np.testing.assert_allclose(found["forward"], np.einsum("ni,noi->no", x, w[of_row]), **close)
    np.testing.assert_allclose(found["d rows"], np.einsum("no,noi->ni", dy, w[of_row]), **close)
    wanted = np.stack([dy[of_row == e].T @ x[of_row == e] for e in range(6)])
    np.testing.assert_allclose(found["d weights"], wanted, **close)


def test_rows_of_all_legs_of_both_products():
    rows = legs.measure("ragged_dot", SHAPE, "float32", 2)
    assert [(row["product"], row["leg"]) for row in rows] == [
        (product, leg)
        for product in ("up", "down")
        for leg in ("dense", "forward", "d rows", "d weights")
    ]
    assert all(row["of_dense"] == 1 for row in rows if row["leg"] == "dense")
    for row in rows:
        assert row["tflops"] * row["ms"] == pytest.approx(2 * 96 * 32 * 24 / 1e9)


def test_a_backend_without_a_product_is_refused():
    with pytest.raises(ValueError, match="loop: computes whole experts"):
        legs.measure("loop", SHAPE, "float32", 2)

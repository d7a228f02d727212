"""Load by domain against numpy: of made-up choices, and of what the layers record."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.data.corpus import load_corpus
from dsmoe_jax.data.pipeline import validation_batches
from dsmoe_jax.evaluation import domain_load
from dsmoe_jax.evaluation.held_out import HeldOut
from dsmoe_jax.model.build import build_model
from dsmoe_jax.moe.interventions import NONE, Intervention
from dsmoe_jax.training.devices import open_mesh
from tests.tools.tiny import FOR_EIGHT_DEVICES, tiny

WAYS = (domain_load.by_adding, domain_load.by_comparing)


def counted(ids_LBSK, domain_B, n_domains, n_experts):
    """One assignment after the other."""
    load_GLE = np.zeros((n_domains, len(ids_LBSK), n_experts), int)
    for (layer, row, _, _), expert in np.ndenumerate(ids_LBSK):
        if expert < n_experts:
            load_GLE[domain_B[row], layer, expert] += 1
    return load_GLE


@pytest.mark.parametrize("count", WAYS)
@given(seed=st.integers(0, 99))
@settings(max_examples=15)
def test_every_assignment_counts_for_the_domain_of_its_sequence(count, seed):
    rng = np.random.default_rng(seed)
    ids_LBSK = rng.integers(0, 4, (2, 5, 4, 3)).astype(np.int32)  # id 3 is unassigned
    domain_B = rng.integers(0, 3, 5).astype(np.int32)
    found = count(jnp.asarray(ids_LBSK), jnp.asarray(domain_B), 3, 3)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, counted(ids_LBSK, domain_B, 3, 3))


class Kept:
    """A recorder that keeps the choices in memory."""

    def __init__(self):
        self.sent = []
        self.computed = []

    def write(self, name, number, recorded):
        """Keeps the choices of a batch, before dropping and after it, with gates."""
        self.sent.append(np.asarray(recorded.sent))
        self.computed.append((np.asarray(recorded.ids), np.asarray(recorded.gates)))


def check(config, corpus, intervention=NONE, batch_size=4):
    """Compares the load of two batches by domain with the recorded choices; returns the results."""
    model = build_model(config.model, jax.random.key(0))
    graph, params, other = nnx.split(model, nnx.Param, ...)
    kept = Kept()
    held_out = HeldOut(graph, corpus, batch_size, 2, kept, intervention=intervention)
    found = held_out.measure(params, other)
    rows = [b["domain_BS"][:, 0] for b in validation_batches(corpus.directory, batch_size, 2)]
    sizes = len(corpus.domains), config.model.moe.n_routed_experts
    wanted = sum(counted(ids, row, *sizes) for ids, row in zip(kept.sent, rows, strict=True))
    by_name = found["load_by_domain"]
    for name, load_LE in zip(corpus.domains, wanted, strict=True):
        assert load_LE.any() == (name in by_name)
        np.testing.assert_array_equal(by_name.get(name, 0), load_LE)
    np.testing.assert_array_equal(np.sum([*by_name.values()], axis=0), found["load"])
    mass_LE = np.zeros_like(found["load"], float)
    for ids_LBSK, gates_LBSK in kept.computed:
        for (layer, *_), expert, gate in zip(
            np.ndindex(ids_LBSK.shape), ids_LBSK.flat, gates_LBSK.flat, strict=True
        ):
            if expert < sizes[1]:
                mass_LE[layer, expert] += gate
    np.testing.assert_allclose(found["gate_mass"], mass_LE, atol=1e-4, rtol=1e-5)
    return found


@pytest.fixture(scope="module")
def corpus(tiny_corpus):
    return load_corpus(tiny_corpus)


DROP = {"model.moe.evaluation_drop.capacity_factor": 0.5}
ROUTERS = {
    "hash": {"model.moe.num_experts_per_tok": 1, "model.moe.balance.router_z": None},
    "expert_choice": {},
    "sinkhorn": DROP,
}


@pytest.mark.parametrize("router", ROUTERS)
def test_load_by_domain_is_that_of_the_recorded_choices(router, corpus):
    changes = {"model.moe.balance.expert": None, **ROUTERS[router]}
    found = check(tiny(**{"model.moe.router.name": router, **changes}), corpus)
    assert sum(found["dropped"]) > 0 or router != "sinkhorn", "before dropping, not after"


def test_a_short_look_has_the_domains_that_it_saw(corpus):
    found = check(tiny(), corpus, batch_size=1)
    assert found["load_by_domain"].keys() == found["domains"].keys()
    assert len(found["domains"]) < len(corpus.domains)


def test_under_an_intervention(corpus):
    config = tiny(**{"model.moe.n_shared_experts": 1})
    found = check(config, corpus, Intervention(1, num_experts_per_tok=3, shared_experts=False))
    assert np.sum(found["load"]) == found["tokens"] * 3 * 2  # in two layers


def test_a_dense_model_has_none(corpus):
    none = {"n_routed_experts": 0, "num_experts_per_tok": 0, "n_shared_experts": 1}
    none |= {"balance.expert": None, "balance.router_z": None}
    config = tiny(**{f"model.moe.{key}": value for key, value in none.items()})
    graph, params, other = nnx.split(build_model(config.model, jax.random.key(0)), nnx.Param, ...)
    assert "load_by_domain" not in HeldOut(graph, corpus, 4, 1).measure(params, other)


@pytest.mark.eight_devices
@pytest.mark.parametrize("count", WAYS)
def test_on_a_mesh_every_shard_is_counted_once(count, tiny_corpus, monkeypatch):
    monkeypatch.setattr(domain_load, "platform", lambda: "cpu" if count == WAYS[0] else "gpu")
    config = tiny(**FOR_EIGHT_DEVICES, **{"mesh.data": 2, "mesh.expert": 4})
    with jax.set_mesh(open_mesh(config, jax.devices())):
        check(config, load_corpus(tiny_corpus), batch_size=8)

"""Adding something is one entry in one registry and nothing else, as the README promises.

A toy router with a setting and a variable of its own, a toy balance term and a toy dispatcher are
registered, named in a config, trained, checkpointed and evaluated.  (Attention: tests/model; loss
parts: tests/training; measures: tests/study.)
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import from_config_dict, replace, to_config_dict
from dsmoe_jax.moe import dispatch, losses, routers
from dsmoe_jax.moe.dispatch import DISPATCHERS, Arrived, Dispatcher
from dsmoe_jax.moe.dispatch.volume import on_one_chip
from dsmoe_jax.moe.losses import TERMS, Factors, Term
from dsmoe_jax.moe.routers import ROUTERS, Router, RouterState
from dsmoe_jax.moe.types import Routing
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.training.loop import train


def by_sentence(logits_TE, inputs, settings):
    """All tokens of a sequence go to the experts that their mean prefers, `shift` experts on."""
    b = len(inputs.sequences())
    mean_BE = logits_TE.reshape(b, -1, settings.n_experts).mean(axis=1) + inputs.state["seen_E"] * 0
    _, ids_BK = settings.top_k(mean_BE, settings.k)
    ids_TK = jnp.repeat(ids_BK, len(logits_TE) // b, axis=0)
    ids_TK = (ids_TK + settings.option("shift")) % settings.n_experts
    s_TE = jax.nn.softmax(logits_TE)
    return Routing(ids_TK, jnp.take_along_axis(s_TE, ids_TK, axis=1), s_TE, logits_TE)


SEEN = RouterState(
    first=lambda settings: {"seen_E": jnp.zeros(settings.n_experts)},
    after_step=lambda state, load_LE, progress, settings: {"seen_E": state["seen_E"] + load_LE},
)


def first_expert(routing, devices):
    """Twice the mean affinity to expert 0, from which a mixture is pulled away."""
    return Factors(None, 2 * routing.affinity_TE[:, :1])


def last_token_first(x_TD, routing, n_experts, max_rows, kernels):
    """The tokens in the reverse order."""
    backwards = Routing(routing.ids_TK[::-1], routing.gates_TK[::-1], None)
    return Arrived(x_TD[::-1], backwards)


def combine_backwards(out_TD, state, kernels):
    return out_TD[::-1]


TOYS = {
    "model.moe.router.name": "by_sentence",
    "model.moe.router.options.shift": 1,
    "model.moe.balance.first_expert.factor": 0.1,
    "model.moe.balance.first_expert.scope": "global_batch",
    "model.moe.balance.first_expert.schedule": ((0.0, 1.0), (1.0, 0.5)),
}


@pytest.fixture
def toys(monkeypatch):
    router = Router(by_sentence, options={"shift": 0}, state=SEEN)
    monkeypatch.setitem(ROUTERS, "by_sentence", router)
    monkeypatch.setitem(TERMS, "first_expert", Term(first_expert, counts_load=False))
    dispatcher = Dispatcher(
        last_token_first, combine_backwards, on_one_chip, needs_mesh=False, splits_experts=False
    )
    monkeypatch.setitem(DISPATCHERS, "last_token_first", dispatcher)


def test_a_router_and_a_term_are_trained_saved_and_loaded(toys, tiny_config, tmp_path):
    config = tiny_config(**TOYS)
    assert from_config_dict(to_config_dict(config)) == config
    train(config, tmp_path / "run", progress=False)
    rows = read_rows(tmp_path / "run")
    term_SL = np.array([row["first_expert_balance"] for row in rows])
    assert term_SL.shape == (10, 2)
    assert (term_SL > 0).all()
    load_LE = sum(np.array(row["load"]) for row in rows)  # every step is logged
    other = load_run(tmp_path / "run").model.layers.moe.seen_E[...]
    np.testing.assert_array_equal(other, load_LE)


def test_the_setting_changes_the_routing_and_a_typo_is_answered(toys, tiny_config):
    moe = tiny_config(**TOYS).model.moe
    inputs = routers.RouterInputs(jnp.zeros(6, jnp.int32), state={"seen_E": jnp.zeros(4)})
    logits_TE = jnp.tile(jnp.arange(4.0), (6, 1))
    router, settings = routers.get_router(moe)
    np.testing.assert_array_equal(router.route(logits_TE, inputs, settings).ids_TK[0], [0, 3])
    config = replace(tiny_config(**TOYS), **{"model.moe.router.options.shft": 2})
    with pytest.raises(
        ValueError, match=r"options\.shft=2: the by_sentence router .* mean shift\?"
    ):
        routers.get_router(config.model.moe)
    other = replace(tiny_config(), **{"model.moe.balance.first_expet.factor": 2.0})
    with pytest.raises(ValueError, match="did you mean first_expert"):
        losses.check(other.model.moe, "topk", learned=True, balanced=False)


def test_a_dispatcher_gives_the_same_model(toys, tiny_config, tmp_path):
    """The losses are those of the config's own dispatcher, up to rounding."""
    few = {"train.steps": 3, "optimizer.warmup_steps": 0, "train.eval_every": None}
    losses_by_name = {}
    for name in ("local", "last_token_first"):
        config = tiny_config(**few, **{"model.moe.dispatch.name": name})
        train(config, tmp_path / name, progress=False)
        losses_by_name[name] = [row["loss"] for row in read_rows(tmp_path / name)]
    np.testing.assert_allclose(
        losses_by_name["last_token_first"], losses_by_name["local"], rtol=1e-4
    )
    assert dispatch.volume(config.model.moe, 64, 1).received == 0

"""The training step of every config file, at the smoke scale: traced with its shapes, not run.

That the numbers of a refactoring stay the same is for `python -m benchmarks.same_numbers`, which
trains them all.
"""

import jax
import numpy as np
import pytest

import configs
from dsmoe_jax.config import from_config_dict, stages_of
from dsmoe_jax.config.trees import flatten, to_tree
from dsmoe_jax.training.start import state_shapes
from dsmoe_jax.training.step import make_train_step
from tests.tools.tiny import batch


def form(name):
    """Form of the step that a config asks for: names, switches, and what is there at all."""
    values = list(flatten(to_tree(from_config_dict(configs.load(name, "smoke")))))
    switches = {k: v for k, v in values if not isinstance(v, (int, float)) or isinstance(v, bool)}
    counts = ("first_k_dense_replace", "n_routed_experts", "n_shared_experts", "q_lora_rank")
    there = {k: bool(v) for k, v in values if k.rpartition(".")[2] in counts}
    return repr(sorted({**switches, **there, "name": ""}.items()))


# Configs that differ in sizes alone have the same step; one of each kind is enough.
OF_EACH_FORM = {form(name): name for name in configs.names()}.values()


@pytest.mark.parametrize("name", OF_EACH_FORM)
def test_the_step_of_every_stage(name):
    for stage in stages_of(from_config_dict(configs.load(name, "smoke"))):
        config = stage.config
        step = make_train_step(config, np.ones(config.model.vocab_size, np.int32))
        state = state_shapes(config)
        after, metrics = jax.eval_shape(step, state, batch(config))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        assert metrics.loss.shape == metrics.grad_norm.shape == ()
        moe = config.model.moe
        assert set(metrics.terms) == set(moe.balance)
        if moe.n_routed_experts:
            layers = len(config.model.moe_layers) + config.model.mtp_depth
            assert metrics.router.load_E.shape == (layers, moe.n_routed_experts)
        else:
            assert metrics.router is None

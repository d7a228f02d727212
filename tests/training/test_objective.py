"""The training loss as a list of parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.training.objective import LOSS_PARTS, LossPart
from dsmoe_jax.training.rows import first_non_finite, training_row
from dsmoe_jax.training.start import init_state
from dsmoe_jax.training.step import make_train_step
from tests.tools.tiny import tiny
from tests.training.test_step import V, synthetic_batch

M = "model.moe."
NO_BALANCE = {f"{M}balance.expert": None, f"{M}balance.router_z": None}
POLICY = {f"{M}router.name": "reinforce", f"{M}router.options.entropy_factor": 0.7}
DENSE = {
    **NO_BALANCE, f"{M}n_routed_experts": 0, f"{M}num_experts_per_tok": 0, f"{M}n_shared_experts": 1
}  # fmt: skip


@functools.cache
def initial_state(**overrides):
    return init_state(tiny(**overrides))


def first_step(**overrides):
    config = tiny(**overrides)
    same_state = {k: v for k, v in overrides.items() if not k.startswith("train.")}
    step = jax.jit(make_train_step(config, jnp.ones(V)))
    state, metrics = step(initial_state(**same_state), synthetic_batch())
    return state, jax.device_get(metrics)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({}, ["cross_entropy", "balance"]),
        (NO_BALANCE, ["cross_entropy"]),
        (DENSE, ["cross_entropy"]),
        ({**POLICY, **NO_BALANCE}, ["cross_entropy", "policy"]),
        (POLICY, ["cross_entropy", "balance", "policy"]),
    ],
)
def test_the_parts_of_a_config_add_up_to_its_loss(overrides, names):
    _, metrics = first_step(**overrides)
    assert set(metrics.parts) == set(names)
    np.testing.assert_allclose(sum(metrics.parts.values()), metrics.total_loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.parts["cross_entropy"], metrics.loss, rtol=1e-6)
    assert all(part != 0 for part in metrics.parts.values())


def large_logits(context):
    """Twice the mean over the batch of a target's mean squared logit."""
    square_BS = jnp.square(context.output.logits_BSV).mean(axis=-1)
    return 2.0 * (square_BS * context.batch["loss_mask_BS"]).sum() / context.all_tokens


def is_wide(config):
    return config.model.hidden_size >= 32


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_new_part_is_one_line(monkeypatch, micro_batches):
    """It is differentiated, adds up over micro-batches, and is logged; nothing else knows of it."""
    overrides = {"train.accumulation_steps": micro_batches}
    before, without = first_step(**overrides)
    part = LossPart(is_wide, large_logits, "logit_size", logits=True)
    monkeypatch.setitem(LOSS_PARTS, "large_logits", part)
    after, metrics = first_step(**overrides)
    model = tiny().model
    state = initial_state()
    logits = jax.jit(forward)(state.params, state.other)
    mask_BS = synthetic_batch()["loss_mask_BS"]
    wanted = 2 * (np.square(logits).mean(axis=-1) * mask_BS).sum() / mask_BS.sum()
    np.testing.assert_allclose(metrics.parts["large_logits"], wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics.total_loss - without.total_loss, wanted, rtol=1e-4)
    assert training_row(metrics, model)["logit_size"] == float(metrics.parts["large_logits"])
    assert abs(metrics.grad_norm - without.grad_norm) > 1e-3 * without.grad_norm
    head = [s.params["head_VD"][...] for s in (before, after)]
    assert np.abs(head[0] - head[1]).max() > 0
    broken = metrics._replace(parts=metrics.parts | {"large_logits": np.float32("nan")})
    assert first_non_finite(broken)[0] == "logit_size"
    narrow = {"model.hidden_size": 16, "model.attention.head_dim": 8}
    assert "large_logits" not in first_step(**narrow)[1].parts


def forward(params, other):
    """Logits of the tiny model on the batch."""
    from flax import nnx

    from dsmoe_jax.model.build import abstract_model
    from dsmoe_jax.model.types import ModelInputs

    model = nnx.merge(abstract_model(tiny().model), params, other)
    return model.forward(ModelInputs.of_batch(synthetic_batch())).logits_BSV

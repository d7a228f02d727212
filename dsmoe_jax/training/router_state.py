"""The routers' variables that are no parameters: how they begin, and how a step moves them.

Shapes: L MoE layers, E routed experts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.model import layout
from dsmoe_jax.moe.layer import RouterVariable
from dsmoe_jax.moe.routers import RouterSettings, RouterState, get_router, scored
from dsmoe_jax.moe.schedules import Progress, multiple


def first_values(
    model: ModelConfig, token_counts: Callable[[], np.ndarray] | None
) -> dict[str, np.ndarray]:
    """First values of router variables that depend on the training text, by name.

    Args:
      model: config of the model.
      token_counts: how often each token is an input of the training text; called if needed.

    Raises:
      ValueError: if it is needed and None.
    """
    found = _stateful(model)
    if found is None:
        return {}
    state, settings = found
    if state.from_token_counts is None or not state.first(settings):
        return {}
    require(
        token_counts is not None,
        "model.moe.router.options",
        dict(settings.config.options),
        f"with these the {model.moe.router.name} router needs token counts of the training text",
    )
    assert token_counts is not None
    counted = token_counts()
    counts_V = np.zeros(model.vocab_size, np.int64)
    counts_V[: len(counted)] = counted  # a tokenizer may leave rows of the embedding unused
    return state.from_token_counts(counts_V, settings)


def fill(other: nnx.State, values: Mapping[str, Any]) -> nnx.State:
    """Gives every layer's router variables these values, by name."""

    def filled(path: tuple, old: jax.Array) -> jax.Array:
        name = _name(path)
        return jnp.broadcast_to(values[name], old.shape) if name in values else old

    return _map_variables(filled, other)


def after_step(
    other: nnx.State, load_LE: jax.Array, progress: Progress, model: ModelConfig
) -> nnx.State:
    """The router variables after an optimizer step.

    Args:
      other: with the variables of all MoE layers, each with a leading layer axis.
      load_LE: assignments of the whole global batch, of all layers in the order of reports, those
        of identity experts last.
      progress: of the run.
      model: config of the model.
    """
    found = _stateful(model)
    if found is None or found[0].after_step is None:
        return other
    state, settings = found
    assert state.after_step is not None
    variables, _ = nnx.split_state(other, RouterVariable, ...)
    before = jax.tree.leaves_with_path(variables)
    moved = {}
    first = 0
    for stack, n in layout.moe_stacks(model):
        of_stack = {_name(p): x for p, x in before if layout.keys_of(p)[: len(stack)] == stack}
        load = load_LE[first : first + n]
        values = state.after_step(of_stack, load, progress, settings)
        moved |= {(*stack, "moe", name): x for name, x in values.items()}
        first += n
    assert first == len(load_LE), "a load for every MoE layer"
    assert not moved or moved.keys() == {layout.keys_of(p) for p, _ in before}, "all are moved"
    return _map_variables(lambda path, old: moved.get(layout.keys_of(path), old), other)


class Biases(NamedTuple):
    """Counts of a step, int32: routers whose balance bias moved, and those whose bias had to."""

    moved: jax.Array
    due: jax.Array


def count_moved(
    before: nnx.State, after: nnx.State, load_LE: jax.Array, progress: Progress, model: ModelConfig
) -> Biases | None:
    """Counts the routers whose loss-free bias a step has moved; None for a model without.

    The bias of a router has to move if the load of one of its routed experts was not the mean, at a
    speed that float32 can add.

    Args:
      before, after: router variables around `after_step`; the others are its arguments.
    """
    found = _stateful(model)
    if found is None or (speed := found[1].config.bias_update_speed) is None:
        return None
    speed *= multiple(found[1].config.bias_update_schedule, progress)
    old, new = (
        {layout.keys_of(path): x for path, x in jax.tree.leaves_with_path(state)}
        for state in (before, after)
    )
    moved, due = jnp.int32(0), jnp.int32(0)
    first = 0
    for stack, n in layout.moe_stacks(model):
        bias_LE = old[*stack, "moe", "bias_E"]
        below_LE = scored.below_mean(load_LE[first : first + n])[:, : model.moe.n_routed_experts]
        uneven_L = (below_LE != 0).any(axis=-1)
        adds_L = speed > 1e-6 * jnp.abs(bias_LE).max(axis=-1)
        moves_L = (new[*stack, "moe", "bias_E"] != bias_LE).any(axis=-1)
        due += (uneven_L & adds_L).sum(dtype=jnp.int32)
        moved += (moves_L & adds_L).sum(dtype=jnp.int32)
        first += n
    return Biases(moved, due)


def _stateful(model: ModelConfig) -> tuple[RouterState, RouterSettings] | None:
    """Variables of the model's router, and its settings; None for a router without variables."""
    if not model.moe.n_routed_experts:
        return None
    router, settings = get_router(model.moe)
    if router.state is None:
        return None
    return router.state, dataclasses.replace(settings, vocab_size=model.vocab_size)


def _map_variables(change: Callable[[tuple, jax.Array], jax.Array], other: nnx.State) -> nnx.State:
    """The state with its router variables changed."""
    variables, rest = nnx.split_state(other, RouterVariable, ...)
    return nnx.merge_state(jax.tree.map_with_path(change, variables), rest)


def _name(path: tuple) -> str:
    """The variable's name in its path."""
    return str(layout.keys_of(path)[-1])

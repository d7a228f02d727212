"""The state of a run, and where it begins.

fresh     parameters drawn at random
resumed   the newest checkpoint of this run
from_run  parameters and router variables of another run (`train.start_from`), nothing else
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.config import Config
from dsmoe_jax.config.checks import require
from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.opening import check_same_corpus, check_same_tokenizer
from dsmoe_jax.model.build import ModelState, build_model, model_shapes
from dsmoe_jax.moe import dropping
from dsmoe_jax.parallel import sharding
from dsmoe_jax.runs import loading
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.checkpoint import MODEL, Checkpoints, target
from dsmoe_jax.storage.places import place_of
from dsmoe_jax.training import router_state, spikes
from dsmoe_jax.training.freezing import Freezing
from dsmoe_jax.training.optimizer import optimizer_of
from dsmoe_jax.training.spikes import SpikeWindow

TRAINING = "training"  # the item of a checkpoint that holds what only training needs


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int32, updates made so far.
      params: the model's `nnx.Param`s, float32.
      opt_state: of the optax optimizer, for the parameters that are trained.
      other: the model's variables that carry no gradient: the routers' loss-free bias.
      spikes: the values that a step's loss is compared with; None without `train.spikes`.  A
        checkpoint has them beside the arrays.
    """

    step: jax.Array
    params: nnx.State
    opt_state: Any
    other: nnx.State
    spikes: SpikeWindow | None = None


class Start(NamedTuple):
    """Beginning of a call of `train`.

    Attributes:
      state: before the next step.
      step: updates made.
      extra: what was saved beside the state of a run that goes on; None at the beginning of a run.
    """

    state: TrainState
    step: int
    extra: dict[str, Any] | None


def start(config: Config, checkpoints: Checkpoints, corpus: Corpus) -> Start:
    """The state that a run goes on from, or begins with.

    Args:
      config: of the run.
      checkpoints: of the run.
      corpus: that it is trained on.

    Raises:
      ValueError: for a damaged checkpoint, or one of other text.
    """
    if checkpoints.steps():
        return resumed(config, checkpoints, corpus)
    if config.train.start_from is not None:
        return Start(from_run(config, corpus), 0, None)
    return Start(init_state(config, lambda: corpus.token_counts_V), 0, None)


def resumed(config: Config, checkpoints: Checkpoints, corpus: Corpus) -> Start:
    """The newest checkpoint of a run."""
    step = checkpoints.steps()[-1]
    restored = checkpoints.restore(step, to_items(abstract_state(config)))
    check_same_corpus(corpus, restored.extra["corpus"])
    return Start(from_items(restored.items), step, restored.extra)


def init_state(config: Config, token_counts: Callable[[], np.ndarray] | None = None) -> TrainState:
    """A fresh state: parameters and moments made in one compiled call.

    On a mesh every array is made in its shards: no device ever has the whole.

    Args:
      config: of the run.
      token_counts: how often each token is in the training text; called if a router variable
        begins with values that depend on it.

    Raises:
      ValueError: if it needs it and there is none.
    """
    values = router_state.first_values(config.model, token_counts)
    out_shardings = sharding.shardings(state_shapes(config))
    init = jax.jit(functools.partial(_first_state, config), out_shardings=out_shardings)
    return init(jax.random.key(config.train.seed), values)  # one program for all seeds and values


def from_run(config: Config, corpus: Corpus) -> TrainState:
    """The newest model of the run `train.start_from`, with a fresh optimizer, before step 1.

    Its arrays go straight to their shards on the ambient mesh, whatever mesh they were saved on.

    Raises:
      ValueError: if its arrays have other shapes, or its text another tokenizer.
    """
    check_start_from(config)
    key = _key(config)
    shapes = model_shapes(config.model)
    model, _, extra = loading.load_model_state(str(config.train.start_from), shapes, key=key)
    check_same_tokenizer(corpus, extra["tokenizer"], key)

    def begin(params: nnx.State) -> tuple[jax.Array, Any]:
        return jnp.int32(0), _first_moments(config, params)

    shardings = sharding.shardings(state_shapes(config))
    out_shardings = None if shardings is None else (shardings.step, shardings.opt_state)
    step, opt_state = jax.jit(begin, out_shardings=out_shardings)(model.params)
    return TrainState(step, model.params, opt_state, model.other)


def check_start_from(config: Config) -> None:
    """Refuses a `train.start_from` whose model is not that of the config; loads nothing.

    Raises:
      ValueError: naming the first array of another shape, or saying that there is no checkpoint.
    """
    if config.train.start_from is None:
        return
    workdir = place_of("train.start_from", config.train.start_from)
    key = _key(config)
    began = workdirs.read_config(workdir, key).model
    if began.moe.quantised is not None:
        raise ValueError(
            f"{key}: its experts are quantised, and whole numbers have no gradient; must be the run"
            " that it was made from"
        )
    there = shapes_by_path(model_shapes(began))
    here = shapes_by_path(model_shapes(config.model))
    for path in {**here, **there}:
        if there.get(path) != here.get(path):
            shapes = f"{there.get(path, 'missing')} there, {here.get(path, 'missing')} here"
            raise ValueError(f"{key}: {path} is {shapes}; must be the same")
    with loading.saved_checkpoints(workdir, key):
        pass


def _key(config: Config) -> str:
    """The key with its value, as errors name it."""
    return f"train.start_from={config.train.start_from!r}"


def shapes_by_path(tree: Any) -> dict[str, Any]:
    """Shape of every array of a `ModelState` or `TrainState` by its name in errors."""
    names = {"params": "parameters", "other": "router variables", "opt_state": "optimizer"}
    found = {}
    for path, x in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        first, slash, rest = name.partition("/")
        found[names.get(first, first) + slash + rest] = x.shape
    return found


def _first_state(
    config: Config, key: jax.Array, values: Mapping[str, Any] | None = None
) -> TrainState:
    _refuse_quantised(config)
    _refuse_without_room(config)
    _, params, other = nnx.split(build_model(config.model, key), nnx.Param, ...)
    if values:
        other = router_state.fill(other, values)
    moments = _first_moments(config, params)
    return TrainState(jnp.int32(0), params, moments, other, spikes.first_window(config))


def _first_moments(config: Config, params: nnx.State) -> Any:
    """The state of a fresh optimizer, of the parameters that are trained."""
    trained, _ = Freezing(config).split(params)
    return optimizer_of(config).init(trained)


def _refuse_quantised(config: Config) -> None:
    """Refuses experts that have no gradient."""
    quantised = config.model.moe.quantised
    want = "whole numbers have no gradient; must be None to train; quantise when all is trained"
    require(quantised is None, "model.moe.quantised", quantised, want)


def _refuse_without_room(config: Config) -> None:
    """Refuses experts that have no room for the tokens of a micro-batch."""
    tokens = config.tokens_per_step // config.train.accumulation_steps
    dropping.check_capacity(config.model.moe, tokens)


def state_shapes(config: Config) -> TrainState:
    """The shapes of a state, without devices.

    Raises:
      ValueError: for a model that cannot be, or experts without room for the tokens of a step.
    """
    return jax.tree.map(lambda x: x, _shapes(config))  # the reader's own, to change


@functools.lru_cache(maxsize=64)  # a run asks six times
def _shapes(config: Config) -> TrainState:
    # The key is made in here: nothing may run, the ambient mesh's devices may not exist.
    return jax.eval_shape(lambda: _first_state(config, jax.random.key(config.train.seed)))


def abstract_state(config: Config) -> TrainState:
    """The shapes of a state with their shardings, as a target to load a checkpoint into.

    They are those of the ambient mesh; without one, the default device.
    """
    return target(state_shapes(config))


def to_items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint: the model, and what only training needs."""
    return {
        MODEL: ModelState(state.params, state.other),
        TRAINING: {"opt_state": state.opt_state, "step": state.step},
    }


def from_items(items: dict[str, Any]) -> TrainState:
    """The state that `to_items` took apart."""
    model = items[MODEL]
    training = items[TRAINING]
    return TrainState(training["step"], model.params, training["opt_state"], model.other)

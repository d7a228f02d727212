"""Extraction of a task's dense model from a mixture whose router chooses by task (2110.03742).

All text of a task goes to the same K experts of a layer, with the same gates.  Beside the shared
experts they are one wide FFN, since an FFN is a sum over its hidden units:

    sum_i FFN_i(u) + sum_k g_k FFN_k(u) = down h(gate u, up u)

where gate and up have the rows of all these experts, and down their columns, those of a routed
expert times its gate.  The model has no router and no other experts.  On text of the task it gives
the logits of the mixture, to rounding; on other text it is another model.

Shapes: E routed experts, K activated ones, A tasks, D hidden, F width of an expert, W of the new
FFN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dsmoe_jax.config import Config, MoEConfig, replace
from dsmoe_jax.config.checks import require
from dsmoe_jax.model.build import ModelState, model_shapes
from dsmoe_jax.model.size import count_parameters
from dsmoe_jax.moe.routers import get_router, task_number
from dsmoe_jax.moe.types import RouterInputs
from dsmoe_jax.surgery import by_layer
from dsmoe_jax.surgery.by_layer import Apart, Arrays
from dsmoe_jax.surgery.types import Option, Outcome, Subject

OPTIONS = {
    "task": Option(str, "Of model.moe.router.tasks, or a domain of one.", needed=True),
}
_ROUTED = ("gate_EFD", "up_EFD", "down_EDF")
_BIASES = ("gate_bias_EF", "up_bias_EF", "down_bias_ED")
_SHARED = ("moe", "shared")


class Chosen(NamedTuple):
    """The experts of a task in a layer.

    Attributes:
      ids_K: int.
      gates_K: float32.
    """

    ids_K: np.ndarray
    gates_K: np.ndarray


def extract_task(subject: Subject, options: Mapping[str, Any]) -> Outcome:
    """The dense model that a mixture is on the text of one task.

    What the mixture would drop in evaluation is computed.

    Args:
      subject: the mixture; its router chooses by task.
      options: values of `OPTIONS`.

    Raises:
      ValueError: for another router, an unknown task, and experts that are part of no FFN.
    """
    config = subject.config
    moe = config.model.moe
    name = options["task"]
    task = task_number(moe, name, "--task")
    assert task is not None, "a name has a number"
    new = dense_config(config)
    params = by_layer.apart(config.model, by_layer.by_path(subject.model.params))
    variables = by_layer.apart(config.model, by_layer.by_path(subject.model.other))
    layers = []
    chosen = []
    for layer, own in zip(params.layers, variables.layers, strict=True):
        if ("moe", _ROUTED[0]) not in layer:
            layers.append(layer)
            continue
        chosen.append(experts_of(moe, layer, own, task))
        layers.append(merged(layer, chosen[-1]))
    shapes = model_shapes(new.model)
    arrays = by_layer.joined(new.model, Apart(layers, params.rest))
    before, after = (count_parameters(c.model).total for c in (config, new))
    ids = [layer.ids_K.tolist() for layer in chosen]
    return Outcome(
        config=new,
        model=ModelState(by_layer.filled(shapes.params, arrays), shapes.other),
        report={
            "task": moe.router.tasks[task],
            "experts": ids,
            "gates": [layer.gates_K.tolist() for layer in chosen],
            "parameters": {"before": before, "after": after},
        },
        text=f"{moe.router.tasks[task]}: experts {'; '.join(map(str, ids))} by layer, of"
        f" {moe.n_routed_experts}, with the shared ones as one dense FFN of"
        f" {new.model.moe.shared_width}\n{before:,} -> {after:,} parameters",
    )


def experts_of(moe: MoEConfig, layer: Arrays, variables: Arrays, task: int) -> Chosen:
    """The experts that a router by task gives a task, and their gates.

    Args:
      moe: config of the layer.
      layer: its parameters.
      variables: those of its router that are none.
      task: its number.
    """
    router, settings = get_router(moe)
    logits_TE = None
    if router.learned:
        logits_TE = jnp.asarray(layer["moe", "router_EA"])[None, :, task]
    inputs = RouterInputs(
        jnp.zeros(1, jnp.int32),
        state={str(keys[-1]): jnp.asarray(x) for keys, x in variables.items()},
        task_ids_T=jnp.array([task]),
    )
    routing = router.route(logits_TE, inputs, settings)
    return Chosen(np.asarray(routing.ids_TK[0]), np.asarray(routing.gates_TK[0]))


def merged(layer: Arrays, chosen: Chosen) -> Arrays:
    """The arrays of a layer with its shared experts and a task's routed ones as one FFN.

    Args:
      layer: its parameters by path.
      chosen: the routed experts, with what their outputs are multiplied by.
    """
    found = {keys: x for keys, x in layer.items() if keys[0] != "moe"}
    gate_KFD, up_KFD, down_KDF = (layer["moe", name][chosen.ids_K] for name in _ROUTED)
    weighted_DKF = (chosen.gates_K[:, None, None] * down_KDF).transpose(1, 0, 2)
    d = gate_KFD.shape[-1]
    ffn = {
        "gate_FD": gate_KFD.reshape(-1, d),
        "up_FD": up_KFD.reshape(-1, d),
        "down_DF": weighted_DKF.reshape(d, -1),
    }
    if ("moe", _BIASES[0]) in layer:
        gate_KF, up_KF, down_KD = (layer["moe", name][chosen.ids_K] for name in _BIASES)
        ffn |= {
            "gate_bias_F": gate_KF.reshape(-1),
            "up_bias_F": up_KF.reshape(-1),
            "down_bias_D": chosen.gates_K @ down_KD,
        }
    for name, x in ffn.items():
        shared = layer.get((*_SHARED, name))
        found[*_SHARED, name] = x if shared is None else _beside(name, shared, x)
    return found


def _beside(name: str, shared: np.ndarray, routed: np.ndarray) -> np.ndarray:
    """The arrays of two FFNs as those of one that gives the sum: units follow units."""
    axis = name.rpartition("_")[2].find("F")
    return shared + routed if axis < 0 else np.concatenate([shared, routed], axis=axis)


def dense_config(config: Config) -> Config:
    """The config of a task's dense model, whose FFN is written as one shared expert.

    It is the same for all tasks.

    Args:
      config: of the mixture.

    Raises:
      ValueError: naming the key of what cannot be a part of the FFN, or of a setting of routed
        experts that would be lost.
    """
    moe = config.model.moe
    gate = moe.shared_expert_gate
    want = "the shared experts' gate depends on the token: they are part of no wider FFN; must be"
    require(not gate, "model.moe.shared_expert_gate", gate, f"{want} False")
    z = moe.n_identity_experts
    require(z == 0, "model.moe.n_identity_experts", z, "they are part of no FFN; must be 0")
    experts = config.train.trainable.experts
    want = "there will be no routed experts; must be None to operate on it"
    require(experts is None, "train.trainable.experts", experts, want)
    for key, values in (config.train.stages or {}).items():
        ours = not key.startswith("model.moe.")
        require(ours, f"train.stages.{key}", values, "of a mixture; must be None to operate on it")
    return replace(
        config,
        **{
            "model.moe": MoEConfig(
                n_routed_experts=0,
                n_shared_experts=1,
                num_experts_per_tok=0,
                moe_intermediate_size=moe.moe_intermediate_size,
                nominal_width=moe.nominal_width,
                shared_expert_intermediate_size=moe.shared_width
                + moe.num_experts_per_tok * moe.moe_intermediate_size,
                balance=type(moe.balance)(),
                expert=moe.expert,
            ),
            "train.record_routing": False,
            "train.replay_routing": None,
            "train.analyse_every": None,
        },
    )

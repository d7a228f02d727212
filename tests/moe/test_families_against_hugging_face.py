"""The MoE layer of every open family against Hugging Face's module of random weights.

Output, routing, and the gradients to the input and to every parameter, for several random configs
of each family.

Shapes: B sequences, S their length, D hidden, F expert width, E experts, Z identity experts,
K activated.
"""

from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import Config, replace
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.types import MoEInputs

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

B, S, D, F, E, Z, V = 2, 8, 12, 6, 8, 4, 30
PARAMETERS = 0.4  # their deviation, so that limits and biases are felt


class Family(NamedTuple):
    """A module of theirs, and ours.

    Attributes:
      module: theirs.
      moe: our config, dotted keys of `model.moe`.
      router: the part of theirs that returns (logits, gates, ids).
      parameters: `get -> {our name: array}`, of what `get` returns for each of their parameters.
      variables: our router's variables by name.
      token_ids: whether their module wants them.
    """

    module: Any
    moe: dict[str, Any]
    router: Any
    parameters: Any
    variables: Any = MappingProxyType({})
    token_ids: bool = False


def experts(module, get):
    """The matrices of fused experts."""
    gate, up = np.split(get(module.gate_up_proj)[:E], 2, axis=1)
    return {"gate_EFD": gate, "up_EFD": up, "down_EDF": get(module.down_proj)}


def shared(module, get):
    """Those of a shared expert."""
    names = {"gate_FD": module.gate_proj, "up_FD": module.up_proj, "down_DF": module.down_proj}
    return {f"shared/{name}": get(linear.weight) for name, linear in names.items()}


def sizes(rng, **changed):
    """Settings that all of their configs have; K is drawn."""
    k = int(rng.integers(2, 5))
    common = {"hidden_size": D, "num_experts_per_tok": k, "experts_implementation": "eager"}
    return {**common, **changed}


def softmax_family(rng, config, block, **changed):
    """Softmax scores of a fused `gate` and `experts`, as in most families."""
    norm = bool(rng.integers(2))
    settings = sizes(rng, moe_intermediate_size=F, norm_topk_prob=norm, **changed)
    module = block(config(**settings))

    def parameters(get):
        return {"router_ED": get(module.gate.weight), **experts(module.experts, get)}

    moe = {"num_experts_per_tok": settings["num_experts_per_tok"], "n_shared_experts": 0}
    return Family(module, {**moe, "router.norm_topk_prob": norm}, module.gate, parameters)


def olmoe(rng):
    from transformers.models.olmoe import configuration_olmoe, modeling_olmoe

    block = modeling_olmoe.OlmoeSparseMoeBlock
    config = configuration_olmoe.OlmoeConfig
    return softmax_family(rng, config, block, num_experts=E, intermediate_size=F)


def qwen3_moe(rng):
    from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

    block = modeling_qwen3_moe.Qwen3MoeSparseMoeBlock
    return softmax_family(rng, configuration_qwen3_moe.Qwen3MoeConfig, block, num_experts=E)


def mixtral(rng):
    from transformers.models.mixtral import configuration_mixtral, modeling_mixtral

    block = modeling_mixtral.MixtralSparseMoeBlock
    config = configuration_mixtral.MixtralConfig
    family = softmax_family(rng, config, block, num_local_experts=E, intermediate_size=F)
    return family._replace(moe={**family.moe, "router.norm_topk_prob": True})


def with_shared_gate(rng, config, block):
    """One shared expert of a width of its own, times sigmoid(x . w)."""
    width = int(rng.integers(5, 11))
    changed = {"num_experts": E, "shared_expert_intermediate_size": width}
    family = softmax_family(rng, config, block, **changed)

    def parameters(get):
        return {
            **family.parameters(get),
            **shared(family.module.shared_expert, get),
            "shared_gate_D": get(family.module.shared_expert_gate.weight)[0],
        }

    moe = {
        "n_shared_experts": 1,
        "shared_expert_gate": True,
        "shared_expert_intermediate_size": width,
    }
    return family._replace(moe={**family.moe, **moe}, parameters=parameters)


def qwen2_moe(rng):
    from transformers.models.qwen2_moe import configuration_qwen2_moe, modeling_qwen2_moe

    block = modeling_qwen2_moe.Qwen2MoeSparseMoeBlock
    return with_shared_gate(rng, configuration_qwen2_moe.Qwen2MoeConfig, block)


def qwen3_next(rng):
    from transformers.models.qwen3_next import configuration_qwen3_next, modeling_qwen3_next

    block = modeling_qwen3_next.Qwen3NextSparseMoeBlock
    return with_shared_gate(rng, configuration_qwen3_next.Qwen3NextConfig, block)


def deepseek_v4(rng, layer="moe"):
    from transformers.models.deepseek_v4 import configuration_deepseek_v4, modeling_deepseek_v4

    limit = float(rng.uniform(0.3, 1.5))
    scale = float(rng.uniform(0.5, 3.0))
    settings = sizes(
        rng,
        moe_intermediate_size=F,
        n_routed_experts=E,
        routed_scaling_factor=scale,
        swiglu_limit=limit,
        vocab_size=V,
        num_hidden_layers=1,
        mlp_layer_types=[layer],
        layer_types=["heavily_compressed_attention"],
    )
    config = configuration_deepseek_v4.DeepseekV4Config(**settings)
    module = modeling_deepseek_v4.DeepseekV4SparseMoeBlock(config, 0)
    k = settings["num_experts_per_tok"]

    def parameters(get):
        return {
            "router_ED": get(module.gate.weight),
            **experts(module.experts, get),
            **shared(module.shared_experts, get),
        }

    moe = {
        "num_experts_per_tok": k,
        "router.scoring_func": "sqrtsoftplus",
        "router.norm_topk_prob": True,
        "router.routed_scaling_factor": scale,
        "expert.name": "clamped_swiglu",
        "expert.limit": limit,
    }
    if layer == "hash_moe":
        table_VK = np.stack([rng.permutation(E)[:k] for _ in range(V)])
        module.gate.tid2eid.copy_(torch.tensor(table_VK))
        moe |= {"router.name": "token_table", "balance.expert": None}
        return Family(module, moe, module.gate, parameters, {"table_VK": table_VK}, token_ids=True)
    bias_E = rng.normal(0, 0.3, E).astype(np.float32)
    module.gate.e_score_correction_bias.copy_(torch.tensor(bias_E))
    moe["router.bias_update_speed"] = 0.0
    return Family(module, moe, module.gate, parameters, {"bias_E": bias_E})


def deepseek_v4_table(rng):
    return deepseek_v4(rng, "hash_moe")


def gpt_oss(rng):
    from transformers.models.gpt_oss import configuration_gpt_oss, modeling_gpt_oss

    alpha, limit = float(rng.uniform(0.8, 2.0)), float(rng.uniform(0.3, 1.5))
    settings = sizes(
        rng, intermediate_size=F, num_local_experts=E, swiglu_alpha=alpha, swiglu_limit=limit
    )
    module = modeling_gpt_oss.GptOssMLP(configuration_gpt_oss.GptOssConfig(**settings))

    def parameters(get):
        gate_up_EDG, bias_EG = (
            get(module.experts.gate_up_proj),
            get(module.experts.gate_up_proj_bias),
        )
        return {
            "router_ED": get(module.router.weight),
            "router_bias_E": get(module.router.bias),
            "gate_EFD": gate_up_EDG[..., ::2].swapaxes(1, 2),
            "up_EFD": gate_up_EDG[..., 1::2].swapaxes(1, 2),
            "down_EDF": get(module.experts.down_proj).swapaxes(1, 2),
            "gate_bias_EF": bias_EG[:, ::2],
            "up_bias_EF": bias_EG[:, 1::2],
            "down_bias_ED": get(module.experts.down_proj_bias),
        }

    moe = {
        "num_experts_per_tok": settings["num_experts_per_tok"],
        "n_shared_experts": 0,
        "router.logits_bias": True,
        "router.norm_topk_prob": True,
        "expert.name": "gpt_oss",
        "expert.alpha": alpha,
        "expert.limit": limit,
    }
    return Family(module, moe, module.router, parameters)


def longcat_flash(rng):
    from transformers.models.longcat_flash import (
        configuration_longcat_flash,
        modeling_longcat_flash,
    )

    scale = float(rng.uniform(0.5, 6.0))
    k = int(rng.integers(2, 6))
    config = configuration_longcat_flash.LongcatFlashConfig(
        hidden_size=D,
        moe_topk=k,
        n_routed_experts=E,
        zero_expert_num=Z,
        expert_ffn_hidden_size=F,
        routed_scaling_factor=scale,
    )
    module = modeling_longcat_flash.LongcatFlashMoE(config)
    bias_E = rng.normal(0, 0.05, E + Z).astype(np.float32)
    module.router.e_score_correction_bias.copy_(torch.tensor(bias_E))

    def parameters(get):
        return {"router_ED": get(module.router.classifier.weight), **experts(module.experts, get)}

    moe = {
        "num_experts_per_tok": k,
        "n_shared_experts": 0,
        "n_identity_experts": Z,
        "router.routed_scaling_factor": scale,
        "router.bias_update_speed": 0.0,
    }
    return Family(module, moe, module.router, parameters, {"bias_E": bias_E})


FAMILIES = {
    olmoe: 1,
    qwen3_moe: 1,
    mixtral: 1,
    qwen2_moe: 1,
    qwen3_next: 3,
    deepseek_v4: 3,
    deepseek_v4_table: 2,
    gpt_oss: 3,
    longcat_flash: 3,
}
CASES = [(family, seed) for family, n in FAMILIES.items() for seed in range(n)]


def by_name(state):
    """Arrays of a state of ours by name: "shared/gate_FD"."""
    return {"/".join(path): x[...] for path, x in nnx.to_flat_state(state)}


def theirs(family, x_BSD, token_ids_BS, probe_BSD):
    """Output, ids of the experts, and gradients of their module."""
    x = torch.tensor(x_BSD, requires_grad=True)
    tokens = [torch.tensor(token_ids_BS)] if family.token_ids else []
    y = family.module(x, *tokens)
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.tensor(probe_BSD)).sum().backward()
    with torch.no_grad():
        ids = family.router(x.reshape(-1, D), *tokens)[2]

    def gradient(parameter):
        return parameter.grad.numpy()

    return y.detach().numpy(), ids.numpy(), {"x": x.grad.numpy(), **family.parameters(gradient)}


def ours(family, x_BSD, token_ids_BS, probe_BSD):
    """The same of our layer with their parameters."""
    settings = {"n_routed_experts": E, "moe_intermediate_size": F, "expert_backend": "loop"}
    keys = {f"model.moe.{key}": value for key, value in {**settings, **family.moe}.items()}
    moe = replace(Config(), **keys).model.moe
    layer = MoELayer(moe, hidden_size=D, vocab_size=V, initializer_range=0.1, rngs=nnx.Rngs(0))
    wanted = family.parameters(lambda parameter: parameter.detach().numpy())
    graph, params, other = nnx.split(layer, nnx.Param, ...)
    assert set(by_name(params)) == set(wanted)
    for path, param in nnx.to_flat_state(params):
        param[...] = jnp.asarray(wanted["/".join(path)])
    for path, variable in nnx.to_flat_state(other):
        variable[...] = jnp.asarray(family.variables[path[-1]])
    inputs = MoEInputs(jnp.asarray(token_ids_BS), jnp.ones((B, S), bool))

    def loss(params, x_BSD):
        y_BSD, report = nnx.merge(graph, params, other)(x_BSD, inputs)
        return (y_BSD * probe_BSD).sum(), (y_BSD, report)

    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (dparams, dx), (y_BSD, report) = step(params, jnp.asarray(x_BSD))
    return y_BSD, report, {"x": dx, **by_name(dparams)}


@pytest.mark.parametrize(("family", "seed"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_layer_and_its_gradients(family, seed):
    rng = np.random.default_rng(seed)
    case = family(rng)
    with torch.no_grad():
        for parameter in case.module.parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(torch.tensor(PARAMETERS * rng.standard_normal(shape)))
    x, probe = rng.standard_normal((2, B, S, D), np.float32)
    token_ids = rng.integers(0, V, (B, S))
    y, ids, gradients = theirs(case, x, token_ids, probe)
    found_y, report, found = ours(case, x, token_ids, probe)
    found_ids = np.sort(np.asarray(report.recorded.ids).reshape(B * S, -1), axis=1)
    np.testing.assert_array_equal(found_ids, np.sort(ids, axis=1))
    np.testing.assert_allclose(found_y, y, rtol=1e-4, atol=1e-5)
    assert set(found) == set(gradients)
    for name, wanted in gradients.items():
        np.testing.assert_allclose(
            found[name], wanted, rtol=2e-4, atol=2e-5 * np.abs(wanted).max(), err_msg=name
        )
    count_E = np.bincount(ids.ravel(), minlength=E + Z)
    np.testing.assert_array_equal(report.logged.load_E, count_E[:E])
    np.testing.assert_array_equal(report.logged.ledger.computed_E, count_E[:E])
    if report.logged.identity_Z is not None:
        np.testing.assert_array_equal(report.logged.identity_Z, count_E[E:])

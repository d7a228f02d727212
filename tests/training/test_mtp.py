"""Multi-token prediction: loss and gradient by a plain formula, and what may not change them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import Config, replace
from dsmoe_jax.config.mesh import MeshConfig
from dsmoe_jax.model import layout, size
from dsmoe_jax.model.build import abstract_model, model_shapes
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe.layer import RouterVariable
from dsmoe_jax.moe.schedules import Progress
from dsmoe_jax.parallel import sharding
from dsmoe_jax.parallel.mesh import make_mesh
from dsmoe_jax.training import micro_batches, router_state
from dsmoe_jax.training.micro_batches import BatchGradient
from dsmoe_jax.training.rows import training_row
from dsmoe_jax.training.start import init_state
from dsmoe_jax.training.step import StepMetrics, mtp_weight
from tests.tools.tiny import FOR_EIGHT_DEVICES, tiny
from tests.tools.trees import REORDERED, assert_all_below, by_path, relative_errors

# All in one process: three of them need the same compiled gradient.
pytestmark = pytest.mark.eight_devices
FAST = {"xla_cpu_use_fusion_emitters": False}  # compiles in a third of the time
B, S, V, D, DEPTH, WEIGHT = 8, 10, 64, 16, 2, 0.3
CONFIG = {
    **FOR_EIGHT_DEVICES,
    "model.vocab_size": V,
    "model.hidden_size": D,
    "model.num_hidden_layers": 1,
    "model.attention.num_key_value_heads": 2,
    "model.tie_word_embeddings": True,
    "model.initializer_range": 0.2,
    "model.head_block_tokens": 7,
    "model.mtp.num_nextn_predict_layers": DEPTH,
    "model.mtp.factor": WEIGHT,
    "model.moe.moe_intermediate_size": 8,
    "model.moe.router.bias_update_speed": 0.01,
    "model.moe.balance.expert.factor": 0.5,
    "model.moe.balance.expert.scope": "global_batch",
    "model.moe.balance.sequence.factor": 0.5,
    "model.moe.balance.sequence.scope": "document",
    "model.moe.balance.router_z.factor": 0.1,
    "data.sequence_length": S,
    "data.tokenizer_vocab_size": V,
}
# Of each sequence, its documents' lengths; the rest is padding.
DOCUMENTS = [[10], [4, 6], [1, 2, 3, 4], [5], [], [9, 1], [2, 8], [3, 3]]


def config_of(**overrides: object) -> Config:
    return tiny(**{**CONFIG, **overrides})


def batch() -> dict[str, np.ndarray]:
    """Packed documents; each target is the next token, also behind the end of a document."""
    tokens = np.random.default_rng(0).integers(0, V, (B, S + 1)).astype(np.int32)
    arrays = {"tokens_BS": tokens[:, :-1].copy(), "targets_BS": tokens[:, 1:].copy()}
    segments_BS = np.zeros((B, S), np.int32)
    positions_BS = np.zeros((B, S), np.int32)
    for row, lengths in enumerate(DOCUMENTS):
        first = 0
        for number, n in enumerate(lengths, start=1):
            segments_BS[row, first : first + n] = number
            positions_BS[row, first : first + n] = np.arange(n)
            first += n
    mask_BS = (segments_BS > 0).astype(np.float32)
    mask_BS[0, 3:5] = 0  # of a document that is not all to be learned from
    return {
        **arrays,
        "segment_ids_BS": segments_BS,
        "positions_BS": positions_BS,
        "loss_mask_BS": mask_BS,
    }


@functools.cache
def initial_state():
    return init_state(config_of())


@functools.cache
def compiled(micro_batches):
    gradient = BatchGradient(config_of(**{"train.accumulation_steps": micro_batches}), jnp.ones(V))
    return jax.jit(gradient, compiler_options=FAST)


def gradients(micro_batches=1, inputs=None, params=None, term_weight=0.5):
    """Gradient and totals of a batch, with the same weight for all balance terms."""
    state = initial_state()
    weights = dict.fromkeys(("expert", "sequence", "router_z"), jnp.float32(term_weight))
    return compiled(micro_batches)(
        params or state.params,
        state.other,
        inputs or batch(),
        jax.random.key(0),
        weights,
        jnp.float32(WEIGHT),
    )


@functools.cache
def whole():
    return gradients()


def rms(x, scale):
    return x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6) * scale


def rotated(x_LNH):
    """RoPE (2104.09864): pairs (i, i + H/2) turned by position x 10000^(-2i/H)."""
    length, _, size = x_LNH.shape
    angle = np.arange(length)[:, None] * 10_000.0 ** (-2 * np.arange(size // 2) / size)
    turn = np.exp(1j * angle)[:, None]
    half = x_LNH[..., : size // 2] + 1j * x_LNH[..., size // 2 :]
    return jnp.concatenate([(half * turn).real, (half * turn).imag], axis=-1)


def swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T


def block(x_LD, w):
    """Attention and MoE layer of one document with residuals, written out."""
    a = w["attention"]
    normed = rms(x_LD, w["attention_norm"]["scale_D"])
    query = rotated(jnp.einsum("ld,nhd->lnh", normed, a["query_NHD"]))
    key = rotated(jnp.einsum("ld,mhd->lmh", normed, a["key_MHD"])).repeat(2, axis=1)
    value = jnp.einsum("ld,mhd->lmh", normed, a["value_MHD"]).repeat(2, axis=1)
    scores = jnp.einsum("lnh,knh->nlk", query, key) / math.sqrt(query.shape[-1])
    length = len(x_LD)
    scores = jnp.where(np.tri(length, dtype=bool), scores, -jnp.inf)
    attended = jnp.einsum("nlk,knh->lnh", jax.nn.softmax(scores), value)
    x_LD = x_LD + jnp.einsum("lnh,dnh->ld", attended, a["out_DNH"])
    moe = w["moe"]
    normed = rms(x_LD, w["ffn_norm"]["scale_D"])
    affinity = jax.nn.softmax(normed @ moe["router_ED"].T)
    _, best = jax.lax.top_k(affinity, 2)
    y = swiglu(normed, *(moe["shared"][name] for name in ("gate_FD", "up_FD", "down_DF")))
    for e in range(affinity.shape[1]):
        gate = jnp.where((best == e).any(axis=1), affinity[:, e], 0.0)
        weights = (moe[name][e] for name in ("gate_EFD", "up_EFD", "down_EDF"))
        y = y + gate[:, None] * swiglu(normed, *weights)
    return x_LD + y


def plain_loss(params, hidden_BSD, arrays):
    """V3 eqs. 21-25, each document by itself: weighted loss, and by module the sum and the number.

    Documents are padded at the end, which no position before it sees.
    """
    places = [
        (row, sum(lengths[:i]), n)
        for row, lengths in enumerate(DOCUMENTS)
        for i, n in enumerate(lengths)
    ]
    tokens = np.zeros((len(places), 2 * S), np.int32)
    counts = np.zeros((len(places), 2 * S), np.float32)
    hidden = []
    for document, (row, first, n) in enumerate(places):
        own = slice(first, first + n)
        tokens[document, :n] = arrays["tokens_BS"][row, own]
        tokens[document, n] = arrays["targets_BS"][row, first + n - 1]
        counts[document, :n] = arrays["loss_mask_BS"][row, own]
        hidden.append(jnp.pad(hidden_BSD[row, own], [(0, S - n), (0, 0)]))
    h = jnp.stack(hidden)
    nll, numbers = [], []
    for k in range(1, DEPTH + 1):
        w = jax.tree.map(lambda x, k=k: x[k - 1], params["mtp"])
        e = rms(params["embedding_VD"][tokens[:, k : k + S]], w["embedding_norm"]["scale_D"])
        pair = jnp.concatenate([e, rms(h, w["hidden_norm"]["scale_D"])], axis=-1)
        x = jax.vmap(block, (0, None))(pair @ w["projection_DJ"].T, w["block"])
        h = rms(x, w["final_norm"]["scale_D"])
        log_p = jax.nn.log_softmax(h @ params["embedding_VD"].T)
        target = tokens[:, k + 1 : k + 1 + S, None]
        weight = counts[:, k : k + S]
        nll.append(-(jnp.take_along_axis(log_p, target, axis=-1)[..., 0] * weight).sum())
        numbers.append(weight.sum())
    total = arrays["loss_mask_BS"].sum()
    return WEIGHT / DEPTH * sum(x / total for x in nll), (jnp.stack(nll), numbers)


def test_loss_and_gradient_are_those_of_the_plain_formula():
    """Beside the model's own cross-entropy; balance terms have no weight."""
    arrays = batch()
    state = initial_state()
    found = gradients(term_weight=0.0)
    graph = abstract_model(config_of().model)

    def loss(params):
        model = nnx.merge(graph, params, state.other)
        hidden_BSD, _, _ = model.hidden(ModelInputs.of_batch(arrays))
        log_p = jax.nn.log_softmax(hidden_BSD @ params["embedding_VD"][...].T)
        nll_BS = -jnp.take_along_axis(log_p, arrays["targets_BS"][..., None], axis=-1)[..., 0]
        own = (nll_BS * arrays["loss_mask_BS"]).sum() / arrays["loss_mask_BS"].sum()
        ahead, sums = plain_loss(nnx.to_pure_dict(params), hidden_BSD, arrays)
        return own + ahead, (ahead, sums)

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)
    (total, (ahead, (nll, numbers))), wanted = grad(state.params)
    np.testing.assert_allclose(found.totals.parts["mtp"], ahead, rtol=1e-5)
    np.testing.assert_allclose(found.totals.total_loss, total, rtol=1e-5)
    np.testing.assert_allclose(found.totals.ahead.nll, nll, rtol=1e-5)
    np.testing.assert_array_equal(found.totals.ahead.tokens, numbers)
    errors = relative_errors(found.params, wanted)
    assert any("mtp" in path for path in errors)
    assert_all_below(errors, 2e-4)


def test_micro_batches_change_nothing():
    _assert_same(gradients(micro_batches=4), whole())


def test_a_mesh_changes_nothing():
    sizes = {"fsdp": 2, "expert": 2, "tensor": 2}
    with jax.set_mesh(make_mesh(MeshConfig(data=1, **sizes), jax.devices()[:8])):
        arrays = sharding.global_batch(batch(), sharding.local_rows(B), B)
        found = gradients(inputs=arrays)
    _assert_same(found, whole())


def _assert_same(found: micro_batches.Gradients, wanted: micro_batches.Gradients) -> None:
    errors = relative_errors(found.params, wanted.params)
    assert sum("mtp" in path for path in errors) > 10
    assert_all_below(errors, REORDERED)
    totals = [t._replace(router=t.router._replace(dispatch=())) for t in (found[0], wanted[0])]
    assert_all_below(relative_errors(*totals), REORDERED)


def test_balance_terms_and_loads_of_the_modules_count():
    """A load of each MoE layer, and every token of a document but the last k of module k."""
    totals = whole().totals
    tokens = [sum(max(n - k, 0) for row in DOCUMENTS for n in row) for k in range(DEPTH + 1)]
    np.testing.assert_array_equal(totals.router.tokens, tokens)
    np.testing.assert_array_equal(totals.router.load_E.sum(axis=1), [2 * n for n in tokens])
    # With the same affinity for all experts a term is exactly 1, whatever the load: every mean is
    # over the tokens that its layer sees.
    even = jax.tree.map_with_path(
        lambda path, x: 0 * x if "router" in jax.tree_util.keystr(path) else x,
        initial_state().params,
    )
    terms = gradients(params=even).totals.terms
    for name in ("expert", "sequence"):
        np.testing.assert_allclose(terms[name], np.ones(1 + DEPTH), rtol=1e-5)


def test_as_many_biases_move_as_there_are_routers():
    """Also with dense layers between the MoE layers; pitfall: those of the modules stay behind."""
    config = config_of(**{"model.num_hidden_layers": 5, "model.moe_layer_freq": 2}).model
    other = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model_shapes(config).other)
    routers = len(config.moe_layers) + DEPTH
    load_LE = jnp.arange(routers * 8.0).reshape(routers, 8) ** 2
    assert [n for _, n in layout.moe_stacks(config)] == [2, 1, DEPTH]
    moved = router_state.after_step(other, load_LE, Progress(jnp.int32(0), 10), config)
    biases = jax.tree.leaves(nnx.filter_state(moved, RouterVariable))
    assert sum(len(bias_LE) for bias_LE in biases) == routers
    assert all((np.abs(bias_LE).max(axis=1) > 0).all() for bias_LE in biases)
    by_stack = by_path(moved)
    first = by_stack["['layers']['moe']['bias_E'].value"]
    wanted = np.sign(load_LE.mean(axis=1, keepdims=True) - load_LE) * 0.01
    np.testing.assert_allclose(first, wanted[:2])
    np.testing.assert_allclose(by_stack["['mtp']['block']['moe']['bias_E'].value"], wanted[3:])


def test_parameters_by_formula_are_those_of_the_module():
    config = config_of()
    counted = size.count_parameters(config.model)
    assert counted == size.parameters_by_formula(config.model)
    alone = size.count_parameters(replace(config, **{"model.mtp": None}).model)
    assert (alone.total, alone.activated) == (counted.total, counted.activated)
    assert counted.mtp > counted.mtp_activated > 0
    flops = size.train_flops_per_token(config)
    more = flops - size.train_flops_per_token(replace(config, **{"model.mtp": None}))
    # The head is multiplied with once more by each module; its norms are no product.
    products = counted.mtp_activated + DEPTH * (V * D - 5 * D)
    scores = DEPTH * 12 * S * 4 * 8
    assert more == 6 * products + scores


def test_its_weight_follows_a_schedule():
    schedule = ((0.5, 1.0), (0.5, 0.1))
    config = config_of(**{"model.mtp.schedule": schedule, "train.steps": 4})
    found = [mtp_weight(config, Progress(jnp.int32(step), 4)) for step in range(4)]
    np.testing.assert_allclose(found, [WEIGHT, WEIGHT, WEIGHT / 10, WEIGHT / 10], rtol=1e-6)
    assert mtp_weight(replace(config, **{"model.mtp": None}), Progress(jnp.int32(0), 4)) is None


def test_a_row_has_loss_and_acceptance_of_each_module():
    totals = whole().totals
    number = jnp.float32(1.0)
    metrics = StepMetrics(
        number, number, totals.parts, *[number] * 4, totals.terms, totals.router, None, totals.ahead
    )
    row = training_row(metrics, config_of().model)
    sums = totals.ahead
    np.testing.assert_allclose(row["mtp_loss"], sums.nll / sums.tokens, rtol=1e-6)
    np.testing.assert_allclose(row["mtp_acceptance"], sums.agreed / sums.tokens, rtol=1e-6)
    assert all(0 <= share <= 1 for share in row["mtp_acceptance"])
    assert len(row["maxvio"]) == 1 + DEPTH
    none = metrics._replace(ahead=jax.tree.map(jnp.zeros_like, sums))
    assert np.isnan(training_row(none, config_of().model)["mtp_loss"]).all()


def test_impossible_modules_are_refused():
    with pytest.raises(ValueError, match=r"model\.mtp\.num_nextn_predict_layers=0: must be > 0"):
        config_of(**{"model.mtp.num_nextn_predict_layers": 0})
    with pytest.raises(ValueError, match=r"model\.mtp\.schedule=.*must be pairs"):
        config_of(**{"model.mtp.schedule": ((2.0, 1.0),)})
    learns = {"model.moe.router.name": "reinforce", "model.moe.router.bias_update_speed": None}
    with pytest.raises(ValueError, match=r"model\.mtp=.*reinforce router learns from the loss"):
        model_shapes(config_of(**learns).model)

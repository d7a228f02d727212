"""A model whose router chooses by task: packed documents of several tasks, generation, meshes.

Shapes: B sequences, S positions, L MoE layers, K activated experts.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.config import MeshConfig, replace
from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.evaluation.likelihood import Encoded, Scorer
from dsmoe_jax.model.generation import generate
from dsmoe_jax.model.speculative import generate_drafted
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe.interventions import GENERATION
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.types import MoEInputs
from dsmoe_jax.parallel.mesh import make_mesh
from tests.model.tiny_model import V, make
from tests.tools.routing import TASKS
from tests.tools.tiny import tiny

S = 16
CHANGES = {
    "model.num_hidden_layers": 1,
    "model.first_k_dense_replace": 0,
    "model.moe.router.name": "task",
    "model.moe.router.tasks": TASKS,
    "model.moe.router.scoring_func": "sigmoid",  # gates that matter
    "model.moe.balance": {},
}


@functools.cache
def model():
    return make(**CHANGES)


@functools.cache
def scoring():
    """`(tokens, segments, positions, tasks) -> nll_BS, ids_LBSK`, compiled once."""
    graph, state = nnx.split(model())

    @jax.jit
    def run(tokens_BS, segment_ids_BS, positions_BS, task_ids_BS):
        batch = Batch(
            tokens_BS=tokens_BS, segment_ids_BS=segment_ids_BS, positions_BS=positions_BS,
            targets_BS=tokens_BS, loss_mask_BS=tokens_BS, task_ids_BS=task_ids_BS,
        )  # fmt: skip
        inputs = ModelInputs.of_batch(batch)
        scored = nnx.merge(graph, state).score(inputs, jnp.roll(tokens_BS, -1, axis=1))
        return scored.nll_BS, scored.report.recorded.ids

    return run


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    tasks=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_documents_packed_are_what_they_are_alone(lengths, tasks, seed):
    """The first row has all documents, each other row one: losses and experts are the same."""
    rng = np.random.default_rng(seed)
    tokens_BS, segments_BS, positions_BS, tasks_BS = np.zeros((4, 7, S), np.int32)
    pieces = {}
    start = 0
    for row, (length, task) in enumerate(zip(lengths, tasks, strict=False), start=1):
        n = min(length, S - start)
        pieces[row] = slice(start, start + n), slice(0, n)
        document = rng.integers(0, V, n)
        for place in ((0, pieces[row][0]), (row, pieces[row][1])):
            tokens_BS[place] = document
            segments_BS[place] = row if place[0] == 0 else 1
            positions_BS[place] = np.arange(n)
            tasks_BS[place] = task
        start += n
    nll_BS, ids_LBSK = map(np.asarray, scoring()(tokens_BS, segments_BS, positions_BS, tasks_BS))
    for row, (packed, alone) in pieces.items():
        # The last token's target is of the next document.
        wanted = nll_BS[row, alone][:-1]
        np.testing.assert_allclose(nll_BS[0, packed][:-1], wanted, rtol=2e-5, atol=1e-6)
        experts_LSK = ids_LBSK[:, 0, packed]
        np.testing.assert_array_equal(experts_LSK, ids_LBSK[:, row, alone])
        assert (experts_LSK == experts_LSK[:, :1]).all(), "a task has one set of experts"


def greedy(prompt, task, n):
    """By passes over the whole sequence: no cache."""
    graph, state = nnx.split(model())

    @jax.jit
    def logits(tokens_BS):
        inputs = ModelInputs(tokens_BS).of_task(task)
        return nnx.merge(graph, state).forward(inputs, intervention=GENERATION).logits_BSV

    tokens_BS = jnp.pad(jnp.array([prompt]), [(0, 0), (0, n)])
    for i in range(len(prompt), len(prompt) + n):
        tokens_BS = tokens_BS.at[:, i].set(jnp.argmax(logits(tokens_BS)[:, i - 1], axis=-1))
    return tokens_BS[0, len(prompt) :].tolist()


def test_generation_is_of_the_task_that_is_named():
    prompt = [5, 3, 11]
    texts = [generate(model(), [prompt], 5, task=task).tokens_BG[0].tolist() for task in TASKS[:2]]
    assert texts == [greedy(prompt, task, 5) for task in range(2)]
    assert texts[0] != texts[1]
    with pytest.raises(ValueError, match=r"^task: missing; the task router .* en, de, code$"):
        generate(model(), [prompt], 5)


def test_drafts_are_of_the_task_too():
    drafting = make(**CHANGES, **{"model.mtp.num_nextn_predict_layers": 1})
    prompt = [[5, 3, 11]]
    wanted = generate(drafting, prompt, 5, task="code_c").tokens_BG
    drafted = generate_drafted(drafting, prompt, 5, task="code_c").tokens_BG
    np.testing.assert_array_equal(drafted, wanted)


def test_likelihoods_are_of_the_task_that_is_named():
    request = Encoded((0, 5, 3), (11, 2))
    tokens_S = np.zeros((1, S), np.int32)
    tokens_S[0, :5] = 0, 5, 3, 11, 2
    zeros = np.arange(S)[None] * 0
    nll_BS, _ = scoring()(tokens_S, zeros + 1, np.arange(S)[None], zeros + 1)
    (found,) = Scorer(model(), S, task="de").score([request])
    np.testing.assert_allclose(found.nats, -nll_BS[0, 2:4].sum(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"^task='fr': must be one of en, de, code$"):
        Scorer(model(), S, task="fr")


@pytest.mark.eight_devices
def test_a_layer_on_a_mesh_is_as_on_one_device():
    moe = replace(tiny(), **CHANGES, **{"model.moe.n_routed_experts": 8}).model.moe
    layer = MoELayer(moe, hidden_size=8, vocab_size=V, initializer_range=0.5, rngs=nnx.Rngs(0))
    graph, params, other = jax.device_get(nnx.split(layer, nnx.Param, ...))
    x_BSD = np.random.default_rng(0).normal(size=(8, 6, 8)).astype(np.float32)
    zeros_BS = np.zeros((8, 6), np.int32)
    inputs = MoEInputs(zeros_BS, zeros_BS == 0, task_ids_BS=np.arange(48).reshape(8, 6) // 7 % 3)

    def loss(params, inputs):
        y_BSD, _ = nnx.merge(graph, params, other)(x_BSD, inputs)
        return jnp.square(y_BSD).sum()

    found = []
    for mesh in (None, make_mesh(MeshConfig(data=1, fsdp=2, expert=4), jax.devices()[:8])):
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            run = jax.jit(jax.value_and_grad(loss))
            value, gradient = jax.device_get(run(params, jax.device_put(inputs)))
            found.append((value, gradient["router_EA"][...]))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)
    assert np.abs(found[0][1]).max() > 1e-3

"""The loss in blocks of tokens: the numbers of the whole logits, in less memory.

Shapes: B sequences, S positions, D hidden, V vocabulary.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from dsmoe_jax.config import replace
from dsmoe_jax.config.mesh import MeshConfig
from dsmoe_jax.nn import head
from dsmoe_jax.parallel.mesh import make_mesh
from dsmoe_jax.parallel.sharding import spec
from dsmoe_jax.training import objective
from dsmoe_jax.training.micro_batches import BatchGradient
from dsmoe_jax.training.start import init_state
from tests.tools.tiny import batch, tiny
from tests.tools.trees import REORDERED, assert_all_below, by_path, relative_errors

D = 8


def arrays(b, s, v):
    """Activations, head, targets, and a weight for each token, 0 for some."""
    rng = np.random.default_rng(b * s * v)
    x_BSD = rng.normal(size=(b, s, D)).astype(np.float32)
    head_VD = rng.normal(size=(v, D)).astype(np.float32)
    weight_BS = rng.normal(size=(b, s)) * (rng.random((b, s)) < 0.8)
    return x_BSD, head_VD, rng.integers(0, v, (b, s), np.int32), weight_BS.astype(np.float32)


@functools.partial(jax.jit, static_argnums=4)
def in_blocks(x_BSD, head_VD, targets_BS, weight_BS, n_blocks):
    """Losses of the tokens, and gradients of their weighted sum."""

    def loss(x_BSD, head_VD):
        nll_BS = head.nll_in_blocks(x_BSD, nnx.Param(head_VD), targets_BS, n_blocks)
        return (nll_BS * weight_BS).sum(), nll_BS

    gradients, nll_BS = jax.grad(loss, argnums=(0, 1), has_aux=True)(x_BSD, head_VD)
    return nll_BS, *gradients


def by_torch(x_BSD, head_VD, targets_BS, weight_BS):
    """The same in float64."""
    x, w = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x_BSD, head_VD))
    logits = (x @ w.T).flatten(0, 1)
    targets = torch.tensor(targets_BS, dtype=torch.int64).flatten()
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    nll = nll.reshape(targets_BS.shape)
    (nll * torch.tensor(weight_BS)).sum().backward()
    return nll.detach().numpy(), x.grad.numpy(), w.grad.numpy()


@settings(max_examples=12)
@given(b=st.integers(1, 3), s=st.integers(1, 7), v=st.integers(2, 9), n_blocks=st.integers(1, 25))
def test_values_and_gradients(b, s, v, n_blocks):
    """For any number of blocks, more than tokens too."""
    inputs = arrays(b, s, v)
    for got, want in zip(in_blocks(*inputs, n_blocks), by_torch(*inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_blocks", [1, 4])
def test_best_words_are_the_first_of_the_largest_logits(n_blocks):
    x_BSD, head_VD, targets_BS, _ = arrays(2, 5, 6)
    head_VD[4] = head_VD[1]  # a tie
    of_tokens = x_BSD, nnx.Param(head_VD), targets_BS, n_blocks
    nll_BS, best_BS = jax.jit(head.nll_and_best_in_blocks, static_argnums=3)(*of_tokens)
    np.testing.assert_array_equal(best_BS, (x_BSD @ head_VD.T).argmax(axis=-1))
    assert (best_BS == 1).any()
    np.testing.assert_array_equal(nll_BS, head.nll_in_blocks(*of_tokens))


def test_large_logits_do_not_overflow():
    x_BSD, *rest = arrays(2, 3, 5)
    nll_BS, *gradients = in_blocks(1e4 * x_BSD, *rest, 2)
    assert np.isfinite(nll_BS).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "block_tokens", "blocks"),
    [
        (4 * 256, 4096, None, 1),  # the demo's order of size
        (2 * 4096, 102_400, None, 4),  # 3.4 GB of float32
        (2**15, 2**13, None, 1),  # exactly 1 GiB
        (2**15 + 1, 2**13, None, 2),
        (1000, 10, 1000, 1),
        (1000, 10, 300, 4),
        (3, 2**30, None, 3),  # one token is more than 1 GiB
    ],
)
def test_number_of_blocks(tokens, vocab_size, block_tokens, blocks):
    assert head.n_blocks(tokens, vocab_size, block_tokens) == blocks


def test_blocks_are_of_one_devices_tokens_and_words():
    mesh = jax.sharding.AbstractMesh((2, 2, 2, 4), ("data", "fsdp", "expert", "tensor"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert head.n_blocks(2**18, 2**15, None) == 1
        assert head.n_blocks(2**18, 2**15, 2**14) == 2
        assert head.n_blocks(2**20, 2**15, None) == 4


SAMPLED = {"model.moe.router.name": "reinforce", "model.moe.router.options.entropy_factor": 0.7}


@functools.cache
def initial_state(sampled):
    return init_state(tiny(**SAMPLED) if sampled else tiny())


def gradient_and_arguments(block_tokens, micro_batches, sampled):
    state = initial_state(sampled)
    config = replace(
        tiny(**SAMPLED) if sampled else tiny(),
        **{
            "model.head_block_tokens": block_tokens,
            "train.accumulation_steps": micro_batches,
        },
    )
    gradient = BatchGradient(config, jnp.arange(512) % 5)
    weights = {name: jnp.float32(0.1) for name in config.model.moe.balance}
    rng = jax.random.key(1)
    return gradient, (state.params, state.other, batch(config), rng, weights)


@functools.cache
def step_gradients(*case):
    gradient, arguments = gradient_and_arguments(*case)
    return jax.device_get(jax.jit(gradient)(*arguments))


@pytest.mark.parametrize(
    ("block_tokens", "micro_batches", "sampled"),
    [(256, 1, False), (100, 1, False), (17, 2, False), (100, 1, True)],
)
def test_a_steps_gradients_and_sums(block_tokens, micro_batches, sampled):
    """Packed documents with padding; the policy's reward is the loss of each token."""
    want = step_gradients(None, 1, sampled)
    got = step_gradients(block_tokens, micro_batches, sampled)
    assert_all_below(relative_errors(by_path(got.params), by_path(want.params)), REORDERED)
    sums = zip(jax.tree.leaves(got.totals), jax.tree.leaves(want.totals), strict=True)
    for found, whole in sums:
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-6)
    if block_tokens == 256:  # all tokens: it is the same program
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_part_that_looks_at_logits_has_them_whole(monkeypatch):
    def largest_logit(context):
        seen.append(context.output.logits_BSV)
        return jnp.float32(0)

    seen = []
    part = objective.LossPart(lambda config: True, largest_logit, logits=True)
    for parts in ({}, {"largest_logit": part}):
        with monkeypatch.context() as patch:
            for name, line in parts.items():
                patch.setitem(objective.LOSS_PARTS, name, line)
            gradient, arguments = gradient_and_arguments(100, 1, False)
            jax.eval_shape(gradient, *arguments)
    assert [logits_BSV.shape for logits_BSV in seen] == [(4, 64, 512)]


@pytest.mark.eight_devices
def test_on_a_mesh():
    """The same numbers, and no block collects the head or scatters its gradient."""
    inputs = arrays(8, 6, 12)
    alone = in_blocks(*inputs, 3)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))) as _:
        mesh = jax.sharding.get_mesh()
        letters = ("BSD", "VD", "BS", "BS")
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec(axes)))
            for x, axes in zip(inputs, letters, strict=True)
        ]
        compiled = in_blocks.lower(*placed, 3).compile()
        found = compiled(*placed)
    for got, want in zip(found, alone, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    inside, outside = collectives(compiled.as_text())
    assert inside == {"all-reduce"}  # a number for each token, over the vocabulary
    assert {"all-gather", "reduce-scatter"} <= outside


def collectives(text):
    """Kinds of collectives inside and outside the bodies of loops."""
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    assert bodies
    kinds = {True: set(), False: set()}
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        name = re.match(r"%?([\w.-]+)", computation)
        inside = name is not None and name[1] in bodies
        found = re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all)\(", computation)
        kinds[inside] |= set(found)
    return kinds[True], kinds[False]


def test_memory_is_that_of_a_block(full_optimisation):
    inputs = arrays(2, 512, 2048)
    whole = 4 * 2 * 512 * 2048  # bytes of all logits

    def temporaries(n_blocks):
        return in_blocks.lower(*inputs, n_blocks).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(1) > whole
    assert temporaries(8) < whole / 3

"""A student's predictions beside its teacher's: values and gradients by torch, whole and in blocks.

Shapes: B sequences, S positions, D hidden of the student, H of the teacher, V vocabulary.
"""

import functools

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from dsmoe_jax.config.mesh import MeshConfig
from dsmoe_jax.nn import soft_targets
from dsmoe_jax.nn.soft_targets import Hidden
from dsmoe_jax.parallel.mesh import make_mesh
from dsmoe_jax.parallel.sharding import spec

D, H = 8, 16


def arrays(b, s, v, seed=0):
    """Inputs of both heads, both heads, and a weight for each token, 0 for some."""
    rng = np.random.default_rng(seed)
    shapes = (b, s, D), (v, D), (b, s, H), (v, H)
    values = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    weight_BS = rng.normal(size=(b, s)) * (rng.random((b, s)) < 0.8)
    return *values, weight_BS.astype(np.float32)


@functools.partial(jax.jit, static_argnums=(5, 6))
def compared(x_BSD, head_VD, teacher_BSH, teacher_VH, weight_BS, temperature, n_blocks):
    """Divergence and agreement of the tokens, and gradients of the divergences' weighted sum.

    `n_blocks` None: of whole logits.
    """

    def loss(x_BSD, head_VD, teacher_BSH, teacher_VH):
        if n_blocks is None:
            both = (x_BSD @ head_VD.T, teacher_BSH @ teacher_VH.T)
            found = soft_targets.of_logits(*both, temperature)
        else:
            both = Hidden(x_BSD, head_VD), Hidden(teacher_BSH, teacher_VH)
            found = soft_targets.in_blocks(*both, temperature, n_blocks)
        return (found.divergence_BS * weight_BS).sum(), found

    of_all = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    gradients, found = of_all(x_BSD, head_VD, teacher_BSH, teacher_VH)
    return *found, *gradients


def by_torch(x_BSD, head_VD, teacher_BSH, teacher_VH, weight_BS, temperature):
    """T^2 KL(teacher || student) in float64, and its gradients for the student."""
    x, w = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x_BSD, head_VD))
    logits = x @ w.T
    of_teacher = torch.tensor(teacher_BSH.astype(np.float64) @ teacher_VH.T.astype(np.float64))
    divergence = temperature**2 * torch.nn.functional.kl_div(
        torch.log_softmax(logits / temperature, -1),
        torch.log_softmax(of_teacher / temperature, -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    (divergence * torch.tensor(weight_BS)).sum().backward()
    agrees = logits.argmax(-1) == of_teacher.argmax(-1)
    return divergence.detach().numpy(), agrees.numpy(), x.grad.numpy(), w.grad.numpy()


@pytest.mark.parametrize("n_blocks", [None, 3])
@settings(max_examples=3)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(2, 7)),
    temperature=st.sampled_from([0.5, 3.0]),
)
def test_values_and_gradients(n_blocks, sizes, temperature):
    """The teacher gets no gradient."""
    inputs = arrays(*sizes)
    *found, of_teacher, of_teachers_head = compared(*inputs, temperature, n_blocks)
    for got, want in zip(found, by_torch(*inputs, temperature), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert not of_teacher.any()
    assert not of_teachers_head.any()


@pytest.mark.parametrize("n_blocks", [None, 2])
def test_the_teacher_itself_is_at_no_distance(n_blocks):
    _, _, teacher_BSH, teacher_VH, weight_BS = arrays(2, 3, 5)
    same = (teacher_BSH, teacher_VH, teacher_BSH, teacher_VH, weight_BS)
    divergence_BS, agrees_BS, *gradients = compared(*same, 2.0, n_blocks)
    np.testing.assert_array_equal(divergence_BS, 0)
    assert agrees_BS.all()
    for gradient in gradients:  # of whole logits, shares that are summed to 1 first
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("n_blocks", [None, 2])
def test_large_logits_do_not_overflow(n_blocks):
    x_BSD, head_VD, teacher_BSH, *rest = arrays(2, 3, 5)
    found = compared(1e4 * x_BSD, head_VD, 1e4 * teacher_BSH, *rest, 1.0, n_blocks)
    assert all(np.isfinite(array).all() for array in found)


@pytest.mark.eight_devices
def test_on_a_mesh():
    """Tokens over two axes, the vocabulary over a third."""
    inputs = arrays(8, 6, 12)
    alone = compared(*inputs, 2.0, 3)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))):
        mesh = jax.sharding.get_mesh()
        letters = ("BSD", "VD", "BSD", "VD", "BS")
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec(axes)))
            for x, axes in zip(inputs, letters, strict=True)
        ]
        found = compared(*placed, 2.0, 3)
    for got, want in zip(found, alone, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_memory_is_that_of_a_block(full_optimisation):
    inputs = arrays(2, 512, 2048)
    whole = 4 * 2 * 512 * 2048  # bytes of all logits of a model

    def temporaries(n_blocks):
        lowered = compared.lower(*inputs, 1.0, n_blocks)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(None) > 2 * whole
    assert temporaries(8) < whole

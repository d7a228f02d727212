"""The distance of a student's predictions of the next token from those of its teacher.

    T^2 KL(softmax(t / T) || softmax(s / T))      t, s: logits of teacher and student

as Hinton et al. (1503.02531, section 2) weigh it: its gradient is then of the same size at every
temperature T.  Nothing is differentiated with respect to the teacher.

Of the two heads' logits, `in_blocks` never has more than those of a block of tokens, as the loss of
the text in head.py; the backward pass computes both again.

Shapes: B sequences, S positions, D hidden, V vocabulary; on a shard of the mesh t tokens, v words
of the vocabulary, and b tokens of a block.  The teacher's D may be another than the student's.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.nn.token_blocks import (
    IN_USE,
    best_words,
    cut,
    joined,
    logits_of_block,
    on_shards,
    over_vocabulary,
    scattered,
)
from dsmoe_jax.parallel.sharding import gathered, spec


class Compared(NamedTuple):
    """A student's predictions beside its teacher's.

    Attributes:
      divergence_BS: T^2 KL of every position in nats, float32.
      agrees_BS: whether both find the same token best, bool.
    """

    divergence_BS: jax.Array
    agrees_BS: jax.Array


class Hidden(NamedTuple):
    """A model's input to its head, normed, (B, S, D), and the head, (V, D)."""

    x_BSD: jax.Array
    head_VD: jax.Array


def of_logits(logits_BSV: jax.Array, teacher_BSV: jax.Array, temperature: float) -> Compared:
    """Compares logits that are whole, float32 (B, S, V)."""
    teacher_BSV = jax.lax.stop_gradient(teacher_BSV)
    log_student_BSV = jax.nn.log_softmax(logits_BSV / temperature)
    log_teacher_BSV = jax.nn.log_softmax(teacher_BSV / temperature)
    surplus_BSV = log_teacher_BSV - log_student_BSV
    divergence_BS = (jnp.exp(log_teacher_BSV) * surplus_BSV).sum(axis=-1)
    agrees_BS = logits_BSV.argmax(axis=-1) == teacher_BSV.argmax(axis=-1)
    return Compared(temperature**2 * divergence_BS, agrees_BS)


def in_blocks(student: Hidden, teacher: Hidden, temperature: float, n_blocks: int) -> Compared:
    """Compares in blocks of tokens.

    Args:
      student: its products are of the dtype of `x_BSD`, their sums float32; so is the gradient of
        its head, which is float32.
      teacher: of the same vocabulary.
      temperature: T.
      n_blocks: into which the tokens of one device are cut, see head.py.
    """
    found: Any = _compared(*student, *teacher, temperature, n_blocks)
    return Compared(*found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _compared(x_BSD, head_VD, teacher_BSD, teacher_VD, temperature, n_blocks) -> Any:
    return _compared_fwd(x_BSD, head_VD, teacher_BSD, teacher_VD, temperature, n_blocks)[0]


def _compared_fwd(x_BSD, head_VD, teacher_BSD, teacher_VD, temperature, n_blocks):
    # Collected once, and kept until the backward pass, as in head.py.
    head_VD = gathered(head_VD.astype(x_BSD.dtype), "VD")
    teacher_VD = gathered(teacher_VD.astype(teacher_BSD.dtype), "VD")
    by_token = spec("BS")
    by_vector = spec("BSD")
    forward = on_shards(
        functools.partial(_forward, temperature, n_blocks),
        in_specs=(by_vector, IN_USE, by_vector, IN_USE),
        out_specs=(by_token,) * 4,
    )
    arrays = x_BSD, head_VD, teacher_BSD, teacher_VD
    divergence_BS, agrees_BS, *log_sums = forward(*arrays)
    return (divergence_BS, agrees_BS), (*arrays, *log_sums)


def _compared_bwd(temperature, n_blocks, saved, gradients):
    by_token = spec("BS")
    by_vector = spec("BSD")
    backward = on_shards(
        functools.partial(_backward, temperature, n_blocks),
        in_specs=(by_vector, IN_USE, by_vector, IN_USE, by_token, by_token, by_token),
        out_specs=(by_vector, spec("VD")),
    )
    dx_BSD, dhead_VD = backward(*saved, gradients[0])
    return dx_BSD, dhead_VD, None, None


_compared.defvjp(_compared_fwd, _compared_bwd)


def _forward(temperature, n_blocks, x_BSD, head_vD, teacher_BSD, teacher_vD):
    """Divergence, agreement, and both log-sums of exponentials of a shard's tokens."""

    def one(_, block):
        x_bD, teacher_bD = block
        logits_bv, log_sum_b, best_b = _at_temperature(x_bD, head_vD, temperature)
        teacher_bv, teacher_log_sum_b, teacher_best_b = _at_temperature(
            teacher_bD, teacher_vD, temperature
        )
        share_bv = jnp.exp(teacher_bv - teacher_log_sum_b[:, None])
        surplus_bv = (teacher_bv - teacher_log_sum_b[:, None]) - (logits_bv - log_sum_b[:, None])
        divergence_b = over_vocabulary(jax.lax.psum, (share_bv * surplus_bv).sum(axis=1))
        agrees_b = best_b == teacher_best_b
        return None, (temperature**2 * divergence_b, agrees_b, log_sum_b, teacher_log_sum_b)

    each = jax.lax.scan(one, None, cut(n_blocks, x_BSD, teacher_BSD))[1]
    return tuple(joined(x, x_BSD.shape[:2]) for x in each)


def _at_temperature(x_bD, head_vD, temperature):
    """A block's logits divided by the temperature, their log-sum over all words, the best word."""
    logits_bv = logits_of_block(x_bD, head_vD) / temperature
    largest_b = over_vocabulary(jax.lax.pmax, logits_bv.max(axis=1))
    total_b = over_vocabulary(jax.lax.psum, jnp.exp(logits_bv - largest_b[:, None]).sum(axis=1))
    return logits_bv, largest_b + jnp.log(total_b), best_words(logits_bv, largest_b)


def _backward(
    temperature, n_blocks, x_BSD, head_vD, teacher_BSD, teacher_vD, log_sum_BS, teacher_log_sum_BS,
    ddivergence_BS,
):  # fmt: skip
    """Gradients of a shard's tokens, and of its part of the head from all shards' tokens.

    That of a student's logit is T (its probability - the teacher's), both at the temperature.
    """

    def one(dhead_vD, block):
        x_bD, teacher_bD, log_sum_b, teacher_log_sum_b, ddivergence_b = block
        logits_bv = logits_of_block(x_bD, head_vD) / temperature
        teacher_bv = logits_of_block(teacher_bD, teacher_vD) / temperature
        share_bv = jnp.exp(logits_bv - log_sum_b[:, None])
        of_teacher_bv = jnp.exp(teacher_bv - teacher_log_sum_b[:, None])
        dlogits_bv = (share_bv - of_teacher_bv) * (temperature * ddivergence_b)[:, None]
        dlogits_bv = dlogits_bv.astype(x_bD.dtype)
        dx_bD = jnp.einsum("bv,vd->bd", dlogits_bv, head_vD)
        dhead_vD += jnp.einsum("bv,bd->vd", dlogits_bv, x_bD, preferred_element_type=jnp.float32)
        return dhead_vD, dx_bD

    blocks = cut(n_blocks, x_BSD, teacher_BSD, log_sum_BS, teacher_log_sum_BS, ddivergence_BS)
    dhead_vD, dx_bD = jax.lax.scan(one, jnp.zeros(head_vD.shape, jnp.float32), blocks)
    dx_BSD = over_vocabulary(jax.lax.psum, joined(dx_bD, x_BSD.shape))
    return dx_BSD, scattered(dhead_vD)

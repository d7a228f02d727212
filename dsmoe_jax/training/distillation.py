"""A student beside its teacher on a micro-batch: what the loss and the log need of the two.

The teacher is used as in generation: nothing is dropped, nothing is random, and a token's experts
do not depend on other tokens, so that its predictions are the same in any micro-batch.

Shapes: B sequences of a micro-batch, S positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import DistillationConfig
from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.model.types import ModelInputs, Scored
from dsmoe_jax.moe import interventions
from dsmoe_jax.nn import head, soft_targets
from dsmoe_jax.nn.soft_targets import Compared, Hidden


class Distilled(NamedTuple):
    """Sums over predicted tokens.

    Attributes:
      divergence: T^2 KL(teacher || student) in nats, at the temperature T.
      squared: mean squared difference of what the two heads get; None where it has no weight.
      agreed: tokens of which both find the same next one best.
    """

    divergence: jax.Array
    squared: jax.Array | None
    agreed: jax.Array


def compare(
    section: DistillationConfig,
    student: Transformer,
    output: Scored,
    teacher: Transformer,
    batch: Batch,
) -> Distilled:
    """The sums of a micro-batch; differentiable with respect to the student alone.

    Args:
      section: of the run's config.
      student: the model that is trained.
      output: of the student on the micro-batch, with `hidden_BSD`.
      teacher: a frozen model.
      batch: the micro-batch.
    """
    inputs = ModelInputs.of_batch(batch)._replace(replayed=None)  # that is the student's routing
    with jax.named_scope("teacher"):
        teacher_BSD, _, _ = teacher.hidden(inputs, intervention=interventions.GENERATION)
        teacher_BSD = jax.lax.stop_gradient(teacher_BSD)
    with jax.named_scope("head"):
        compared = _predictions(section, student, output, teacher, teacher_BSD)
    mask_BS = jnp.asarray(batch["loss_mask_BS"]).astype(jnp.float32)
    squared = None
    if section.hidden_factor is not None:
        assert output.hidden_BSD is not None
        difference_BSD = output.hidden_BSD.astype(jnp.float32) - teacher_BSD.astype(jnp.float32)
        squared = (jnp.square(difference_BSD).mean(axis=-1) * mask_BS).sum()
    divergence = (compared.divergence_BS * mask_BS).sum()
    return Distilled(divergence, squared, (compared.agrees_BS * mask_BS).sum())


def _predictions(
    section: DistillationConfig,
    student: Transformer,
    output: Scored,
    teacher: Transformer,
    teacher_BSD: jax.Array,
) -> Compared:
    """Compares the predictions, whole where the student's logits are there, else in blocks."""
    if output.logits_BSV is not None:
        logits_BSV = head.logits(teacher_BSD, teacher.head)
        return soft_targets.of_logits(output.logits_BSV, logits_BSV, section.temperature)
    assert output.hidden_BSD is not None
    config = student.config
    n_tokens = output.nll_BS.size
    n_blocks = head.n_blocks(n_tokens, config.vocab_size, config.head_block_tokens)
    return soft_targets.in_blocks(
        Hidden(output.hidden_BSD, student.head[...]),
        Hidden(teacher_BSD, teacher.head[...]),
        section.temperature,
        n_blocks,
    )

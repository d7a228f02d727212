"""A model so small that a run takes seconds, and a batch for it.

Tests change what they are about by dotted key: `tiny(**{"model.moe.router.name": "hash"})`.
"""

from __future__ import annotations

import numpy as np

from dsmoe_jax.config import Config, replace

TINY = {
    "name": "tiny",
    "model.vocab_size": 512,
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.attention.num_attention_heads": 2,
    "model.attention.num_key_value_heads": 2,
    "model.attention.head_dim": 16,
    "model.initializer_range": 0.05,
    "model.moe.n_routed_experts": 4,
    "model.moe.num_experts_per_tok": 2,
    "model.moe.moe_intermediate_size": 16,
    "model.moe.balance.router_z.factor": 0.001,
    "model.moe.expert_backend": "loop",  # the quickest to compile
    "data.sequence_length": 64,
    "data.tokenizer_vocab_size": 512,
    "optimizer.peak_learning_rate": 0.01,
    "optimizer.warmup_steps": 2,
    "train.steps": 10,
    "train.global_batch_size": 4,
    "train.log_every": 1,
    "train.checkpoint_every": 3,
    "train.eval_every": 5,
    "train.eval_batches": 2,
}
# Of eight virtual devices: as many experts, sequences and values of D as the largest axis.
FOR_EIGHT_DEVICES = {
    "model.attention.num_attention_heads": 4,
    "model.attention.head_dim": 8,
    "model.moe.n_routed_experts": 8,
    "train.global_batch_size": 8,
}


def tiny(**overrides: object) -> Config:
    """The tiny config with dotted keys changed."""
    return replace(Config(), **{**TINY, **overrides})


def batch(config: Config, step: int = 0, documents: int = 2) -> dict[str, np.ndarray]:
    """Tokens by formula, since the text of the standard library changes with Python.

    Sequences of several documents; every third ends in padding, of another length each.

    Args:
      config: of which the vocabulary, the batch size and the sequence length are.
      step: another batch for another number.
      documents: in each sequence.
    """
    b, s, v = config.train.global_batch_size, config.data.sequence_length, config.model.vocab_size
    index_BS = np.arange(b * s).reshape(b, s) + step
    tokens_BS = ((index_BS * index_BS * 31 + index_BS * 7) % v).astype(np.int32)
    row_B1 = np.arange(b)[:, None]
    valid_BS = np.arange(s) < np.where(row_B1 % 3 == 2, s * (row_B1 + 1) // (2 * b), s)
    length = -(-s // documents)
    return {
        "tokens_BS": tokens_BS,
        "targets_BS": np.roll(tokens_BS, -1, axis=1),
        "segment_ids_BS": ((np.arange(s) // length + 1) * valid_BS).astype(np.int32),
        "positions_BS": np.tile(np.arange(s, dtype=np.int32) % length, (b, 1)),
        "loss_mask_BS": valid_BS.astype(np.float32),
    }

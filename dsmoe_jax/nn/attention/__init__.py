"""The registry of attentions.

A new attention is a file beside `grouped` and an entry in `ATTENTION`: the model, generation, the
counts of parameters and FLOPs and the planner read the entry and know no names.  The parameters'
names end in their logical axes (parallel/sharding.py).
"""

from __future__ import annotations

from dsmoe_jax.config import AttentionConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.nn.attention import grouped
from dsmoe_jax.nn.attention.types import Activations, Attention

ATTENTION: dict[str, Attention] = {
    "grouped": Attention(
        module=grouped.GroupedAttention,
        empty_cache=grouped.empty_cache,
        parameters=grouped.parameters,
        train_flops=grouped.train_flops,
        activations=grouped.activations,
    ),
}


def get(config: AttentionConfig) -> Attention:
    """The attention of a config.

    Raises:
      ValueError: for an unknown name, or an option that this attention does not have.
    """
    name = config.name
    require(name in ATTENTION, "model.attention.name", name, f"must be one of {sorted(ATTENTION)}")
    known = ATTENTION[name].options
    for option, value in config.options.items():
        key = f"model.attention.options.{option}"
        options = f"its options are {sorted(known)}" if known else "it has no options"
        require(option in known, key, value, f"not of the {name} attention; {options}")
    return ATTENTION[name]


__all__ = ["ATTENTION", "Activations", "Attention", "get"]

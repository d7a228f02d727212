"""Settings of a router: its section of the config, and the sizes of its layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dsmoe_jax.config import RouterConfig
from dsmoe_jax.moe.kernels import rows


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """Static arguments of a router, besides its inputs.

    Attributes:
      config: the section `model.moe.router`, with the defaults of missing options filled in.
      n_experts: E, all that it chooses among.
      k: K, the experts that a token activates.
      vocab_size: V, of the layer's token ids.
      mask_best: number of each token's best experts to mask (an intervention).
      n_identity: how many of the last ones are identity experts, see moe/identity.
      top_k: `(x_TE, k) -> values_TK, places_TK`, the kernel in use.
    """

    config: RouterConfig
    n_experts: int
    k: int
    vocab_size: int = 0
    mask_best: int = 0
    n_identity: int = 0
    top_k: Callable[..., tuple[jax.Array, jax.Array]] = rows.top_k

    def option(self, name: str) -> Any:
        """Value of an option, a setting that this router alone has."""
        return self.config.options[name]

"""What the code at hand runs on."""

from __future__ import annotations

import jax


def platform() -> str:
    """What the code at hand will run on ("cpu", "gpu", "tpu"): the one place that knows.

    That of the ambient mesh, whose devices may be of another machine (the command `aot`); without a
    mesh JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform

"""The platform that a computation is built for."""

from __future__ import annotations

import jax


def platform() -> str:
    """The platform that the code being traced will run on: "cpu", "gpu" or "tpu".

    It is that of the ambient mesh, whose devices may be of another machine (the command `aot`);
    without a mesh it is JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform

"""Lower bounds of the time of a step by the data sheet of a chip."""

from __future__ import annotations

import dataclasses

from dsmoe_jax.config import Config
from dsmoe_jax.hardware.chips import Chip
from dsmoe_jax.model import remat, size
from dsmoe_jax.nn import attention
from dsmoe_jax.nn.kept import ATTENDED


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds of the time of a step on a chip, in seconds, one for each resource.

    Attributes:
      compute: the FLOPs of `size.train_flops_per_token` at the peak, rematerialisation included.
      memory: what the program reads from HBM and writes to it (`memory_traffic`) at the bandwidth.
      network: bytes of the program's collectives at the bandwidth of all links together, and those
        between slices at that of the data-centre network.
      model_compute: the part of `compute` that MFU counts.
    """

    compute: float
    memory: float
    network: float
    model_compute: float

    def with_idle(self, share: float) -> Roofline:
        """The bounds of a step of which a chip computes nothing for that share, in a pipeline.

        What it reads and receives in the bubble is in the bytes already: there it computes too, in
        vain.
        """
        return dataclasses.replace(self, compute=self.compute / (1 - share))

    @property
    def overlapped(self) -> float:
        """Seconds of a step in which the three overlap perfectly."""
        return max(self.compute, self.memory, self.network)

    @property
    def serial(self) -> float:
        """Seconds of a step in which the chip waits for the network.

        Computation and HBM overlap even then: a kernel loads its next tiles while it multiplies.
        """
        return max(self.compute, self.memory) + self.network

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilisation, waiting for the network and with perfect overlap."""
        return self.model_compute / self.serial, self.model_compute / self.overlapped


def recomputed(config: Config, chips: int) -> float:
    """FLOPs that the backward pass computes again, relative to those of forward and backward pass.

    A forward pass is a third of them.  On a mesh the routed experts, whose rows come in blocks
    (moe/blocks.py), compute two of their three products again in any case, and the third never.
    """
    model = config.model
    moe = model.moe
    all_flops = size.train_flops_per_token(config)
    routed = scores = 0.0
    if chips > 1 and moe.n_routed_experts:
        layers = len(model.moe_layers) + model.mtp_depth
        weights = moe.computed_per_token * 3 * model.hidden_size * moe.moe_intermediate_size
        routed = layers * 6 * weights / all_flops
    kind = remat.get(model.remat)
    if ATTENDED in kind.kept and not attention.kernels.keeps_scores(model.attention.kernel):
        length = config.data.sequence_length
        one = attention.get(model.attention).train_flops(model.attention, length)
        scores = (model.num_hidden_layers + model.mtp_depth) * one / all_flops
    rest = 1 - routed - scores if kind.again else 0.0
    return (rest + routed * 2 / 3) / 3


def roofline(
    config: Config,
    chips: int,
    chip: Chip,
    *,
    moved_gb: float,
    received_gb: float,
    sliced_gb: float = 0.0,
) -> Roofline:
    """Lower bounds of the time of a step.

    Args:
      config: of the model and its batch.
      chips: their number.
      chip: one of them.
      moved_gb: GB that a step moves in the HBM of one chip.
      received_gb: GB that one chip receives in a step from others of its slice.
      sliced_gb: those that it receives from other slices.

    Raises:
      ValueError: for bytes between slices of a chip whose bandwidth there is not known.
    """
    tokens = config.tokens_per_step / chips
    network = received_gb * 1e9 / chip.link_bandwidth
    if sliced_gb:
        if chip.between_slices is None:
            raise ValueError("mesh.slices: the network between slices of this chip is not known")
        network += sliced_gb * 1e9 / chip.between_slices
    model_compute = size.train_flops_per_token(config) * tokens / chip.peak_flops
    return Roofline(
        compute=model_compute * (1 + recomputed(config, chips)),
        memory=moved_gb * 1e9 / chip.hbm_bandwidth,
        network=network,
        model_compute=model_compute,
    )

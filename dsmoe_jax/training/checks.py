"""Refusals of a config that cannot be trained, before anything is written."""

from __future__ import annotations

from dsmoe_jax.analysis.routed_text import check_routes
from dsmoe_jax.config import Config, stages_of
from dsmoe_jax.runs import routing_records
from dsmoe_jax.training import spikes
from dsmoe_jax.training.optimizer import make_schedule
from dsmoe_jax.training.stages import check_kernels, check_stages
from dsmoe_jax.training.start import check_start_from
from dsmoe_jax.training.teacher import check_teacher_on_mesh


def check_config(config: Config) -> None:
    """Refuses what could be trained on no devices.

    Raises:
      ValueError: naming the key and what would be right.
    """
    for stage in stages_of(config):
        make_schedule(stage.config.optimizer, config.train.scheduled_steps)
    check_stages(config)
    routing_records.check_keys(config)
    if config.train.analyse_every is not None:
        for stage in stages_of(config):
            check_routes(stage.config.model)
    check_start_from(config)
    spikes.check(config)


def check_on_mesh(config: Config) -> None:
    """Refuses what the ambient mesh cannot compute: a kernel, or a teacher that it does not divide.

    Raises:
      ValueError: naming the key and what would be right.
    """
    check_kernels(config)
    check_teacher_on_mesh(config)

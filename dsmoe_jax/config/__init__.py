"""Every knob of a run: frozen dataclasses by section, which refuse to be built wrong.  No jax."""

from dsmoe_jax.config.data import DataConfig
from dsmoe_jax.config.mesh import MeshConfig
from dsmoe_jax.config.model import ModelConfig
from dsmoe_jax.config.moe import MoEConfig, Schedule
from dsmoe_jax.config.run import (
    Config,
    Stage,
    differences,
    from_config_dict,
    replace,
    to_config_dict,
)
from dsmoe_jax.config.train import OptimizerConfig, StagesConfig, TrainConfig

__all__ = [
    "Config",
    "DataConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Schedule",
    "Stage",
    "StagesConfig",
    "TrainConfig",
    "differences",
    "from_config_dict",
    "replace",
    "to_config_dict",
]
